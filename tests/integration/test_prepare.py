"""The stage `prepare` from files to files."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from tda import corpus
from tda.artifacts import Workspace, read_json, read_table
from tda.config import Prepare, load_config
from tda.data import load_documents
from tda.ingest import content_hash
from tda.prepare import SCHEMA, Prepared, prepare_documents, write_prepared

ROOT = Path(__file__).parents[2]
WORDS = [
    f"{start}{end}"
    for start in ("ka", "lo", "mi", "nu", "pe", "ri", "so", "ta")
    for end in ("ber", "dan", "fel", "gor", "mes", "ton")
]


def sentence(seed: int | str, number: int = 12) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=number))


@pytest.fixture
def base(tmp_path) -> dict:
    rows = [
        {"id": f"{source}-{number:03d}", "source": source, "text": f"{source} {number}\n\n{sentence(f'{source}{number}')}."}
        for source in ("alpha", "beta", "gamma", "delta")
        for number in range(60)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = load_config(ROOT / "params.yaml").prepare.model_dump()
    small = {"num_targets": 20, "num_heldout": 10, "max_documents": 100, "min_characters": 20, "vocabulary": 300, "context": 48}
    sources = {"documents": str(path), "general_sources": ["alpha", "beta"], "target_sources": ["gamma"]}
    return {**values, **small, **sources, "damage": 0.2}


def prepare(base: dict, *, model: str = "llama", **changes) -> Prepared:
    return prepare_documents(Prepare.model_validate({**base, **changes}), model=model)


@pytest.mark.parametrize(
    ("key", "shipped"), [("id_field", "id"), ("source_field", "source"), ("part_field", "")], ids=["id", "source", "part"]
)
def test_a_field_that_no_row_has_is_refused(base, key, shipped):
    message = f"prepare.{key}: no row of .*rows.jsonl has the field 'sauce'; expected one of the fields found: id, source, text; "
    with pytest.raises(ValueError, match=f'^{message}correct the name, or set prepare.{key} to "{shipped}"$'):
        prepare(base, **{key: "sauce"})


def test_documents_need_no_ids_and_own_targets_not_the_fields_of_documents(base, tmp_path):
    rows = [{"text": f"{number} {sentence(number)}.", "part": "mixed"} for number in range(60)]
    for name, held in (("rows", rows[:50]), ("own", [{"text": row["text"]} for row in rows[50:]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    own = {"targets": str(tmp_path / "own.jsonl"), "part_field": "part", "general_sources": [], "num_targets": 10}
    prepared = prepare(base, **own, damage=0.0)
    assert set(prepared.documents["source"]) == {"rows"}
    assert len(prepared.targets) == 10


def test_tables_have_the_agreed_columns_and_say_the_same(base):
    prepared = prepare(base)
    for table, more in ((prepared.documents, {}), (prepared.heldout, {}), (prepared.targets, {"half": pl.String})):
        assert dict(table.schema) == {**SCHEMA, **more}
        assert table["id"].is_sorted() and table["id"].is_unique().all() and table["content_hash"].is_unique().all()
        assert table["content_hash"].to_list() == [content_hash(text) for text in table["text"]]
        assert table["num_tokens"].to_list() == table["tokens"].list.len().to_list()
        assert (table["num_tokens"] > table["loss_start"]).all() and table["num_tokens"].max() <= 48
    assert prepared.damage["id"].to_list() == prepared.documents["id"].to_list()
    assert prepared.stats["documents"] == {
        "alpha": {"general": 25},
        "beta": {"general": 25},
        "delta": {"mixed": 25},
        "gamma": {"mixed": 25},
    }
    assert prepared.stats["targets"] == {"gamma": {"score": 10, "verdict": 10}}
    assert set(prepared.heldout["source"]) == {"alpha", "beta"} and len(prepared.heldout) == 10
    assert prepared.stats["tokens"]["documents"]["total"] == prepared.documents["num_tokens"].sum()


def test_no_part_of_a_document_is_on_two_sides(base):
    prepared = prepare(base, context=16, max_documents=0)
    origins = [
        {name.partition("#")[0] for name in table["id"]} for table in (prepared.documents, prepared.targets, prepared.heldout)
    ]
    assert not (origins[0] & origins[1] or origins[0] & origins[2] or origins[1] & origins[2])
    halves = [
        {row["id"].partition("#")[0] for row in prepared.targets.to_dicts() if row["half"] == half}
        for half in ("score", "verdict")
    ]
    assert not halves[0] & halves[1]
    assert prepared.stats["encoding"]["documents"]["split"] > 0
    assert len(prepared.targets) == 20 and len(prepared.heldout) == 10


def test_a_part_that_says_what_another_says_is_there_once(base, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"id": f"{n:03d}", "source": "s", "text": f"{sentence(n)} " + "tick tock " * 100} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"documents": str(path), "general_sources": [], "target_sources": ["s"], "damage": 0.0}
    prepared = prepare(base, **own, near_duplicate_threshold=0.0, context=32, max_documents=0, num_heldout=10)
    hashes = pl.concat([table["content_hash"] for table in (prepared.documents, prepared.targets, prepared.heldout)])
    assert hashes.is_unique().all()
    assert all(prepared.stats["dropped_rows"][f"{name}_same_text"] > 0 for name in ("documents", "targets", "heldout"))


def test_the_truth_is_apart_and_right(base):
    clean, damaged = prepare(base, damage=0.0), prepare(base)
    before = dict(clean.documents.select("id", "text").iter_rows())
    after = dict(damaged.documents.select("id", "text").iter_rows())
    truth = dict(damaged.damage.select("id", "damaged").iter_rows())
    whole = [name for name in before if name in after]
    assert len(whole) > 60
    assert all((before[name] != after[name]) == truth[name] for name in whole)
    assert set(damaged.damage.filter("damaged")["kind"]) == {"boilerplate", "encoding damage", "shuffled words", "wrong pairing"}
    assert set(damaged.documents.columns) == set(clean.documents.columns) == set(SCHEMA)
    assert not clean.damage["damaged"].any()
    for name in ("targets", "heldout"):  # never damaged
        assert getattr(clean, name)["text"].to_list() == getattr(damaged, name)["text"].to_list()


def test_parts_that_damage_left_alone_count_as_undamaged(base, tmp_path):
    rows = [{"id": f"{n:03d}", "source": "s", "text": sentence(n, 80)} for n in range(60)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare(
        base, documents=str(tmp_path / "long.jsonl"), general_sources=[], target_sources=["s"], max_documents=0, damage=0.5
    )
    originals = {row["id"]: row["text"] for row in rows}
    kinds = dict(prepared.damage.select("id", "kind").iter_rows())
    texts = dict(prepared.documents.select("id", "text").iter_rows())
    assert all((kind == "") == (texts[name] in originals[name.partition("#")[0]]) for name, kind in kinds.items())
    paired = {name.partition("#")[0] for name, kind in kinds.items() if kind == "wrong pairing"}
    assert {kinds[name] for name in kinds if name.partition("#")[0] in paired} == {"", "wrong pairing"}
    assert set(prepared.documents["part"]) == {"mixed"} == set(prepared.heldout["part"])  # no general sources


def test_files_are_written_whole_and_can_be_read(base, tmp_path):
    with Path(base["documents"]).open("a") as stream:
        stream.write('{"id": "bad \\ud800", "text": 3}\n')
    prepared = prepare(base)
    workspace = Workspace(tmp_path / "out")
    write_prepared(prepared, workspace)
    for name in ("documents", "targets", "heldout", "damage"):
        assert read_table(getattr(workspace, name), stage="prepare").equals(getattr(prepared, name))
    assert read_json(workspace.preparation, stage="prepare") == prepared.stats
    (line,) = workspace.quarantine.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["line"] == 241 and json.loads(line)["reason"] == "field text is not text"
    assert prepared.stats["quarantined"] == {"field text is not text": 1}
    loaded = load_documents(workspace.targets, half="verdict")
    assert len(loaded) == 10 and loaded.num_loss_tokens.min() > 0
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(workspace.tokenizer))
    row = prepared.heldout.row(0, named=True)
    assert tokenizer.decode(row["tokens"], skip_special_tokens=True) == row["text"]
    assert not list(workspace.root.rglob("*.part"))


def test_the_same_bytes_whatever_the_hash_seed_order_and_workers(base, tmp_path):
    lines = Path(base["documents"]).read_text().splitlines()
    random.Random(0).shuffle(lines)
    program = (
        "import json, sys; from pathlib import Path; from tda.artifacts import Workspace; from tda.config import Prepare\n"
        "from tda.prepare import prepare_documents, write_prepared\n"
        "values, out = json.loads(sys.argv[1]), Path(sys.argv[2])\n"
        "write_prepared(prepare_documents(Prepare.model_validate(values), model='llama'), Workspace(out))"
    )
    outputs = []
    for place, text in enumerate((Path(base["documents"]).read_text(), "\n".join(lines))):
        Path(base["documents"]).write_text(text)
        out = tmp_path / str(place)
        environment = {**os.environ, "PYTHONHASHSEED": str(place + 1)}
        subprocess.run([sys.executable, "-c", program, json.dumps(base), str(out)], check=True, cwd=ROOT, env=environment)
        outputs.append({str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert outputs[0] == outputs[1] and len(outputs[0]) == 8


def test_own_targets_and_parts(base, tmp_path):
    targets = tmp_path / "targets.csv"
    pl.DataFrame([{"id": f"t{n}", "text": sentence(f"target {n}")} for n in range(25)]).write_csv(targets)
    prepared = prepare(base, targets=str(targets), target_sources=[])
    assert prepared.stats["targets"] == {"targets": {"score": 10, "verdict": 10}}
    assert prepared.stats["read"]["target_rows"] == 25

    rows = [json.loads(line) for line in Path(base["documents"]).read_text().splitlines()]
    for row in rows:
        row["stage"] = "general" if int(row["id"][-1]) % 2 else "mixed"
    named = tmp_path / "parts.jsonl"
    named.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare(base, documents=str(named), targets=str(targets), part_field="stage")
    assert all(
        (row["part"] == "general") == (int(row["id"].partition("#")[0][-1]) % 2 == 1) for row in prepared.documents.to_dicts()
    )


def test_training_documents_near_a_target_are_taken_out(base, tmp_path):
    text = json.loads(Path(base["documents"]).read_text().splitlines()[70])["text"]
    targets = tmp_path / "targets.jsonl"
    rows = [{"id": "near", "text": text + " more"}, *({"id": f"t{n}", "text": sentence(f"t{n}")} for n in range(19))]
    targets.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare(base, targets=str(targets), max_documents=0)
    assert prepared.stats["near_duplicates"] == 1
    assert "beta-010" not in set(prepared.documents["id"])


def test_a_target_that_is_a_training_document_is_refused(base, tmp_path):
    first = json.loads(Path(base["documents"]).read_text().splitlines()[0])
    for number, clash in enumerate(({"id": "other", "text": first["text"]}, {"id": first["id"], "text": sentence("another")})):
        targets = tmp_path / f"targets{number}.jsonl"
        targets.write_text("".join(json.dumps(row) + "\n" for row in [clash, {"id": "fine", "text": sentence("fine")}]))
        with pytest.raises(ValueError, match=r"a target document that is also a training document .*got 1 .*first 'alpha-000'"):
            prepare(base, targets=str(targets))


def test_prompts_and_completions(base, tmp_path):
    rows = [{"id": f"{n:03d}", "ask": f"What is {sentence(n, 3)}?", "reply": sentence(n, 6)} for n in range(80)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare(
        base,
        documents=str(tmp_path / "pairs.jsonl"),
        prompt_field="ask",
        completion_field="reply",
        general_sources=[],
        target_sources=["pairs"],
        context=200,
    )
    assert "#" not in "".join(prepared.documents["id"])
    for row in prepared.targets.to_dicts():
        assert row["text"] == row["prompt"] + "\n" + row["completion"] and row["loss_start"] > 1
        assert prepared.tokenizer.decode(row["tokens"][row["loss_start"] : -1]) == row["completion"]


def test_a_tokenizer_that_is_given_is_used(base, tmp_path):
    prepare(base, vocabulary=280).tokenizer.save_pretrained(str(tmp_path / "given"))
    given = prepare(base, tokenizer=str(tmp_path / "given"))
    models_own = prepare(base, model=str(tmp_path / "given"))
    assert given.stats["vocabulary"] == models_own.stats["vocabulary"] == 280
    assert given.documents.equals(models_own.documents)
    end = given.tokenizer.eos_token_id
    assert not any(end in tokens for tokens in given.documents["tokens"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_sources": ["gama"]}, r"prepare.target_sources: no documents of gama: .* there are: alpha, beta, delta, gamma"),
        ({"general_sources": ["omega"]}, r"prepare.general_sources: no documents of omega"),
        ({"target_sources": []}, r"prepare: no targets: expected a file in prepare.targets, or sources"),
        ({"target_sources": ["alpha"]}, r"prepare.target_sources: alpha is in the general part"),
        ({"num_targets": 61}, r"num_targets: too few documents: expected 61, got 60 after cleaning; set it to 60 at most"),
        ({"num_heldout": 121}, r"num_heldout: too few documents: expected 121, got 120 .*; set it to 119 at most"),
        ({"min_characters": 5000}, r"prepare.documents: no document of .* is left: expected some of at least 5000 characters"),
        ({"general_sources": [], "target_sources": ["alpha", "beta", "gamma", "delta"], "num_targets": 200, "num_heldout": 40},
         r"no training documents are left beside 200 targets and 40 held-out documents"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(base, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(base, **changes)


def test_what_cleaning_took_out_is_said_where_too_few_are_left(base, tmp_path):
    path = tmp_path / "same.jsonl"
    pairs = [("s", sentence(1))] * 30 + [("t", sentence(2))] * 9 + [("t", "-")]
    rows = [{"id": f"{place}", "source": source, "text": text} for place, (source, text) in enumerate(pairs)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"documents": str(path), "general_sources": [], "target_sources": ["s", "t"], "num_targets": 8}
    with pytest.raises(ValueError) as error:
        prepare(base, **own)
    assert str(error.value) == (
        "prepare.num_targets: too few documents: expected 8, got 2 after cleaning, which took out 1 too short, "
        "37 exact duplicates; add documents"
    )
    with pytest.raises(ValueError, match=r"num_targets: too few documents: expected 8, got 1 .* duplicates; add documents$"):
        prepare(base, **own | {"target_sources": ["t"]})
    with pytest.raises(ValueError, match=r"num_heldout: too few documents: expected 10, got 1 .* duplicates; add documents$"):
        prepare(base, **own | {"targets": targets_file(tmp_path, 8), "general_sources": ["s"]})
    with pytest.raises(
        ValueError, match=r"num_targets: .* got 3 after cleaning, which took out .*, 1 too short or duplicate own targets; set it"
    ):
        prepare(base, **own | {"targets": targets_file(tmp_path, 3, more=1)})


def targets_file(folder: Path, number: int, more: int = 0) -> str:
    """A file of as many targets, and `more` that are too short."""
    rows = [{"id": f"t{place}", "text": sentence(f"t{place}")} for place in range(number)]
    rows += [{"id": f"u{place}", "text": "-"} for place in range(more)]
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(("setting", "wanted"), [("num_targets", 1000), ("num_heldout", 1000)])
@pytest.mark.parametrize("general", [[], ["alpha", "beta"]])
def test_the_value_that_is_advised_is_accepted(base, setting, wanted, general):
    base = base | {"general_sources": general, "damage": 0}
    with pytest.raises(ValueError, match="set it to") as error:
        prepare(base, **{setting: wanted})
    advised = int(re.search(r"set it to (\d+) at most", str(error.value)).group(1))
    assert len(prepare(base, **{setting: advised}).documents)


def test_targets_that_are_all_too_short_are_refused(base, tmp_path):
    (tmp_path / "targets.jsonl").write_text('{"id": "t", "text": "short"}\n')
    with pytest.raises(ValueError, match=r"prepare.targets: no target of .* is left: expected some of at least 20 characters"):
        prepare(base, targets=str(tmp_path / "targets.jsonl"))


def test_an_id_that_looks_like_a_part_is_refused(base, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"id": f"{n}", "source": "s", "text": sentence(n, 80)} for n in range(40)]
    rows += [{"id": f"{n}#1", "source": "s", "text": sentence(f"part {n}")} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"documents": str(path), "general_sources": [], "target_sources": ["s"]}
    with pytest.raises(ValueError, match=r"the id '.*#1' is that of a document and of a part of another"):
        prepare(base, **own, num_targets=2, num_heldout=1, max_documents=0)


def test_builtin_documents(base, monkeypatch):
    monkeypatch.setattr(corpus, "DOMAINS", {"stdlib": ("argparse", "asyncio", "email"), "numpy": ("numpy.ma", "numpy.lib")})
    monkeypatch.setattr("tda.prepare.GENERAL_SOURCES", ("reference", "stdlib"))
    monkeypatch.setattr("tda.prepare.TARGET_SOURCES", ("numpy",))
    prepared = prepare(base, documents="builtin:python", general_sources=[], target_sources=[], min_characters=80)
    parts = {source: set(parts) for source, parts in prepared.stats["documents"].items()}
    assert parts == {"numpy": {"mixed"}, "reference": {"general"}, "stdlib": {"general"}}
    assert set(prepared.targets["source"]) == {"numpy"}
    assert all(name.startswith(f"{source}/") for name, source in prepared.documents.select("id", "source").iter_rows())
