"""Two workers that follow one store: what each serves, and when. Their models are stand-ins that load at once."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.artifact.errors import ArtifactError
from service.errors import ArtifactRefused, Refusal
from service.experiments.assignment import Experiment, Running, parse
from service.http import problems
from service.observability.metrics import Metrics
from service.registry import control, follower
from service.registry.changes import Changes
from service.registry.follower import ControlFollower
from service.registry.local_copy import LocalCopy
from service.registry.registry import ModelRegistry
from service.store.control_store import ControlDocument, MemoryControlStore
from service.store.feature_store import StoreUnavailable

ARMS = [{"name": name, "model": "tiny", "version": "v1", "share": 50} for name in ("one", "two")]
EXPERIMENT = {"experiment": "test", "salt": "s", "arms": ARMS}


class LoadedStandIn:
    def __init__(self, version: str) -> None:
        self.version = version
        self.artifact = SimpleNamespace(path=Path("tiny") / version, manifest=SimpleNamespace(model="tiny"))
        self.name = "tiny"
        self.served = SimpleNamespace(drain=self._drain)
        self.closed = False

    async def _drain(self) -> None:
        return

    def close(self) -> None:
        self.closed = True

    def describe(self) -> dict[str, Any]:
        return {"version": self.version}


class Loader:
    """Loads any version but those that it lacks."""

    root = Path("tiny")

    def __init__(self) -> None:
        self.missing: set[str] = set()
        self.loads: list[str] = []

    def load(self, _arm: Any, version: str, **_: Any) -> LoadedStandIn:
        if version in self.missing:
            raise ArtifactError(f"tiny/{version}: no such artifact folder")
        self.loads.append(version)
        return LoadedStandIn(version)


class Warmer:
    """Takes as long as a test wants: until `go_on` is set."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.begun = asyncio.Event()

    async def prepare(self, arm: str, version: str) -> Any:
        self.begun.set()
        await self.go_on.wait()
        try:
            return self._loader.load(arm, version)
        except ArtifactError as err:
            raise ArtifactRefused(str(err)) from None


class Store(MemoryControlStore):
    """One that can be down, and lose what it was told last."""

    down = False
    polls = 0

    async def revision(self) -> str | None:
        self.polls += 1
        self._check()
        return await super().revision()

    async def read(self) -> ControlDocument | None:
        self._check()
        return await super().read()

    async def replace(self, document: ControlDocument, *, expected: ControlDocument | None) -> bool:
        self._check()
        return await super().replace(document, expected=expected)

    def lose(self, document: ControlDocument | None) -> None:
        self._document = document

    def _check(self) -> None:
        if self.down:
            raise StoreUnavailable("no answer from the store")


class Worker:
    """A follower with its parts, and what operators ask of it."""

    def __init__(
        self, store: MemoryControlStore, content: dict[str, Any] = EXPERIMENT, *, copy: Path | None = None
    ) -> None:
        self.store = store
        self.experiment: Experiment = parse(content, source="test")
        self.running = Running(self.experiment)
        self.metrics = Metrics()
        self.loader: Any = Loader()
        self.warmer = Warmer(self.loader)
        self.copy = LocalCopy.of(copy, experiment="test")

    async def join(self) -> "Worker":
        start = await follower.find_start(self.store, self.copy, self.experiment)
        versions = None if start.document is None else start.document.state.models
        self.registry = ModelRegistry.load(self.loader, self.experiment.served, versions=versions)
        parts: dict[str, Any] = {"store": self.store, "registry": self.registry, "warmer": self.warmer}
        self.follower = ControlFollower(
            **parts,
            experiment=self.experiment,
            running=self.running,
            metrics=self.metrics,
            local_copy=self.copy,
            poll_s=0.01,
        )
        self.changes = Changes(**parts, experiment=self.experiment, follower=self.follower)
        await self.follower.join(start)
        return self

    async def set_shares(self, **changes: Any) -> None:
        edit = control.set_shares(self.experiment, **{"shares": {}, "shadow": {}, "kill": [], "unkill": [], **changes})
        await self.changes.set_shares(edit, changed_by="alice")

    async def load(self, version: str, arm: str = "one") -> None:
        await self.changes.load(arm, version, changed_by="alice")

    async def follow(self) -> None:
        await self.follower.poll()
        await self.follower.settled()

    @property
    def version(self) -> int:
        return self.follower.document.version

    @property
    def serving(self) -> dict[str, str]:
        return {arm: versions[0] for arm, versions in self.registry.versions().items()}


