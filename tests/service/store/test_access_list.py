"""The access list of docs/operating.md is enough for everything that the service asks of its server."""

import math
import re
import time
from contextlib import aclosing
from pathlib import Path

import redis

from service.store.codec import Click, Mark
from service.store.feature_store import Outcome
from service.store.local_server import RedisServer
from service.store.redis_control_store import RedisControlStore
from service.store.redis_store import RedisStore
from tests.service.store.test_control_store import document

OPERATING = Path(__file__).parents[3] / "docs" / "operating.md"


async def test_the_documented_user_may_do_all_that_the_service_does(own_redis: RedisServer) -> None:
    rule = re.search(r"^ACL SETUSER (.*?)^```", OPERATING.read_text(), re.DOTALL | re.MULTILINE)
    assert rule is not None
    words = rule.group(1).replace("\\\n", " ").split()
    with redis.Redis.from_url(own_redis.url) as admin:
        admin.execute_command("ACL", "SETUSER", *words)
    url = own_redis.url.replace("unix://", "unix://clickserve:PASSWORD@")

    async with aclosing(RedisStore.connect(url, timeout_s=5.0)) as store:
        await store.check()
        await store.ping()
        await store.put_users({"u1": {"gender": "F"}})
        await store.put_items({"a1": {"brand": "nike"}})
        click = Click(event_id="1", user="u1", item="a1", ts=time.time(), features={"size": "large"})
        mark = Mark(type="impression", event_id="1", owner="u1", ts=time.time())
        assert await store.append([click, mark]) == [Outcome.NEW, Outcome.NEW]
        start = await store.changed_items("0-0")
        fetched = await store.fetch("u1", ["a1"], before=math.inf, limit=9)
        await store.delete_user("u1", at=time.time())
        assert store.failures() == []
    async with aclosing(RedisStore.connect(url, timeout_s=5.0)) as another:  # which has to read the words
        await another.append([click])
        assert another.failures() == []
    async with aclosing(RedisControlStore.connect(url, experiment="test", timeout_s=5)) as control:
        assert await control.replace(document(), expected=None)
        assert await control.read() is not None
        assert len(await control.audit()) == 1

    assert start.items == ["a1"]
    assert [event.features for event in fetched.behaviours] == [{"size": "large"}]
