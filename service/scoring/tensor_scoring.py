"""Scores of clients that bring their own encoded tensors: no user, no store, no experiment."""

import asyncio
from functools import partial

import numpy as np

from models.features.arrays import Arrays
from models.features.packing import num_requests
from service.deadline import Deadline
from service.errors import ModelFailed, Refusal
from service.runtime.backend import BackendError, Logits
from service.runtime.backends import one_request
from service.runtime.scheduler import Run, RunOutcome, Scheduler
from service.scoring.loaded_model import LoadedModel


async def score_tensors(model: LoadedModel, arrays: Arrays, deadline: Deadline, scheduler: Scheduler) -> Logits:
    """The logits [C] of the encoder's arrays of any number of requests, each a run of its own in the queue.

    Raises Overloaded, ModelFailed and DeadlinePassed. When the caller is cancelled nothing more is run for it.
    """
    packed = model.artifact.encoder.layout.pack(arrays)
    user_index = packed["user_index"]
    logits = np.empty(len(user_index), dtype=np.float32)
    loop = asyncio.get_running_loop()
    runs: list[Run] = []
    waiting: list[asyncio.Future[RunOutcome]] = []
    with model.served.lease():
        try:
            packed["items"] = model.item_graph.run(packed)
        except BackendError as err:
            raise ModelFailed("the model could not be run") from err
        try:
            of_users = [np.flatnonzero(user_index == user) for user in range(num_requests(packed))]
            for user, rows in enumerate(of_users):
                future: asyncio.Future[RunOutcome] = loop.create_future()
                waiting.append(future)
                if not rows.size:
                    future.set_result(np.zeros(0, dtype=np.float32))
                    continue
                runs.append(
                    Run(
                        model=model.served,
                        arrays=one_request(packed, user, rows),
                        num_candidates=rows.size,
                        expires_at=deadline.at,
                        timeout_ms=deadline.timeout_ms,
                        is_shadow=False,
                        on_run=partial(_set, future),
                    )
                )
                scheduler.submit(runs[-1])
            for rows, future in zip(of_users, waiting, strict=True):
                outcome = await future
                if isinstance(outcome, Refusal):
                    raise outcome
                logits[rows] = outcome
        finally:
            for run in runs:
                scheduler.cancel(run)
    if not np.isfinite(logits).all():
        raise ModelFailed("the model gave a score that is no number")
    return logits


def _set(future: "asyncio.Future[RunOutcome]", outcome: RunOutcome, _: Run) -> None:
    if not future.done():  # else the caller has gone
        future.set_result(outcome)
