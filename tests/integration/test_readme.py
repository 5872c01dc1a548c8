"""What the README shows is run, and what it names exists."""

import re
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).parents[2]
README = (PROJECT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_runs(snippet, capsys):
    torch.manual_seed(0)
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_example_is_short():
    assert len(SNIPPETS) == 1
    assert len(SNIPPETS[0].splitlines()) < 25


def test_files_that_the_readme_names_exist():
    named = set(re.findall(r"`((?:tda|flows|benchmarks|tests)/[\w/.]*|[A-Za-z]+\.(?:md|yaml|toml|lock))`", README))
    assert "tda/README.md" in named
    missing = sorted(name for name in named - {"dvc.lock"} if not (PROJECT / name).exists())  # the lock is made by a run
    assert not missing


def test_the_map_of_the_code_names_every_module():
    every = (PROJECT / "tda/README.md").read_text(encoding="utf-8").partition("## All modules")[2]
    modules = {path.name for path in (PROJECT / "tda").glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"`(\w+\.py)`", every)) == modules