async def pair(store: MemoryControlStore | None = None) -> tuple[Worker, Worker]:
    store = store or Store()
    return await Worker(store).join(), await Worker(store).join()


async def test_the_first_worker_begins_the_document_and_the_next_one_follows_it() -> None:
    a, b = await pair()

    assert a.follower.document is b.follower.document
    assert a.follower.document.state == await_state(shares={"one": 50, "two": 50})
    assert (a.version, a.follower.document.changed_by) == (1, "experiment file")


def await_state(**changes: Any) -> Any:
    document = control.begin(parse(EXPERIMENT, source="test"), {"one": ["v1"], "two": ["v1"]}, version=1)
    return type(document.state)(
        **{name: getattr(document.state, name) for name in document.state.__struct_fields__} | changes
    )


async def test_workers_that_start_at_once_agree() -> None:
    store = Store()
    workers = [Worker(store) for _ in range(8)]

    await asyncio.gather(*(worker.join() for worker in workers))
    for worker in workers:
        await worker.follow()

    assert len({worker.follower.document.revision for worker in workers}) == 1


async def test_a_change_at_one_worker_counts_there_at_once_and_at_the_other_with_its_next_poll() -> None:
    a, b = await pair()

    await a.set_shares(kill=["two"])
    at_once, not_yet = a.running.now.killed, b.running.now.killed
    await b.follow()

    assert (at_once, not_yet, b.running.now.killed) == (("two",), (), ("two",))
    assert b.version == a.version == 2


async def test_a_version_is_loaded_by_each_worker_and_goes_back_at_once_everywhere() -> None:
    a, b = await pair()

    await a.load("v2")
    not_yet = b.serving
    await b.follow()
    loads = list(b.loader.loads)
    await b.changes.roll_back("one", changed_by="bob")
    await a.follow()

    assert (not_yet["one"], a.serving, b.serving) == ("v1", {"one": "v1", "two": "v1"}, {"one": "v1", "two": "v1"})
    assert loads.count("v2") == 1
    assert b.loader.loads == loads  # the one before was still loaded
    assert [entry.changed_by for entry in await a.store.audit()] == ["bob", "alice", "experiment file"]


async def test_a_kill_does_not_wait_for_a_load_of_another_worker_nor_of_the_same() -> None:
    a, b = await pair()
    b.warmer.go_on.clear()
    await a.load("v2")
    await b.follower.poll()
    await b.warmer.begun.wait()

    await a.set_shares(kill=["two"])
    await b.follower.poll()
    of_another = b.running.now.killed
    loading = asyncio.create_task(b.load("v3"))
    await b.set_shares(kill=["one"], unkill=["two"])
    of_the_same, serving = b.running.now.killed, b.serving["one"]
    b.warmer.go_on.set()
    await loading
    await b.follower.settled()

    assert (of_another, of_the_same, serving) == (("two",), ("one",), "v1")
    assert b.serving["one"] == "v3"


async def test_a_version_that_is_no_longer_wanted_when_it_is_ready_does_not_serve() -> None:
    a, b = await pair()
    b.warmer.go_on.clear()
    await a.load("v2")
    await b.follower.poll()
    await b.warmer.begun.wait()

    await a.load("v3")
    await b.follower.poll()
    b.warmer.go_on.set()
    await b.follower.settled()

    assert b.serving["one"] == "v3"
    assert b.registry.versions()["one"] == ["v3", "v1"]  # it never served v2


async def test_a_version_that_is_refused_here_leaves_the_old_one_serving_and_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = await pair()
    b.loader.missing.add("v2")

    await a.load("v2")
    await b.follow()
    await b.follow()
    described, of_arm = b.follower.describe(), b.follower.describe_arm("one")

    assert (a.serving["one"], b.serving["one"]) == ("v2", "v1")
    assert described["models"]["one"] == {
        "version": "v1",
        "target": "v2",
        "refused": "tiny/v2: no such artifact folder",
    }
    assert described["models"]["two"] == {"version": "v1"}
    assert (of_arm["target"], of_arm["refused"]) == ("v2", "tiny/v2: no such artifact folder")
    assert described["version"] == of_arm["control_version"] == 2
    assert [record.msg for record in caplog.records].count("control document not followed") == 1  # not each poll

    monkeypatch.setattr(follower, "RETRY_S", 0.0)
    await a.set_shares(kill=["two"])  # a new document tries once more, ...
    await b.follow()
    assert b.serving["one"] == "v1"
    b.loader.missing.clear()
    await b.follow()  # ... and so does time
    assert b.serving["one"] == "v2"
    assert "target" not in b.follower.describe()["models"]["one"]


