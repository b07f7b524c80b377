"""Servers that act as one store end with their block."""

from service.store import local_cluster
from service.store.local_server import RedisServer


def test_no_server_outlives_the_block_though_one_was_killed_before(session_redis: RedisServer):
    with local_cluster.start_watched() as servers:
        started = [servers.primary, servers.replica, *servers.sentinels]
        servers.replica.kill()
        assert servers.primary.is_up and all(sentinel.is_up for sentinel in servers.sentinels)

    assert not any(server.is_up for server in started)
