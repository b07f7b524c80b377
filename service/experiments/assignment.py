"""Experiment and assignment: the experiment file, and the sticky draw of an arm by hashing the user's id."""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"  # safe as a metric's label, in a path and in a URL
SUM_TOLERANCE = 1e-6  # percent: three arms of 33.333333 or so are a whole
LOOK_BACK_S = 86_400.0  # an event of an older request is counted as the experiment runs now


class ExperimentError(ValueError):
    """An experiment file that cannot be used: which one, where in it, and why."""


class Arm(BaseModel):
    """A model under test: its artifact, what runs it, and its share of the users in percent.

    A shadow arm's share is the percentage of all requests that it scores too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    name: str = Field(pattern=NAME)
    model: str = Field(pattern=NAME)
    version: str = Field(default="current", pattern=NAME)
    share: float = Field(ge=0, le=100, allow_inf_nan=False)
    backend: Literal["onnx", "torchscript"] = "onnx"
    device: Literal["cpu", "cuda"] = "cpu"


class Experiment(BaseModel):
    """One experiment, as its file says it. Holds no state: any process draws the same arm for the same unit.

    The arms' shares sum to 100. Shadow arms score a sample of the requests beside the arm that answers, and never
    answer. A killed arm, of either kind, keeps its share for the day it comes back, and until then has no users: those
    it had go to the others, and nobody else moves.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    name: str = Field(alias="experiment", pattern=NAME)
    salt: str = Field(min_length=1)
    unit: Literal["user"] = "user"
    arms: tuple[Arm, ...] = Field(min_length=1)
    shadow: tuple[Arm, ...] = ()
    overrides: dict[str, str] = {}
    killed: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _arms_fit_together(self) -> Self:
        names = [arm.name for arm in self.arms]
        every = [arm.name for arm in self.served]
        if len(set(every)) < len(every):
            raise ValueError(f"arm names must differ, got {', '.join(every)}")
        total = math.fsum(arm.share for arm in self.arms)
        if abs(total - 100) > SUM_TOLERANCE:
            listed = ", ".join(f"{arm.name} {arm.share:g}" for arm in self.arms)
            raise ValueError(f"the arms' shares are percentages that sum to 100, got {total:.10g} ({listed})")
        for name in self.killed:
            if name not in every:
                raise ValueError(f"killed names arm {name}; there are {', '.join(every)}")
        if not self._drawn:
            raise ValueError("at least one arm with a share above 0 must not be killed")
        for unit, name in self.overrides.items():
            if name not in names:
                raise ValueError(f"override of {unit} names arm {name}; there are {', '.join(names)}")
        return self

    def assign(self, unit_id: str) -> Arm:
        """The arm of a unit: the user's id, or the request's where there is no user.

        Weighted rendezvous: from hash(salt, arm, unit) each arm draws a waiting time of rate `share`, and the first
        wins. So the order of the arms does not matter, a changed share moves only the users it must
        (50/50 to 60/40: a tenth of them, all one way), and a new arm takes users without moving others among the old.
        """
        if unit_id in self.overrides:
            return self.arm(self.overrides[unit_id])
        unit = unit_id.encode()
        return min(self._drawn, key=lambda arm: -math.log(_uniform(arm[1], unit)) / arm[2])[0]

    def shadows(self, request_id: str) -> list[Arm]:
        """The shadow arms that score this request too: each draws by the request's id, the same in every process."""
        request = request_id.encode()
        return [arm for arm, begun in self._sampled if _uniform(begun, request) * 100 < arm.share]

    @property
    def served(self) -> tuple[Arm, ...]:
        """Every arm that needs a model."""
        return (*self.arms, *self.shadow)

    def arm(self, name: str) -> Arm:
        return self._by_name[name]

    def propensity(self, arm: Arm) -> float:
        """The probability with which an arm is drawn. Overridden users are not drawn: keep them out of any analysis."""
        return 0.0 if arm.name in self.killed else arm.share / math.fsum(share for _, _, share in self._drawn)

    def describe(self) -> dict[str, Any]:
        """What /experiments tells of it."""
        return {
            "experiment": self.name,
            "unit": self.unit,
            "arms": [{**arm.model_dump(), "propensity": self.propensity(arm)} for arm in self.arms],
            "shadow": [arm.model_dump() for arm in self.shadow],
            "killed": list(self.killed),
        }

    def with_shares(
        self, *, shares: Mapping[str, float], shadow: Mapping[str, float], killed: Iterable[str] | None = None
    ) -> "Experiment":
        """The same with other shares, by arm and by shadow arm; an arm that is not named keeps its share.

        `killed` replaces the killed arms. Raises ExperimentError for an arm that does not exist, and for shares that no
        file could have.
        """
        content = self.model_dump(by_alias=True)
        if killed is not None:
            content["killed"] = sorted(set(killed))
        for part, changes in (("arms", shares), ("shadow", shadow)):
            by_name = {arm["name"]: arm for arm in content[part]}
            for name, share in changes.items():
                if name not in by_name:
                    known = f"there are {', '.join(by_name)}" if by_name else "there are none"
                    raise ExperimentError(f"{part} has no {name}; {known}")
                by_name[name]["share"] = share
        return parse(content, source="the new shares")

    @cached_property
    def _by_name(self) -> dict[str, Arm]:
        return {arm.name: arm for arm in self.arms}

    @cached_property
    def _drawn(self) -> "list[tuple[Arm, hashlib.blake2b, float]]":
        """The arms that take part, in the order of their names, each with its hash begun and its share."""
        arms = sorted((arm for arm in self.arms if self._is_live(arm)), key=lambda arm: arm.name)
        return [(arm, self._begun(arm, ""), arm.share) for arm in arms]

    @cached_property
    def _sampled(self) -> "list[tuple[Arm, hashlib.blake2b]]":
        return [(arm, self._begun(arm, "shadow:")) for arm in self.shadow if self._is_live(arm)]

    def _is_live(self, arm: Arm) -> bool:
        return arm.share > 0 and arm.name not in self.killed

    def _begun(self, arm: Arm, purpose: str) -> "hashlib.blake2b":
        return hashlib.blake2b(f"{len(self.salt)}:{self.salt}:{arm.name}:{purpose}".encode(), digest_size=8)


