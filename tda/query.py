"""Which documents most helped and most hurt the model on a text: answered from the store, no training gradient computed again."""

import textwrap

import numpy as np
import torch
import xxhash

from tda.artifacts import Workspace, read_table
from tda.config import Config
from tda.data import Documents, load_documents
from tda.scoring import load_attribution, query_blocks, store_dot

EXCERPT = 240  # characters


def answer(text: str, *, config: Config, workspace: Workspace, top: int = 10) -> dict:
    """The `top` most helpful and most harmful training documents for `text`: rank, score, id, source, excerpt.

    A score is the predicted rise of the text's mean loss per token (nats) had the document been left out.
    A text that is empty, or has too few tokens to predict any, is refused with ValueError.
    """
    torch.set_num_threads(1)
    documents = load_documents(workspace.documents)
    query = _as_document(text, config=config, workspace=workspace)
    attribution = load_attribution(config, workspace, documents)
    dot = store_dot(workspace, attribution, documents.ids)
    values = np.zeros(len(documents))
    for gradients, _rows in query_blocks(config, workspace, attribution, query):
        values += attribution.source(gradients, dot)[0].sum(axis=0)
    order = np.argsort(-values, kind="stable")
    texts = read_table(workspace.documents, stage="prepare", columns=["text"])["text"]

    def told(rows: np.ndarray) -> list[dict]:
        return [
            {
                "rank": rank,
                "score": float(values[row]),
                "doc_id": documents.ids[row],
                "source": documents.sources[row],
                "excerpt": textwrap.shorten(texts[int(row)], EXCERPT, placeholder=" ..."),
            }
            for rank, row in enumerate(rows.tolist(), start=1)
        ]

    return {
        "text": text,
        "num_tokens": int(query.num_loss_tokens.sum()),
        "num_documents": len(documents),
        "unit": "predicted rise of the text's mean loss per token (nats) had the document been left out of training",
        "helped": told(order[:top]),
        "hurt": told(order[::-1][:top]),
    }


def _as_document(text: str, *, config: Config, workspace: Workspace) -> Documents:
    from transformers import AutoTokenizer

    if not text.strip():
        raise ValueError("query: the text is empty; give some words, or a file that has some with --file")
    tokenizer = AutoTokenizer.from_pretrained(workspace.tokenizer)
    start = [token for token in (tokenizer.bos_token_id,) if token is not None]
    tokens = (start + tokenizer(text, add_special_tokens=False)["input_ids"])[: config.prepare.context]
    if len(tokens) < 2:
        raise ValueError(f"query: {text!r} is {len(tokens)} token; expected at least two, so that one predicts the other")
    return Documents(
        ids=["query"],
        sources=["query"],
        parts=["mixed"],
        content_hashes=[xxhash.xxh3_128_hexdigest(text.encode())],
        tokens=[np.array(tokens, dtype=np.int32)],
        loss_starts=np.array([1]),
    )


def render(answered: dict) -> str:
    """The answer as text for a terminal."""
    lines = [f"{answered['num_documents']} documents, {answered['num_tokens']} predicted tokens; score: {answered['unit']}"]
    for title, key in (("Helped most", "helped"), ("Hurt most", "hurt")):
        lines += ["", title]
        for told in answered[key]:
            excerpt = " ".join("".join(letter if letter.isprintable() else " " for letter in told["excerpt"]).split())
            lines.append(f"{told['rank']:>4}  {told['score']:+.2e}  {told['doc_id']}  [{told['source']}]")
            lines += textwrap.wrap(excerpt, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
