"""What a training run is: one value, checked when made, that with the data decides the weights bit by bit."""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from models import zoo
from training.errors import UserError

MAX_LR = 1e30  # a float32 holds no more than 3e38


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run. L2 penalties are the model's own (`model.l2_*`), so no weight decay stands here."""

    model: str
    model_config: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the model's defaults, by field of its Config."""

    batch_size: int
    lr: float
    max_epochs: int
    patience: int
    """Evaluations in a row without a better `monitor` on the validation part before training stops."""
    eval_every_steps: int = 0
    """Steps from one evaluation on the validation part to the next; 0: an evaluation at the end of each epoch."""
    monitor: Literal["auc", "logloss"] = "auc"
    optimizer: Literal["adam", "ftrl"] = "adam"
    adam_beta2: float = 0.999
    ema_decay: float = 0.0
    """Above 0, what is validated and kept is the exponential moving average of the weights over the steps."""
    table_l1: float = 10.0
    """FTRL's on the rows of the embedding tables, as published: for the loss summed over a batch (`optimizers`)."""
    table_l2: float = 10.0
    dense_l1: float = 0.1
    """The same on all other weights."""
    dense_l2: float = 0.1
    init_z_from_w: bool = True
    """Whether FTRL starts from the weights as initialised, and so keeps most rows, or, as published, from zeros."""
    plateau_monitor: Literal["auc", "logloss"] | None = None
    """The validation figure whose plateau lowers the learning rate; None: `monitor`, which decides the end."""
    plateau_factor: float = 0.1
    """The learning rate is multiplied by it after more than `plateau_patience` evaluations without a better one."""
    plateau_patience: int = 0
    min_lr: float = 1e-6
    clip_norm: float = 10.0
    """The gradient is scaled down to this norm where it is longer."""
    seed: int = 2026
    checkpoint_s: float = 30.0
    """Seconds between checkpoints; one more is written after each evaluation."""

    def __post_init__(self) -> None:
        rules = {
            "batch_size": (self.batch_size >= 2, "at least 2"),
            "lr": (0 < self.lr <= MAX_LR, f"above 0 and at most {MAX_LR:g}"),
            "max_epochs": (self.max_epochs >= 1, "at least 1"),
            "patience": (self.patience >= 1, "at least 1"),
            "eval_every_steps": (self.eval_every_steps >= 0, "at least 0"),
            "monitor": (self.monitor in ("auc", "logloss"), "auc or logloss"),
            "optimizer": (self.optimizer in ("adam", "ftrl"), "adam or ftrl"),
            "adam_beta2": (0 <= self.adam_beta2 < 1, "at least 0 and below 1"),
            "ema_decay": (0 <= self.ema_decay < 1, "at least 0 and below 1"),
            **{
                name: (0 <= getattr(self, name) < math.inf, "at least 0")
                for name in ("table_l1", "table_l2", "dense_l1", "dense_l2")
            },
            "plateau_monitor": (self.plateau_monitor in (None, "auc", "logloss"), "auc, logloss or null"),
            "plateau_factor": (0 < self.plateau_factor <= 1, "above 0 and at most 1"),
            "plateau_patience": (self.plateau_patience >= 0, "at least 0"),
            "min_lr": (0 <= self.min_lr < math.inf, "at least 0"),
            "clip_norm": (self.clip_norm > 0, "above 0"),
            "seed": (0 <= self.seed < 2**63, "at least 0 and below 2^63"),
            "checkpoint_s": (self.checkpoint_s >= 0, "at least 0"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Run":
        return cls(**values)


def override(run: Run, assignments: Sequence[str]) -> Run:
    """The run with every `key=value` applied at once; `model.key=value` goes to the model's Config.

    A value is read as the type of its field. Raises UserError for an unknown key, a value of another type, and values
    that do not fit each other.
    """
    run_types = {name: hint for name, hint in get_type_hints(Run).items() if name not in ("model", "model_config")}
    model_types = get_type_hints(zoo.MODELS[run.model][0])
    types = run_types | {f"model.{name}": hint for name, hint in model_types.items()}
    options: dict[str, dict[str, Any]] = {"": {}, "model": {}}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set wants key=value, got {assignment!r}")
        if key not in types:
            raise UserError(f"--set {key}: no such setting; {_suggestion(key, list(types))}")
        group, _, name = key.rpartition(".")
        options[group][name] = _parse(key, text, types[key])
    try:
        run = replace(run, model_config={**run.model_config, **options["model"]}, **options[""])
        zoo.configure(run.model, run.model_config)
    except ValueError as err:
        raise UserError(f"--set {' '.join(assignments)}: {err}") from err
    return run


def assignments(run: Run) -> list[str]:
    """Every setting of a run as `--set` takes it, the model's defaults too; FTRL's only where it is in use."""
    settings = run.to_json()
    left_out = {"model", "model_config"}
    if run.optimizer != "ftrl":
        left_out |= {"table_l1", "table_l2", "dense_l1", "dense_l2", "init_z_from_w"}
    options = asdict(zoo.configure(run.model, run.model_config))
    values = {k: v for k, v in settings.items() if k not in left_out} | {f"model.{k}": v for k, v in options.items()}
    return [f"{name}={json.dumps(value, separators=(',', ':'))}".replace('"', "") for name, value in values.items()]


def varied(run: Run, **options: Any) -> Run:
    """The run with other options of its model."""
    return replace(run, model_config={**run.model_config, **options})


def difference(old: Run, new: Run) -> str | None:
    """What the first setting is that two runs differ in, in words; None when they are the same."""
    before, after = _flat(old), _flat(new)
    for key in ("model", *sorted(before.keys() | after.keys())):
        if before.get(key) != after.get(key):
            return f"{key} was {before.get(key, 'the default')}, now {after.get(key, 'the default')}"
    return None


def _flat(run: Run) -> dict[str, Any]:
    values = json.loads(json.dumps(run.to_json()))
    return {**values, **{f"model.{k}": v for k, v in values["model_config"].items()}, "model_config": None}


def _parse(key: str, text: str, annotation: Any) -> Any:
    adapter = TypeAdapter(annotation)
    try:
        return adapter.validate_python(text)
    except ValidationError:
        pass
    try:
        return adapter.validate_python(yaml.safe_load(text))
    except (ValidationError, yaml.YAMLError):
        kind = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
        raise UserError(f"--set {key}: expected {kind}, got {text!r}") from None


def _suggestion(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(known))}"
