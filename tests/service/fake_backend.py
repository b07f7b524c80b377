"""What the scheduler's tests run instead of a model: its scores are known, its time is the test's."""

import asyncio
import threading
import time

import numpy as np

from models.features.arrays import Arrays
from service.runtime.backend import BackendError
from service.runtime.latency_model import LatencyModel
from service.runtime.scheduler import OnRun, Run, RunOutcome, Scheduler, ServedModel


class FakeBackend:
    """A candidate's score is its request's number plus its own; NaN for the item -1, and -2 cannot be run at all."""

    lanes = 1
    batch_wait_s = 0.0

    def __init__(self, *, joins: bool = False) -> None:
        self.joins = joins
        self.runs: list[list[float]] = []  # the items of each
        self.blocks = False  # each run, until `proceed` is released
        self.entered, self.proceed = threading.Semaphore(0), threading.Semaphore(0)
        self.is_closed = False

    def run(self, arrays: Arrays) -> np.ndarray:
        items = arrays["items"][:, 0]
        self.runs.append(items.tolist())
        self.entered.release()
        if self.blocks:
            assert self.proceed.acquire(timeout=10)
        if -2 in items:
            raise BackendError("poison")
        users = arrays["request_ids"][arrays["user_index"], 0] if self.joins else arrays["request_ids"][0, 0]
        return np.where(items == -1, np.nan, users + items).astype(np.float32)

    def close(self) -> None:
        self.is_closed = True


def packed(*items: float, user: int = 0) -> Arrays:
    return {"request_ids": np.array([[user]]), "items": np.array(items, dtype=np.float32)[:, None]}


def served(backend: FakeBackend, *, base_s: float = 1e-3, per_candidate_s: float = 1e-6) -> ServedModel:
    return ServedModel(backend=backend, latency=LatencyModel(base_s=base_s, per_candidate_s=per_candidate_s))


def submitted(
    scheduler: Scheduler, model: ServedModel, arrays: Arrays, *, within_s: float = 30.0, is_shadow: bool = False
) -> "tuple[Run, asyncio.Future[RunOutcome]]":
    """A run that was handed to the scheduler, and what comes of it."""
    outcome: asyncio.Future[RunOutcome] = asyncio.get_running_loop().create_future()
    on_run: OnRun = lambda value, _: outcome.set_result(value)  # noqa: E731 - a callback by type
    run = Run(
        model=model,
        arrays=arrays,
        num_candidates=len(arrays["items"]),
        expires_at=time.monotonic() + within_s,
        timeout_ms=within_s * 1000,
        is_shadow=is_shadow,
        on_run=on_run,
    )
    scheduler.submit(run)
    return run, outcome


async def entered(backend: FakeBackend) -> None:
    """Returns when the backend has begun one more run."""
    assert await asyncio.to_thread(backend.entered.acquire, timeout=10)


async def blocked(scheduler: Scheduler, model: ServedModel) -> "asyncio.Future[RunOutcome]":
    """A run under way until the test releases it: behind it the others wait together."""
    backend = model.backend
    assert isinstance(backend, FakeBackend)
    backend.blocks = True
    _, outcome = submitted(scheduler, model, packed(0))
    await entered(backend)
    backend.blocks = False
    return outcome
