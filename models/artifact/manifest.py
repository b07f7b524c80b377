"""What an artifact says of itself: the model, where it came from, what its graphs take, the sha256 of its files."""

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from models.artifact.explanation import Explanation
from models.features.field import Input

MODEL = "model.onnx"  # one request's candidates, by their item rows
BATCHED = "model.batched.onnx"  # the same of several requests joined
TORCHSCRIPT = "model.ts"  # the same for torch.jit.load; inputs go by position
ITEM = "item.onnx"  # ads to item rows
EXPLAINING = "explain.onnx"  # several requests from their ads' ids on: the logits, then what `explain` lists


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The tensors that one graph takes, in order, and gives: dimensions are "U" requests, "C" candidates, or fixed."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    inputs: tuple[Input, ...]
    outputs: tuple[Input, ...]


class Manifest(BaseModel):
    """What the artifact is, where it came from, and the sha256 of every other file in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str
    version: str
    created: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    schema_fingerprint: str
    inputs: tuple[Input, ...]  # of the encoder's arrays, those that the model reads
    graphs: dict[str, Graph]  # by file name
    explain: tuple[Explanation, ...] = ()
    code_version: str
    data_hash: str
    files: dict[str, str]

    @property
    def item_width(self) -> int:
        """W: how many numbers an item row has."""
        (items,) = self.graphs[ITEM].outputs
        width = items.dims[-1]
        assert isinstance(width, int)
        return width

    @property
    def click_rate(self) -> float | None:
        """Of the validation part, and so what the calibrated scores come to on average: the best guess without them."""
        valid = self.metrics.get("valid")
        rate = valid.get("click_rate") if isinstance(valid, dict) else None
        return rate if isinstance(rate, float) and 0 < rate < 1 else None
