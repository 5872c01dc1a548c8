import json
import re
import subprocess
from html.parser import HTMLParser

import polars as pl
import pytest

from tda.artifacts import read_json, remove, write_json, write_table
from tda.charts import number, power_of_ten, scaled, ticks
from tda.excerpts import excerpt, excerpt_in_a_line
from tda.page import flat, visible
from tda.provenance import how_to_reproduce, lock_digest, provenance
from tda.report import build_report
from tests.fake_workspace import fake_workspace

HOSTILE = (
    "<script>document.title='hacked'</script>",
    "</textarea></details></main><style>*{display:none}</style>",
    '"\'><img src="http://example.invalid/x" onerror=alert(1)>',
    "{{ 7 * 7 }} {% raw %}",
)
VOID = {"meta", "link", "br", "img", "rect", "circle", "line", "polyline", "path"}


class Outline(HTMLParser):
    """Tags, attributes and headings of a page; refuses tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tags, self.ids, self.links = [], set(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        values = dict(attrs)
        assert not [name for name in values if name.startswith("on") or name == "style"], (tag, values)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[name] for name in ("href", "src") if name in values]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    return fake_workspace(tmp_path_factory.mktemp("run"))


def outline(page: str) -> Outline:
    parsed = Outline()
    parsed.feed(page)
    assert parsed.open == []
    return parsed


def test_page_has_every_part_and_says_the_verdict(fake):
    page = build_report(fake.workspace, fake.config)
    parsed = outline(page)
    verdict = read_json(fake.workspace.verdict, stage="evaluation")
    assert verdict["accepted"]
    assert "Accepted: train on the curated data" in page
    assert verdict["answer"] in page
    expected = {
        "verdict",
        "retraining",
        "decision",
        "harmful",
        "helpful",
        "control",
        "training",
        "preparation",
        "limits",
        "provenance",
    }
    assert expected <= set(parsed.ids)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "planted: " in page
    for name in ("kept, cap of its source", "kept, past the limit"):
        assert name.capitalize() in page


def test_page_needs_nothing_from_outside(fake):
    parsed = outline(build_report(fake.workspace, fake.config))
    assert not parsed.tags & {"script", "img", "iframe", "object", "embed", "form", "base"}
    assert {link for link in parsed.links if not link.startswith("#")} == {"data:,"}
    assert {link[1:] for link in parsed.links if link.startswith("#")} <= set(parsed.ids)


def test_page_is_the_same_twice_and_has_no_path_of_the_machine(fake):
    page = build_report(fake.workspace, fake.config)
    assert page == build_report(fake.workspace, fake.config)
    assert str(fake.workspace.root) not in page


def test_hostile_documents_are_text(tmp_path):
    fake = fake_workspace(tmp_path, num_documents=300, texts=HOSTILE)
    page = build_report(fake.workspace, fake.config)
    parsed = outline(page)
    assert "script" not in parsed.tags
    assert "&lt;script&gt;" in page
    assert "{{ 7 * 7 }}" in page
    assert not [link for link in parsed.links if "example" in link]


def test_hostile_names_are_text(tmp_path):
    fake = fake_workspace(tmp_path, num_documents=300)
    for path, column in ((fake.workspace.manifest, "source"), (fake.workspace.documents, "source")):
        write_table(path, pl.read_parquet(path).with_columns(pl.col(column).replace("click", "<b onclick=x>\u202e</b>")))
    counts = read_json(fake.workspace.curation, stage="curation")
    counts["sources"]["<b onclick=x>\u202e</b>"] = counts["sources"].pop("click")
    write_json(fake.workspace.curation, counts)
    config = fake.config.model_copy(update={"report": fake.config.report.model_copy(update={"title": "</title><script>"})})
    parsed = outline(build_report(fake.workspace, config))
    assert "script" not in parsed.tags


@pytest.mark.parametrize("action", ["drop", "reweight"])
def test_page_without_damage_has_no_control(tmp_path, action):
    fake = fake_workspace(tmp_path, num_documents=200, damage=0.0, action=action)
    page = build_report(fake.workspace, fake.config)
    assert "control" not in outline(page).ids
    assert "planted" not in page.split("</style>")[1]
    assert ("Mean weight" in page) == (action == "reweight")


def test_page_of_a_rejected_run_says_so(tmp_path):
    fake = fake_workspace(tmp_path, num_documents=200, gain=-0.02)
    page = build_report(fake.workspace, fake.config)
    assert "Rejected: keep training on all data" in page
    assert "the gain against all data is not certain" in page


def test_a_confidence_is_shown_with_all_its_digits(tmp_path):
    fake = fake_workspace(tmp_path, num_documents=200)
    verdict = json.loads(fake.workspace.verdict.read_text())
    write_json(fake.workspace.verdict, verdict | {"confidence": 0.9995})
    page = build_report(fake.workspace, fake.config)
    assert "over the whole 99.95% interval" in page
    assert "100% interval" not in page


def test_losses_that_were_not_recorded_leave_the_learning_rate(tmp_path):
    fake = fake_workspace(tmp_path, num_documents=200)
    write_table(
        fake.workspace.trajectory, pl.read_parquet(fake.workspace.trajectory).with_columns(loss=pl.lit(None, dtype=pl.Float64))
    )
    assert "the losses were not recorded" in build_report(fake.workspace, fake.config)


def test_missing_artifact_names_its_stage(tmp_path):
    fake = fake_workspace(tmp_path, num_documents=200)
    remove(fake.workspace.verdict)
    with pytest.raises(
        FileNotFoundError, match=r"verdict.json is missing; stage evaluation makes it: run `dvc repro evaluation`"
    ):
        build_report(fake.workspace, fake.config)


def test_invisible_characters_are_shown():
    assert visible("a\x00b\x7f\u202ec\u2066\ufeff") == "a⟨U+0000⟩b⟨U+007F⟩⟨U+202E⟩c⟨U+2066⟩⟨U+FEFF⟩"
    assert visible("a\r\nb\u2028c\td") == "a\nb\nc\td"
    family = "\U0001f468\u200d\U0001f469 שלום é"
    assert visible(family) == family


def test_excerpt_is_a_few_lines_and_ends_at_a_word():
    assert excerpt("\n".join("abcdefgh")) == "a\nb\nc\nd\ne"
    assert excerpt("word " * 100) == ("word " * 60)[:-1]
    assert excerpt("x" * 1000) == "x" * 300


def test_an_excerpt_in_a_line_ends_at_a_word_and_shows_a_text_that_has_no_spaces():
    assert excerpt_in_a_line("some\nwords ") == "some words"
    assert excerpt_in_a_line("word " * 100) == "word " * 47 + "..."
    assert excerpt_in_a_line("界" * 1000) == "界" * 236 + " ..."


def test_numbers_are_written_for_people():
    assert number(-0.00123) == "−0.00123"
    assert number(-3.1e-6) == "−3.1 × 10⁻⁶"
    assert number(0.0, sign=True) == "0"
    assert power_of_ten([3e-6, -5e-7]) == -6
    assert power_of_ten([1e-6] * 99 + [-1.56e-3]) == -3  # of the largest, so that no number needs a power beside the factor
    assert power_of_ten([0.3, -0.9, float("nan")]) == 0
    assert power_of_ten([2e7, 1]) == 6
    assert power_of_ten([float("nan")]) == 0
    assert ticks(-0.021, 0.02, 4) == [-0.02, 0, 0.02]
    assert flat({"a": {"b": 1}, "c": [2]}) == [("a.b", "1"), ("c", "[2]")]


@pytest.mark.parametrize(
    ("value", "exponent", "text"),
    [
        (1.56e-3, -3, "+1.56"),
        (-1.2e-8, -3, "−0.000012"),
        (-1e-12, -3, "−0"),
        (0.9997, -3, "+1000"),
        (5e-3, -6, "+5000"),
        (0.25, 0, "+0.25"),
        (0.0, 0, "0"),
    ],
)
def test_a_number_beside_a_factor_has_no_power_of_its_own(value, exponent, text):
    assert scaled(value, exponent, sign=True) == text


def test_lock_digest_ignores_order_and_the_report_itself(tmp_path):
    lock = tmp_path / "dvc.lock"
    stages = {"a": "  a:\n    cmd: x\n", "b": "  b:\n    cmd: y\n", "report": "  report:\n    cmd: z\n"}

    def digest(*names: str) -> str:
        lock.write_text("schema: '2.0'\nstages:\n" + "".join(stages[name] for name in names), encoding="utf-8")
        return lock_digest(lock, without=["report"])

    assert digest("a", "b") == digest("b", "a") == digest("report", "a", "b") == digest("a", "report", "b")
    assert digest("a") != digest("a", "b")
    assert lock_digest(tmp_path / "none", without=[]) == ""


def test_provenance_says_whether_the_code_is_committed(tmp_path):
    assert provenance(tmp_path)["commit"] == ""

    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@example.invalid", *arguments],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    assert "Put this folder under git" in how_to_reproduce(tmp_path)
    (tmp_path / "code.py").write_text("1")
    (tmp_path / "dvc.lock").write_text("stages:\n  a:\n    cmd: x\n")
    git("init")
    git("add", "code.py", "dvc.lock")
    git("commit", "-m", "first")
    commit = provenance(tmp_path)["commit"]
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert how_to_reproduce(tmp_path) == f"`git checkout {commit[:12]}`, then `make run`."
    (tmp_path / "dvc.lock").write_text("stages:\n  a:\n    cmd: y\n")
    assert provenance(tmp_path)["changed"] is False  # the page cannot be in the lock that it quotes
    assert how_to_reproduce(tmp_path).startswith(f"Commit what changed since `{commit[:12]}`")
    (tmp_path / "code.py").write_text("2")
    assert provenance(tmp_path)["changed"] is True
