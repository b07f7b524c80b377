"""Explainer: what a model attended to in one request, with names; its explain.onnx, on a thread of its own."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.artifact.errors import ArtifactError
from models.artifact.explanation import LOGIT, worded
from models.features.history import history
from service.deadline import Deadline
from service.errors import DeadlinePassed, ModelFailed, NotExplained, Overloaded, Refusal
from service.ids import canonical_id
from service.runtime.backend import BackendError
from service.scoring.pending_score import PreparedInput, Scored
from service.scoring.request import ScoringRequest
from service.scoring.scorer import Scorer

MAX_PENDING = 4  # one runs, the others wait for it


@dataclass(frozen=True, kw_only=True, slots=True)
class Explained:
    """An answer as to a prediction, and beside it every explanation of the arm's model by name, as JSON."""

    scored: Scored
    explanations: dict[str, msgspec.Raw]


class Explainer:
    """One request after the other; its queue is short, as people read the answers, and predictions never wait for it.

    Nothing is loaded before it is asked for. What it scores is not counted among the arm's predictions.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._num_pending = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="explain")

    async def explain(self, request: ScoringRequest, *, request_id: str | int | None, deadline: Deadline) -> Explained:
        """Raises as `Scorer.start` says, and NotExplained where the arm's artifact explains nothing."""
        if self._num_pending >= MAX_PENDING:  # before anything else: a storm of these must not reach the store
            raise Overloaded(f"{self._num_pending} explanations are under way already; try again")
        self._num_pending += 1
        try:
            prepared = await self._scorer.prepare(request, request_id=request_id, deadline=deadline)
        except BaseException:
            self._num_pending -= 1
            raise
        try:
            return await self._explained(prepared, deadline)
        except Refusal as refusal:
            refusal.arm = prepared.arm
            raise

    async def _explained(self, prepared: PreparedInput, deadline: Deadline) -> Explained:
        manifest = prepared.model.artifact.manifest
        if not manifest.explain:
            self._num_pending -= 1
            raise NotExplained(manifest.model, manifest.version)
        answer = asyncio.get_running_loop().run_in_executor(self._thread, self._run, prepared, deadline)
        answer.add_done_callback(self._end)
        await asyncio.wait([answer], timeout=max(deadline.left_s, 0))
        if not answer.done():
            raise DeadlinePassed(deadline.timeout_ms)
        try:
            return answer.result()
        except (ArtifactError, BackendError) as err:
            raise ModelFailed("the model could not be explained") from err

    def _run(self, prepared: PreparedInput, deadline: Deadline) -> Explained:
        deadline.check()
        request, artifact = prepared.request, prepared.model.artifact
        user_index = np.zeros(len(request.candidates.ids), dtype=np.int64)
        logits, *tensors = prepared.model.explaining.run_all({**prepared.input.arrays, "user_index": user_index})
        if not all(np.isfinite(values).all() for values in (logits, *tensors)):
            raise ModelFailed("the model gave an explanation that is no number")
        clicks = history(prepared.input.history, before=request.ts, limit=artifact.schema.history_length)
        explanations = {}
        for explanation, values in zip((LOGIT, *artifact.manifest.explain), (logits, *tensors), strict=True):
            document = worded(
                explanation,
                values,
                request=canonical_id(prepared.request_id),
                candidates=request.candidates.ids,
                behaviours=[click.item for click in clicks],
            )
            explanations[explanation.name] = msgspec.Raw(
                msgspec.json.encode({**document, "values": _by_candidate(document["values"])})
            )
        return Explained(scored=prepared.scored(logits), explanations=explanations)

    def _end(self, answer: "asyncio.Future[Explained]") -> None:
        self._num_pending -= 1
        if not answer.cancelled():
            answer.exception()  # after a deadline nobody else reads it

    def close(self) -> None:
        """Ends after the explanation under way."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def _by_candidate(values: NDArray[np.float64]) -> msgspec.Raw:
    """The values as JSON, one candidate at a time: while a list is encoded the event loop has to wait."""
    if values.ndim < 2:
        return msgspec.Raw(msgspec.json.encode(values.tolist()))
    return msgspec.Raw(b"[" + b",".join(msgspec.json.encode(part.tolist()) for part in values) + b"]")
