"""The thread that runs the models, and the bounded line of candidates before it."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from models.encoding import Arrays
from service.backends import Backend, BackendError
from service.deadline import Deadline
from service.errors import model_failed, overloaded, too_late
from service.metrics import Metrics


class Worker:
    """Runs one request after the other: a model on one core is fastest alone, and `run` gives the event loop its GIL.

    The line is bounded in candidates, not requests, as those are what takes time.
    """

    def __init__(self, metrics: Metrics, *, max_queued_candidates: int) -> None:
        self._metrics = metrics
        self._limit = max_queued_candidates
        self._waiting = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    async def run(self, backend: Backend, arrays: Arrays, deadline: Deadline) -> NDArray[np.float32]:
        """The candidates' logits, all finite. Raises Problem: 503 if the line is full or the model fails, 504 late."""
        num_candidates = len(arrays["user_index"])
        if self._waiting and self._waiting + num_candidates > self._limit:
            raise overloaded(self._waiting)
        self._line_grows(num_candidates)
        loop = asyncio.get_running_loop()
        queued = time.perf_counter()

        def run() -> NDArray[np.float32]:
            started = time.perf_counter()
            loop.call_soon_threadsafe(self._line_grows, -num_candidates)
            self._metrics.stages["queue"].observe(started - queued)
            deadline.check()
            logits = backend.run(arrays)
            self._metrics.stages["infer"].observe(time.perf_counter() - started)
            self._metrics.batch_candidates.observe(num_candidates)
            return logits

        answer = loop.run_in_executor(self._thread, run)
        await asyncio.wait([answer], timeout=max(deadline.left_s, 0))
        if not answer.done():
            answer.add_done_callback(asyncio.Future.exception)  # nobody is left to read it
            raise too_late(deadline.timeout_ms)
        try:
            logits = answer.result()
        except BackendError as err:
            raise model_failed("the model could not be run") from err
        if not np.isfinite(logits).all():
            raise model_failed("the model gave a score that is no number")
        return logits

    def _line_grows(self, num_candidates: int) -> None:
        self._waiting += num_candidates
        self._metrics.queue_candidates.set(self._waiting)

    def close(self) -> None:
        """Ends after the runs under way."""
        self._thread.shutdown(wait=True, cancel_futures=True)
