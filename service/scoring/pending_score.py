"""Pending score: one request on its way through the scorer, and its answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.deadline import Deadline
from service.errors import Degraded, ModelFailed
from service.experiments.assignment import Experiment
from service.runtime.backend import Logits
from service.runtime.scheduler import Run
from service.scoring.loaded_model import LoadedModel
from service.scoring.model_inputs import InputLookup, ModelInput
from service.scoring.request import ScoringRequest
from service.store.feature_store import Fetched


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """An answer: calibrated click probabilities in the candidates' order, and what it had to do without."""

    request_id: str | int
    experiment: str
    arm: str
    model: str
    version: str
    ctr: NDArray[np.float64]
    degraded: Sequence[Degraded]


Outcome = Scored | Exception
"""A Refusal is the client's to hear; any other exception is an error of ours, MalformedFeatures the body's."""
OnOutcome = Callable[[Outcome], None]


class PendingScore:
    """One request on its way. Times are perf_counter's but for the deadline."""

    __slots__ = (
        "arm",
        "asked_at",
        "busy_s",
        "cause",
        "deadline",
        "encode_s",
        "expected_s",
        "experiment",
        "fetch_s",
        "fetched",
        "infer_s",
        "input",
        "is_done",
        "is_shadow",
        "logits",
        "lookup",
        "model",
        "on_outcome",
        "request",
        "request_id",
        "run",
    )

    def __init__(
        self,
        request: ScoringRequest,
        request_id: str | int,
        deadline: Deadline,
        on_outcome: OnOutcome,
        *,
        experiment: Experiment,
        arm: str,
        model: LoadedModel,
        is_shadow: bool = False,
        cause: ModelFailed | None = None,
    ) -> None:
        self.request = request
        self.request_id = request_id
        self.deadline = deadline
        self.on_outcome = on_outcome
        self.experiment = experiment
        self.arm = arm
        self.model = model
        self.is_shadow = is_shadow
        self.cause = cause  # why the arm's own version does not answer, where its previous one is to
        self.expected_s = 0.0
        self.asked_at = 0.0
        self.busy_s = 0.0  # of the event loop and the model
        self.fetch_s = self.encode_s = self.infer_s = 0.0
        self.is_done = False
        self.lookup: InputLookup | None = None
        self.fetched: Fetched | None = None
        self.input: ModelInput | None = None
        self.logits: Logits | None = None
        self.run: Run | None = None

    @property
    def num_candidates(self) -> int:
        return len(self.request.candidates.ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedInput:
    """A request with its model's inputs, not yet run: for explanations."""

    request: ScoringRequest
    request_id: str | int
    experiment: Experiment
    arm: str
    model: LoadedModel
    input: ModelInput

    def scored(self, logits: Logits) -> Scored:
        return Scored(
            request_id=self.request_id,
            experiment=self.experiment.name,
            arm=self.arm,
            model=self.model.name,
            version=self.model.version,
            ctr=self.model.calibration(logits),
            degraded=self.input.degraded,
        )
