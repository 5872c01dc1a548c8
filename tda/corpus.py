"""`builtin:python`: the documentation of the Python standard library and of the installed packages, as a corpus.

A document is one module, class or function: its qualified name with its parameters, a blank line, and the beginning of its
docstring, up to the first example, notes, references or the like. Paragraphs of the language reference are documents too.
Source files are parsed, never imported.
"""

import ast
import importlib.util
import itertools
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tda.parallel import parallel_map

REFERENCE = "reference"  # the language reference, as `pydoc` has it

# Domain -> packages, or parts of them. All are in the standard library or among what this project depends on.
DOMAINS: dict[str, tuple[str, ...]] = {
    "matplotlib": ("matplotlib",),
    "networkx": ("networkx",),
    "numpy": ("numpy",),
    "pandas": ("pandas",),
    "polars": ("polars",),
    "prefect": ("prefect",),
    "scipy": ("scipy",),
    "sqlalchemy": ("sqlalchemy",),
    "stdlib": (
        "argparse", "ast", "asyncio", "base64", "bdb", "bisect", "calendar", "cmd", "codecs", "collections", "concurrent",
        "configparser", "contextlib", "copy", "csv", "datetime", "decimal", "difflib", "dis", "doctest", "email", "enum",
        "fileinput", "fnmatch", "fractions", "ftplib", "functools", "getopt", "gettext", "glob", "gzip", "hashlib", "heapq",
        "html", "http", "imaplib", "importlib", "inspect", "ipaddress", "json", "linecache", "locale", "logging", "lzma",
        "mailbox", "mimetypes", "multiprocessing", "netrc", "numbers", "opcode", "operator", "optparse", "os", "pathlib", "pdb",
        "pickle", "pickletools", "pkgutil", "platform", "plistlib", "poplib", "posixpath", "pprint", "profile", "pstats",
        "pydoc", "queue", "random", "reprlib", "sched", "secrets", "selectors", "shelve", "shlex", "shutil", "smtplib",
        "socket", "socketserver", "sqlite3", "ssl", "statistics", "string", "subprocess", "symtable", "sysconfig", "tarfile",
        "tempfile", "textwrap", "threading", "timeit", "tokenize", "trace", "traceback", "tracemalloc", "turtle", "types",
        "typing", "unittest", "urllib", "uuid", "venv", "warnings", "wave", "weakref", "webbrowser", "wsgiref", "xml", "xmlrpc",
        "zipapp", "zipfile", "zoneinfo", "_pydecimal", "_pyio", "_collections_abc",
    ),
    "torch": ("torch.autograd", "torch.cuda", "torch.distributions", "torch.distributed", "torch.fx", "torch.nn", "torch.optim",
              "torch.utils"),
    "transformers": ("transformers.data", "transformers.generation", "transformers.integrations", "transformers.pipelines",
                     "transformers.quantizers", "transformers.utils", "transformers.modeling_utils", "transformers.trainer",
                     "transformers.tokenization_utils_base", "transformers.image_processing_utils", "transformers.cache_utils",
                     "datasets", "huggingface_hub"),
}  # fmt: skip

# First training stage, and the domains whose documents may become targets.
GENERAL_SOURCES = ("polars", "prefect", REFERENCE, "sqlalchemy", "stdlib", "torch", "transformers")
TARGET_SOURCES = ("numpy", "scipy")

SKIPPED = frozenset(  # folders and modules: tests, copies of other projects, generated or dead code
    {
        "test",
        "tests",
        "_tests",
        "testing",
        "_testing",
        "conftest",
        "_vendor",
        "_vendored",
        "_migrations",
        "_lib",
        "distutils",
        "f2py",
    }
)
MAX_SIGNATURE = 120  # characters
LEAD = 400  # characters beyond which no further line of a docstring is taken

# Where the beginning of a docstring ends: an example, notes or references as heading, a directive, a doctest, a fence.
_END = re.compile(
    r"""(?mx)
      ^[ ]*(?:Examples?|Notes?|References|See[ ]Also|Warnings?)[ ]*\n[ ]*[-=~^"*]{3,}[ ]*$
    | ^[ ]*(?:Examples?|Notes?|References|See[ ]also|Usage)[ ]*::?[ ]*$
    | ^[ ]*(?:>>>|\.\.[ ]|```|<Tip|In[ ]\[)
    """
)


class Text(NamedTuple):
    """A document of the corpus; its id is `source/name`."""

    source: str
    name: str
    text: str


class _File(NamedTuple):
    source: str
    module: str
    path: Path


def python_texts(*, workers: int = 1) -> list[Text]:
    """All documents of `builtin:python`, sorted by id, each id once; the same for any number of `workers`."""
    files = source_files()
    found: dict[tuple[str, str], Text] = {}
    parsed = parallel_map(file_texts, files, workers=workers, description="prepare: reading docstrings", unit="file")
    for text in itertools.chain(*parsed, _reference_topics()):
        found.setdefault((text.source, text.name), text)
    return [found[key] for key in sorted(found)]


