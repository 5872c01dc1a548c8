"""Scores that need no model: what any attribution method has to beat."""

import re
from collections.abc import Sequence

import bm25s
import numpy as np
import xxhash
from jaxtyping import Float

_WORD = re.compile(r"\w+")


def bm25_scores(texts: Sequence[str], target_texts: Sequence[str]) -> Float[np.ndarray, " document"]:
    """BM25 (Lucene's form, k1 1.5, b 0.75) of every document for a target's words, mean over the targets.

    A word that a target repeats counts as often as it is repeated. Never negative: it finds what is alike, and cannot say
    that a document harms.

    Raises:
        ValueError: there are no targets.
    """
    if not target_texts:
        raise ValueError("scores: BM25 needs at least one target document; got none; see prepare.targets in params.yaml")
    return _bm25([_words(text) for text in texts], [_words(text) for text in target_texts]).mean(axis=0)


def token_bm25_scores(rows: Sequence[np.ndarray], queries: Sequence[np.ndarray]) -> Float[np.ndarray, "query document"]:
    """The same for each query, of documents that are rows of tokens: a token is a word."""
    return _bm25([[str(token) for token in row] for row in rows], [[str(token) for token in query] for query in queries])


def _bm25(words: list[list[str]], queries: list[list[str]]) -> Float[np.ndarray, "query document"]:
    scores = np.zeros((len(queries), len(words)))
    if any(words):
        index = bm25s.BM25()
        index.index(words, show_progress=False)
        for place, query in enumerate(queries):
            if query:
                scores[place] = index.get_scores(query)
    return scores


def random_scores(doc_ids: Sequence[str], *, seed: int) -> Float[np.ndarray, " document"]:
    """A uniform draw from [-0.5, 0.5) for every document, fixed by its id and the seed whatever the order."""
    draws = [xxhash.xxh3_64_intdigest(doc_id.encode(), seed=seed % 2**64) / 2**64 for doc_id in doc_ids]
    return np.array(draws, dtype=np.float64) - 0.5


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
