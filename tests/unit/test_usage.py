"""Memory that is left where a container has a limit."""

import pytest

from tda.usage import free_memory, left_by_control_groups


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_a_group_leaves_its_limit_less_what_is_used_and_not_mere_files(tmp_path):
    group(tmp_path / "proc/self", cgroup="0::/jobs/one")
    mount = tmp_path / "sys/fs/cgroup"
    group(mount / "jobs/one", memory__max=1000, memory__current=700, memory__stat="anon 500\ninactive_file 150")
    group(mount / "jobs", memory__max=5000, memory__current=4000, memory__stat="anon 1")
    group(mount, memory__max="max", memory__current=9000, memory__stat="anon 1")
    assert left_by_control_groups(tmp_path) == [450, 1000]


def test_groups_of_the_first_version(tmp_path):
    group(tmp_path / "proc/self", cgroup="5:cpu,cpuacct:/\n4:memory:/docker/abc")
    held = {"memory__limit_in_bytes": 800, "memory__usage_in_bytes": 900, "memory__stat": "total_inactive_file 40"}
    group(tmp_path / "sys/fs/cgroup/memory/docker/abc", **held)
    assert left_by_control_groups(tmp_path) == [0]


@pytest.mark.parametrize("lines", ["", "0::/gone", "4:memory:/gone"])
def test_groups_that_cannot_be_read_set_no_limit(tmp_path, lines):
    group(tmp_path / "proc/self", cgroup=lines)
    assert left_by_control_groups(tmp_path) == []
    assert left_by_control_groups(tmp_path / "nowhere") == []


def test_there_is_some_memory():
    assert free_memory() > 2**20
