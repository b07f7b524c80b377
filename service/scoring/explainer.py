"""What a model attended to in one request, with names: its explain.onnx, run aside so that predictions never wait."""

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
from service.errors import explaining_enough, model_failed, not_explained, of_arm, too_late
from service.ids import spelled
from service.runtime.backend import BackendError
from service.scoring.feature_merge import Given
from service.scoring.scorer import Encoded, Scored, Scorer

MAX_UNDER_WAY = 4  # one runs, the others wait for it


@dataclass(frozen=True, kw_only=True, slots=True)
class Explained:
    """An answer as to a prediction, and beside it every explanation of the arm's model by name, as JSON."""

    scored: Scored
    explanations: dict[str, msgspec.Raw]


class Explainer:
    """Explains on a thread of its own, one request after the other; its line is short, as people read the answers.

    Nothing is loaded before it is asked for. What it scores is not counted among the arm's predictions.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._under_way = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="explain")

    async def explain(self, given: Given, *, request_id: str | int | None, deadline: Deadline) -> Explained:
        """Raises Problem as `Scorer.score` does, and 409 where the arm's artifact explains nothing."""
        if self._under_way >= MAX_UNDER_WAY:  # before anything else: a storm of these must not reach the store
            raise explaining_enough(self._under_way)
        self._under_way += 1
        try:
            encoded = await self._scorer.encode(given, request_id=request_id, deadline=deadline)
            _check_explained(encoded)
        except BaseException:
            self._under_way -= 1
            raise
        answer = asyncio.get_running_loop().run_in_executor(self._thread, self._run, given, encoded, deadline)
        answer.add_done_callback(self._ended)
        with of_arm(encoded.arm):
            await asyncio.wait([answer], timeout=max(deadline.left_s, 0))
            if not answer.done():
                raise too_late(deadline.timeout_ms)
            try:
                return answer.result()
            except (ArtifactError, BackendError) as err:
                raise model_failed("the model could not be explained") from err

    def _run(self, given: Given, encoded: Encoded, deadline: Deadline) -> Explained:
        deadline.check()
        artifact = encoded.model.artifact
        logits, *tensors = encoded.model.explaining.run_all(encoded.read.arrays)
        if not all(np.isfinite(values).all() for values in (logits, *tensors)):
            raise model_failed("the model gave an explanation that is no number")
        clicks = history(encoded.read.past, before=given.ts, limit=artifact.schema.history_length)
        explanations = {}
        for explanation, values in zip((LOGIT, *artifact.manifest.explain), (logits, *tensors), strict=True):
            told = worded(
                explanation,
                values,
                request=spelled(encoded.request_id),
                candidates=given.candidates.ids,
                behaviours=[click.item for click in clicks],
            )
            explanations[explanation.name] = msgspec.Raw(
                msgspec.json.encode({**told, "values": _in_pieces(told["values"])})
            )
        return Explained(scored=self._scorer.answer(encoded, logits), explanations=explanations)

    def _ended(self, answer: "asyncio.Future[Explained]") -> None:
        self._under_way -= 1
        if not answer.cancelled():
            answer.exception()  # after a deadline nobody else reads it

    def close(self) -> None:
        """Ends after the explanation under way."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def _check_explained(encoded: Encoded) -> None:
    manifest = encoded.model.artifact.manifest
    with of_arm(encoded.arm):
        if not manifest.explain:
            raise not_explained(manifest.model, manifest.version)


def _in_pieces(values: NDArray[np.float64]) -> msgspec.Raw:
    """The values as JSON, one candidate at a time: while a list is encoded the event loop has to wait."""
    if values.ndim < 2:
        return msgspec.Raw(msgspec.json.encode(values.tolist()))
    return msgspec.Raw(b"[" + b",".join(msgspec.json.encode(part.tolist()) for part in values) + b"]")
