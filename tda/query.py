"""`tda query`: which documents most helped and most hurt the model on a text."""

import textwrap

import numpy as np
import torch

from tda.artifacts import Workspace, existing, read_table
from tda.config import Config
from tda.data import Documents, as_documents, load_documents
from tda.excerpts import excerpt_in_a_line
from tda.ingest import Document
from tda.prepare import document_table
from tda.scoring import load_attribution
from tda.tokens import encode_documents, load_tokenizer
from tda.top_documents import top_documents

UNITS = {
    "loss": "rise of the text's mean loss per token (nats)",
    "margin": "fall of the text's mean margin log(p / (1 - p)) per token",
    "log_probability": "fall of the text's mean log-probability per token (nats)",
}


def answer(text: str, *, config: Config, workspace: Workspace, top: int = 10) -> dict:
    """The `top` most helpful and most harmful training documents for `text`: rank, score, id, source, excerpt.

    A score is the predicted rise of the text's mean loss per token (nats) had the document been left out, or the fall of
    another measurement. A text that is longer than the context is split, and counts as a whole. Scores are exact, but the
    documents are found by their stored rows, and in a large store by sketches of these (`top_documents.py`), which may miss some.
    A text that is empty, or has too few tokens to predict any, is a ValueError.
    """
    torch.set_num_threads(1)
    documents = load_documents(workspace.documents)
    query = _as_documents(text, config=config, workspace=workspace)
    attribution = load_attribution(config, workspace, documents)
    found = top_documents(config, workspace, attribution, query, top=top)
    texts = read_table(workspace.documents, stage="prepare", columns=["text"])["text"]

    def told(rows: np.ndarray, values: np.ndarray) -> list[dict]:
        return [
            {
                "rank": rank,
                "score": float(value),
                "doc_id": documents.ids[row],
                "source": documents.sources[row],
                "excerpt": excerpt_in_a_line(texts[int(row)]),
            }
            for rank, (row, value) in enumerate(zip(rows.tolist(), values.tolist(), strict=True), start=1)
        ]

    return {
        "text": text,
        "num_tokens": int(query.num_loss_tokens.sum()),
        "num_documents": len(documents),
        "unit": f"predicted {UNITS[config.scores.measurement]} had the document been left out of training",
        "helped": told(found.highest, found.highest_values),
        "hurt": told(found.lowest, found.lowest_values),
    }


def _as_documents(text: str, *, config: Config, workspace: Workspace) -> Documents:
    """The text as `prepare` would tokenise it; a long one in parts."""
    if not text.strip():
        raise ValueError("query: the text is empty; give some words, or a file that has some with --file")
    tokenizer = load_tokenizer(str(existing(workspace.tokenizer, stage="prepare")))
    rows = encode_documents([Document("query", "query", text)], tokenizer, context=config.prepare.context, end=False).rows
    if not rows:
        raise ValueError(f"query: {text!r} is too few tokens; expected at least two, so that one predicts the other")
    return as_documents(document_table(rows))


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
