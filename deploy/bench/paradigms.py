"""DynInt's low-rank paradigms against the weights written out: training step and memory (section 3.5 of its paper).

    python deploy/bench/paradigms.py --out OUT [--rows N] [--rounds N]

Of DGP and DWP, with the same number of layers over the same rows, three sides take turns in one thread:

- paradigm: what the model computes, U (s * V^T X) and sum_p u_p * W (v_p * X);
- written out: the same weights and the same answers, but each row's W^(i) is formed, one [P, P] matrix a layer;
- generated: the naive form of section 3.3, whose net gives all P * P numbers of W^(i) (of G^(i)) itself.

A step is the gates and the maps, forward and backward, from the rows on: without tables, output and optimiser. The
bytes are counted, not measured: of the parameters, and of the tensors that autograd keeps for the backward pass.
OUT gets paradigms.md and paradigms.json.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from interleaved import Ratio, ratio, run_rounds
from torch import Tensor

from models.papers.dynint import DGP, DWP, Gate, cross

PARADIGM, WRITTEN_OUT, GENERATED = "paradigm", "written out", "generated"
WIDTH, LAYERS, REDUCTION, KERNEL_SIZE, RANK = 16, 3, 4, 16, 2
SETTINGS = {"iPinYou": (16, 4), "Criteo": (39, 4)}  # fields, subspaces
TOLERANCE = 1e-4
HEADING = """# DynInt's paradigms against weights written out

One training step of gates and maps, in turns in one thread; bytes of parameters and of what the backward pass needs.

