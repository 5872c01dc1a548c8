"""Writes the same rows twice, once undisturbed and once killed again and again; prints both manifests and what was seen, as JSON.

A process of its own, because it forks: nothing before a fork may have imported lance.
"""

import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tda import store
from tests.store_rows import documents_of, make_rows, open_for_writing

store.MAX_FRAGMENTS = 8  # so that sealing compacts
DIM, PER_COMMIT = 2048, 6
IDS = [f"doc-{number}" for number in range(180)]


def attempt(folder: Path, report: Callable[[str], None]) -> None:
    """One run of a writer; reports `R rows` when ready, `C rows` after each commit, and S before it seals."""
    table = open_for_writing(folder, dim=DIM)
    have = table.present()
    report(f"R {len(have)}")
    missing = [doc for doc in IDS if doc not in have]
    for start in range(0, len(missing), PER_COMMIT):
        table.write([make_rows(missing[start : start + PER_COMMIT], dim=DIM)])
        report(f"C {len(table)}")
    report("S 0")
    manifest = folder / "manifest.json"
    manifest.with_suffix(".part").write_text(json.dumps(table.seal(documents_of(IDS))))
    manifest.with_suffix(".part").replace(manifest)


def run(folder: Path, kill_after: tuple[str, int, float] | None) -> tuple[list[list[str]], float, bool]:
    """What one attempt reported, its seconds once ready, and whether it was killed: so long after so many such reports.

    It goes on from a report when it is told to, and is told no more once it is to be killed: so it cannot end before that.
    """
    ours, theirs = os.pipe()
    awaited, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        os.close(go)

        def report(line: str) -> None:
            os.write(theirs, f"{line}\n".encode())
            os.read(awaited, 1)

        attempt(folder, report)
        os._exit(0)
    os.close(theirs)
    text, ready, deadline, killed = "", None, None, False
    while True:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([ours], [], [], wait)[0]:
            os.kill(child, signal.SIGKILL)
            killed, deadline = True, None
            continue
        piece = os.read(ours, 4096).decode()
        if not piece:
            break
        text += piece
        ready = ready or time.monotonic()
        if deadline is None:
            os.write(go, bytes(piece.count("\n")))
            if kill_after and not killed and text.count(kill_after[0]) >= kill_after[1]:
                deadline = time.monotonic() + kill_after[2]
    for end in (ours, awaited, go):
        os.close(end)
    _, status = os.waitpid(child, 0)
    assert killed or status == 0, f"the writer ended with status {status}"
    return [line.split() for line in text.splitlines()], time.monotonic() - (ready or time.monotonic()), killed


def main(root: Path, seed: int) -> None:
    """Write undisturbed, then with kills spread over writing and sealing."""
    draw = random.Random(seed)
    lines, seconds, _ = run(root / "plain", None)
    kills, losses, committed, starts = 0, 0, 0, []
    commit = seconds * PER_COMMIT / len(IDS)  # seconds of one
    plan = [("C", draw.randint(1, 4), draw.uniform(0, commit)) for _ in range(5)]  # of 30 commits
    plan += [("S", 1, draw.uniform(0, 0.05)) for _ in range(2)] + [None]
    for kill_after in plan:
        lines, _, killed = run(root / "killed", kill_after)
        kills += killed
        counts = [int(count) for kind, count in lines if kind in "RC"]
        if counts:
            losses += counts[0] < committed
            starts.append(counts[0])
            committed = max(counts)
    with Path(root / "killed" / "manifest.json").open(encoding="utf-8") as file:
        killed_manifest = json.load(file)
    with Path(root / "plain" / "manifest.json").open(encoding="utf-8") as file:
        plain_manifest = json.load(file)
    print(json.dumps({"plain": plain_manifest, "killed": killed_manifest, "kills": kills, "losses": losses, "starts": starts}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
