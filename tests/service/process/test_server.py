"""What a process does before it serves, and when it is told to stop."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

from service.process.server import Server

ONE_ARM = {"experiment": "test", "salt": "s", "arms": [{"name": "one", "model": "tiny", "share": 100}]}


def test_the_garbage_collector_leaves_alone_what_is_there_before_the_first_request(artifacts: Path) -> None:
    """A full collection of modules and models takes longer than a request may."""
    script = f"""
import asyncio, gc, os, signal
from service.__main__ import serve_here
from service.settings import Settings
from service.worker import WorkerInfo

def listening():
    print(gc.get_freeze_count(), len(gc.get_objects()), flush=True)
    os.kill(os.getpid(), signal.SIGINT)

settings = Settings(artifacts_dir={str(artifacts)!r}, port=0, experiment={ONE_ARM!r})
asyncio.run(serve_here(settings, WorkerInfo.alone(), listening))
"""
    ran = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60)

    frozen, looked_through = map(int, ran.stdout.split())
    assert frozen > 20_000
    assert looked_through < frozen / 10


HANGS = """
import asyncio, time
from service.__main__ import serve_here
from service.settings import Settings
from service.worker import WorkerInfo

def hangs_in_the_loop():
    time.sleep(60)

def listening():
    asyncio.get_running_loop().call_later(0.1, hangs_in_the_loop)

settings = Settings(artifacts_dir={artifacts!r}, port=0, experiment={experiment!r}, watchdog_s=1)
asyncio.run(serve_here(settings, WorkerInfo.alone(), listening))
"""


def test_a_service_whose_loop_hangs_ends_and_says_where(artifacts: Path) -> None:
    program = HANGS.format(artifacts=str(artifacts), experiment=ONE_ARM)

    ran = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)

    assert ran.returncode == 1
    assert "in hangs_in_the_loop" in ran.stderr


class Lifecycle:
    stopping = False


async def app(*_: object) -> None:
    raise AssertionError("nobody asks")


def test_a_second_stop_puts_the_end_off_no_further() -> None:
    lifecycle = Lifecycle()
    server = Server(app, protocol=asyncio.Protocol, lifecycle=lifecycle, drain_s=5, listening=lambda: None)

    server.handle_exit(signal.SIGTERM, None)
    ends = server._stop_at
    server.handle_exit(signal.SIGTERM, None)

    assert lifecycle.stopping
    assert server._stop_at == ends
    server.handle_exit(signal.SIGINT, None)
    assert server._stop_at < ends
    assert server.force_exit
