"""What is needed to reproduce a result: the code's commit, the data's digests, and the versions of installed packages."""

import hashlib
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = [
    "tda",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "lancedb",
    "pylance",
    "polars",
    "numpy",
    "scipy",
    "bm25s",
    "dvc",
    "prefect",
]


def provenance(root: Path) -> dict:
    """The state of the project in `root`, without times, host names and paths, so that it is the same on every machine.

    `lock_digest` leaves out the stage `report`, whose entry depends on the page that quotes the digest.
    """
    commit = _commit(root)
    return {
        "commit": commit,
        "commit_date": _git(root, "show", "-s", "--format=%cs", "HEAD") if commit else "",
        "changed": _has_changes(root, without=["dvc.lock"]) if commit else None,
        "lock_digest": lock_digest(root / "dvc.lock", without=["report"]),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def how_to_reproduce(root: Path) -> str:
    """Sentences on how to get a run in `root` again."""
    commit = _commit(root)[:12]
    if not commit:
        return "Put this folder under git: a run is reproduced from the commit that has its params.yaml and dvc.lock."
    if _has_changes(root):
        changed = f"Commit what changed since `{commit}`, params.yaml and dvc.lock at least"
        return f"{changed}; then `git checkout` that commit, and `make run`."
    return f"`git checkout {commit}`, then `make run`."


def lock_digest(path: Path, *, without: list[str]) -> str:
    """SHA-256 of the stages in DVC's lock file, whatever their order; empty if there is none."""
    if not path.is_file():
        return ""
    stages = re.split(r"^(?=  \S)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    kept = sorted(stage.rstrip() for stage in stages if stage.strip().partition(":")[0] not in without)
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()


def _commit(root: Path) -> str:
    """The commit that is checked out in `root`; empty outside a repository or without git."""
    return _git(root, "rev-parse", "HEAD")


def _has_changes(root: Path, *, without: Sequence[str] = ()) -> bool:
    """Whether files that git tracks below `root`, except those in `without`, differ from the commit."""
    excluded = [f":(exclude){name}" for name in without]
    return bool(_git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *excluded))


def _git(root: Path, *arguments: str) -> str:
    """Git's answer; empty outside a repository or without git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
