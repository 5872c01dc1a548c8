"""A pipeline small enough for tests: sixty short documents, a model of a few thousand weights, two segments."""

import json
import random
from pathlib import Path

import yaml

from tda import stages
from tda.artifacts import Workspace
from tda.config import Config, parse_config

PARAMS = Path(__file__).parent.parent / "params.yaml"
SUBJECTS = {
    "garden": ["rose", "oak", "fern", "moss", "pear", "vine"],
    "harbour": ["boat", "rope", "tide", "gull", "mast", "quay"],
}
BY_SOURCE = {"scores__averaged_influence": False, "curation__method": "source"}  # for `toy_config`
VERBS = ["holds", "shades", "meets", "follows", "covers", "finds"]


def sentences(source: str, seed: int, count: int = 4) -> str:
    chosen = random.Random(f"{source}/{seed}")
    words = SUBJECTS[source]
    return " ".join(f"The {chosen.choice(words)} {chosen.choice(VERBS)} the {chosen.choice(words)}." for _ in range(count))


def write_corpus(folder: Path, *, num_documents: int = 60) -> None:
    """`documents.jsonl` and `targets.jsonl`; targets are of the second source."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = list(SUBJECTS)
    rows = [
        {"id": f"{sources[n % 2]}-{n:03d}", "source": sources[n % 2], "text": sentences(sources[n % 2], n)}
        for n in range(num_documents)
    ]
    targets = [{"id": f"target-{n}", "source": "harbour", "text": sentences("harbour", 1000 + n)} for n in range(8)]
    for name, held in (("documents", rows), ("targets", targets)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held), encoding="utf-8")


def toy_values(folder: Path) -> dict:
    """`params.yaml` of the toy, as nested values."""
    values = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    values["prepare"] |= {
        "documents": str(folder / "documents.jsonl"),
        "targets": str(folder / "targets.jsonl"),
        "general_sources": ["garden"],
        "num_targets": 8,
        "num_heldout": 6,
        "max_documents": 0,
        "min_characters": 10,
        "near_duplicate_threshold": 0,
        "damage": 0.1,
        "vocabulary": 300,
        "context": 24,
    }
    values["train"] |= {
        "architecture": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_layers": 2,
            "num_heads": 2,
            "num_key_value_heads": 1,
            "tie_embeddings": True,
        },
        "batch_size": 8,
        "learning_rate": 0.01,
        "stages": [{"part": "general", "epochs": 1}, {"part": "mixed", "epochs": 2}],
        "checkpoints": [0, 1, 2, 3],
    }
    values["segments"]["indices"] = [0, 1]
    values["curvature"]["num_documents"] = 20
    values["gradients"] |= {"rank": 4, "batch_tokens": 256}
    values["retraining"]["seeds"] = [0, 1]
    values["compute"] |= {"device": "cpu", "workers": 1}
    return values


def toy_config(folder: Path, **changes: object) -> Config:
    """The toy's configuration; `changes` as `train__optimizer="sgd"`."""
    values = toy_values(folder)
    for key, value in changes.items():
        section, name = key.split("__")
        values[section][name] = value
    return parse_config(values, origin="toy")


def write_params(folder: Path, values: dict) -> None:
    """`values` as the folder's `params.yaml`."""
    (folder / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")


def run_stages(config: Config, workspace: Workspace, *names: str) -> None:
    """The stages, every part of each, in this process."""
    for name in names:
        parts = {"curvature": config.segments.indices, "gradients": config.train.checkpoints}.get(name)
        for arguments in [(part,) for part in parts] if parts else [()]:
            getattr(stages, name)(config, workspace, *arguments)
