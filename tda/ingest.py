"""Reading a user's documents. Malformed rows are put into quarantine, with their place and the reason, never silently lost."""

import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from tda.parallel import progress_is_shown
from tda.readers import EXCERPT, Malformed, Row, neighbouring_form, not_read, rows, stem

MAX_ID = 512  # characters
PARTS = ("general", "mixed")
REMEDIES = {  # of malformed rows, by how the reason ends
    "duplicate id with other content": 'set prepare.id_field to "", so that ids are made from the texts, or mend the rows',
    "neither text nor a whole number": 'name a field of these, or "" for none, or mend the rows',
    "is not text": "name a field of text; lists, such as the messages of a chat, have to be written out as text",
}
OTHER_REMEDY = (
    "name fields that are there (text_field, or prompt_field and completion_field), mend the rows, or raise max_bad_rows"
)


@dataclass(frozen=True, slots=True)
class Document:
    """A document before it is tokenised. With a prompt and a completion, `text` is the two joined."""

    id: str
    source: str
    text: str
    prompt: str = ""
    completion: str = ""
    part: str = ""  # general or mixed; empty: decided by the source


@dataclass(frozen=True)
class Fields:
    """Names of the fields to read; empty: there is none. Where `completion` is set, `text` is not read."""

    text: str = "text"
    prompt: str = ""
    completion: str = ""
    id: str = ""
    source: str = ""
    part: str = ""


@dataclass
class Reading:
    """What was read: documents in the order of their rows, rows put aside, and the number of rows of both kinds."""

    documents: list[Document] = field(default_factory=list)
    quarantine: list[dict] = field(default_factory=list)  # file, line, reason, row
    num_rows: int = 0
    num_ids_made: int = 0
    names: dict[str, None] = field(default_factory=dict)  # of fields that rows have, the first ones, for messages
    absent: set[str] = field(default_factory=set)  # fields that were named and no row has
    whole: bool = True  # whether all rows were read


class _Refused(Exception):  # noqa: N818 (not an error of the program: the row is put aside)
    """The row is not a document; the message is the reason."""


def part_of(document: Document, general_sources: Collection[str]) -> str:
    """The part of training that a document is in: the one that it names, else the one of its source."""
    return document.part or ("general" if document.source in general_sources else "mixed")


