"""What a client gets over HTTP when the model fails, hangs or is late, and what shadow arms may cost him: nothing."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.features.arrays import Arrays
from service.errors import FieldError, InvalidValue, WouldBeLate
from service.runtime.onnx_cpu import OnnxBackend
from service.scoring.admission import AdmissionController
from service.scoring.model_inputs import ModelInputBuilder
from tests.service import tiny
from tests.service.conftest import Running, Start

ALONE = {"experiment": "test", "salt": "s", "arms": [{"name": "one", "model": "tiny", "share": 100}]}
POISONED = [{"id": "a1"}, {"id": "a4"}]  # the second is what the broken version scores as no number


def ctr(answer: Any) -> list[float]:
    return [p["ctr"] for p in answer.json()["predictions"]]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A good version 1, and a current version 2 that cannot score one item."""
    tiny.write(tmp_path, seed=1)
    tiny.write(tmp_path, seed=2, files=tiny.graphs(2, poisoned="a4"))
    return tmp_path


class Gate:
    """While it is shut every model hangs."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.runs: list[int] = []


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate, run = Gate(), OnnxBackend.run

    def gated(self: OnnxBackend, arrays: Arrays) -> np.ndarray:
        gate.runs.append(len(arrays.get("items", ())))
        assert gate.open.wait(10)
        return run(self, arrays)

    monkeypatch.setattr(OnnxBackend, "run", gated)
    yield gate
    gate.open.set()


async def swapped(service: Running, versions: list[str]) -> None:
    """Every one of the versions in turn becomes the arm's."""
    registry = service.parts.registry
    for version in versions:
        registry.flip("one", await asyncio.to_thread(registry.read, "one", version))


def version_names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "tiny").iterdir() if path.is_dir())


async def test_a_model_that_fails_is_stood_in_for_by_its_previous_version(start: Start, broken: Path) -> None:
    good, bad = version_names(broken)

    async with start(artifacts_dir=broken, experiment=ALONE) as service:
        await swapped(service, [good])
        before = await service.predict(candidates=POISONED, ts=0)
        await swapped(service, [bad])
        well = await service.predict(candidates=[{"id": "a1"}], ts=0)
        stood_in = await service.predict(candidates=POISONED, ts=0)

        assert stood_in.status_code == 200
        assert stood_in.json()["degraded"] == ["previous_version"]
        assert (well.json()["version"], stood_in.json()["version"]) == (bad, good)
        assert ctr(stood_in) == ctr(before)
        assert await service.metric('clickserve_degraded_total{reason="previous_version"}') == 1


async def test_without_a_previous_version_a_model_that_fails_is_a_503(start: Start, broken: Path) -> None:
    async with start(artifacts_dir=broken, experiment=ALONE) as service:
        failed = await service.predict(candidates=POISONED)

        assert (failed.status_code, failed.headers["retry-after"]) == (503, "1")
        assert await service.metric('clickserve_rejected_total{reason="model_failed"}') == 1


async def test_by_setting_the_click_rate_stands_in_for_a_model_that_fails(start: Start, broken: Path) -> None:
    async with start(artifacts_dir=broken, experiment=ALONE, fallback="prior") as service:
        answer = await service.predict(candidates=POISONED)

        assert answer.status_code == 200
        assert answer.json()["degraded"] == ["prior"]
        assert ctr(answer) == [tiny.CLICK_RATE] * 2
        assert [p["id"] for p in answer.json()["predictions"]] == ["a1", "a4"]
        assert await service.metric('clickserve_degraded_total{reason="prior"}') == 1


async def test_when_the_previous_version_fails_too_the_click_rate_stands_in(start: Start, broken: Path) -> None:
    tiny.write(broken, seed=3, files=tiny.graphs(3, poisoned="a4"))
    _, bad, worse = version_names(broken)

    async with start(artifacts_dir=broken, experiment=ALONE, fallback="prior") as service:
        await swapped(service, [bad, worse])
        answer = await service.predict(candidates=POISONED)

    assert answer.json()["degraded"] == ["prior"]
    assert answer.json()["version"] == worse


@pytest.mark.parametrize(("fallback", "status"), [("none", 503), ("prior", 200)])
async def test_what_the_previous_version_cannot_take_is_not_the_clients_fault(
    start: Start, broken: Path, monkeypatch: pytest.MonkeyPatch, fallback: str, status: int
) -> None:
    good, bad = version_names(broken)

    async with start(artifacts_dir=broken, experiment=ALONE, fallback=fallback) as service:
        await swapped(service, [good, bad])
        previous = service.parts.registry.previous("one")
        assert previous is not None
        build = ModelInputBuilder.build

        def refuse(inputs: ModelInputBuilder, *arguments: Any) -> Any:
            if inputs is previous.inputs:
                raise InvalidValue([FieldError(pointer="/context", expected="another schema's", got="this one's")])
            return build(inputs, *arguments)

        monkeypatch.setattr(ModelInputBuilder, "build", refuse)
        answer = await service.predict(candidates=POISONED)

    assert answer.status_code == status
    assert fallback == "none" or answer.json()["degraded"] == ["prior"]


