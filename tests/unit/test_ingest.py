import gzip
import json
from pathlib import Path

import polars as pl
import pytest

from tda import readers
from tda.ingest import Document, Fields, Reading, content_hash, part_of, read_documents

FIELDS = Fields(id="id", source="source", part="part")
PAIR = Fields(prompt="question", completion="answer")


def read(
    path: Path | str, *, fields: Fields = FIELDS, split: str = "train", max_bad_rows: float = 1.0, key: str = "prepare.documents"
) -> Reading:
    return read_documents(str(path), fields=fields, split=split, max_bad_rows=max_bad_rows, key=key)


def reasons(reading: Reading) -> dict[int, str]:
    return {row["line"]: row["reason"] for row in reading.quarantine}


ROWS = [{"id": "a", "source": "one", "text": "First text, with é and 😀."}, {"id": "b", "source": "two", "text": "Second\ntext"}]
WANTED = [Document("a", "one", "First text, with é and 😀."), Document("b", "two", "Second\ntext")]


def write_all_kinds(folder: Path) -> dict[str, Path]:
    from datasets import Dataset, DatasetDict

    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    table = pl.DataFrame(ROWS)
    paths = {
        name: folder / f"rows.{name}" for name in ("jsonl", "jsonl.gz", "csv", "csv.gz", "parquet", "saved", "dict", "mixed")
    }
    paths["jsonl"].write_text("\ufeff" + lines + "\n\n", encoding="utf-8")
    paths["jsonl.gz"].write_bytes(gzip.compress(lines.encode()))
    table.write_csv(paths["csv"])
    paths["csv.gz"].write_bytes(gzip.compress(paths["csv"].read_bytes()))
    table.write_parquet(paths["parquet"])
    Dataset.from_list(ROWS).save_to_disk(str(paths["saved"]))
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(str(paths["dict"]))
    paths["mixed"].mkdir()
    (paths["mixed"] / "1.jsonl").write_text(json.dumps(ROWS[0]))
    pl.DataFrame(ROWS[1:]).write_csv(paths["mixed"] / "2.csv")
    (paths["mixed"] / "notes.txt").write_text("not read")
    (paths["mixed"] / "._2.csv").write_text("what macOS leaves in archives: not read")
    return paths


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    for name, path in write_all_kinds(tmp_path).items():
        reading = read(path)
        assert reading.documents == WANTED, name
        assert (reading.quarantine, reading.num_rows, reading.num_ids_made) == ([], 2, 0), name
    with pytest.raises(ValueError, match=r"has no split 'validation': it has train, test; set prepare.split"):
        read(tmp_path / "rows.dict", split="validation")


def test_files_in_sub_folders_are_read_too(tmp_path, capsys):
    from datasets import Dataset

    folder = tmp_path / "all"
    for place in ("wiki", "code/deep", ".hidden", "saved"):
        (folder / place).mkdir(parents=True)
    (folder / "rows.jsonl").write_text('{"text": "on top"}\n')
    (folder / "wiki" / "rows.jsonl").write_text('{"text": "below"}\n{"text": 7}\n')
    (folder / "code" / "deep" / "rows.csv").write_text("text\nfurther below\n")
    (folder / ".hidden" / "rows.jsonl").write_text("not read")
    (folder / "wiki" / "more.jsonl.zst").write_text("not read, which is said")
    Dataset.from_list([{"text": "a data set"}]).save_to_disk(str(folder / "saved" / "set"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "rows.jsonl").write_text('{"text": "linked"}\n')
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "wiki" / "loop").symlink_to(folder)
    reading = read(folder)
    assert [(one.source, one.text) for one in reading.documents] == [
        ("code/deep/rows", "further below"),
        ("link/rows", "linked"),
        ("rows", "on top"),
        ("saved/set", "a data set"),
        ("wiki/rows", "below"),
    ]
    assert [(row["file"], row["line"]) for row in reading.quarantine] == [("wiki/rows.jsonl", 2)]
    assert capsys.readouterr().err.endswith(
        f"\nprepare.documents: not read, of no known kind, in {folder}: wiki/more.jsonl.zst\n"
    )


