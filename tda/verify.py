"""`tda verify` and `tda gc`: whether the gradient store holds what the manifests say, and removing what no manifest names."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tda import store
from tda.artifacts import Workspace, only_run, read_json, read_table

NEEDED = ("table", "tag", "rows", "dim", "dtype", "digest", "documents", "fingerprint", "identity", "checkpoint", "segment")


def verify(workspace: Workspace) -> list[str]:
    """What is wrong with the store, a line per problem; empty if the rows of every manifest hash to its digest."""
    paths = manifest_paths(workspace)
    if not paths:
        return [f"{_folder(workspace)} holds no manifest, so there is nothing to check; run `dvc repro`"]
    table = read_table(workspace.documents, stage="prepare", columns=["id", "content_hash"])
    documents = list(zip(table["id"].to_list(), table["content_hash"].to_list(), strict=True))
    missing = [
        f"{workspace.gradients(checkpoint)} is missing, and so are the rows of checkpoint {checkpoint}; run `dvc checkout`, or "
        f"`dvc repro gradients@{checkpoint}`"
        for checkpoint in _without_manifest(workspace, paths)
    ]
    return [*missing, *(problem for path in paths for problem in _problems(workspace, path, documents))]


def _without_manifest(workspace: Workspace, paths: list[Path]) -> list[int]:
    """The checkpoints of the run that have none."""
    steps = read_json(workspace.training, stage="train")["checkpoint_steps"]
    return sorted(set(range(len(steps))) - {int(path.stem) for path in paths})


def _problems(workspace: Workspace, path: Path, documents: list[tuple[str, str]]) -> Iterator[str]:
    try:
        manifest = _manifest(path)
        if manifest["documents"] != store.documents_digest(documents):
            yield (
                f"{path} is for other documents than {workspace.documents} holds now (it has {manifest['rows']}, there are "
                f"{len(documents)}); run `dvc repro gradients@{manifest['checkpoint']}`"
            )
            return
        digest = store.open_sealed(workspace.store, manifest).digest([doc for doc, _ in documents])
        if digest != manifest["digest"]:
            yield (
                f"{path}: the rows of {manifest['table']} hash to {digest}, the manifest says {manifest['digest']}: the store is "
                f"damaged; delete {store.table_path(workspace.store, manifest['table'])} and "
                f"run `dvc repro --single-item --force gradients@{manifest['checkpoint']}`"
            )
    except (OSError, ValueError, RuntimeError) as error:
        yield f"{path}: {error}"


def collect_garbage(workspace: Workspace, dry_run: bool = False) -> list[str]:
    """Remove from the store what no manifest needs. Returns a line for each thing removed, or with `dry_run` to be removed.

    Kept are the tables and tags that a manifest in the workspace names, and all of a checkpoint of the run that has no manifest:
    work is unfinished there, or DVC can bring the manifest back. Rows of other commits of the repository are removed; `dvc repro
    --force gradients@C` makes them again, and the next audit makes its own tags again. While a gradients stage runs or an audit
    adds documents, nothing is removed (RuntimeError).

    Raises:
        ValueError: there is no manifest, or one cannot be read, so that it is not known what is needed.
    """
    names = store.table_names(workspace.store)
    locks = set(workspace.work.glob("gradients-*.lock"))
    locks |= {workspace.work / f"gradients-{store.table_checkpoint(name)}.lock" for name in names}
    with contextlib.ExitStack() as held:
        for lock in sorted(locks):
            held.enter_context(only_run(lock))
        paths = manifest_paths(workspace)
        manifests = [_manifest(path) for path in paths]
        if not manifests:
            raise ValueError(
                f"{_folder(workspace)} holds no manifest, so every table would go; run `dvc repro` or `dvc checkout` first, "
                f"or delete {workspace.store} to start afresh"
            )
        waiting = _without_manifest(workspace, paths)
        settled = [name for name in names if store.table_checkpoint(name) not in waiting]
        return [line for name in settled for line in _collect(workspace, name, manifests, dry_run=dry_run)]


def _collect(workspace: Workspace, name: str, manifests: list[dict[str, Any]], *, dry_run: bool) -> Iterator[str]:
    done = "would remove" if dry_run else "removed"
    tags = {manifest["tag"] for manifest in manifests if manifest["table"] == name}
    if tags:
        stale, num_bytes = store.prune(workspace.store, name, keep_tags=tags, dry_run=dry_run)
        if stale or num_bytes:
            yield f"{done} {', '.join(stale) or 'untagged versions'} of {name}: {num_bytes} bytes"
        return
    yield f"{done} {name}: {store.drop_table(workspace.store, name, dry_run=dry_run)} bytes"


def manifest_paths(workspace: Workspace) -> list[Path]:
    """The manifests there are, by checkpoint."""
    return sorted((path for path in _folder(workspace).glob("*.json") if path.stem.isdigit()), key=lambda path: int(path.stem))


def _folder(workspace: Workspace) -> Path:
    return workspace.gradients(0).parent


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest in `path`.

    Raises:
        ValueError: it is not one.
    """
    remedy = f"run `dvc repro --single-item --force gradients@{path.stem}`"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {remedy}") from None
    lacking = [key for key in NEEDED if not isinstance(manifest, dict) or key not in manifest]
    if lacking:
        raise ValueError(f"{path} is not a manifest of gradient rows: it has no {', '.join(lacking)}; {remedy}")
    return manifest