@pytest.mark.parametrize("fallback", ["none", "prior"])
async def test_a_client_is_never_told_a_click_rate_for_his_own_mistake(start: Start, fallback: str) -> None:
    async with start(experiment=ALONE, fallback=fallback) as service:
        answer = await service.predict(candidates=[{"id": "a1", "features": {"price": "dear"}}])

    assert answer.status_code == 422


@pytest.mark.parametrize(("fallback", "status", "fetches"), [("none", 503, 0), ("prior", 200, 0)])
async def test_under_overload_a_request_is_refused_before_any_work_unless_the_click_rate_may_stand_in(
    start: Start, monkeypatch: pytest.MonkeyPatch, fallback: str, status: int, fetches: int
) -> None:
    def full(admission: AdmissionController, *arguments: Any) -> None:
        raise WouldBeLate(1.0)

    monkeypatch.setattr(AdmissionController, "check", full)
    monkeypatch.setattr(AdmissionController, "admit", full)
    async with start(experiment=ALONE, fallback=fallback) as service:
        answer = await service.predict(user={"id": "u1"}, candidates=[{"id": "a1"}])

        assert answer.status_code == status
        assert await service.metric('clickserve_store_seconds_count{op="fetch"}') == fetches


@pytest.mark.parametrize(("fallback", "status"), [("none", 504), ("prior", 200)])
async def test_behind_a_model_that_hangs_every_answer_is_out_at_its_deadline(
    start: Start, gate: Gate, fallback: str, status: int
) -> None:
    async with start(experiment=ALONE, fallback=fallback, inline_run_ms=0) as service:
        await service.predict(candidates=[{"id": "a1"}])  # its row is made, and cached
        service.parts.scorer.recent._by_arm.clear()
        gate.open.clear()
        started = time.monotonic()
        first = await service.predict(candidates=[{"id": "a1"}], timeout_ms=100)
        took_s = time.monotonic() - started
        second = await service.predict(candidates=[{"id": "a1"}], timeout_ms=60)
        at_once = time.monotonic() - started - took_s
        replayed = service.parts.scorer.recent.of("one")
        gate.open.set()
        async with asyncio.timeout(10):
            while (well := await service.predict(candidates=[{"id": "a1"}])).status_code == 503:
                pass

    assert first.status_code == status
    assert 0.1 <= took_s < 1
    assert second.status_code == (503 if fallback == "none" else 200)
    assert at_once < 0.06  # refused on arrival: it would have been too late
    assert replayed == []  # no model has taken them: a load that replays them might refuse a good one
    assert well.json()["degraded"] == []
    if fallback == "prior":
        assert first.json()["degraded"] == second.json()["degraded"] == ["deadline"]
        assert ctr(first) == [tiny.CLICK_RATE]


async def test_a_deadline_that_has_passed_is_answered_with_the_click_rate_by_setting(start: Start) -> None:
    async with start(experiment=ALONE, fallback="prior") as service:
        answer = await service.predict(candidates=[{"id": "a1"}], timeout_ms=0.000001)

    assert (answer.status_code, answer.json()["degraded"]) == (200, ["deadline"])


def shadowed(share: float) -> dict[str, Any]:
    return {**ALONE, "shadow": [{"name": "dark", "model": "other", "share": share}]}


@pytest.fixture
async def shadowing(start: Start) -> AsyncIterator[Running]:
    async with start(experiment=shadowed(100)) as service:
        yield service


async def until(service: Running, metric: str, value: float) -> None:
    async with asyncio.timeout(10):
        while await service.metric(metric) != value:  # noqa: ASYNC110 - metrics have no event
            await asyncio.sleep(0)


async def test_a_shadow_arm_scores_what_another_answers(shadowing: Running) -> None:
    answer = await shadowing.predict(candidates=[{"id": "a1"}, {"id": "a2"}])

    assert (answer.json()["arm"], answer.json()["model"]) == ("one", "tiny")
    await until(shadowing, 'clickserve_predicted_ctr_count{arm="dark"}', 2)
    assert await shadowing.metric('clickserve_predicted_ctr_count{arm="one"}') == 2
    assert await shadowing.metric('clickserve_requests_total{arm="dark",route="/predict",status="200"}') == 0


async def test_a_shadow_arm_without_a_share_scores_nothing(start: Start, gate: Gate) -> None:
    async with start(experiment=shadowed(0)) as service:
        await service.predict(candidates=[{"id": "a1"}])  # its row is made, and cached
        warmed = len(gate.runs)
        for _ in range(3):
            await service.predict(candidates=[{"id": "a1"}])

    assert len(gate.runs) == warmed + 3


async def test_a_shadow_arm_whose_model_fails_is_counted_and_costs_no_answer(start: Start, tmp_path: Path) -> None:
    tiny.write(tmp_path)
    tiny.write(tmp_path, "other", files=tiny.graphs(1, poisoned="a4"))

    async with start(artifacts_dir=tmp_path, experiment=shadowed(100)) as service:
        answer = await service.predict(candidates=POISONED)
        await until(service, 'clickserve_rejected_total{reason="model_failed"}', 1)

    assert (answer.status_code, answer.json()["degraded"]) == (200, [])
