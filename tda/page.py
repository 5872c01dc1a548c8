"""A page: its template filled in, everything escaped and nothing but its own style allowed; words and numbers for people.

Documents are hostile input: they are shown as text, with their invisible characters made visible.
"""

import base64
import hashlib
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tda import charts
from tda.excerpts import excerpt

TEMPLATES = Path(__file__).parent / "templates"
TEXT_CHARACTERS = 6000  # of a document shown in a page; the rest is in the workspace
_JOINERS = {"\u200c", "\u200d"}  # invisible, and part of ordinary words and emoji


def render(template: str, **values: Any) -> str:
    """The page of `template`, everything escaped, its style sheet allowed by digest and everything else forbidden."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": charts.number,
        "scaled": charts.scaled,
        "signed": signed,
        "percent": percent,
        "visible": visible,
        "label": label,
        "minus": minus,
    }
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template(template).render(style=Markup(style), style_digest=digest, **values)


# Words and numbers


def signed(value: int | float) -> str:
    """A change of a loss: four decimals, its sign always there."""
    return f"{value:+.4f}".replace("-", "−")


def minus(text: str) -> str:
    """`text` with true minus signs before its numbers."""
    return re.sub(r"(?<![\w-])-(?=\d)", "−", text)


def percent(share: int | float) -> str:
    """A share in percent, a decimal where it is small."""
    return f"{share:.0%}" if share == 0 or share >= 0.1 else f"{share:.1%}"


def label(name: str) -> str:
    """A key as words."""
    return name.replace("_", " ").strip().capitalize()


def visible(text: str) -> str:
    """`text` with its line ends made plain and control, direction and other invisible characters shown by their numbers.

    What a reader judges must be all that is there, and nothing in it may reorder or hide the page around it.
    """
    text = text.replace("\r\n", "\n").replace("\u2028", "\n").replace("\u2029", "\n")
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or (code >= 32 and unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Co"}):
        return character
    return character if character in _JOINERS else f"⟨U+{code:04X}⟩"


def flat(values: dict, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows of dotted name and value."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        rows += flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", str(value))]
    return rows


def both(draw: Callable[[int], Markup]) -> Markup:
    """A chart for a screen and one for a phone; the style sheet shows one of them."""
    return draw(charts.WIDE) + draw(charts.NARROW)


def document_card(text: str) -> dict:
    """A document's text as the page shows it: its beginning, all of it where that is longer, and what is left out."""
    shown = visible(text[:TEXT_CHARACTERS])
    beginning = excerpt(shown)
    return {
        "excerpt": beginning,
        "text": shown if len(beginning) < len(shown.strip("\n")) else "",
        "num_characters": len(text),
        "clipped": len(text) > TEXT_CHARACTERS,
    }
