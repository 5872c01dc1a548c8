"""Removing documents that are too short, and duplicates and near duplicates; of these, the first by id is kept."""

import re
from collections.abc import Iterable

import numpy as np
import xxhash
from tqdm import tqdm

from tda.ingest import Document, content_hash
from tda.parallel import progress_is_shown

SHINGLE = 3  # words
PERMUTATIONS = 64
MAX_INDEX_THRESHOLD = 0.95  # candidates need at least two bands of the index
RECALL_WEIGHTS = (0.1, 0.9)  # of false positives, of false negatives: candidates are verified, so a missed pair costs more

_WORD = re.compile(r"\w+")


def long_enough(documents: Iterable[Document], *, min_characters: int) -> list[Document]:
    """The documents whose text, without white space around it, has at least `min_characters`."""
    return [document for document in documents if len(document.text.strip()) >= min_characters]


def without_copies(documents: Iterable[Document]) -> list[Document]:
    """One document for each content, sorted by id."""
    seen: set[str] = set()
    kept = []
    for document in sorted(documents, key=lambda document: document.id):
        digest = content_hash(document.text)
        if digest not in seen:
            seen.add(digest)
            kept.append(document)
    return kept


def without_near_copies(documents: Iterable[Document], *, threshold: float, of: Iterable[Document] = ()) -> list[Document]:
    """The documents that are no near duplicate of an earlier one by id, nor of one of `of`; sorted by id.

    Near duplicates have word shingles with a Jaccard similarity of at least `threshold`. MinHash-LSH finds the candidates
    (with these settings it misses few pairs above the threshold), and each is verified on the shingles themselves.
    A threshold of 0 turns this off.
    """
    from datasketch import MinHash, MinHashLSH  # takes half a second, which a question to the store need not spend

    ordered = sorted(documents, key=lambda document: document.id)
    if threshold == 0:
        return ordered
    index = MinHashLSH(threshold=min(threshold, MAX_INDEX_THRESHOLD), num_perm=PERMUTATIONS, weights=RECALL_WEIGHTS)
    prototype = MinHash(PERMUTATIONS, hashfunc=int, scheme="affine64")
    indexed: list[np.ndarray] = []
    kept = []
    first = list(of)
    progress = tqdm([*first, *ordered], desc="prepare: near duplicates", unit="doc", disable=not progress_is_shown())
    for place, document in enumerate(progress):
        shingles = shingle_hashes(document.text)
        sketch = prototype.copy()
        sketch.update_batch(shingles)
        if place >= len(first):
            if any(_jaccard(shingles, indexed[other]) >= threshold for other in index.query(sketch)):
                continue
            kept.append(document)
        index.insert(len(indexed), sketch, check_duplication=False)
        indexed.append(shingles)
    return kept


def shingle_hashes(text: str) -> np.ndarray:
    """Sorted hashes of all runs of three words, in lower case; of the whole text if it has fewer words."""
    words = _WORD.findall(text.lower()) or [text]
    runs = {" ".join(words[place : place + SHINGLE]) for place in range(max(1, len(words) - SHINGLE + 1))}
    return np.sort(np.array([xxhash.xxh3_64_intdigest(run.encode("utf-8")) for run in runs], dtype=np.uint64))


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard similarity of two sorted sets."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)