class Running:
    """The experiment as it runs. `now` is replaced as a whole: whoever reads it once sees one state of it."""

    def __init__(self, experiment: Experiment, *, clock: Callable[[], float] = time.time) -> None:
        self.now = experiment
        self._clock = clock
        self._past: list[tuple[float, Experiment]] = []  # each until when, the earliest first

    def replace(self, experiment: Experiment, past: Iterable[tuple[float, Experiment]]) -> None:
        """From now on as the control document has it. `past` is how it ran before and until when, earliest first."""
        self.now = experiment
        self._past = list(past)

    def at(self, ts: float) -> Experiment:
        """As it ran at a time of the last day, in Unix seconds; for an earlier one, which a replay brings, as now."""
        if ts > self._clock() - LOOK_BACK_S:
            for until, experiment in self._past:
                if ts < until:
                    return experiment
        return self.now


def from_setting(setting: Path | Mapping[str, Any] | None) -> Experiment:
    """The experiment that the setting names a file of, or holds. Raises ExperimentError."""
    if setting is None:
        raise ExperimentError("the setting experiment is missing: name the experiment file, or write what stands in it")
    return read(setting) if isinstance(setting, Path) else parse(setting, source="setting experiment")


def read(path: Path) -> Experiment:
    """What stands in the file is text: an arm `on` and a version 1.10 are called so.

    Raises ExperimentError in one sentence for a file that is absent, no YAML, or no experiment.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # noqa: S506 - it makes text only
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise ExperimentError(f"{path}: not a readable YAML file: {' '.join(str(err).split())}") from err
    return parse(content, source=str(path))


def parse(content: object, *, source: str) -> Experiment:
    """An experiment from what its file holds. Raises ExperimentError in one sentence that begins with the source."""
    try:
        return Experiment.model_validate(content)
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise ExperimentError(f"{source}: at {where}: {first['msg'].removeprefix('Value error, ')}") from err


def _uniform(begun: "hashlib.blake2b", unit: bytes) -> float:
    """A number strictly between 0 and 1, the same for ever for the same bytes."""
    digest = begun.copy()
    digest.update(unit)
    # 52 bits and a half: exact in a double, and never 0 or 1: a waiting time is finite and more than nothing.
    return ((int.from_bytes(digest.digest()) >> 12) + 0.5) / 2**52
