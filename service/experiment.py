"""Who gets which arm: the experiment file, and the sticky draw by hashing."""

import hashlib
import math
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"  # safe as a metric's label, in a path and in a URL


class ExperimentError(ValueError):
    """An experiment file that cannot be used: which one, where in it, and why."""


class Arm(BaseModel):
    """A model under test: its artifact, what runs it, and its share of the users (relative to the other arms')."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    name: str = Field(pattern=NAME)
    model: str = Field(pattern=NAME)
    version: str = Field(default="current", pattern=NAME)
    share: float = Field(ge=0, allow_inf_nan=False)
    backend: Literal["onnx", "torchscript"] = "onnx"


class Experiment(BaseModel):
    """One experiment, as its file says it. Holds no state: any process draws the same arm for the same unit."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    name: str = Field(alias="experiment", pattern=NAME)
    salt: str = Field(min_length=1)
    unit: Literal["user"] = "user"
    arms: tuple[Arm, ...] = Field(min_length=1)
    shadow: tuple[Arm, ...] = ()
    overrides: dict[str, str] = {}

    @field_validator("shadow")
    @classmethod
    def _no_shadow_arms(cls, shadow: tuple[Arm, ...]) -> tuple[Arm, ...]:
        if shadow:
            raise ValueError("shadow arms are not served yet; leave the list empty")
        return shadow

    @model_validator(mode="after")
    def _arms_fit_together(self) -> Self:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"arm names must differ, got {', '.join(names)}")
        if not any(arm.share for arm in self.arms):
            raise ValueError("at least one arm needs a share above 0")
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

    def arm(self, name: str) -> Arm:
        return self._by_name[name]

    def propensity(self, arm: Arm) -> float:
        """The probability with which an arm is drawn. Overridden users are not drawn: keep them out of any analysis."""
        return arm.share / math.fsum(a.share for a in self.arms)

    @cached_property
    def _by_name(self) -> dict[str, Arm]:
        return {arm.name: arm for arm in self.arms}

    @cached_property
    def _drawn(self) -> "list[tuple[Arm, hashlib.blake2b, float]]":
        """The arms that take part, in the order of their names, each with its hash begun and its share."""
        arms = sorted((arm for arm in self.arms if arm.share), key=lambda arm: arm.name)
        begin = f"{len(self.salt)}:{self.salt}:"
        return [(arm, hashlib.blake2b(f"{begin}{arm.name}:".encode(), digest_size=8), arm.share) for arm in arms]


def read(path: Path) -> Experiment:
    """Raises ExperimentError in one sentence for a file that is absent, no YAML, or no experiment."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
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
    whole = begun.copy()
    whole.update(unit)
    # 52 bits and a half: exact in a double, and never 0 or 1: a waiting time is finite and more than nothing.
    return ((int.from_bytes(whole.digest()) >> 12) + 0.5) / 2**52
