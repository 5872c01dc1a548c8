import pytest

from tda.ingest import Document, join
from tda.tokens import BOS, EOS, MIN_PART, PAD, encode_documents, load_tokenizer, part_starts, train_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "Return the sum of all elements in the list.",
    "héllo wörld 😀 naïve",
] * 4
HOSTILE = "x <|eos|><|bos|>\r\n\x07 \u202e 😀😀 ﷺ \x85 " + "a" * 300 + " é" * 40


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CORPUS, vocabulary=320)


def text(content: str, name: str = "a") -> Document:
    return Document(name, "s", content, part="mixed")


def pair(prompt: str, completion: str) -> Document:
    return Document("p", "s", join(prompt, completion), prompt, completion)


def test_the_vocabulary_has_the_size_asked_for_and_the_same_merges_again(tokenizer):
    assert len(tokenizer) == 320
    again = train_tokenizer(iter(CORPUS), vocabulary=320)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_any_text_comes_back(tokenizer):
    assert tokenizer.decode(tokenizer(HOSTILE, add_special_tokens=False)["input_ids"]) == HOSTILE


def test_special_tokens_are_not_read_from_texts_even_after_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(str(tmp_path))
    loaded = load_tokenizer(str(tmp_path))
    special = {tokenizer.convert_tokens_to_ids(token) for token in (BOS, EOS, PAD)}
    assert special == {0, 1, 2}
    for one in (tokenizer, loaded):
        assert not special & set(one(HOSTILE, add_special_tokens=False)["input_ids"])
        assert (one.bos_token, one.eos_token, one.pad_token) == (BOS, EOS, PAD)