async def test_a_load_that_fails_in_a_way_nobody_foresaw_is_told_and_others_go_on() -> None:
    a, b = await pair()

    async def fail(arm: str, version: str) -> Any:
        raise MemoryError

    prepare: Any = b.warmer.prepare
    b.warmer.prepare = fail  # type: ignore[method-assign]
    await a.load("v2")
    await b.follow()
    refused = b.follower.describe()["models"]["one"]["refused"]
    b.warmer.prepare = prepare  # type: ignore[method-assign]
    await a.load("v3", arm="two")
    await b.follow()

    assert refused == "it could not be loaded: MemoryError()"
    assert b.serving == a.serving == {"one": "v2", "two": "v3"}


async def test_a_worker_that_starts_later_begins_with_what_serves_and_what_served() -> None:
    a, _ = await pair()
    await a.load("v2")
    await a.load("v3")
    await a.set_shares(shares={"one": 60, "two": 40}, kill=["two"])

    late = await Worker(a.store).join()
    await late.changes.roll_back("one", changed_by="bob")
    await a.follow()

    assert late.running.now.killed == ("two",)
    assert [arm.share for arm in late.running.now.arms] == [60, 40]
    at_the_start = a.follower.document.state.models["one"]
    assert at_the_start == ["v2", "v1"]
    assert a.registry.versions() == late.registry.versions() == {"one": ["v2", "v1"], "two": ["v1"]}


async def test_a_worker_that_starts_later_knows_which_shares_held_before() -> None:
    users = [f"u{number}" for number in range(50)]
    a, _ = await pair()
    await a.set_shares(kill=["two"])
    before = a.follower.document.past[0].until - 1

    late = await Worker(a.store).join()

    for worker in (a, late):
        assert {worker.running.now.assign(user).name for user in users} == {"one"}
        assert {worker.running.at(before).assign(user).name for user in users} == {"one", "two"}


async def test_a_worker_that_cannot_load_what_serves_starts_with_a_version_before_and_says_so() -> None:
    a, _ = await pair()
    await a.load("v2")

    late = Worker(a.store)
    late.loader.missing.add("v2")
    await late.join()

    assert late.serving["one"] == "v1"
    assert late.follower.describe()["models"]["one"]["refused"] == "tiny/v2: no such artifact folder"
    assert late.follower.document == a.follower.document
    hopeless = Worker(a.store)
    hopeless.loader.missing |= {"v1", "v2"}
    with pytest.raises(ArtifactError, match="v2"):
        await hopeless.join()


@pytest.mark.parametrize("change", ["arms", "salt"])
async def test_another_experiment_file_begins_a_new_document_and_those_with_the_old_one_keep_theirs(
    change: str,
) -> None:
    a, b = await pair()
    await a.set_shares(kill=["two"])
    await b.follow()
    content = {**EXPERIMENT, "salt": "t"} if change == "salt" else {**EXPERIMENT, "arms": [{**ARMS[0], "share": 100}]}

    new = await Worker(a.store, content).join()
    await a.follow()

    assert (new.version, new.running.now.killed, new.follower.document.changed_by) == (3, (), "experiment file")
    assert (a.version, a.running.now.killed) == (2, ("two",))
    assert "another experiment file" in a.follower.describe()["not_followed"]
    with pytest.raises(Refusal, match="of another experiment file") as refused:
        await a.set_shares(unkill=["two"])
    assert problems.rule_of(refused.value).status == 409
    assert await a.store.read() == new.follower.document


async def test_new_shares_in_the_file_do_not_undo_what_was_decided(caplog: pytest.LogCaptureFixture) -> None:
    a, _ = await pair()
    await a.set_shares(shares={"one": 60, "two": 40})
    content = {**EXPERIMENT, "arms": [{**arm, "share": share} for arm, share in zip(ARMS, (10, 90), strict=True)]}

    with caplog.at_level(logging.WARNING):
        late = await Worker(a.store, content).join()

    assert [arm.share for arm in late.running.now.arms] == [60, 40]
    told = next(r for r in caplog.records if r.msg == "the control document wins over the experiment file")
    assert told.__dict__["shares"] == {"one": 60, "two": 40}
    assert told.__dict__["shares_in_file"] == {"one": 10, "two": 90}


