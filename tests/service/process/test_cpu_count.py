"""How many cores there are, by the files of both kinds of cgroup."""

import os
from pathlib import Path

import pytest

from service.process import cpu_count


def test_version_2_gives_quota_and_period_or_max() -> None:
    assert cpu_count.parse_v2("150000 100000\n") == 1.5
    assert cpu_count.parse_v2("max 100000\n") is None


def test_version_1_gives_them_apart_and_minus_one_for_none() -> None:
    assert cpu_count.parse_v1("200000\n", "50000\n") == 4
    assert cpu_count.parse_v1("-1\n", "100000\n") is None


def written(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


V1 = {"cpu,cpuacct/box/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/box/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("0::/pod/box\n", {"pod/cpu.max": "50000 100000\n", "pod/box/cpu.max": "max 100000\n"}, 0.5),
        ("0::/host/path/not/here\n", {"cpu.max": "400000 100000\n"}, 4),
        ("5:memory:/x\n4:cpu,cpuacct:/box\n0::/\n", V1, 3),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("1:cpuset:/\n", {"cpuset/cpu.max": "100000 100000\n"}, None),
    ],
)
def test_the_tightest_quota_around_a_process_counts(
    membership: str, files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    assert cpu_count.quota_of(membership, written(tmp_path, files)) == quota


@pytest.mark.parametrize(("quota", "usable"), [("max", 3), ("160000", 2), ("10000", 1), ("900000", 3)])
def test_affinity_and_quota_bound_the_cores_and_one_is_always_there(
    quota: str, usable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, {"cpu.max": f"{quota} 100000\n", "membership": "0::/\n"})
    monkeypatch.setattr(cpu_count, "CGROUPS", tmp_path)
    monkeypatch.setattr(cpu_count, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 2, 5})

    assert cpu_count.usable() == usable