def test_a_short_text_has_its_bounds(tokenizer):
    (row,) = encode_documents([text("The quick fox")], tokenizer, context=32, end=True).rows
    assert row.tokens[0] == tokenizer.bos_token_id and row.tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row.tokens[1:-1]) == "The quick fox"
    assert (row.loss_start, row.origin, row.document.id) == (1, "a", "a")
    (row,) = encode_documents([text("The quick fox")], tokenizer, context=32, end=False).rows
    assert row.tokens[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize("content", [CORPUS[0] * 4, HOSTILE, "😀" * 50, "a" * 400, " " * 300 + "b"])
@pytest.mark.parametrize("context", [8, 17, 64])
def test_the_parts_of_a_long_text_are_the_text(tokenizer, content, context):
    encoded = encode_documents([text(content)], tokenizer, context=context, end=True)
    whole = tokenizer(content, add_special_tokens=False)["input_ids"]
    assert len(encoded.rows) == encoded.counts["parts"] > 1 == encoded.counts["split"]
    assert [row.document.id for row in encoded.rows] == [f"a#{number}" for number in range(1, len(encoded.rows) + 1)]
    assert all(len(row.tokens) <= context and row.tokens[0] == tokenizer.bos_token_id for row in encoded.rows)
    assert all(row.origin == "a" and row.document.part == "mixed" for row in encoded.rows)
    ended = [row.tokens[-1] == tokenizer.eos_token_id for row in encoded.rows]
    dropped = encoded.counts["short_parts_dropped"]
    assert ended == [False] * (len(ended) - 1) + [dropped == 0]
    joined_text = "".join(row.document.text for row in encoded.rows)
    joined_tokens = [token for row in encoded.rows for token in row.tokens if token > 2]
    assert content.startswith(joined_text) and whole[: len(joined_tokens)] == joined_tokens
    if dropped:
        assert 0 < len(whole) - len(joined_tokens) < MIN_PART
    else:
        assert joined_text == content
    assert all(tokenizer.decode(row.tokens, skip_special_tokens=True) == row.document.text for row in encoded.rows)


def test_a_part_starts_at_a_word_where_it_can():
    content = "abcd efgh ijkl mnop"
    each_character = [(place, place + 1) for place in range(len(content))]
    assert part_starts(content, each_character, room=8) == [0, 8, 15]  # no space within two characters of the border
    assert part_starts(content, each_character, room=10) == [0, 10]
    assert part_starts(content, each_character, room=11) == [0, 10]
    assert part_starts("ab", [(0, 1), (1, 2)], room=2) == [0]


def test_no_part_starts_inside_a_character():
    offsets = [(place // 4, place // 4 + 1) for place in range(40)]  # four tokens for every character
    assert part_starts("😀" * 10, offsets, room=10) == [0, 8, 16, 24, 32]


def test_one_character_of_more_tokens_than_fit_does_not_hang():
    assert part_starts("x", [(0, 1)] * 20, room=6) == [0, 6, 12, 18]


def test_the_loss_counts_on_the_completion_alone(tokenizer):
    document = pair("The quick brown fox", "jumps over")
    (row,) = encode_documents([document], tokenizer, context=64, end=True).rows
    assert tokenizer.decode(row.tokens[1 : row.loss_start]) == "The quick brown fox\n"
    assert tokenizer.decode(row.tokens[row.loss_start : -1]) == "jumps over"


def test_an_empty_prompt_leaves_the_first_prediction(tokenizer):
    (row,) = encode_documents([pair("", "jumps")], tokenizer, context=64, end=True).rows
    assert row.loss_start == 1


def test_a_long_prompt_is_cut_on_the_left_and_a_long_completion_on_the_right(tokenizer):
    long = (CORPUS[0] * 2).strip()
    encoded = encode_documents([pair(long, "jumps over")], tokenizer, context=20, end=True)
    (row,) = encoded.rows
    assert len(row.tokens) == 20 and tokenizer.decode(row.tokens[row.loss_start : -1]) == "jumps over"
    assert (long + "\n").endswith(tokenizer.decode(row.tokens[1 : row.loss_start]))
    assert (encoded.counts["prompts_cut"], encoded.counts["completions_cut"]) == (1, 0)
    encoded = encode_documents([pair("Why?", long)], tokenizer, context=20, end=True)
    (row,) = encoded.rows
    assert len(row.tokens) == 20 and row.loss_start == 1
    assert long.startswith(tokenizer.decode(row.tokens[1:-1]))
    assert (encoded.counts["prompts_cut"], encoded.counts["completions_cut"]) == (1, 1)


def test_encoding_in_blocks_changes_nothing(tokenizer, monkeypatch):
    documents = [text(f"The dog {number} " * number, str(number)) for number in range(1, 30)] + [pair("The", "dog")]
    whole = encode_documents(documents, tokenizer, context=16, end=True)
    monkeypatch.setattr("tda.tokens.DOCUMENTS_AT_ONCE", 7)
    assert encode_documents(documents, tokenizer, context=16, end=True) == whole


class Bare:
    """A tokenizer of characters with the special tokens asked for."""

    def __init__(self, bos=None, eos=None):
        self.bos_token_id, self.eos_token_id = bos, eos

    def __call__(self, texts, **_):
        offsets = [[(place, place + 1) for place in range(len(one))] for one in texts]
        return {"input_ids": [[ord(character) for character in one] for one in texts], "offset_mapping": offsets}


@pytest.mark.parametrize(("bare", "first"), [(Bare(5, 6), [5]), (Bare(None, 6), [6]), (Bare(), [])])
def test_without_a_token_for_the_beginning_the_one_for_the_end_or_none(bare, first):
    (row,) = encode_documents([text("ab")], bare, context=8, end=False).rows
    assert row.tokens == [*first, 97, 98]


def test_a_document_without_a_prediction_is_dropped_and_counted():
    encoded = encode_documents([text("a"), text("ab", "b")], Bare(), context=8, end=False)
    assert [row.document.id for row in encoded.rows] == ["b"] and encoded.counts["without_tokens"] == 1


def test_a_tokenizer_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"(?s)prepare.tokenizer: no tokenizer in .*nothing.*expected a folder with tokenizer.json"
    ):
        (tmp_path / "nothing").mkdir()
        load_tokenizer(str(tmp_path / "nothing"))

    class Slow:
        is_fast = False

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: Slow())
    with pytest.raises(ValueError, match=r"'slow' does not say where its tokens lie in the text: expected a fast tokenizer"):
        load_tokenizer("slow")
