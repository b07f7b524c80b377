"""DynInt: Y. Yan and L. Li, "DynInt: Dynamic Interaction Modeling for Large-scale Click-Through Rate Prediction".

DLP-KDD 2022, arXiv 2301.08139; its static base PIN is "xDeepInt" (2020) by the same authors. D1..D11 are the
ambiguities listed in models.md section 5.7.
"""

# U requests, C candidates, n: U or C; F flat fields (request's first), G some of them, D width, S subspaces, W = D / S
# P = S * F crossed rows, L layers

import math
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from models.blocks import CTRModel, FieldEmbeddings, Inputs, UserState
from models.config import Config, Count, Weight, Within
from models.dynint_maps import DA, DGP, DWP, PIN, Gate, Maps, apply_kernel, cross
from models.explanation import BIAS, CANDIDATE, Explanation, of_fields
from models.own import if_one_request
from models.schema import Schema
from models.taps import tap, tapped


@dataclass(frozen=True, kw_only=True)
class DynIntConfig(Config):
    """Which weights each input gets: pin, the same for all; da, gated; dgp, low-rank and generated; dwp, rescaled."""

    emb_dim: Count = 16
    mode: Literal["pin", "da", "dgp", "dwp"] = "dgp"
    layers: Annotated[int, Within(low=0)] = 3  # 0: logistic regression on the summed embeddings
    subspaces: Count = 4  # D2: 1 is vector-wise, emb_dim bit-wise
    residual: bool = True  # false: no identity, and the output reads every order
    reduction: Count = 4  # how much narrower a gate is inside
    gate_scope: Literal["all", "request"] = "all"  # D11: request is ours, so that gates are made once per request
    detach_gate_input: bool = True
    da_gate: Literal["element", "row"] = "element"  # D1
    kernel_size: Count = 16  # K of dgp
    dgp_sigma: Literal["sigmoid", "linear"] = "sigmoid"  # D3: sigmoid is doubled
    latent_rank: Count = 2  # K of dwp
    dwp_offset: Literal["inv_sqrt", "inv"] = "inv_sqrt"  # D4: inv is the paper's, and starts at 1/K instead of 1
    orth_lambda: Weight = 0.0
    orth_on: Literal["after", "before"] = "after"  # D5: dwp's u and v with or without their offset
    orth_reduction: Literal["sum", "mean"] = "sum"  # over the pairs of vectors
    l2_emb: Weight = 0.0  # (weight / 2) * sum of squares of the tables

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.emb_dim % self.subspaces:
            raise ValueError(f"option subspaces: {self.subspaces} do not divide emb_dim {self.emb_dim}")


