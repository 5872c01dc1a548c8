import ast
from pathlib import Path

import pytest

from tda import corpus
from tda.corpus import Text, python_texts

SOURCE = '''
"""A module about boxes.

It opens and closes them.

Parameters
----------
none : of them
"""
import this_package_does_not_exist

class Box:
    """A box with a lid; it is closed at first.

    Examples
    --------
    >>> Box()
    """

    def open(self, lid, *, gently=True, **others):
        """Open the box, and raise an error if it is open already.

        :param lid: which lid
        """

    def _creak(self):
        """Private, so that no document comes of it."""

    @property
    def size(self):
        r"""Size in \\metres."""

if True:
    def conditional(a, /, b=1, *rest, c=(1, 2)):
        """Found below a condition.

        Args:
            a: it
        """
        def inner():
            """Inside a function, so left out."""
'''


def documents_of(source: str | bytes, tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "boxes.py"
    path.write_bytes(source if isinstance(source, bytes) else source.encode())
    return {text.name: text.text for text in corpus.file_texts(corpus._File("things", "things.boxes", path))}


def test_a_document_per_public_object_without_importing(tmp_path):
    assert documents_of(SOURCE, tmp_path) == {
        "things.boxes": "things.boxes\n\nA module about boxes.\n\nIt opens and closes them.\n\n"
        "Parameters\n----------\nnone : of them",
        "things.boxes.Box": "things.boxes.Box\n\nA box with a lid; it is closed at first.",
        "things.boxes.Box.open": "things.boxes.Box.open(lid, *, gently=True, **others)\n\n"
        "Open the box, and raise an error if it is open already.\n\n:param lid: which lid",
        "things.boxes.Box.size": "things.boxes.Box.size()\n\nSize in \\metres.",
        "things.boxes.conditional": "things.boxes.conditional(a, b=1, *rest, c=(1, 2))\n\n"
        "Found below a condition.\n\nArgs:\n    a: it",
    }


@pytest.mark.parametrize(
    "source",
    [
        b'def broken(:\n    """text text"""',
        b'"""\xff\xfe not UTF-8"""',
        b'def f():\n    """nul \\0 inside the text"""',
        b'def f():\n    """half a pair \\ud800 inside"""',
        b'def f():\n    """Plot of %(name)s, a template."""',
        b'def f():\n    """=== --- +++ === a"""',
        b'def f():\n    """\n    Examples\n    --------\n    run it\n    """',
        b"def f():\n    'no triple quotes in this file'",
    ],
)
def test_files_and_docstrings_that_are_no_text_are_left_out(source, tmp_path):
    assert documents_of(source, tmp_path) == {}


def test_a_long_signature_is_shortened_and_a_long_docstring_cut_at_a_line(tmp_path):
    parameters = ", ".join(f"parameter_{number}={number}" for number in range(40))
    paragraphs = "\n\n    ".join(["First words of it."] + ["Another paragraph of some length. " * 2] * 9)
    text = documents_of(f'def f({parameters}):\n    """{paragraphs}"""', tmp_path)["things.boxes.f"]
    head, lead = text.split("\n\n", 1)
    assert head.endswith(", ...)") and head.startswith("things.boxes.f(parameter_0=0, ")
    assert len(head) <= len("things.boxes.f()") + corpus.MAX_SIGNATURE
    assert corpus.LEAD - 80 < len(lead) <= corpus.LEAD + 10
    assert lead.startswith("First words of it.\n\nAnother paragraph") and lead.endswith("of some length.")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(corpus, "DOMAINS", {"gone": ("no_such_package_anywhere",)})
    with pytest.raises(ValueError, match="needs the package no_such_package_anywhere; it is not installed"):
        python_texts()


def test_the_same_for_any_number_of_workers(monkeypatch):
    monkeypatch.setattr(corpus, "DOMAINS", {"stdlib": ("json", "heapq", "textwrap"), "network": ("email", "http")})
    alone = python_texts()
    assert alone == python_texts(workers=2)
    keys = [(text.source, text.name) for text in alone]
    assert keys == sorted(set(keys))
    assert {"stdlib", "network", corpus.REFERENCE} == {text.source for text in alone}
    assert any(text.name == "json.dumps" and "Serialize ``obj``" in text.text for text in alone)


def test_the_reference_is_made_of_passages_with_their_topic():
    texts = corpus._reference_topics()
    assertion = next(text for text in texts if text.name == "assert.001")
    assert assertion == Text(corpus.REFERENCE, "assert.001", assertion.text)
    assert assertion.text.startswith('The "assert" statement\n\nAssert statements are a convenient way')
    assert len({text.name for text in texts}) == len(texts) > 500


def test_the_table_is_sound():
    assert set(corpus.GENERAL_SOURCES) <= {*corpus.DOMAINS, corpus.REFERENCE}
    assert set(corpus.TARGET_SOURCES) <= set(corpus.DOMAINS) - set(corpus.GENERAL_SOURCES)
    for packages in corpus.DOMAINS.values():
        for package in packages:
            files = corpus._files("any", package)
            assert files, package
            assert not any("tests" in file.path.parts for file in files)


def test_every_top_level_package_is_a_dependency_or_in_the_standard_library():
    """numpy and the like come with the project; a package that only its developers install may be missing at a user's."""
    from importlib.metadata import requires
    from sys import stdlib_module_names

    from packaging.requirements import Requirement

    wanted, open_names = set(), ["tda"]
    while open_names:
        name = open_names.pop()
        for line in requires(name) or []:
            requirement = Requirement(line)
            if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
                key = requirement.name.lower().replace("-", "_")
                if key not in wanted:
                    wanted.add(key)
                    open_names.append(requirement.name)
    tops = {package.split(".")[0] for packages in corpus.DOMAINS.values() for package in packages}
    assert {top for top in tops if top not in stdlib_module_names} <= wanted


def test_the_head_of_a_function_without_parameters():
    node = ast.parse("def f(self): ...").body[0]
    assert corpus._head(node, "a.f") == "a.f()"
