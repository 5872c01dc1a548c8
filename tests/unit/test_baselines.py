import math
from collections import Counter

import numpy as np
import pytest

from tda.baselines import bm25_scores, random_scores

TEXTS = ["the cat sat on the mat", "a dog and a dog", "cat cat dog", "nothing alike", ""]


def slow_bm25(texts: list[str], query: str, *, k1: float = 1.5, b: float = 0.75) -> list[float]:
    """The formula, word by word."""
    words = [text.split() for text in texts]
    mean_length = sum(map(len, words)) / len(words)
    scores = []
    for document in words:
        counts, score = Counter(document), 0.0
        for word in query.split():
            holding = sum(word in other for other in words)
            rarity = math.log(1 + (len(words) - holding + 0.5) / (holding + 0.5))
            score += rarity * counts[word] / (counts[word] + k1 * (1 - b + b * len(document) / mean_length))
        scores.append(score)
    return scores


def test_bm25_is_the_formula_averaged_over_the_targets():
    targets = ["cat dog cat", "mat", "unheard of"]
    expected = np.mean([slow_bm25(TEXTS, target) for target in targets], axis=0)
    np.testing.assert_allclose(bm25_scores(TEXTS, targets), expected, rtol=1e-5)  # the index is float32


def test_bm25_ignores_case_and_punctuation():
    np.testing.assert_array_equal(bm25_scores(TEXTS, ["Cat, DOG!"]), bm25_scores(TEXTS, ["cat dog"]))


def test_bm25_of_documents_or_targets_without_words_is_zero():
    assert bm25_scores(["", "..."], ["cat"]).tolist() == [0, 0]
    assert bm25_scores(TEXTS, ["", "?"]).tolist() == [0] * len(TEXTS)


def test_bm25_refuses_no_targets():
    with pytest.raises(ValueError, match="needs at least one target"):
        bm25_scores(TEXTS, [])


def test_random_scores_go_with_the_id_and_not_the_order():
    ids = [f"d{number}" for number in range(2000)]
    values = random_scores(ids, seed=3)
    np.testing.assert_array_equal(random_scores(ids[::-1], seed=3), values[::-1])
    assert (random_scores(ids, seed=4) != values).all()
    assert ((values >= -0.5) & (values < 0.5)).all()
    assert abs(values.mean()) < 4 * math.sqrt(1 / 12 / len(ids))  # four standard errors
    assert abs(np.corrcoef(values, random_scores(ids, seed=4))[0, 1]) < 4 / math.sqrt(len(ids))