class DynInt(CTRModel):
    """Products of the input with maps of itself, X_l = X_{l-1} * (1 + t_l(X_0)), whose weights the input may choose.

    Flat fields only: the history is not read (D10). The paper's fields are all categorical; a number enters here as
    its value times a direction, as in every model (models.md section 1). All maps read X_0 and most are linear in it,
    so the request's part of them, and of the gates' first layer, is computed once for all candidates; with
    `gate_scope` request so are the gates, and a single request's weights as dgp or dwp make them (models.md
    section 8.4).
    """

    def __init__(self, config: DynIntConfig, schema: Schema) -> None:
        super().__init__()
        self.config = config
        self.num_request = len(schema.group("user")) + len(schema.group("context"))
        self.num_fields = self.num_request + len(schema.group("item"))
        _check_schema(config, self.num_request, self.num_fields)
        self.fields = FieldEmbeddings(schema, config.emb_dim, init=_truncated_normal)
        self.maps = _maps(config, self.num_fields) if config.layers else None
        self.gate: Gate | None = None
        if self.maps is not None and config.mode != "pin":
            seen = self.num_request if config.gate_scope == "request" else self.num_fields
            self.gate = Gate(
                config.layers,
                seen,
                config.emb_dim,
                reduction=config.reduction,
                out=self.maps.gate_width,
                detach=config.detach_gate_input,
            )
        both_sides = 0 < self.num_request < self.num_fields
        self.makes_weights = config.gate_scope == "request" and isinstance(self.maps, DGP | DWP) and both_sides
        self.out = nn.Linear(self.num_fields * (1 if config.residual else config.layers + 1), 1)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self._overlap: Tensor | None = None

    def encode_user(self, inputs: Inputs) -> UserState:
        fields = self.fields.group("user", inputs) + self.fields.group("context", inputs)
        if not fields:
            return {}
        state = self._read(torch.stack(fields, dim=1), slice(0, self.num_request))
        if self.gate is not None and self.config.gate_scope == "request":
            state["gate"] = self.gate(state["gate"])
        return state

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        if self.makes_weights and not (self.training or tapped()):
            return self._score_by_request(state, inputs)
        parts = [{name: value.index_select(0, inputs["user_index"]) for name, value in state.items()}] if state else []
        items = self.fields.group("item", inputs)
        if items:
            parts.append(self._read(torch.stack(items, dim=1), slice(self.num_request, self.num_fields)))
        read = _join(parts)
        return self._read_out(read["rows"], self._terms(read))

    def _score_by_request(self, state: UserState, inputs: Inputs) -> Tensor:
        """The same with gates that read the request alone, which then makes the weights of all of its candidates."""
        user_index, items = inputs["user_index"], self.fields.group("item", inputs)
        rows_UWSR, gate_ULO = state["rows"], state["gate"]
        rows_CWSG = cross(torch.stack(items, dim=1), self.config.subspaces)
        operands = (rows_UWSR, gate_ULO, rows_CWSG, user_index)
        terms_CWLP = if_one_request(gate_ULO.shape[0], self._terms_of_one_request, self._terms_of_any, operands)
        whole_CWSF = torch.cat([rows_UWSR.index_select(0, user_index), rows_CWSG], dim=-1)
        return self._read_out(whole_CWSF.flatten(2), terms_CWLP.unbind(dim=2))

    def _terms_of_any(self, rows_UWSR: Tensor, gate_ULO: Tensor, rows_CWSG: Tensor, user_index: Tensor) -> Tensor:
        assert self.maps is not None
        rows_CWSF = torch.cat([rows_UWSR.index_select(0, user_index), rows_CWSG], dim=-1)
        read = {"rows": rows_CWSF.flatten(2), "gate": gate_ULO.index_select(0, user_index)}
        terms_CWLP: Tensor = self.maps(read | self.maps.read(rows_CWSF, slice(0, self.num_fields)))
        return terms_CWLP

    def _terms_of_one_request(self, rows_UWSR: Tensor, gate_ULO: Tensor, rows_CWSG: Tensor, _: Tensor) -> Tensor:
        assert self.maps is not None
        (weights_LPP,) = self.maps.weights(gate_ULO[:1])
        of_request_1WLP = apply_kernel(weights_LPP, rows_UWSR[:1], slice(0, self.num_request))
        return of_request_1WLP + apply_kernel(weights_LPP, rows_CWSG, slice(self.num_request, self.num_fields))

    def _read_out(self, x_CWP: Tensor, terms: tuple[Tensor, ...]) -> Tensor:
        """The logits [C], given X_0 and the terms t_1 .. t_L."""
        orders = [x_CWP]
        for t_CWP in terms:
            x_CWP = x_CWP * (1 + t_CWP) if self.config.residual else x_CWP * t_CWP
            orders.append(x_CWP)
        # Back from subspaces to fields: a field has one weight for the sum over its width.
        sums_CFs = [
            torch.unflatten(x.sum(dim=1), -1, (-1, self.num_fields)).sum(dim=1)
            for x in (orders[-1:] if self.config.residual else orders)
        ]
        sums_CX = torch.cat(sums_CFs, dim=-1)
        tap("field_contrib", lambda: torch.unflatten(sums_CX * self.out.weight, -1, (-1, self.num_fields)).sum(dim=1))
        tap("bias", self.out.bias.squeeze)
        logit_C1: Tensor = self.out(sums_CX)
        return logit_C1.squeeze(-1)

    def explanations(self) -> tuple[Explanation, ...]:
        fields = of_fields(self.fields.schema)
        meaning = "What each field's row of the last layer adds to the logit: with `bias`, exactly all of it."
        contributions = Explanation(name="field_contrib", axes=(CANDIDATE, fields), meaning=meaning)
        return (contributions, BIAS, *(self.maps.explanations(fields.labels or ()) if self.maps is not None else ()))

    def penalty(self) -> Tensor:
        """The tables' L2, and with `orth_lambda` how far dgp's or dwp's vectors are from orthogonal (section 5.4).

        dwp makes its vectors from the input: the term is that of the last batch scored in training mode.
        """
        penalty = self.fields.penalty(self.config.l2_emb)
        if isinstance(self.maps, DGP) and self.config.orth_lambda:
            overlap = self.maps.overlap(mean=self.config.orth_reduction == "mean")
            penalty = penalty + self.config.orth_lambda * overlap
        if self._overlap is not None:
            penalty = penalty + self.config.orth_lambda * self._overlap
        return penalty

    def __getstate__(self) -> dict[str, object]:
        # A copy is a model of its own: it scored no batch, and a tensor inside a graph cannot be copied.
        return {**self.__dict__, "_overlap": None}

    def _read(self, x_nGD: Tensor, fields: slice) -> UserState:
        """What these fields bring: their crossed rows, and their part of what is linear in all fields."""
        state = {"rows": cross(x_nGD, self.config.subspaces)}
        if self.maps is not None:
            state |= self.maps.read(state["rows"], fields)
        if self.gate is not None and fields.stop <= self.gate.num_fields:  # else a gate that sees the request alone
            state["gate"] = self.gate.read(x_nGD, fields)
        return state

    def _terms(self, read: UserState) -> tuple[Tensor, ...]:
        """t_1 .. t_L, each [C, W, P]."""
        if self.maps is None:
            return ()
        if self.gate is not None and self.config.gate_scope == "all":
            read["gate"] = self.gate(read["gate"])
        if isinstance(self.maps, DWP) and self.training and self.config.orth_lambda:
            before, mean = self.config.orth_on == "before", self.config.orth_reduction == "mean"
            self._overlap = self.maps.overlap(read["gate"], before=before, mean=mean)
        if tapped():
            self.maps.show(read)
        terms_CWLP: Tensor = self.maps(read)
        return terms_CWLP.unbind(dim=2)