async def test_without_the_store_a_worker_serves_on_refuses_changes_and_follows_again_when_it_is_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Store()
    a, b = await pair(store)
    await a.set_shares(kill=["two"])
    store.down = True

    for _ in range(3):
        await b.follow()
    for change in (b.set_shares(kill=["one"]), b.load("v2"), b.changes.roll_back("one", changed_by="bob")):
        with pytest.raises(StoreUnavailable):
            await change
    described, killed = b.follower.describe(), b.running.now.killed
    store.down = False
    await b.follow()

    assert (described["store"], described["version"], killed) == ("no answer from the store", 1, ())
    assert b.serving == {"one": "v1", "two": "v1"}
    assert b.running.now.killed == ("two",)
    assert "store" not in b.follower.describe()
    assert [record.msg for record in caplog.records].count("control store unavailable") == 1  # not each poll


async def test_a_restart_without_the_store_serves_what_was_decided_last(tmp_path: Path) -> None:
    store = Store()
    a = await Worker(store, copy=tmp_path).join()
    await a.load("v2")
    await a.set_shares(kill=["two"])
    await a.follower.settled()
    store.down = True

    again = await Worker(store, copy=tmp_path).join()
    without_copy = await Worker(store).join()

    assert (again.version, again.serving["one"], again.running.now.killed) == (3, "v2", ("two",))
    assert (without_copy.version, without_copy.serving["one"], without_copy.running.now.killed) == (1, "v1", ())
    store.down = False
    await again.follow()
    await without_copy.follow()
    assert again.follower.document == without_copy.follower.document == await store.read()
    assert (without_copy.version, without_copy.serving["one"], without_copy.running.now.killed) == (3, "v2", ("two",))


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": 1}', b"\xff"])
async def test_a_local_copy_that_is_damaged_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "control-test.json").write_bytes(content)

    worker = await Worker(Store(), copy=tmp_path).join()

    assert worker.version == 1
    await worker.follower.settled()
    assert LocalCopy(tmp_path / "control-test.json").read() == worker.follower.document


async def test_a_local_copy_of_other_arms_and_one_that_cannot_be_written_are_passed_over(tmp_path: Path) -> None:
    a = await Worker(Store(), copy=tmp_path).join()
    await a.set_shares(kill=["two"])
    await a.follower.settled()
    (tmp_path / "file").touch()

    other = await Worker(Store(), {**EXPERIMENT, "salt": "t"}, copy=tmp_path).join()
    unwritten = await Worker(Store(), copy=tmp_path / "file" / "folder").join()
    await unwritten.follower.settled()

    assert other.running.now.killed == unwritten.running.now.killed == ()


async def test_the_store_wins_over_a_local_copy_of_another_time(tmp_path: Path) -> None:
    away = await Worker(Store(), copy=tmp_path).join()
    for arm in ("two", "one", "two"):
        await away.set_shares(kill=[arm], unkill=[{"one": "two", "two": "one"}[arm]])
    await away.follower.settled()
    here = await Worker(Store()).join()
    await here.set_shares(shares={"one": 60, "two": 40})

    back = await Worker(here.store, copy=tmp_path).join()

    assert away.version > back.version
    assert back.follower.document == here.follower.document


@pytest.mark.parametrize("loses_all", [True, False])
async def test_a_store_that_lost_the_latest_decision_gets_it_back(loses_all: bool) -> None:
    store = Store()
    a, b = await pair(store)
    before = await store.read()
    await a.set_shares(kill=["two"])
    await b.follow()
    store.lose(None if loses_all else before)

    await a.follow()
    await b.follow()

    assert await store.read() == a.follower.document == b.follower.document
    assert a.running.now.killed == b.running.now.killed == ("two",)
    await b.set_shares(unkill=["two"])
    await a.follow()
    assert a.version == 3