def source_files() -> list[_File]:
    """All source files that are read, by source and module."""
    return [file for source, packages in sorted(DOMAINS.items()) for package in packages for file in _files(source, package)]


def _files(source: str, package: str) -> list[_File]:
    """The source files of a package or module, sorted, without tests."""
    top, *rest = package.split(".")
    root = _root(top).joinpath(*rest)
    if not root.is_dir():
        return [_File(source, package, root.with_suffix(".py"))]
    files = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED.isdisjoint(parts) and not parts[-1].startswith("test_") and not parts[-1].endswith("_test"):
            module = ".".join([package, *parts]).removesuffix(".__init__")
            files.append(_File(source, module, path))
    return files


def _root(package: str) -> Path:
    """Where a top-level package or module lies (a module without its suffix), found without importing it."""
    standard = Path(sysconfig.get_path("stdlib"), package)
    if standard.is_dir() or standard.with_suffix(".py").is_file():
        return standard
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"prepare.documents: builtin:python needs the package {package}; it is not installed here; install the "
            "project's requirements again, or set prepare.documents to a file or folder of your own"
        )
    origin = Path(spec.origin)
    return origin.parent if origin.name == "__init__.py" else origin.with_suffix("")


def file_texts(file: _File) -> list[Text]:
    """The documents of one source file, in the file's order; none if it is missing or cannot be parsed."""
    source = file.path.read_bytes() if file.path.is_file() else b""
    if b'"""' not in source and b"'''" not in source:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    return [Text(file.source, name, f"{head}\n\n{lead}") for name, head, lead in _objects(tree, file.module)]


def _objects(node: ast.AST, name: str) -> Iterator[tuple[str, str, str]]:
    """Name, name with parameters, and lead of the docstring of `node` and of the public objects in it."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        lead = _lead(ast.get_docstring(node) or "")
        if lead:
            yield name, _head(node, name), lead
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if not child.name.startswith("_"):
                yield from _objects(child, f"{name}.{child.name}")
        elif isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from _objects(child, name)


def _lead(docstring: str) -> str:
    """The first lines of a docstring; none if they are a template or hold characters that are no text."""
    end = _END.search(docstring)
    first, *lines = docstring[: end.start() if end else None].strip().split("\n")
    lead = first
    for line in lines:
        if len(lead) + len(line) > LEAD:
            break
        lead = f"{lead}\n{line}"
    return "" if "%(" in lead or not _is_prose(lead) else lead.strip()


def _is_prose(text: str) -> bool:
    """Whether most of the visible characters are letters, and none is a control character or half a surrogate pair."""
    visible = [character for character in text if not character.isspace()]
    letters = sum(map(str.isalpha, visible))
    return letters > 0.6 * len(visible) and all(character.isprintable() for character in visible)


def _head(node: ast.AST, name: str) -> str:
    """The name, for a function with its parameters and their defaults, as many as fit."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return name
    arguments = node.args
    defaults = [None] * (len(arguments.posonlyargs + arguments.args) - len(arguments.defaults)) + arguments.defaults
    pairs = [(one.arg, default) for one, default in zip(arguments.posonlyargs + arguments.args, defaults, strict=True)]
    if arguments.vararg or arguments.kwonlyargs:
        pairs.append((f"*{arguments.vararg.arg}" if arguments.vararg else "*", None))
    pairs += [(one.arg, default) for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        pairs.append((f"**{arguments.kwarg.arg}", None))
    shown = [one if default is None else f"{one}={ast.unparse(default)}" for one, default in pairs if one not in ("self", "cls")]
    while shown and len(", ".join(shown)) > MAX_SIGNATURE:
        shown = [*shown[: -2 if shown[-1] == "..." else -1], "..."] if len(shown) > 1 else []
    return f"{name}({', '.join(shown)})"


def _reference_topics() -> list[Text]:
    """The language reference, paragraph by paragraph: the topic's title, a blank line, and paragraphs of it.

    None where Python comes without `pydoc_data`.
    """
    path = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")
    tree = ast.parse(path.read_bytes() if path.is_file() else b"")
    texts = []
    for table in (node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)):
        for key, value in zip(table.keys, table.values, strict=True):
            title, _, body = ast.literal_eval(value).strip().partition("\n")
            underline, _, rest = body.partition("\n")
            paragraphs = (body if underline.strip("*=-~") else rest).split("\n\n")
            texts += [
                Text(REFERENCE, f"{ast.literal_eval(key)}.{number:03d}", f"{title.strip()}\n\n{passage}")
                for number, passage in enumerate(_passages(paragraphs), start=1)
                if _is_prose(passage)
            ]
    return texts


def _passages(paragraphs: list[str]) -> Iterator[str]:
    """Neighbouring paragraphs, as many together as have `LEAD` characters."""
    passage = ""
    for paragraph in paragraphs:
        if passage and len(passage) + len(paragraph) > LEAD:
            yield passage
            passage = ""
        passage = f"{passage}\n\n{paragraph}".strip("\n")
    if passage:
        yield passage
