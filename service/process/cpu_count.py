"""CPU count: how many cores this process may use, by affinity and cgroup quota."""

import os
import sys
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def usable() -> int:
    """Cores of this process's affinity, or of its cgroup's quota if that is less; at least 1."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0))
    quota = quota_of(MEMBERSHIP.read_text(), CGROUPS) if MEMBERSHIP.exists() else None
    return allowed if quota is None else max(1, min(allowed, round(quota)))


def quota_of(membership: str, root: Path) -> float | None:
    """The tightest quota, in cores, of a process's cgroup and those around it; None without one.

    `membership` is what /proc/PID/cgroup says. In a container it may name a path of the machine that does not exist
    below `root`; the container's own group is `root` itself then, and it is asked in any case.
    """
    quotas = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers == "":
            top, read = root, _read_v2
        elif "cpu" in names:
            top, read = next((root / name for name in (controllers, "cpu") if (root / name).exists()), root), _read_v1
        else:
            continue
        inner = top / path.strip("/")
        quotas += [read(folder) for folder in (inner, *inner.parents) if folder.is_relative_to(top)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _read_v2(folder: Path) -> float | None:
    file = folder / "cpu.max"
    return parse_v2(file.read_text()) if file.exists() else None


def _read_v1(folder: Path) -> float | None:
    quota, period = folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"
    return parse_v1(quota.read_text(), period.read_text()) if quota.exists() and period.exists() else None


def parse_v2(cpu_max: str) -> float | None:
    """`150000 100000` is one and a half cores, `max 100000` any number."""
    quota, period = cpu_max.split()
    return None if quota == "max" else int(quota) / int(period)


def parse_v1(quota_us: str, period_us: str) -> float | None:
    """A quota of -1 is none."""
    return int(quota_us) / int(period_us) if int(quota_us) > 0 else None
