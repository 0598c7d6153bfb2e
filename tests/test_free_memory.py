"""What is free where no budget is given: the machine's memory, and what each control group's limit leaves."""

import pytest
import torch

from fullframe.budget import host_bytes

CPU = torch.device("cpu")
GB = 10**9
V2 = "30 23 0:26 {root} {at} rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
V1 = "31 23 0:27 {root} {at} rw,nosuid shared:5 - cgroup cgroup rw,memory\n"
V1_CPU = "32 23 0:28 {root} {at} rw,nosuid shared:6 - cgroup cgroup rw,cpu,cpuacct\n"


def tree(folder, files):
    """A system's files under a folder; numbers are bytes."""
    for name, content in (
        {"proc/meminfo": "MemTotal: 99999999 kB\nMemAvailable: 20000000 kB\n"} | dict(files)
    ).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return folder


def group(at, limit, used, pages=0, high="max"):
    stat = f"anon {used - pages}\nfile {pages}\ninactive_file {pages // 4}\nactive_file {pages - pages // 4}"
    return {
        f"{at}/memory.max": limit,
        f"{at}/memory.high": high,
        f"{at}/memory.current": used,
        f"{at}/memory.stat": stat,
    }


def group1(at, limit, used, pages=0):
    stat = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {pages // 4}\ntotal_active_file {pages - pages // 4}"
    return {f"{at}/memory.limit_in_bytes": limit, f"{at}/memory.usage_in_bytes": used, f"{at}/memory.stat": stat}


def second(path, *, root="/", at="/sys/fs/cgroup"):
    return {"proc/self/cgroup": f"0::{path}", "proc/self/mountinfo": V2.format(root=root, at=at)}


def first(path, root="/"):
    mounts = V1_CPU.format(root=root, at="/sys/fs/cgroup/cpu") + V1.format(root=root, at="/sys/fs/cgroup/memory")
    return {"proc/self/cgroup": f"4:cpu,cpuacct:/other\n3:memory:{path}\n0::/", "proc/self/mountinfo": mounts}


AT, AT1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"
NONE1 = 9223372036854771712  # how version 1 says that there is no limit
CASES = {
    "no groups": ({}, 20_480_000_000),
    "a container sees its own": (second("/") | group(AT, 4 * GB, GB), 3 * GB),
    "read files can be taken back": (second("/") | group(AT, 4 * GB, 4 * GB, 3 * GB), 3 * GB),
    "no limit": (second("/") | group(AT, "max", GB), 20_480_000_000),
    "throttled": (second("/") | group(AT, 8 * GB, GB, high=2 * GB), GB),
    "a parent's": (
        second("/user/job/step") | group(f"{AT}/user", 5 * GB, 3 * GB, GB) | group(f"{AT}/user/job", "max", 2 * GB)
        | group(f"{AT}/user/job/step", 9 * GB, GB),
        3 * GB,
    ),
    "one's own is the least": (
        second("/user/job") | group(f"{AT}/user", 9 * GB, GB) | group(f"{AT}/user/job", 2 * GB, GB), GB),
    "a mount of a part": (second("/box/a/b", root="/box/a") | group(f"{AT}/b", 2 * GB, 0) | group(AT, GB, 0), GB),
    "a name of outside": (second("/../elsewhere") | group(AT, 4 * GB, GB), 3 * GB),
    "mounted elsewhere": (second("/a", at="/mnt/groups") | group("mnt/groups/a", 2 * GB, GB), GB),
    "version 1": (first("/") | group1(AT1, 4 * GB, 2 * GB, GB), 3 * GB),
    "version 1, a parent's": (
        first("/slurm/job") | group1(f"{AT1}/slurm", 3 * GB, GB) | group1(f"{AT1}/slurm/job", NONE1, GB), 2 * GB),
    "version 1, in a container": (first("/docker/x", root="/docker/x") | group1(AT1, 3 * GB, GB), 2 * GB),
    "nothing left": (second("/") | group(AT, GB, 2 * GB), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_free(name, tmp_path):
    files, expected = CASES[name]
    assert host_bytes(tree(tmp_path, files)) == expected


def test_what_is_free_where_nobody_says(tmp_path):
    assert host_bytes(tmp_path) == 8 * GB


def test_what_is_free_here():
    assert 1 < host_bytes() < 1 << 50
