"""What a process does before it serves."""

import subprocess
import sys
from pathlib import Path

ONE_ARM = {"experiment": "test", "salt": "s", "arms": [{"name": "one", "model": "tiny", "share": 1}]}


def test_the_garbage_collector_leaves_alone_what_is_there_before_the_first_request(artifacts: Path) -> None:
    """A full collection of modules and models takes longer than a request may."""
    script = f"""
import asyncio, gc, os, signal
from service.place import Place
from service.server import serve
from service.settings import Settings

def listening():
    print(gc.get_freeze_count(), len(gc.get_objects()), flush=True)
    os.kill(os.getpid(), signal.SIGINT)

settings = Settings(artifacts_dir={str(artifacts)!r}, port=0, experiment={ONE_ARM!r})
asyncio.run(serve(settings, Place.alone(), listening=listening))
"""
    ran = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60)

    frozen, looked_through = map(int, ran.stdout.split())
    assert frozen > 20_000
    assert looked_through < frozen / 10
