"""How gradients move the weights: Adam, or the FTRL that xDeepInt and DynInt are trained with; and their average."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.swa_utils import AveragedModel

from models.layers.base import CTRModel
from models.layers.embeddings import FieldEmbeddings
from training.config import Run


def build(model: CTRModel, run: Run, *, batch_size: float | None = None) -> Optimizer:
    """The run's optimiser. With ftrl the embedding tables lose whole rows, everything else single weights.

    FTRL's settings are given as published, for the loss summed over a batch. The loop's is the mean, whose gradients
    are smaller by the batch size B: dividing l1, l2 and beta by B, and n's start by B^2, gives the same weights.
    `batch_size` is what batches come to on average, where that is not the run's.
    """
    if run.optimizer == "adam":
        return Adam(model.parameters(), lr=run.lr, betas=(0.9, run.adam_beta2))
    tables = [p for module in model.modules() if isinstance(module, FieldEmbeddings) for p in module.parameters()]
    known = {id(p) for p in tables}
    b = batch_size or run.batch_size
    return FTRL(
        [
            {"params": tables, "by_row": True, "l1": run.table_l1 / b, "l2": run.table_l2 / b},
            {
                "params": [p for p in model.parameters() if id(p) not in known],
                "by_row": False,
                "l1": run.dense_l1 / b,
                "l2": run.dense_l2 / b,
            },
        ],
        lr=run.lr,
        beta=1 / b,
        n_start=0.1 / b**2,
        init_z_from_w=run.init_z_from_w,
    )


def slow_down(optimizer: Optimizer, factor: float, *, least: float) -> None:
    """Multiply every learning rate, as far as `least`; no weight moves by that."""
    for group in optimizer.param_groups:
        lr = min(group["lr"], max(group["lr"] * factor, least))
        if isinstance(optimizer, FTRL):
            optimizer.set_rate(group, lr)
        else:
            group["lr"] = lr


def averaged(model: CTRModel, run: Run) -> AveragedModel | None:
    """A copy of the model that follows it, told of each step by `update_parameters`; None where the run wants none.

    Its weights, and the statistics of its batch norms, are a moving average of the model's: after each step so much of
    what they were as `_decay_after` says, and the rest of what the model's are now. Like a falling learning rate it
    takes out of them what the last batches happened to be, while the model goes on learning at the full rate (after
    Polyak and Juditsky 1992).
    """
    if not run.ema_decay:
        return None

    # Not torch's own get_ema_multi_avg_fn: it averages integers too, and cuts what comes of it, so that 3 becomes 2.
    def follow(averages: Sequence[Tensor], latest: Sequence[Tensor], num_before: Tensor | int) -> None:
        decay = _decay_after(int(num_before), run)
        for average, value in zip(averages, latest, strict=True):
            if average.is_floating_point():
                average.lerp_(value, 1 - decay)
            else:
                average.copy_(value)

    return AveragedModel(model, multi_avg_fn=follow, use_buffers=True)


def _decay_after(steps: int, run: Run) -> float:
    """`ema_decay`, but in the first steps less, as TensorFlow's ExponentialMovingAverage has it: min(d, (1+n)/(10+n)).

    A batch norm's variance starts at 1. Where its inputs begin near 0 (FuxiCTR's tables), a hundredth of that is still
    many times the truth, and spoilt the average for twenty epochs (FinalMLP on Frappe).
    """
    return min(run.ema_decay, (1 + steps) / (10 + steps))


class FTRL(Optimizer):
    """Follow the regularised leader: weights are a closed form of the sums n of g^2 and z of g, and mostly zero.

    With n' = n + g^2, each step is z += g - (sqrt(n') - sqrt(n)) / lr * w, n = n', and then

    - by element: w = 0 where |z| <= l1, else (sign(z) l1 - z) / (sqrt(n) / lr + 2 l2); n starts at `n_start`;
    - by row of D weights, Group-Lasso FTRL: w = 0 where |z|_2 <= l1 sqrt(D), else
      -z (1 - l1 sqrt(D) / |z|_2) / ((beta + sqrt(n)) / lr + l2); n starts at 0. Rows without a gradient stay untouched.

    With `init_z_from_w` z starts where that form gives the weights as they were initialised, beyond the threshold, so
    that only a row pushed back becomes zero; else at zero, as published, which forgets them at the first step.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        beta: float,
        n_start: float,
        init_z_from_w: bool,
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "n_start": n_start, "init_z_from_w": init_z_from_w})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss to return
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    @torch.no_grad()
    def set_rate(self, group: dict[str, Any], lr: float) -> None:
        """Another learning rate: z changes so that the weights, of which it is the closed form, stay as they are."""
        group["lr"] = lr
        for parameter in group["params"]:
            state = self.state[parameter]
            if state:
                # Where w = 0, z is below its threshold at any rate; where z = 0, w has not moved yet.
                holds = (state["z"] != 0) & (parameter != 0)
                if group["by_row"]:
                    holds = holds.any(dim=-1, keepdim=True)
                state["z"] = torch.where(holds, _z_of(parameter, state["n"], group), state["z"])

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["n"] = torch.full_like(parameter, 0.0 if group["by_row"] else group["n_start"])
            state["z"] = _z_of(parameter, state["n"], group) if group["init_z_from_w"] else torch.zeros_like(parameter)
        weights, n, z = parameter, state["n"], state["z"]
        if group["by_row"] and parameter.dim() > 1:
            touched = gradient.any(dim=1).nonzero().squeeze(1)
            gradient, weights, n, z = (t.index_select(0, touched) for t in (gradient, weights, n, z))
        n_next = n + gradient.square()
        z = z + gradient - (n_next.sqrt() - n.sqrt()) / group["lr"] * weights
        weights = _weights_of(z, n_next, group)
        for full, part in ((parameter, weights), (state["n"], n_next), (state["z"], z)):
            if group["by_row"] and parameter.dim() > 1:
                full.index_copy_(0, touched, part)
            else:
                full.copy_(part)


def _weights_of(z: Tensor, n: Tensor, group: dict[str, Any]) -> Tensor:
    threshold = _threshold(z, group)
    if group["by_row"]:
        norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
        return torch.where(norm <= threshold, 0.0, -z * (1 - threshold / norm) / _stiffness(n, group))
    return torch.where(z.abs() <= threshold, 0.0, (z.sign() * threshold - z) / _stiffness(n, group))


def _z_of(weights: Tensor, n: Tensor, group: dict[str, Any]) -> Tensor:
    """The inverse of `_weights_of`; a zero weight, or row of them, has z = 0."""
    beyond, threshold = weights * _stiffness(n, group), _threshold(weights, group)
    if group["by_row"]:
        norm = torch.linalg.vector_norm(beyond, dim=-1, keepdim=True)
        return torch.where(norm > 0, -beyond * (1 + threshold / norm), 0.0)
    return -beyond - weights.sign() * threshold


def _threshold(rows: Tensor, group: dict[str, Any]) -> float:
    """Where z begins to count: its length in a row, its absolute value by element."""
    l1: float = group["l1"]
    return l1 * math.sqrt(rows.shape[-1]) if group["by_row"] else l1


def _stiffness(n: Tensor, group: dict[str, Any]) -> Tensor:
    """What divides z beyond its threshold."""
    lr: float = group["lr"]
    l2: float = group["l2"]
    beta: float = group["beta"]
    return (beta + n.sqrt()) / lr + l2 if group["by_row"] else n.sqrt() / lr + 2 * l2
