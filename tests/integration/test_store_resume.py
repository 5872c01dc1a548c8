import json
import resource
import subprocess
import sys
from pathlib import Path

import lance
import lancedb
import pytest

from tda import store as store_module
from tda.store import open_sealed, table_path
from tests.store_rows import documents_of, make_rows, open_for_writing

IDS = [f"doc-{number}" for number in range(64)]
DIM = 8192


def test_a_writer_killed_again_and_again_ends_with_the_same_rows(tmp_path):
    command = [sys.executable, "-m", "tests.integration.killed_writer", str(tmp_path), "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])

    assert seen["kills"] >= 5
    assert seen["losses"] == 0, seen["starts"]
    assert seen["killed"] == seen["plain"]
    tables = [open_sealed(tmp_path / name, seen["plain"]) for name in ("plain", "killed")]
    assert len(tables[0]) == len(tables[1]) == seen["plain"]["rows"]  # no document twice
    left = [sum(file.stat().st_size for file in table_path(table.store, table.name).glob("data/*")) for table in tables]
    assert left[1] <= 1.5 * left[0]  # unfinished files of the killed writers are gone


def test_unfinished_files_go_when_the_table_is_opened_again(tmp_path):
    table = open_for_writing(tmp_path)
    table.write([make_rows(IDS)])
    left_over = table_path(tmp_path, table.name) / "data" / ".tmp0123456789abcdef"
    uncommitted = left_over.with_name("0" * 24 + "abcdef0123456789abcdef0123.lance")
    left_over.write_bytes(b"half a file")
    uncommitted.write_bytes(b"a file that no version names")
    open_for_writing(tmp_path)
    assert not left_over.exists()
    assert not uncommitted.exists()
    assert open_for_writing(tmp_path).present().keys() == set(IDS)


def test_a_folder_that_was_never_a_table_is_made_one(tmp_path):
    name = open_for_writing(tmp_path / "other").name
    (table_path(tmp_path, name) / "data").mkdir(parents=True)
    table = open_for_writing(tmp_path)
    table.write([make_rows(IDS)])
    assert lancedb.connect(tmp_path).open_table(name).count_rows() == len(IDS)


def check_full_disk(folder: Path, monkeypatch) -> None:
    """A disk that takes the first rows and no more: a clear error, the first rows are safe, and writing goes on later."""
    monkeypatch.setattr(store_module.GradientTable, "check_space", lambda *_: None)  # the disk itself is to refuse
    table = open_for_writing(folder, dim=DIM)
    with pytest.raises(OSError, match=r"no space left while writing .*; the rows committed before are safe: free some"):
        table.write([make_rows([f"too-much-{number}" for number in range(300)], dim=DIM)])
    assert table.present().keys() == set(IDS[:8])
    assert not list(table_path(folder, table.name).glob("data/.tmp*"))
    table.write([make_rows(IDS[8:16], dim=DIM)])
    manifest = table.seal(documents_of(IDS[:16]))
    assert len(open_sealed(folder, manifest)) == 16


def test_a_file_size_limit_leaves_the_store_whole(tmp_path, monkeypatch):
    open_for_writing(tmp_path, dim=DIM).write([make_rows(IDS[:8], dim=DIM)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        check_full_disk(tmp_path, monkeypatch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_store_whole(tmp_path, monkeypatch):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no right to mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(OSError, match=r"need 0\.07 GB, 0\.00 GB are free"):
            open_for_writing(tmp_path, dim=DIM).write([make_rows(IDS[:8], dim=DIM)])
        monkeypatch.setattr(store_module, "SPARE_BYTES", 0)
        open_for_writing(tmp_path, dim=DIM).write([make_rows(IDS[:8], dim=DIM)])
        check_full_disk(tmp_path, monkeypatch)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_table_sealed_before_can_be_read_while_it_is_written(tmp_path):
    table = open_for_writing(tmp_path)
    table.write([make_rows(IDS)])
    manifest = table.seal(documents_of(IDS))
    scan = open_sealed(tmp_path, manifest).scan(IDS, block_rows=8)
    next(scan)
    writer = open_for_writing(tmp_path)
    writer.write([make_rows(IDS, version=1)])
    writer.seal(documents_of(IDS, version=1))
    assert sum(len(rows) for _, rows in scan) == len(IDS) - 8
    assert open_sealed(tmp_path, manifest).digest(IDS) == manifest["digest"]
    assert len(lance.dataset(table_path(tmp_path, table.name)).tags.list()) == 2