def _maps(config: DynIntConfig, num_fields: int) -> Maps:
    layers, num_rows, rank = config.layers, num_fields * config.subspaces, config.latent_rank
    if config.mode == "pin":
        return PIN(layers, num_rows)
    if config.mode == "da":
        by_element = config.da_gate == "element"
        return DA(layers, num_rows, subspaces=config.subspaces, width=config.emb_dim, by_element=by_element)
    if config.mode == "dgp":
        return DGP(layers, num_rows, kernel_size=config.kernel_size, linear=config.dgp_sigma == "linear")
    return DWP(layers, num_rows, rank=rank, offset=1 / (math.sqrt(rank) if config.dwp_offset == "inv_sqrt" else rank))


def _join(parts: list[UserState]) -> UserState:
    """The request's and the candidate's part together: rows side by side, all else added up."""
    whole = {
        name: reduce(torch.add, [p[name] for p in parts if name in p])
        for name in parts[-1] | parts[0]
        if name != "rows"
    }
    return whole | {"rows": torch.cat([part["rows"] for part in parts], dim=-1).flatten(2)}


def _truncated_normal(tensor: Tensor) -> None:
    """The authors' rule for tables: normal with deviation 1 / sqrt(D), cut at two deviations."""
    std = 1 / math.sqrt(tensor.shape[-1])
    nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)


def _check_schema(config: DynIntConfig, num_request: int, num_fields: int) -> None:
    if not num_fields:
        raise ValueError("DynInt multiplies fields; the schema has none outside the history")
    if config.mode != "pin" and config.gate_scope == "request" and not num_request:
        raise ValueError("gate_scope request reads user and context fields; the schema has none")
    num_rows = num_fields * config.subspaces
    if config.mode == "dgp" and config.kernel_size > num_rows:  # D9
        raise ValueError(
            f"kernel_size {config.kernel_size}: no more than {num_rows} columns can be orthogonal"
            f" ({num_fields} fields in {config.subspaces} subspaces)"
        )
