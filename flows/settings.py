"""Edits of `params.yaml` and `dvc.yaml` that keep comments and layout."""

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from tda.artifacts import whole
from tda.config import parse_config


def _yaml() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return yaml


def read_yaml(path: Path) -> CommentedMap:
    """The document in `path`, with its comments."""
    return _yaml().load(path.read_text(encoding="utf-8"))


def write_yaml(path: Path, document: CommentedMap) -> bool:
    """Write `document` to `path`; whether that changed the file."""
    text = io.StringIO()
    _yaml().dump(document, text)
    if text.getvalue() == path.read_text(encoding="utf-8"):
        return False
    with whole(path) as part:
        part.write_text(text.getvalue(), encoding="utf-8")
    return True


def override(path: Path, values: dict[str, Any]) -> bool:
    """Set keys such as `curation.drop` in the settings at `path`, so that the run can be repeated; whether the file changed.

    Nothing is written unless all of them are valid.

    Raises:
        ValueError: a key is unknown or a value is wrong.
    """
    document = read_yaml(path)
    for key, value in values.items():
        *sections, name = key.split(".")
        section = document
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or not sections:
            raise ValueError(f"{key}: no such setting; expected section.key as in {path.name}, for example curation.drop")
        section[name] = _styled(value)
    parse_config(document, origin=f"{path.name} with {', '.join(values)}" if values else path.name)
    return write_yaml(path, document)


def _styled(value: Any) -> Any:
    """Lists on one line, as the file has them."""
    if isinstance(value, list):
        styled = CommentedSeq(value)
        styled.fa.set_flow_style()
        return styled
    return value