def content_hash(text: str) -> str:
    """The identity of a text: xxh3_128, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8"))


def join(prompt: str, completion: str) -> str:
    """Prompt and completion as one text, with a line break between them where neither has white space."""
    return prompt + separator(prompt, completion) + completion


def separator(prompt: str, completion: str) -> str:
    """What `join` puts between prompt and completion."""
    return "" if not prompt or prompt[-1].isspace() or completion[:1].isspace() else "\n"


def read_documents(
    location: str,
    *,
    fields: Fields,
    split: str,
    max_bad_rows: float,
    key: str,
    at_most: int | None = None,
) -> Reading:
    """All documents at `location`, which stands under `key` in `params.yaml`, or those of the first `at_most` rows.

    A row without an id gets one made from its source and content, one without a source its file's name. Of rows with the
    same id, the first is kept, and later ones with other content are put aside.

    Raises:
        FileNotFoundError: there is nothing at `location`.
        ValueError: it cannot be read, is empty, or more than the share `max_bad_rows` of its rows is malformed; of the first
            rows alone all may be but one.
    """
    if bool(fields.prompt) != bool(fields.completion):
        raise ValueError(
            "prepare: prompt_field and completion_field belong together: expected both or none; got "
            f"{fields.prompt!r} and {fields.completion!r}; set both, or neither and text_field"
        )
    if left := not_read(location):
        names = ", ".join(left[:10]) + (f" and {len(left) - 10} more" if len(left) > 10 else "")
        print(f"{key}: not read, of no known kind, in {location}: {names}", file=sys.stderr)
    reading = Reading(absent={fields.id, fields.source, fields.part} - {""})
    hashes: dict[str, str] = {}
    try:
        for row in tqdm(rows(location, split=split), desc=f"reading {key}", unit="row", disable=not progress_is_shown()):
            if reading.num_rows == at_most:
                reading.whole = False
                break
            reading.num_rows += 1
            if isinstance(row.value, dict):
                reading.absent.difference_update(row.value)
                if len(reading.names) < 50:
                    reading.names.update(dict.fromkeys(map(str, row.value)))
            try:
                document, made = _document(row, fields=fields)
                digest = content_hash(document.text)
                if hashes.setdefault(document.id, digest) != digest:
                    raise _Refused("duplicate id with other content")
            except _Refused as refused:
                reading.quarantine.append(_put_aside(row, reason=str(refused)))
                continue
            reading.documents.append(document)
            reading.num_ids_made += made
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    if reading.whole or not reading.documents:
        _check(reading, location=location, max_bad_rows=max_bad_rows, key=key)
    return reading


def _check(reading: Reading, *, location: str, max_bad_rows: float, key: str) -> None:
    if reading.num_rows == 0:
        raise ValueError(f"{key}: {location} is empty: expected rows, got none; check the path and prepare.split")
    bad = len(reading.quarantine)
    if bad > max_bad_rows * reading.num_rows:
        reasons = Counter(row["reason"] for row in reading.quarantine)
        counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        first = ", ".join(f"{row['file']}:{row['line']}" for row in reading.quarantine[:3])
        raise ValueError(
            f"{key}: {bad} of {reading.num_rows} rows of {location} are malformed, more than the share {max_bad_rows:g} "
            f"that prepare.max_bad_rows allows; {counts}; first at "
            f"{first}; fields found: {', '.join(reading.names) or 'none'}; "
            f"{_remedy(location, reading.quarantine[0]['file'], reasons.most_common(1)[0][0])}"
        )


def _remedy(location: str, file: str, reason: str) -> str:
    """What to do about malformed rows at `location`, the first of them in `file`, most of them for `reason`."""
    path = Path(location, file) if Path(location).is_dir() else Path(location)
    if form := neighbouring_form(path):
        return f"{path} {form}"
    return next((remedy for end, remedy in REMEDIES.items() if reason.endswith(end)), OTHER_REMEDY)


def _document(row: Row, *, fields: Fields) -> tuple[Document, bool]:
    """The document in a row, and whether its id had to be made."""
    value = row.value
    if isinstance(value, Malformed):
        raise _Refused(value.reason)
    if not isinstance(value, dict):
        raise _Refused("not an object")
    prompt = completion = ""
    if fields.completion:
        prompt = _text(value, fields.prompt, may_be_empty=True)
        completion = _text(value, fields.completion)
        text = join(prompt, completion)
    else:
        text = _text(value, fields.text)
    part = _name(value, fields.part) or ""
    if part not in {"", *PARTS}:
        raise _Refused(f"field {fields.part} is neither general nor mixed")
    source = _name(value, fields.source) or stem(row.file)
    given = _name(value, fields.id)
    return Document(given or f"{source}/{content_hash(text)}", source, text, prompt, completion, part), given is None


def _text(row: dict, name: str, *, may_be_empty: bool = False) -> str:
    value = row.get(name)
    if value is None:
        raise _Refused(f"field {name} is missing")
    if not isinstance(value, str):
        raise _Refused(f"field {name} is not text")
    _check_characters(value, name)
    if not may_be_empty and not value.strip():
        raise _Refused(f"field {name} is empty")
    return value


def _name(row: dict, name: str) -> str | None:
    """The value of a field that names something; None if there is none."""
    value = row.get(name) if name else None
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise _Refused(f"field {name} is neither text nor a whole number")
    _check_characters(value, name)
    if len(value) > MAX_ID or not value.isprintable():
        raise _Refused(f"field {name} is too long or has control characters")
    return value


def _check_characters(value: str, name: str) -> None:
    if "\0" in value:
        raise _Refused(f"field {name} has a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _Refused(f"field {name} is not valid Unicode") from None


def _put_aside(row: Row, *, reason: str) -> dict:
    """An entry of the quarantine; the row's beginning is made fit to be written as UTF-8."""
    excerpt = row.value.excerpt if isinstance(row.value, Malformed) else _shown(row.value)
    return {
        "file": row.file,
        "line": row.line,
        "reason": reason,
        "row": excerpt.encode("utf-8", "backslashreplace").decode("utf-8"),
    }


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {str(item)[:EXCERPT]}" for key, item in list(value.items())[:20])[:EXCERPT]
    return str(value)[:EXCERPT]
