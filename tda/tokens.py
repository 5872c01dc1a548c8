"""Tokenizers, trained or loaded, and documents as rows of tokens."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tda.ingest import Document
from tda.parallel import progress_is_shown

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
MIN_PART = 8  # tokens below which the last part of a long document is dropped
DOCUMENTS_AT_ONCE = 1000  # encoded together


@dataclass(frozen=True)
class Row:
    """A document, or a part of the one with the id `origin`, as tokens; `loss_start` is the first whose prediction counts."""

    origin: str
    document: Document
    tokens: list[int]
    loss_start: int


@dataclass(frozen=True)
class Encoded:
    """Rows in the order of the documents, and counts of what did not fit."""

    rows: list[Row]
    counts: Counter = field(default_factory=Counter)


def train_tokenizer(texts: Iterable[str], *, vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens, learnt from `texts`; it can encode any text.

    Special tokens are never read from a text: a document that spells one gets its characters.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str, *, key: str = "prepare.tokenizer") -> Any:
    """The tokenizer of a local folder or of a model on the hub, named by `key` of `params.yaml`.

    Raises:
        ValueError: there is none, or it is one that cannot say which characters a token stands for.
    """
    from transformers import AutoTokenizer

    try:
        if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in VOCABULARY_FILES):
            raise FileNotFoundError(f"the folder has none of {', '.join(VOCABULARY_FILES)}")  # else an empty one would be made
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"{key}: no tokenizer in {name!r}: {type(error).__name__}: {error}; expected a folder with "
            "tokenizer.json, or a model that the hub or its local cache has; where the hub is out of reach, copy the tokenizer's "
            "files into a folder and set prepare.tokenizer to it"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"{key}: {name!r} does not say where its tokens lie in the text: expected a fast tokenizer, with "
            "tokenizer.json; convert it and save it with save_pretrained"
        )
    return tokenizer


def encode_documents(documents: Sequence[Document], tokenizer: Any, *, context: int, end: bool) -> Encoded:
    """The documents as rows of at most `context` tokens.

    A row begins with the tokenizer's beginning-of-text token (if it has none, its end-of-text token; if it has neither,
    nothing). With `end`, the end-of-text token follows a document's last token.

    A longer text is split into parts `id#1`, `id#2`, ..., which joined are the whole text, except that a last part of fewer
    than `MIN_PART` tokens is dropped. Prompt and completion are encoded together and never split; the loss starts at the first
    token that reaches into the completion. If they are too long, the prompt is cut at its beginning, and if that is not enough,
    the completion at its end.
    """
    encoded = Encoded([])
    first = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]
    last = [tokenizer.eos_token_id] if end else []
    with tqdm(total=len(documents), desc="prepare: tokens", unit="doc", disable=not progress_is_shown()) as progress:
        for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
            some = documents[start : start + DOCUMENTS_AT_ONCE]
            texts = [document for document in some if not document.completion]
            pairs = [document for document in some if document.completion]
            rows = {
                **dict(_text_rows(texts, tokenizer, context=context, first=first, last=last, counts=encoded.counts)),
                **dict(_pair_rows(pairs, tokenizer, context=context, first=first, last=last, counts=encoded.counts)),
            }
            for document in some:
                usable = [row for row in rows[document.id] if len(row.tokens) > row.loss_start]
                encoded.counts["without_tokens"] += not usable
                encoded.rows.extend(usable)
            progress.update(len(some))
    return encoded


def _text_rows(
    documents: Sequence[Document], tokenizer: Any, *, context: int, first: list[int], last: list[int], counts: Counter
) -> Iterator[tuple[str, list[Row]]]:
    room = context - len(first) - len(last)
    for document, (tokens, offsets) in zip(documents, _encode([one.text for one in documents], tokenizer), strict=True):
        starts = part_starts(document.text, offsets, room=room)
        if len(starts) <= 1:
            yield document.id, [Row(document.id, document, first + tokens + last, 1)]
            continue
        counts["split"] += 1
        rows = []
        for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(tokens)], strict=True), start=1):
            begins = offsets[start][0] if start else 0
            ends = offsets[stop][0] if stop < len(tokens) else len(document.text)
            is_last = stop == len(tokens)
            if (is_last and stop - start < MIN_PART) or begins == ends:
                counts["short_parts_dropped"] += 1
                continue
            part = Document(f"{document.id}#{number}", document.source, document.text[begins:ends], part=document.part)
            rows.append(Row(document.id, part, first + tokens[start:stop] + (last if is_last else []), 1))
        counts["parts"] += len(rows)
        yield document.id, rows


def part_starts(text: str, offsets: Sequence[tuple[int, int]], *, room: int) -> list[int]:
    """The numbers of the tokens at which parts of at most `room` tokens start.

    A part starts at a word if there is one in the last quarter of the part before it, else at a character.
    """
    starts = [0]
    while len(offsets) - starts[-1] > room:
        full = starts[-1] + room
        clean = [place for place in range(full, starts[-1], -1) if offsets[place - 1][1] <= offsets[place][0]]
        words = (place for place in clean if place > full - room // 4 and _begins_word(text, offsets[place][0]))
        starts.append(next(words, clean[0] if clean else full))
    return starts


def _begins_word(text: str, at: int) -> bool:
    return text[at - 1 : at + 1] != text[at - 1 : at + 1].strip()


def _pair_rows(
    documents: Sequence[Document], tokenizer: Any, *, context: int, first: list[int], last: list[int], counts: Counter
) -> Iterator[tuple[str, list[Row]]]:
    room = context - len(first) - len(last)
    for document, (tokens, offsets) in zip(documents, _encode([one.text for one in documents], tokenizer), strict=True):
        border = len(document.text) - len(document.completion)
        start = next((place for place, (_, ends) in enumerate(offsets) if ends > border), len(tokens))
        prompt, completion = tokens[:start], tokens[start:]
        counts["completions_cut"] += len(completion) > room
        counts["prompts_cut"] += len(tokens) > room and bool(prompt)
        completion = completion[:room]
        prompt = [*first, *prompt[max(0, len(prompt) + len(completion) - room) :]]
        yield document.id, [Row(document.id, document, [*prompt, *completion, *last], max(1, len(prompt)))]


def _encode(texts: Sequence[str], tokenizer: Any) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Token ids of every text and the characters that each token stands for; no special tokens are added."""
    if not texts:
        return []
    encoding = tokenizer(
        list(texts), add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    return list(zip(encoding["input_ids"], encoding["offset_mapping"], strict=True))
