"""A process whose event loop hangs ends by itself and says where; one that is only busy does not."""

import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, time
from service.process.watchdog import Watchdog

async def main():
    with Watchdog({limit_s}):
        await asyncio.sleep(0.6)
        {doing}
    print("ended by itself")

def computes_for_ever():
    while True:
        pass

asyncio.run(main())
"""


def run(limit_s: float, doing: str) -> "subprocess.CompletedProcess[str]":
    program = PROGRAM.format(limit_s=limit_s, doing=doing)
    return subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("doing", ["computes_for_ever()", "time.sleep(60)"])
def test_a_loop_that_hangs_ends_the_process_and_shows_its_stacks(doing: str) -> None:
    ended = run(0.5, doing)

    assert ended.returncode == 1
    assert "Timeout (0:00:00.500000)!" in ended.stderr
    assert "in main" in ended.stderr
    assert "in computes_for_ever" in ended.stderr or "sleep" in doing
    assert ended.stdout == ""


@pytest.mark.parametrize(
    ("limit_s", "doing"),
    [(2.0, "await asyncio.sleep(2.5)"), (2.0, "time.sleep(0.5)"), (0, "time.sleep(0.5)")],
    ids=["a loop that waits", "a loop that is busy for a while", "no limit"],
)
def test_a_loop_that_does_not_hang_is_left_alone(limit_s: float, doing: str) -> None:
    ended = run(limit_s, doing)

    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ended by itself\n", "")
