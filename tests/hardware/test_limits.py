"""What a job may use, on fabricated machines: files of the kernel below a folder, and Slurm's
variables.
"""

import os

import pytest

from dpfast.hardware import cpus, memory
from dpfast.hardware.cpus import cpu_counts
from dpfast.hardware.memory import free_memory
from dpfast.pool.memory_tiers import HOST_SHARE, MemoryTiers

GIB = 1 << 30
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"


def machine(root, files, *, group="0::/", mounts=(V2,), available=100):
    """A machine with ``available`` GiB, one control group and the files that are given, by path."""
    files = {
        "proc/meminfo": f"MemTotal: 131072000 kB\nMemAvailable: {available * (1 << 20)} kB\n",
        "proc/self/status": f"Name: python\nVmRSS: {2 << 20} kB\n",
        "proc/self/cgroup": group,
        "proc/self/mountinfo": "\n".join(mounts),
        **files,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def v2(folder, limit, used, *, high="max", cache=0):
    """The files of a group of version 2; GiB."""
    place = f"sys/fs/cgroup/{folder}".rstrip("/")
    stat = (
        f"anon 5\nfile {99 * GIB}\nshmem {50 * GIB}\ninactive_file {cache * GIB}\nactive_file "
        "0\nslab_reclaimable 0"
    )
    return {
        f"{place}/memory.max": limit if limit == "max" else limit * GIB,
        f"{place}/memory.high": high if high == "max" else high * GIB,
        f"{place}/memory.current": used * GIB,
        f"{place}/memory.stat": stat,
    }


def test_without_limits_the_kernel_s_word_counts(tmp_path):
    found = free_memory(machine(tmp_path, v2("", "max", 10)), {})
    assert [(free.bytes, free.source) for free in found] == [
        (100 * GIB, "MemAvailable of /proc/meminfo")
    ]


def test_a_container_under_version_2_has_its_limit_without_the_page_cache(tmp_path):
    root = machine(tmp_path, v2("", 32, 20, cache=12))
    free = free_memory(root, {})[0]
    assert (free.bytes, free.limit, free.source) == (
        24 * GIB,
        32 * GIB,
        "/sys/fs/cgroup/memory.max",
    )


def test_the_least_of_nested_groups_counts(tmp_path):
    files = {
        **v2("", "max", 90),
        **v2("slurm", 64, 60),
        **v2("slurm/job_1", 48, 2, high=40),
        **v2("slurm/job_1/step_0", 60, 1),
    }
    found = free_memory(machine(tmp_path, files, group="0::/slurm/job_1/step_0"), {})
    assert found[0].source == "/sys/fs/cgroup/slurm/memory.max"  # others have used it
    assert [free.bytes // GIB for free in found] == [
        4,
        38,
        46,
        59,
        100,
    ]  # memory.high is a limit, too


def v1(place, limit, used, *, cache=0):
    return {
        f"{place}/memory.limit_in_bytes": limit,
        f"{place}/memory.usage_in_bytes": used * GIB,
        f"{place}/memory.stat": f"cache {99 * GIB}\ntotal_inactive_file "
        f"{cache * GIB}\ntotal_active_file 0",
    }


def test_a_group_of_version_1_has_its_limit_and_the_largest_number_is_none(tmp_path):
    files = {
        **v1("sys/fs/cgroup/memory", 9223372036854771712, 90),
        **v1("sys/fs/cgroup/memory/slurm/uid_5/job_7", 16 * GIB, 10, cache=3),
    }
    root = machine(
        tmp_path,
        files,
        group="4:memory:/slurm/uid_5/job_7\n1:cpu:/\n0::/",
        mounts=(V1.format(root="/"), V2),
    )
    found = free_memory(root, {})
    assert [free.bytes // GIB for free in found] == [9, 100]
    assert found[0].source == "/sys/fs/cgroup/memory/slurm/uid_5/job_7/memory.limit_in_bytes"


@pytest.mark.parametrize("path", ["/docker/abc", "/docker/abc/inner", "/../../elsewhere", "/gone"])
def test_within_a_container_the_files_begin_at_its_own_group(tmp_path, path):
    files = v1("sys/fs/cgroup/memory", 8 * GIB, 2)
    root = machine(
        tmp_path, files, group=f"4:memory:{path}", mounts=(V1.format(root="/docker/abc"),)
    )
    assert free_memory(root, {})[0].bytes == 6 * GIB


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_MEM_PER_NODE": "32768"}, 30),
        ({"SLURM_MEM_PER_NODE": "32G", "LOCAL_WORLD_SIZE": "8"}, 16),
        ({"SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_ON_NODE": "8"}, 14),
        ({"SLURM_MEM_PER_GPU": "10240", "SLURM_GPUS_ON_NODE": "4"}, 38),
        ({"SLURM_MEM_PER_NODE": "0"}, 100),
        ({"SLURM_MEM_PER_CPU": "2048"}, 100),
        ({"SLURM_MEM_PER_NODE": "1024"}, 0),
    ],
)
def test_slurm_s_limit_counts_minus_what_the_ranks_hold(tmp_path, variables, expected):
    assert free_memory(machine(tmp_path, {}), variables)[0].bytes == expected * GIB


def test_a_machine_without_these_files_has_half_of_its_memory(tmp_path):
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    assert [free.bytes for free in free_memory(tmp_path, {})] == [half]


def test_ranks_of_one_machine_share_the_limit(tmp_path, monkeypatch):
    root = machine(tmp_path, v2("", 32, 0))
    monkeypatch.setattr(memory, "free_memory", lambda: free_memory(root, {}))
    assert MemoryTiers.detect(processes=8).host_bytes == int(32 * GIB * HOST_SHARE / 8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("max 100000", 64)],
)
def test_a_quota_of_version_2_bounds_the_cpus(tmp_path, monkeypatch, text, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    root = machine(tmp_path, {"sys/fs/cgroup/cpu.max": text})
    assert cpu_counts(root, {})[0].cpus == expected


def test_a_quota_of_version_1_slurm_s_share_and_the_scheduler_s_mask_bound_the_cpus(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    files = {
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "1600000",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    }
    root = machine(
        tmp_path,
        files,
        group="2:cpu,cpuacct:/",
        mounts=(V1.format(root="/").replace("memory", "cpu"),),
    )
    found = cpu_counts(root, {"SLURM_CPUS_ON_NODE": "8"})
    assert [count.cpus for count in found] == [8, 12, 16]
    monkeypatch.setattr(cpus, "cpu_counts", lambda: found)
    assert cpus.cpus() == 8