async def test_a_change_right_after_the_store_lost_all_is_one_of_what_serves() -> None:
    store = Store()
    a, _ = await pair(store)
    await a.set_shares(kill=["two"])
    store.lose(None)

    await a.set_shares(shares={"one": 60, "two": 40})

    assert (a.running.now.killed, [arm.share for arm in a.running.now.arms]) == (("two",), [60, 40])
    assert a.version == 3


async def test_a_document_that_means_nothing_for_these_arms_changes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Store()
    a, _ = await pair(store)
    await a.set_shares(kill=["two"])
    broken = control.change(a.follower.document, lambda state: type(state)(
        shares={"one": 1}, shadow={}, killed=[], models={"one": ["v1"]}), changed_by="by hand")  # fmt: skip
    store.lose(broken)

    await a.follow()

    assert (a.version, a.running.now.killed) == (2, ("two",))
    assert "models has no version of two" in a.follower.describe()["store"]


async def test_a_follower_follows_by_itself_and_outlives_what_nobody_foresaw(
    monkeypatch: pytest.MonkeyPatch, eventually: Callable[[Any], Any]
) -> None:
    store = Store()
    a, b = await pair(store)
    poll, failures = b.follower.poll, 0

    async def failing() -> None:
        nonlocal failures
        failures += 1
        if failures < 3:
            raise ZeroDivisionError
        await poll()

    monkeypatch.setattr(b.follower, "poll", failing)

    async def follows() -> bool:
        return b.running.now.killed == ("two",)

    async with b.follower.following():
        await a.set_shares(kill=["two"])
        await eventually(follows)
    polls = store.polls
    await asyncio.sleep(0)

    assert failures >= 3
    assert store.polls == polls


async def test_a_poll_that_overhears_its_cancellation_keeps_no_follower_from_closing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker, _ = await pair()
    polling = asyncio.Event()

    async def overhears_one() -> None:
        if polling.is_set():
            await asyncio.sleep(3600)
        polling.set()
        with contextlib.suppress(asyncio.CancelledError):  # as asyncio.wait_for does where an answer has just come
            await asyncio.sleep(3600)

    monkeypatch.setattr(worker.follower, "poll", overhears_one)
    before = asyncio.all_tasks()

    async with worker.follower.following():
        await polling.wait()

    assert asyncio.all_tasks() == before


OPERATIONS = st.one_of(
    st.tuples(st.just("shares"), st.integers(0, 100)),
    st.tuples(st.just("kill"), st.sampled_from(["one", "two"])),
    st.tuples(st.just("unkill"), st.sampled_from(["one", "two"])),
    st.tuples(st.just("load"), st.sampled_from([("one", "v2"), ("one", "v3"), ("two", "v2"), ("two", "v1")])),
    st.tuples(st.just("roll_back"), st.sampled_from(["one", "two"])),
    st.tuples(st.just("poll"), st.none()),
    st.tuples(st.just("lose"), st.integers(0, 100)),
    st.tuples(st.just("restart"), st.none()),
)


@settings(max_examples=100)
@given(operations=st.lists(st.tuples(st.integers(0, 1), OPERATIONS), max_size=12))
def test_whatever_two_workers_change_and_the_store_loses_both_end_with_the_same_document(
    operations: list[tuple[int, tuple[str, Any]]],
) -> None:
    async def run() -> None:
        store = Store()
        workers = list(await pair(store))
        written: list[ControlDocument | None] = [None]
        for number, (name, argument) in operations:
            worker = workers[number]
            try:
                match name:
                    case "shares":
                        await worker.set_shares(shares={"one": argument, "two": 100 - argument})
                    case "kill" | "unkill":
                        await worker.set_shares(**{name: [argument]})
                    case "load":
                        await worker.load(argument[1], argument[0])
                    case "roll_back":
                        await worker.changes.roll_back(argument, changed_by="alice")
                    case "poll":
                        await worker.follower.poll()
                    case "lose":
                        store.lose(written[argument % len(written)])
                    case "restart":
                        workers[number] = await Worker(store).join()
            except Refusal:
                pass  # shares that leave no arm, or no version before
            written.append(await store.read())
        for _ in range(3):
            for worker in workers:
                await worker.follow()

        a, b = workers
        assert a.follower.document == b.follower.document == await store.read()
        assert a.running.now == b.running.now
        assert a.serving == b.serving
        assert a.serving == {arm: versions[0] for arm, versions in a.follower.document.state.models.items()}

    asyncio.run(run())
