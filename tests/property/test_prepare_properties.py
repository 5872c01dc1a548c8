"""Invariances of the stage `prepare`: shares, draws, cleaning, encoding."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tda.clean import without_near_copies
from tda.damage import damage_documents
from tda.ingest import Document
from tda.split import by_hash, draw, fair_shares
from tda.tokens import MIN_PART, encode_documents, train_tokenizer

SOURCES = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 50), min_size=1)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=300)
TOKENIZER = train_tokenizer(["some words to learn from, a few times over " * 3], vocabulary=280)


@given(SOURCES, st.integers(0, 300))
def test_shares_are_fair(available, total):
    shares = fair_shares(available, total)
    assert sum(shares.values()) == min(total, sum(available.values()))
    assert all(0 <= shares[source] <= available[source] for source in available)
    most = max(shares.values())
    assert all(shares[source] >= most - 1 or shares[source] == available[source] for source in available)


@given(st.sets(st.text(min_size=1, max_size=5), max_size=30), st.randoms(), st.integers(0, 40))
def test_a_draw_depends_on_ids_alone(ids, rng, count):
    shuffled = sorted(ids)
    rng.shuffle(shuffled)
    same = {"key": lambda name: name, "source": lambda name: name[0], "salt": "0"}
    drawn, rest = draw(shuffled, count, **same)
    assert (drawn, rest) == draw(sorted(ids), count, **same)
    assert Counter(drawn + rest) == Counter(ids)
    assert len(drawn) == min(count, len(ids))


@given(st.sets(st.text(max_size=4), min_size=2, max_size=20))
def test_a_larger_draw_contains_the_smaller(ids):
    order = by_hash(ids, key=lambda name: name, salt="x")
    less = by_hash([name for name in ids if name != order[-1]], key=lambda name: name, salt="x")
    assert less == order[:-1]


@settings(max_examples=60)
@given(TEXTS, st.integers(8, 40))
def test_parts_lose_nothing_but_a_short_end(text, context):
    rows = encode_documents([Document("a", "s", text)], TOKENIZER, context=context, end=True).rows
    joined = "".join(row.document.text for row in rows)
    assert text.startswith(joined)
    assert len(TOKENIZER(text[len(joined) :], add_special_tokens=False)["input_ids"]) < MIN_PART + 4
    assert all(len(row.tokens) <= context for row in rows)


@settings(max_examples=60)
@given(st.lists(TEXTS, min_size=1, max_size=12, unique=True), st.floats(0, 0.99), st.integers(0, 3))
def test_damage_keeps_ids_tells_the_truth_and_leaves_writable_text(texts, share, seed):
    documents = [Document(str(place), "s", text) for place, text in enumerate(texts)]
    damaged, truth = damage_documents(documents, share=share, seed=seed)
    assert [one.id for one in damaged] == [one.id for one in truth] == [one.id for one in documents]
    assert [before.text != after.text for before, after in zip(documents, damaged, strict=True)] == [one.damaged for one in truth]
    assert sum(one.damaged for one in truth) <= round(share * len(documents))
    assert all(one.text.encode("utf-8") for one in damaged)


@settings(max_examples=40)
@given(st.lists(TEXTS, max_size=12), st.randoms())
def test_the_order_of_documents_does_not_change_what_is_kept(texts, rng):
    documents = [Document(str(place), "s", text) for place, text in enumerate(texts)]
    shuffled = list(documents)
    rng.shuffle(shuffled)
    kept = without_near_copies(documents, threshold=0.6)
    assert without_near_copies(shuffled, threshold=0.6) == kept
    assert without_near_copies(kept, threshold=0.6) == kept
