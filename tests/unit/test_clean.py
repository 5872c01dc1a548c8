import random

import pytest

from tda.clean import _jaccard, long_enough, shingle_hashes, without_copies, without_near_copies
from tda.ingest import Document

WORDS = [f"word{number}" for number in range(60)]


def document(name: str, text: str) -> Document:
    return Document(name, "s", text)


def words(seed: int, number: int = 40) -> list[str]:
    return random.Random(seed).choices(WORDS, k=number)


def test_short_documents_go():
    documents = [document("a", "  four  "), document("b", "fives")]
    assert [one.id for one in long_enough(documents, min_characters=5)] == ["b"]


def test_of_equal_texts_the_first_by_id_stays():
    documents = [document("c", "same"), document("a", "other"), document("b", "same")]
    assert [one.id for one in without_copies(documents)] == ["a", "b"]


def test_of_similar_texts_the_first_by_id_stays_in_any_order():
    documents = []
    for seed in range(30):
        text = words(seed)
        documents += [document(f"{seed:02d}-{copy}", " ".join(text[:-copy] or text)) for copy in (0, 1, 2)]
    random.Random(0).shuffle(documents)
    assert [one.id for one in without_near_copies(documents, threshold=0.8)] == [f"{seed:02d}-0" for seed in range(30)]
    assert len(without_near_copies(documents, threshold=1.0)) == len(without_near_copies(documents, threshold=0.0)) == 90


def test_what_is_near_a_target_goes_and_the_target_is_not_among_the_kept():
    text = words(1)
    near, far = document("a", " ".join(text[1:])), document("b", " ".join(words(2)))
    assert without_near_copies([near, far], threshold=0.8, of=[document("t", " ".join(text))]) == [far]


def test_the_index_finds_what_comparing_all_pairs_finds():
    rng = random.Random(3)
    texts = []
    for seed in range(40):
        text = words(seed, 50)
        texts.append(text)
        for _ in range(3):
            changed = list(text)
            for place in rng.sample(range(50), rng.randint(0, 4)):
                changed[place] = "changed"
            texts.append(changed)
    documents = [document(f"{place:03d}", " ".join(text)) for place, text in enumerate(texts)]
    kept: list[Document] = []
    for one in documents:
        mine = {tuple(one.text.split()[at : at + 3]) for at in range(48)}
        others = [{tuple(other.text.split()[at : at + 3]) for at in range(48)} for other in kept]
        if not any(len(mine & other) / len(mine | other) >= 0.7 for other in others):
            kept.append(one)
    assert 40 < len(kept) < len(documents)
    assert without_near_copies(documents, threshold=0.7) == kept


@pytest.mark.parametrize("text", ["", "!!!", "one", "one two", "日本語のテキスト", "\x07\u202e"])
def test_any_text_has_shingles(text):
    hashes = shingle_hashes(text)
    assert len(hashes) == 1 and _jaccard(hashes, hashes) == 1


def test_shingles_ignore_case_and_punctuation():
    assert (shingle_hashes("The quick, brown FOX.") == shingle_hashes("the quick brown fox")).all()
