"""What a process does before it serves, and when it is told to stop."""

import signal
import subprocess
import sys
from pathlib import Path

from service.app import create_app
from service.process.server import Server
from service.settings import Settings
from service.worker import WorkerInfo

ONE_ARM = {"experiment": "test", "salt": "s", "arms": [{"name": "one", "model": "tiny", "share": 100}]}


def test_the_garbage_collector_leaves_alone_what_is_there_before_the_first_request(artifacts: Path) -> None:
    """A full collection of modules and models takes longer than a request may."""
    script = f"""
import asyncio, gc, os, signal
from service.worker import WorkerInfo
from service.process.server import serve
from service.settings import Settings

def listening():
    print(gc.get_freeze_count(), len(gc.get_objects()), flush=True)
    os.kill(os.getpid(), signal.SIGINT)

settings = Settings(artifacts_dir={str(artifacts)!r}, port=0, experiment={ONE_ARM!r})
asyncio.run(serve(settings, WorkerInfo.alone(), listening=listening))
"""
    ran = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60)

    frozen, looked_through = map(int, ran.stdout.split())
    assert frozen > 20_000
    assert looked_through < frozen / 10


def test_being_told_again_to_stop_puts_the_end_off_no_further(artifacts: Path) -> None:
    settings = Settings(artifacts_dir=artifacts, experiment=ONE_ARM, drain_s=5)
    server = Server(create_app(settings, WorkerInfo.alone()), settings, lambda: None)

    server.handle_exit(signal.SIGTERM, None)
    ends = server._stop_at
    server.handle_exit(signal.SIGTERM, None)

    assert server._stop_at == ends
    server.handle_exit(signal.SIGINT, None)
    assert server._stop_at < ends
    assert server.force_exit
