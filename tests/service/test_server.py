"""What the event loop keeps waiting is known to have waited."""

import asyncio
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.front import CAME_AT
from service.server import _Away, _connections_of

ONE_ARM = {"experiment": "test", "salt": "s", "arms": [{"name": "one", "model": "tiny", "share": 1}]}


async def test_what_is_read_in_one_go_waited_while_the_loop_was_busy_and_not_while_it_was_idle() -> None:
    busy = clock = 100.0
    away = _Away(busy=lambda: busy, clock=lambda: clock)

    async def read(*, busy_s: float, idle_s: float) -> tuple[float, float]:
        nonlocal busy, clock
        busy, clock = busy + busy_s, clock + busy_s + idle_s
        first = away.seconds()
        busy, clock = busy + 1, clock + 1  # reading takes time too, and what it reads came before that
        both = first, away.seconds()
        await asyncio.sleep(0)
        return both

    assert await read(busy_s=5, idle_s=0) == (0, 0)  # before the first, whatever that was
    assert await read(busy_s=5, idle_s=1) == (5, 5)
    assert await read(busy_s=3, idle_s=6) == (3, 3)
    assert await read(busy_s=3, idle_s=60) == (0, 0)
    assert await read(busy_s=0, idle_s=0) == (0, 0)


@pytest.mark.parametrize("max_age_s", [0.0, 60.0])
async def test_a_connection_notes_when_its_request_came(max_age_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HttpToolsProtocol, "on_headers_complete", lambda _: None)
    monkeypatch.setattr(_Away, "seconds", lambda _: 4.0)
    kind: Any = _connections_of(max_age_s)
    connection = kind.__new__(kind)
    connection.scope, connection._close_at = {"state": {}}, math.inf

    connection.on_headers_complete()

    assert connection.scope["state"][CAME_AT] == pytest.approx(time.monotonic() - 2, abs=1)


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