"""

Mode = Literal["dgp", "dwp"]
Step = Callable[[], tuple[Tensor, ...]]


class WrongTermsError(RuntimeError):
    """The weights written out do not give the paradigm's terms."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One form of the layers."""

    terms: Step
    parameters: tuple[Tensor, ...]

    def step_s(self) -> float:
        started = time.perf_counter()
        for parameter in self.parameters:
            parameter.grad = None
        _sum(self.terms()).backward()  # type: ignore[no-untyped-call]  # torch's stubs
        return time.perf_counter() - started

    def parameter_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters)

    def activation_bytes(self) -> int:
        """Of all storages that autograd keeps from the forward pass, each once, but for the parameters'."""
        saved: dict[int, Tensor] = {}

        def save(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            terms = self.terms()
        owned = {parameter.untyped_storage().data_ptr() for parameter in self.parameters}
        total = sum(tensor.untyped_storage().nbytes() for pointer, tensor in saved.items() if pointer not in owned)
        del terms
        return total


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one form costs at one setting; ratios are to the paradigm of the same round."""

    setting: str
    mode: Mode
    form: str
    median_ms: float
    ratio: Ratio
    parameter_bytes: int
    activation_bytes: int


def sides(mode: Mode, num_fields: int, subspaces: int, num_rows: int) -> dict[str, Side]:
    torch.manual_seed(2026)
    num_crossed = num_fields * subspaces
    x_BFD = (torch.randn(num_rows, num_fields, WIDTH) / WIDTH**0.5).requires_grad_()  # the tables learn, too
    maps: DGP | DWP
    if mode == "dgp":
        maps = DGP(LAYERS, num_crossed, kernel_size=KERNEL_SIZE, linear=False)
    else:
        maps = DWP(LAYERS, num_crossed, rank=RANK, offset=RANK**-0.5)
    gate = _gate(num_fields, maps.gate_width)

    def gate_of(net: Gate) -> Tensor:
        numbers: Tensor = net(net.read(x_BFD, slice(0, num_fields)))
        return numbers

    def times(weights_BLPP: Tensor) -> tuple[Tensor, ...]:
        """Each row's own weights times the row."""
        x_BWP = cross(x_BFD, subspaces).flatten(2)
        return (x_BWP.unsqueeze(1) @ weights_BLPP.transpose(2, 3)).unbind(dim=1)

    def paradigm() -> tuple[Tensor, ...]:
        rows_BWSF = cross(x_BFD, subspaces)
        read = {"rows": rows_BWSF.flatten(2), "gate": gate_of(gate)} | maps.read(rows_BWSF, slice(0, num_fields))
        terms: tuple[Tensor, ...] = maps(read)
        return terms

    def written_out() -> tuple[Tensor, ...]:
        gate_BLO = gate_of(gate)
        if isinstance(maps, DGP):
            strengths_BLK = 2 * torch.sigmoid(gate_BLO)
            return times((maps.left_LKP.transpose(1, 2) * strengths_BLK.unsqueeze(2)) @ maps.right_LKP)
        u_BLKP, v_BLKP = maps.factors(gate_BLO)
        return times((u_BLKP.transpose(2, 3) @ v_BLKP) * maps.kernel_LPP)

    all_weights = _gate(num_fields, num_crossed**2)

    def generated() -> tuple[Tensor, ...]:
        weights_BLPP = torch.unflatten(gate_of(all_weights), -1, (num_crossed, num_crossed))
        return times(weights_BLPP * maps.kernel_LPP if isinstance(maps, DWP) else weights_BLPP)

    low_rank = (*maps.parameters(), *gate.parameters())
    full = (*(maps.parameters() if mode == "dwp" else ()), *all_weights.parameters())
    return {
        PARADIGM: Side(terms=paradigm, parameters=low_rank),
        WRITTEN_OUT: Side(terms=written_out, parameters=low_rank),
        GENERATED: Side(terms=generated, parameters=full),
    }


def check(found: dict[str, Side]) -> None:
    """Raises WrongTermsError."""
    for layer, (one, other) in enumerate(zip(found[PARADIGM].terms(), found[WRITTEN_OUT].terms(), strict=True)):
        off = (one - other).abs().max().item()
        if not off <= TOLERANCE:
            raise WrongTermsError(
                f"layer {layer + 1}: expected the paradigm's terms to {TOLERANCE:g}, got {off:.3g} off"
            )


def measure(setting: str, mode: Mode, found: dict[str, Side], rounds: int) -> list[Cost]:
    check(found)
    times = run_rounds(list(found), lambda name: found[name].step_s(), rounds, draw=random.Random(2026))
    first = [of_round[PARADIGM] for of_round in times]
    return [
        Cost(
            setting=setting,
            mode=mode,
            form=name,
            median_ms=1000 * statistics.median(of_round[name] for of_round in times),
            ratio=ratio([of_round[name] for of_round in times], first),
            parameter_bytes=side.parameter_bytes(),
            activation_bytes=side.activation_bytes(),
        )
        for name, side in found.items()
    ]


def markdown(costs: Sequence[Cost]) -> str:
    lines = ["| setting | mode | form | step, ms | times the paradigm's (quartiles) | parameters, MB | saved, MB |"]
    lines += ["|---|---|---|---|---|---|---|"]
    lines += [
        f"| {c.setting} | {c.mode} | {c.form} | {c.median_ms:.1f} | {c.ratio} | {c.parameter_bytes / 1e6:.2f} |"
        f" {c.activation_bytes / 1e6:.1f} |"
        for c in costs
    ]
    return "\n".join(lines) + "\n"


def _gate(num_fields: int, out: int) -> Gate:
    return Gate(LAYERS, num_fields, WIDTH, reduction=REDUCTION, out=out, order=None, detach=True)


def _sum(terms: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([term.sum() for term in terms]).sum()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=256, help="of a batch")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    costs: list[Cost] = []
    modes: tuple[Mode, ...] = ("dgp", "dwp")
    try:
        for setting, (num_fields, subspaces) in SETTINGS.items():
            for mode in modes:
                costs += measure(setting, mode, sides(mode, num_fields, subspaces, options.rows), options.rounds)
    except WrongTermsError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    text = markdown(costs)
    print(text)
    (options.out / "paradigms.md").write_text(f"{HEADING}{text}")
    (options.out / "paradigms.json").write_text(json.dumps([asdict(c) for c in costs], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
