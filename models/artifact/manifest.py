"""What an artifact says of itself: the model, where it came from, what its graphs take, the sha256 of its files."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from models.artifact.explanation import Explanation
from models.features.field import Input


class Manifest(BaseModel):
    """What the artifact is, where it came from, and the sha256 of every other file in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str
    version: str
    created: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    schema_fingerprint: str
    inputs: tuple[Input, ...]
    outputs: tuple[Literal["logit"], Literal["prob"]]
    explain: tuple[Explanation, ...] = ()
    code_version: str
    data_hash: str
    files: dict[str, str]

    @property
    def click_rate(self) -> float | None:
        """Of the validation part, and so what the calibrated scores come to on average: the best guess without them."""
        valid = self.metrics.get("valid")
        rate = valid.get("click_rate") if isinstance(valid, dict) else None
        return rate if isinstance(rate, float) and 0 < rate < 1 else None
