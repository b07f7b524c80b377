"""Clicks in any order, late, repeated, after deletions and forgotten tags, leave what a few lines of Python say."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from redis import Redis
from redis.cluster import RedisCluster

from service.store.codec import Click, order
from service.store.feature_store import FeatureStore, Outcome
from service.store.keys import KeySpace
from service.store.memory_store import MemoryStore
from service.store.redis_store import Limits, RedisStore

T = TypeVar("T")
KEEP = 4
USERS = ["u1", "u2", "日本"]
KEYS = KeySpace("cs")


def click(user: str, number: int) -> Click:
    """An event's id says all of it. Some share their time, and some that and their item."""
    return Click(event_id=f"e{number}", user=user, item=f"{number % 3}", ts=float(number // 4), features={"n": number})


@dataclass
class Model:
    """What the contract says of one user: every click that counts, those that are known, and the day of deletion."""

    clicks: dict[str, Click] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    deleted_at: float = -1.0

    @property
    def past(self) -> list[Click]:
        return sorted(self.clicks.values(), key=order)[-KEEP:]

    def append(self, new: Click) -> Outcome:
        if new.event_id in self.known or new.event_id in {c.event_id for c in self.past}:
            self.known.add(new.event_id)
            return Outcome.KNOWN
        self.known.add(new.event_id)
        if new.ts >= self.deleted_at:
            self.clicks[new.event_id] = new
        return Outcome.NEW


class Histories(RuleBasedStateMachine):
    store: FeatureStore
    server: "Redis | RedisCluster | None" = None

    def __init__(self) -> None:
        super().__init__()
        self.models = {user: Model() for user in USERS}
        self.runner = asyncio.Runner()
        self.store = self.run(self.opened())

    async def opened(self) -> FeatureStore:
        return MemoryStore(max_clicks=KEEP)

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    @rule(numbers=st.lists(st.tuples(st.sampled_from(USERS), st.integers(0, 30)), min_size=1, max_size=6, unique=True))
    def append(self, numbers: list[tuple[str, int]]) -> None:
        clicks = [click(user, number) for user, number in numbers]
        outcomes = {(c.user, c.event_id): self.models[c.user].append(c) for c in sorted(clicks, key=order)}

        assert self.run(self.store.append(clicks)) == [outcomes[c.user, c.event_id] for c in clicks]

    @rule(user=st.sampled_from(USERS), at=st.sampled_from([0.0, 2.5, 4.0, 9.0]))
    def delete(self, user: str, at: float) -> None:
        self.models[user] = Model(deleted_at=at)

        self.run(self.store.delete_user(user, at=at))

    @rule(user=st.sampled_from(USERS))
    def forget_tags(self, user: str) -> None:
        """As when their time is over."""
        if self.server is not None:
            self.server.delete(KEYS.event_tags(user, 0))
            self.models[user].known.clear()

    @invariant()
    def pasts_are_the_models(self) -> None:
        for user, model in self.models.items():
            past = self.run(self.store.fetch(user, [], before=1e9, limit=100)).behaviours
            assert [event.features["n"] for event in past] == [c.features["n"] for c in model.past]

    def teardown(self) -> None:
        self.run(self.store.aclose())
        self.runner.close()


@pytest.mark.parametrize(("kind", "examples"), [("memory", 40), ("redis", 25), ("cluster", 15)])
def test_histories_are_as_the_model(kind: str, examples: int, request: pytest.FixtureRequest) -> None:
    machine = Histories
    if kind != "memory":
        url = request.getfixturevalue("cluster").url if kind == "cluster" else request.getfixturevalue("redis_url")

        class OnServer(Histories):
            async def opened(self) -> FeatureStore:
                plain = url.replace("redis+cluster", "redis").partition(",")[0]
                self.server = RedisCluster.from_url(plain) if kind == "cluster" else Redis.from_url(plain)
                for user in USERS:
                    for key in (KEYS.event_tags(user, 0), KEYS.behaviours(user)):
                        self.server.delete(key)
                return RedisStore.connect(url, timeout_s=5.0, limits=Limits(max_clicks=KEEP))

            def teardown(self) -> None:
                super().teardown()
                assert self.server is not None
                self.server.close()

        machine = OnServer
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=12, deadline=None))
