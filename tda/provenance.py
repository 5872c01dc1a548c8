"""What is needed to reproduce a result: the code's commit, the data's digests, and the versions of installed packages."""

import hashlib
import platform
import re
import subprocess
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
    commit = _git(root, "rev-parse", "HEAD")
    return {
        "commit": commit,
        "commit_date": _git(root, "show", "-s", "--format=%cs", "HEAD") if commit else "",
        "changed": bool(_git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)dvc.lock"))
        if commit
        else None,
        "lock_digest": lock_digest(root / "dvc.lock", without=["report"]),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def lock_digest(path: Path, *, without: list[str]) -> str:
    """SHA-256 of the stages in DVC's lock file, whatever their order; empty if there is none."""
    if not path.is_file():
        return ""
    stages = re.split(r"^(?=  \S)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    kept = sorted(stage.rstrip() for stage in stages if stage.strip().partition(":")[0] not in without)
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()


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