def test_malformed_lines_are_put_aside_with_their_place(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE", 200)
    lines = [
        b'{"id": "good", "text": "kept"}',
        b'{"id": "cut", "text": "not',
        b'{"id": "latin", "text": "caf\xe9"}',
        b'["a", "list"]',
        b'{"id": "none"}',
        b'{"id": "number", "text": 7}',
        b'{"id": "empty", "text": "  \\n"}',
        b'{"id": "nul", "text": "a\\u0000b"}',
        b'{"id": "half", "text": "a\\ud800b"}',
        b'{"id": "long", "text": "' + b"x" * 500 + b'"}',
        b'{"id": ["x"], "text": "id is a list"}',
        b'{"id": "a\\nb", "text": "id has a line break"}',
        b'{"id": "part", "text": "some", "part": "third"}',
        b'{"id": "good", "text": "other content"}',
        b'{"id": "good", "text": "kept"}',
        b"[" * 150,
        b'{"id": 12, "text": "last", "part": "general"}',
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    reading = read(path)
    assert [(one.id, one.source, one.part) for one in reading.documents] == [
        ("good", "rows", ""), ("good", "rows", ""), ("12", "rows", "general"),
    ]  # fmt: skip
    assert reasons(reading) == {
        2: "not JSON",
        3: "not UTF-8",
        4: "not an object",
        5: "field text is missing",
        6: "field text is not text",
        7: "field text is empty",
        8: "field text has a NUL character",
        9: "field text is not valid Unicode",
        10: "line too long",
        11: "field id is neither text nor a whole number",
        12: "field id is too long or has control characters",
        13: "field part is neither general nor mixed",
        14: "duplicate id with other content",
        16: "not JSON",
    }
    assert reading.num_rows == len(lines)
    for row in reading.quarantine:
        assert row["file"] == "rows.jsonl" and len(row["row"]) <= 4 * readers.EXCERPT
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    assert next(row["row"] for row in reading.quarantine if row["line"] == 3) == '{"id": "latin", "text": "caf\\xe9"}'


def test_malformed_csv_rows(tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(b'id,text\n1,"two\nlines"\n2,caf\xe9\n3\n4,a,b\n\n5,""\n6,kept\n')
    reading = read(path)
    assert [(one.id, one.text) for one in reading.documents] == [("1", "two\nlines"), ("6", "kept")]
    wrong = "not as many columns as the header"
    assert reasons(reading) == {4: "field text is not valid Unicode", 5: wrong, 6: wrong, 8: "field text is empty"}


def test_a_csv_row_with_line_breaks_is_put_aside_with_its_first_line(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('id,text\n1,"kept\nwhole"\n2,"three\n\nlines",more\n3,""\n')
    assert reasons(read(path)) == {4: "not as many columns as the header", 7: "field text is empty"}


def test_a_huge_csv_field_is_put_aside_and_the_rest_is_read(tmp_path, monkeypatch):
    import csv

    before = csv.field_size_limit()
    monkeypatch.setattr(readers, "MAX_LINE", 100)
    path = tmp_path / "table.csv"
    path.write_text(f"id,text\n1,{'x' * 1000}\n2,kept\n")
    reading = read(path)
    assert [one.id for one in reading.documents] == ["2"]
    assert reasons(reading) == {2: "not CSV"}
    assert csv.field_size_limit() == before


def test_a_csv_quote_that_is_not_closed_takes_no_other_row_along(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(
        'id,text\n1,"one ""quoted"" word,\nand a line"\n2,"open\n3,three\n4,"four, again"\n5,"open\n6,"six"\n7,seven\n'
    )
    (tmp_path / "table.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    for reading in (read(path), read(tmp_path / "table.csv.gz")):
        assert [one.id for one in reading.documents] == ["1", "3", "4", "6", "7"]
        assert reading.documents[0].text == 'one "quoted" word,\nand a line'
        assert reasons(reading) == {4: "not CSV", 7: "not CSV"}
        assert reading.quarantine[0]["row"].endswith(': 2,"open')
    path.write_text('id,text\n1,one\n2,"open\n3,three')
    assert ([one.id for one in read(path).documents], reasons(read(path))) == (["1", "3"], {3: "not CSV"})
    with pytest.raises(ValueError, match=r"1 of 3 rows .* malformed.*not CSV: 1; first at table.csv:3"):
        read(path, max_bad_rows=0.01)


def test_a_csv_header_that_is_no_csv_is_refused(tmp_path):
    (tmp_path / "table.csv").write_text('id,"text\n1,one\n')
    with pytest.raises(ValueError, match=r"prepare.documents: .*table.csv: line 1 is not CSV: .*; mend its quotes$"):
        read(tmp_path / "table.csv")


def test_bad_text_in_parquet_is_put_aside(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.array([b"fine", b"caf\xe9", None], type=pa.binary()).view(pa.string())
    pq.write_table(pa.table({"id": ["1", "2", "3"], "text": text}), tmp_path / "rows.parquet")
    reading = read(tmp_path / "rows.parquet")
    assert [one.id for one in reading.documents] == ["1"]
    assert reasons(reading) == {2: "not UTF-8", 3: "field text is missing"}


def test_too_many_malformed_rows_are_refused_with_the_fields_there_are(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "text"}\n{"body": "more", "label": 1}\n{"text": "good"}\n')
    assert len(read(path, max_bad_rows=0.67).documents) == 1
    with pytest.raises(
        ValueError, match=r"2 of 3 rows .* malformed.*field text is missing: 2; first at rows.jsonl:1, rows.jsonl:2"
    ):
        read(path, max_bad_rows=0.6)
    with pytest.raises(ValueError, match=r"prepare.targets: .*fields found: body, label, text;"):
        read(path, max_bad_rows=0.0, key="prepare.targets")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", json.dumps(ROWS), "seems to be one JSON array: expected one object a line"),
        ("rows.jsonl", json.dumps(ROWS, indent=1), "seems to be one JSON array: expected one object a line"),
        ("rows.csv", "id;text\n1;one, two\n2;two\n", "seems to separate its columns by semicolons: expected commas"),
        ("rows.csv", "\ufeffid\ttext\n1\tone, two\n2\ttwo\n", "seems to separate its columns by tabs: expected commas"),
    ],
)
def test_a_file_of_a_neighbouring_form_is_refused_by_its_name(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_text(content, encoding="utf-8")
    for place, file in ((path, path), (tmp_path / f"{name}.gz", tmp_path / f"{name}.gz"), (folder, folder / name)):
        with pytest.raises(ValueError, match=f"{message}; write it so$") as error:
            read(place, max_bad_rows=0.5)
        assert f"; {file} " in str(error.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"id": 0, "text": "one"}, {"id": 0, "text": "other"}],
            'set prepare.id_field to "", so that ids are made from the texts, or mend the rows',
        ),
        ([{"id": 0.5, "text": "one"}], 'name a field of these, or "" for none, or mend the rows'),
        (
            [{"text": [{"role": "user"}]}],
            "name a field of text; lists, such as the messages of a chat, have to be written out as text",
        ),
        ([{"body": "one"}], r"name fields that are there \(text_field, .*\), mend the rows, or raise max_bad_rows"),
    ],
)
def test_what_to_do_about_malformed_rows_depends_on_what_is_wrong(tmp_path, rows, message):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=f"; {message}$"):
        read(tmp_path / "rows.jsonl", max_bad_rows=0.1)


def test_ids_and_sources_are_made_where_there_are_none(tmp_path):
    path = tmp_path / "poems.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a rose"}\n{"text": "a rose", "source": "garden", "id": ""}\n'))
    reading = read(path)
    assert [(one.id, one.source) for one in reading.documents] == [
        (f"poems/{content_hash('a rose')}", "poems"),
        (f"garden/{content_hash('a rose')}", "garden"),
    ]
    assert reading.num_ids_made == 2


