"""What the oracles of the flat models share: each row's field vectors, and the layers written in NumPy."""

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from models.layers.base import CTRModel
from models.layers.embeddings import FieldEmbeddings

Numbers: TypeAlias = Any  # NumPy's arithmetic is typed as Any
Weights: TypeAlias = dict[str, Numbers]


def vectors(fields: Any, inputs: dict[str, torch.Tensor], *, history: bool) -> Numbers:
    """Each row's field vectors [C, F, D], request's first; the embedding itself is tested in test_layers.py."""
    assert isinstance(fields, FieldEmbeddings)
    request = [fields.request(inputs)]
    if history:
        mask = inputs["hist_mask"].unsqueeze(-1).unsqueeze(-1)
        request.append((fields.history(inputs) * mask).sum(1) / mask.sum(1).clamp(min=1))
    by_row = torch.cat(request, dim=1)[inputs["user_index"]]
    return torch.cat([by_row, fields.item(inputs)], dim=1).detach().numpy()


def weights(model: nn.Module) -> Weights:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def linear(p: Weights, name: str, x: Numbers) -> Numbers:
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)


def batch_norm(p: Weights, name: str, x: Numbers, *, eps: float = 1e-5) -> Numbers:
    scaled = (x - p[f"{name}.running_mean"]) / np.sqrt(p[f"{name}.running_var"] + eps)
    return scaled * p.get(f"{name}.weight", 1.0) + p.get(f"{name}.bias", 0.0)


def layer_norm(p: Weights, name: str, x: Numbers) -> Numbers:
    scaled = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]


def softmax(scores: Numbers) -> Numbers:
    return np.exp(scores) / np.exp(scores).sum()


def sigmoid(x: Numbers) -> Numbers:
    return 1 / (1 + np.exp(-x))


def mlp(p: Weights, name: str, x: Numbers, config: Any) -> float:
    """The logit of `models.layers.base.MLP` for one row."""
    step = 3 + config.batch_norm  # batch norm if asked, ReLU, dropout, linear
    x = linear(p, f"{name}.first", x)
    for layer in range(len(config.hidden)):
        if config.batch_norm:
            x = batch_norm(p, f"{name}.rest.{layer * step}", x)
        x = linear(p, f"{name}.rest.{layer * step + step - 1}", np.maximum(x, 0))
    return float(x[0])


def fields_of(model: CTRModel, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """The embeddings [C, F, D] of each row's fields without its history, request's first."""
    fields: np.ndarray = vectors(model.fields, inputs, history=False)
    return fields
