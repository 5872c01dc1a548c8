import random

import pytest

from tda.damage import (
    BOILERPLATE,
    KINDS,
    MISDECODED,
    MISPAIRED,
    SHUFFLED,
    boilerplate,
    damage_documents,
    misdecode,
    shuffle_words,
)
from tda.ingest import Document

WORDS = ["amber", "birch", "cedar", "dune", "ember", "fern", "grove", "heath", "inlet", "knoll", "laurel", "moss", "oak", "river"]


def named(number: int) -> Document:
    words = random.Random(number).sample(WORDS, 9)
    return Document(
        f"things/{number:03d}", "things", f"things.call_{number}(a, b=1)\n\nReturns the {' '.join(words)} of it.", part="mixed"
    )


def plain(number: int) -> Document:
    return Document(f"tales/{number:03d}", "tales", " ".join(random.Random(number).sample(WORDS, 14)))


def pair(number: int) -> Document:
    question, answer = f"Which is number {number}?", " ".join(random.Random(number).sample(WORDS, 9))
    return Document(f"pairs/{number:03d}", "pairs", f"{question}\n{answer}", question, answer)


def by_kind(make, number: int = 40, *, share: float = 0.5) -> tuple[dict[str, list[tuple[Document, Document]]], list[Document]]:
    documents = [make(place) for place in range(number)]
    damaged, truth = damage_documents(documents, share=share, seed=0)
    kinds = {kind: [] for kind in ("", *KINDS)}
    for before, after, told in zip(documents, damaged, truth, strict=True):
        assert told.id == before.id == after.id
        assert told.damaged == (before.text != after.text) == bool(told.kind)
        assert (after.source, after.part) == (before.source, before.part)
        kinds[told.kind].append((before, after))
    return kinds, documents


@pytest.mark.parametrize("make", [named, plain, pair])
def test_a_share_is_damaged_in_equal_numbers_of_all_kinds(make):
    kinds, _ = by_kind(make)
    assert {kind: len(some) for kind, some in kinds.items()} == {"": 20, **dict.fromkeys(KINDS, 5)}


def test_documents_with_a_name_keep_it_and_lose_their_text():
    kinds, documents = by_kind(named)
    bodies = {one.text.split("\n\n")[1] for one in documents}
    for before, after in kinds[MISPAIRED]:
        head, body = after.text.split("\n\n")
        assert head == before.text.split("\n\n")[0] and body in bodies
    for before, after in kinds[SHUFFLED]:
        assert after.text.split("\n\n")[0] == before.text.split("\n\n")[0]
        assert sorted(after.text.split()) == sorted(before.text.split())
    for before, after in kinds[BOILERPLATE]:
        assert after.text.startswith(before.text.split("\n\n")[0] + "\n\n")
        assert not set(WORDS) & set(after.text.split("\n\n")[1].split())
    for _, after in kinds[MISDECODED]:
        assert "Â" in after.text or "Ã" in after.text


def test_wrong_pairings_take_the_text_of_another_source_where_there_is_one():
    documents = [named(place) for place in range(40)] + [plain(place) for place in range(40)]
    damaged, truth = damage_documents(documents, share=0.5, seed=0)
    halves = {one.text[one.text.find(" ", len(one.text) // 2) + 1 :] for one in documents if one.source == "tales"}
    mispaired = [after for after, told in zip(damaged, truth, strict=True) if told.kind == MISPAIRED and after.source == "things"]
    assert mispaired
    assert {one.text.split("\n\n")[1] for one in mispaired} <= halves


def test_plain_text_gets_the_second_half_of_another():
    kinds, documents = by_kind(plain)
    for before, after in kinds[MISPAIRED]:
        middle = before.text.find(" ", len(before.text) // 2) + 1
        assert after.text.startswith(before.text[:middle])
        assert any(one.text.endswith(after.text[middle:]) for one in documents if one.id != before.id)


def test_prompts_are_left_alone_and_completions_damaged():
    kinds, documents = by_kind(pair)
    for kind in KINDS:
        for before, after in kinds[kind]:
            assert after.prompt == before.prompt and after.completion != before.completion
            assert after.text == f"{after.prompt}\n{after.completion}"
    assert all(after.completion in {one.completion for one in documents} for _, after in kinds[MISPAIRED])


def test_the_order_of_the_documents_changes_nothing_and_the_seed_does():
    documents = [named(place) for place in range(40)]
    damaged, truth = damage_documents(documents, share=0.3, seed=1)
    backwards, truth_backwards = damage_documents(documents[::-1], share=0.3, seed=1)
    assert backwards[::-1] == damaged and truth_backwards[::-1] == truth
    assert damage_documents(documents, share=0.3, seed=2)[1] != truth


def test_without_a_share_nothing_is_touched():
    documents = [named(place) for place in range(8)]
    damaged, truth = damage_documents(documents, share=0.0, seed=0)
    assert damaged == documents and not any(one.damaged for one in truth)


def test_where_one_kind_changes_nothing_another_is_taken():
    documents = [Document(f"a/{place}", "a", "same") for place in range(4)]  # nothing to shuffle, no other text to pair with
    damaged, truth = damage_documents(documents, share=0.9, seed=0)
    assert {one.kind for one in truth if one.damaged} <= {MISDECODED, BOILERPLATE}
    assert sum(one.damaged for one in truth) == 4
    assert all(one.text != "same" for one in damaged)


def test_shuffling_keeps_words_and_white_space_and_leaves_short_texts():
    text = "one two\n\n  three four\tfive "
    shuffled = shuffle_words(text, rng=random.Random(0))
    assert shuffled != text and sorted(shuffled.split()) == sorted(text.split())
    assert [part for part in text if part.isspace()] == [part for part in shuffled if part.isspace()]
    assert shuffle_words("a b c d", rng=random.Random(0)) == "a b c d"


def test_misdecoded_text_can_be_decoded_back():
    text = 'It\'s a "plain" text - with spaces and vowels. ' * 5
    garbled = misdecode(text, rng=random.Random(0))
    raw = b"".join(one.encode("cp1252") if ord(one) > 255 else one.encode("latin-1") for one in garbled)
    decoded = raw.decode("utf-8")
    same = sum(one == other for one, other in zip(decoded, text, strict=True))
    assert 0.6 * len(text) < same < len(text)


def test_boilerplate_differs_between_documents():
    assert len({boilerplate(rng=random.Random(seed)) for seed in range(50)}) > 40


def test_which_are_damaged_and_how_follows_from_ids_not_texts():
    documents = [named(place) for place in range(40)]
    longer = [Document(one.id, one.source, one.text + " And more of the same kind.") for one in documents]
    assert damage_documents(documents, share=0.5, seed=0)[1] == damage_documents(longer, share=0.5, seed=0)[1]