def test_prompt_and_completion(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [("Why?", "Because."), ("Why? ", "So."), ("", "Alone."), ("Empty", "")]
    path.write_text("".join(json.dumps({"question": one, "answer": other}) + "\n" for one, other in rows))
    reading = read(path, fields=PAIR)
    assert [one.text for one in reading.documents] == ["Why?\nBecause.", "Why? So.", "Alone."]
    assert reading.documents[0].prompt == "Why?" and reading.documents[0].completion == "Because."
    assert reasons(reading) == {4: "field answer is empty"}
    with pytest.raises(
        ValueError, match=r"prompt_field and completion_field belong together: expected both or none; got 'q' and ''"
    ):
        read(path, fields=Fields(prompt="q"))


def test_what_cannot_be_read_at_all(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"prepare.documents: .*nowhere.jsonl does not exist: expected builtin:python, a file"
    ):
        read(tmp_path / "nowhere.jsonl")
    (tmp_path / "book.txt").write_text("text")
    with pytest.raises(ValueError, match=r"book.txt is of no known kind: expected \.jsonl.*; got .txt; convert it"):
        read(tmp_path / "book.txt")
    with pytest.raises(ValueError, match=r"nothing to read in this folder: expected files ending in .jsonl"):
        read(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty.jsonl is empty: expected rows, got none"):
        read(tmp_path / "empty.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(ValueError, match=r"cut.jsonl.gz is truncated or damaged: .*expected a whole gzip file"):
        read(tmp_path / "cut.jsonl.gz")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"cut.parquet cannot be read: .*expected a whole Parquet file"):
        read(tmp_path / "cut.parquet")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"saved cannot be loaded: .*expected a folder written by save_to_disk"):
        read(tmp_path / "saved")


def test_a_hub_that_is_out_of_reach_says_what_to_do(monkeypatch):
    import datasets

    def refuse(name, configuration, *, split):
        assert (name, configuration, split) == ("some/set", "main", "train")
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        ValueError, match=r"hub:some/set:main \(split 'train'\) could not be loaded: ConnectionError.*save_to_disk\(FOLDER\)"
    ):
        read("hub:some/set:main")


def test_a_data_set_of_the_hub(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([{"text": "from afar"}]))
    assert [(one.source, one.text) for one in read("hub:some/set").documents] == [("set", "from afar")]


@pytest.mark.parametrize(("named", "source", "part"), [("", "a", "general"), ("", "b", "mixed"), ("mixed", "a", "mixed")])
def test_the_part_that_a_document_names_counts_before_its_source(named, source, part):
    assert part_of(Document("1", source, "text", part=named), ["a"]) == part
