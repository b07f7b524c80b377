"""MIAN: K. Zhang et al., "Multi-Interactive Attention Network for Fine-grained Feature Learning in CTR Prediction".

WSDM 2021, arXiv 2012.06968. Equation numbers are the paper's; M1..M17 are the ambiguities of models.md section 2.3.
"""

# U requests, C candidates, N elements, I width of a candidate, X width of an element
# U requests, C candidates, F = first layer of the head, and the group's score before it, L groups
# R width of the request's vectors together, I of the candidate's, X = R + I
# U requests, C candidates, T history length, N elements a candidate attends to (T clicks, J user or K context fields)
# D width of one field, I = item fields * D, B = sequence fields * D, X width of an element, F = head's first layer + 1

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.artifact.explanation import ATTENDED, BEHAVIOUR, CANDIDATE, REQUEST, Axis, Explanation, numbered, of_fields
from models.features.field import Group
from models.features.schema import Schema
from models.layers.attention import SelfAttention, masked_softmax
from models.layers.base import CTRModel, Inputs, UserState
from models.layers.config import Config, Count, Share, Weight, Within
from models.layers.embeddings import FieldEmbeddings
from models.layers.initialisation import l2, start_linears, truncated_normal
from models.layers.intermediates import record
from models.layers.mlp import MLP
from models.layers.request_matmul import matmul_by_request


class Scorer(nn.Module):
    """gamma(V_n) with V_n = [e_i; x_n], in two halves: what the elements bring, then the candidates' scores [C, N]."""

    def read_elements(self, x_UNX: Tensor) -> Tensor:
        """Whatever of the elements alone enters the scores, [U, N], [U, I, N] or [U, N, X]."""
        raise NotImplementedError

    def forward(self, item_CI: Tensor, read_UN: Tensor, user_index: Tensor) -> Tensor:
        """The scores, given each candidate, what was read of each request's elements, and whose candidate it is."""
        raise NotImplementedError


class AdditiveScorer(Scorer):
    """tanh([e_i; x_n] w_n + b_n), eq. (8) and (10): one w per element, or one for all (M6)."""

    def __init__(self, num_weights: int, item: int, element: int) -> None:
        super().__init__()
        self.kernel = nn.Linear(item + element, num_weights)
        self.item = item

    def read_elements(self, x_UNX: Tensor) -> Tensor:
        return (x_UNX * self.kernel.weight[:, self.item :]).sum(dim=-1) + self.kernel.bias

    def forward(self, item_CI: Tensor, read_UN: Tensor, user_index: Tensor) -> Tensor:
        item_CN = F.linear(item_CI, self.kernel.weight[:, : self.item])
        return torch.tanh(item_CN + read_UN.index_select(0, user_index))


class BilinearScorer(Scorer):
    """tanh(e_i^T M x_n / sqrt(I) + b_n): candidate and click multiply, as they never do in the paper (M8)."""

    def __init__(self, num_biases: int, item: int, element: int) -> None:
        super().__init__()
        self.kernel = nn.Linear(element, item, bias=False)
        self.bias = nn.Parameter(torch.zeros(num_biases))

    def read_elements(self, x_UNX: Tensor) -> Tensor:
        read_UNI: Tensor = self.kernel(x_UNX)
        return read_UNI.transpose(1, 2) / math.sqrt(self.kernel.out_features)

    def forward(self, item_CI: Tensor, read_UIN: Tensor, user_index: Tensor) -> Tensor:
        return torch.tanh(matmul_by_request(item_CI.unsqueeze(1), read_UIN, user_index).squeeze(1) + self.bias)


class MLPScorer(Scorer):
    """tanh(v ReLU(W [e_i; x_n] + c) + b_n), as wide inside as a click (M8)."""

    def __init__(self, num_biases: int, item: int, element: int) -> None:
        super().__init__()
        self.kernel = nn.Linear(item + element, element)
        self.out = nn.Linear(element, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(num_biases))
        self.item = item

    def read_elements(self, x_UNX: Tensor) -> Tensor:
        return F.linear(x_UNX, self.kernel.weight[:, self.item :], self.kernel.bias)

    def forward(self, item_CI: Tensor, read_UNX: Tensor, user_index: Tensor) -> Tensor:
        item_C1X = F.linear(item_CI, self.kernel.weight[:, : self.item]).unsqueeze(1)
        read_CNX = read_UNX.index_select(0, user_index)
        return torch.tanh(self.out(F.relu(item_C1X + read_CNX)).squeeze(-1) + self.bias)


class GlobalInteraction(nn.Module):
    """GIM and head, eq. (14)-(17): omega = softmax_l(tanh(score of r_l)), then the MLP over the weighted groups.

    Groups have unequal widths, which leaves their sum undefined (M9): `project_sum` maps each to G first, `concat`
    weights and concatenates them, `zero_pad` pads them to the widest. Without `gim` the MLP reads their plain
    concatenation. In each case a group enters only through its score and the MLP's first layer, both linear in it:
    `kernel` is that one matrix, whose columns follow the group's own concatenation.
    """

    def __init__(self, config: "MIANConfig", groups: dict[str, int], width: int) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.attends = config.gim
        self.combine = config.gim_combine if config.gim else "concat"
        self.projections = nn.ModuleDict()
        self.scores = nn.ModuleDict()
        if self.combine == "project_sum":
            self.projections.update({name: nn.Linear(raw, width) for name, raw in groups.items()})
        if self.attends:
            self.scores.update({n: nn.Linear(width if n in self.projections else w, 1) for n, w in groups.items()})
        ends = dict(zip(groups, accumulate(groups.values()), strict=True))
        self.columns = {
            "project_sum": dict.fromkeys(groups, slice(0, width)),
            "concat": {name: slice(ends[name] - raw, ends[name]) for name, raw in groups.items()},
            "zero_pad": {name: slice(0, raw) for name, raw in groups.items()},
        }[self.combine]
        read = max(columns.stop for columns in self.columns.values())
        self.head = MLP(read, config.hidden, dropout=config.dropout)
        self.out_width = self.head.first.out_features + self.attends  # F, rows of each group's kernel

    def kernel(self, group: str) -> tuple[Tensor, Tensor]:
        """Weight and bias that take r_l to its score (first, if there are scores) and its part of the first layer."""
        first_FG = self.head.first.weight[:, self.columns[group]]
        weight, bias = first_FG, torch.zeros_like(first_FG[:, 0])
        if self.attends:
            score = _linear(self.scores, group)
            weight = torch.cat([score.weight, first_FG])
            bias = torch.cat([score.bias, bias])
        if group in self.projections:
            projection = _linear(self.projections, group)
            bias = bias + weight @ projection.bias
            weight = weight @ projection.weight
        return weight, bias

    def forward(self, parts_CLF: Tensor) -> Tensor:
        """Logits from what each group's kernel made of it."""
        if self.attends:
            omega_CL = torch.tanh(parts_CLF[..., 0]).softmax(dim=1)
            record("gim_weight", omega_CL)
            found_CF = (omega_CL.unsqueeze(1) @ parts_CLF).squeeze(1)[:, 1:]
        else:
            found_CF = parts_CLF.sum(dim=1)
        return self.head.finish(found_CF + self.head.first.bias)


class Crosses(nn.Module):
    """DCNv2's cross layers, whose logit is added to the head's: x_{l+1} = x_0 * (W_l x_l + b_l) + x_l over all vectors.

    MIAN weighs fields against each other and multiplies none. R. Wang et al., "DCN V2", WWW 2021. The request's columns
    of W_0 meet it once.
    """

    def __init__(self, request: int, item: int, layers: int) -> None:
        super().__init__()
        self.request_width, width = request, request + item
        self.first = nn.Linear(width, width)
        self.rest = nn.ModuleList(nn.Linear(width, width) for _ in range(layers - 1))
        self.out = nn.Linear(width, 1, bias=False)

    def read(self, request_UR: Tensor) -> Tensor:
        """What all candidates of a request share [U, R + X]: its own part of x_0, and what W_0 makes of that."""
        return torch.cat([request_UR, F.linear(request_UR, self.first.weight[:, : self.request_width])], dim=-1)

    def forward(self, read_CR: Tensor | None, item_CI: Tensor) -> Tensor:
        """The logits [C], given what `read` says of each one's request; None where that has no fields."""
        x0_CX, met_CX = item_CI, F.linear(item_CI, self.first.weight[:, self.request_width :], self.first.bias)
        if read_CR is not None:
            x0_CX = torch.cat([read_CR[:, : self.request_width], item_CI], dim=-1)
            met_CX = met_CX + read_CR[:, self.request_width :]
        x_CX = x0_CX * met_CX + x0_CX
        for layer in self.rest:
            x_CX = x0_CX * layer(x_CX) + x_CX
        logits_C: Tensor = self.out(x_CX).squeeze(-1)
        return logits_C


def _linear(layers: nn.ModuleDict, group: str) -> nn.Linear:
    layer = layers[group]
    assert isinstance(layer, nn.Linear)
    return layer


CrossLayers = Annotated[int, Within(low=0, below=9)]


@dataclass(frozen=True, kw_only=True)
class MIANConfig(Config):
    """The paper's model; options named M.. settle what the paper leaves open (models.md section 2.3)."""

    emb_dim: Count = 16  # M1
    heads: Count = 8
    transformer: Literal["pre_ln", "post_ln", "none"] = "pre_ln"
    ffn_mult: Count = 4  # M4
    final_ln: bool = False  # M3
    position: Literal["none", "learned"] = "none"  # M5
    ibim: bool = True
    iuim: bool = True
    icim: bool = True
    gim: bool = True
    ibim_score: Literal["per_position", "shared"] = "per_position"  # M6
    ibim_scorer: Literal["additive", "bilinear", "mlp"] = "additive"  # M8
    gim_combine: Literal["project_sum", "concat", "zero_pad"] = "project_sum"  # M9
    gim_eb: Literal["concat", "masked_mean"] = "concat"  # M10
    gim_width: Count | None = None  # G; by default twice the item's width, rounded up to a multiple of 8
    ablate_drop_raw: bool = False  # M15: an ablated module takes its raw group along
    hidden: tuple[Count, ...] = (32, 8)
    cross_layers: CrossLayers = 0  # not the paper's: DCNv2's beside the head
    dropout: Share = 0.2
    l2_dense: Weight = 1e-3  # M14: weight * sum of squares of the dense kernels
    l2_emb: Weight = 0.0  # M14: (weight / 2) * sum of squares of the tables

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.final_ln and self.transformer != "pre_ln":
            raise ValueError(f"option final_ln goes with transformer pre_ln, got transformer {self.transformer}")


class MIAN(CTRModel):
    """Three local attentions of the candidate (to clicks, user fields, context fields) under one global attention.

    Whatever reads the candidate beside something of the request is linear in their concatenation up to its first
    nonlinearity, so its weights are applied to the two parts apart, the request's once (models.md section 8.1).
    """

    def __init__(self, config: MIANConfig, schema: Schema) -> None:
        super().__init__()
        _check_schema(config, schema)
        self.config = config
        self.fields = FieldEmbeddings(schema, config.emb_dim, init=truncated_normal)
        length, width = schema.history_length, config.emb_dim
        num_user, num_context = len(schema.group("user")), len(schema.group("context"))
        item, event = len(schema.group("item")) * width, len(schema.group("behaviour")) * width
        self.local = nn.ModuleDict()
        if config.ibim:
            self.transformer = Transformer(config, length, event)
            self.local["ibim"] = _click_scorer(config, length, item, event)
        if config.iuim:
            self.local["iuim"] = AdditiveScorer(num_user, item, width)
        if config.icim:
            self.local["icim"] = AdditiveScorer(num_context, item, width)
        raw = {
            "item": item,
            "context": num_context * width,
            "behaviour": event * (length if config.gim_eb == "concat" else 1),
            "user": num_user * width,
        }
        if config.ablate_drop_raw:
            gone = [group for group, name in _LOCAL.items() if name not in self.local]
            raw = {name: raw[name] for name in raw if name not in gone}
        local = {"ibim": item + event, "iuim": item + width, "icim": item + width}
        groups = {n: w for n, w in raw.items() if w} | {n: local[n] for n in self.local}
        self.gim = GlobalInteraction(config, groups, config.gim_width or -(-2 * item // 8) * 8)
        crossed = num_user * width + num_context * width + event
        self.crosses = Crosses(crossed, item, config.cross_layers) if config.cross_layers else None
        self.item_width = item
        # A module's kernel may meet each of its elements or their weighted sum, being linear. Each is cheaper for one
        # request, but for a batch of many it makes T products to be copied and summed for every candidate: that pays
        # while they are no wider than the clicks. User and context fields are few.
        self.sums_first = {"ibim"} if self.gim.out_width > event else set()
        start_linears(self, truncated_normal)

    def encode_user(self, inputs: Inputs) -> UserState:
        """The raw groups' part in the global module; of each local module, what its elements bring to any candidate."""
        state: UserState = {}
        for raw, local in _LOCAL.items():
            if raw not in self.gim.groups and local not in self.gim.groups:
                continue
            if raw == "behaviour":
                elements_UNX = torch.cat(self.fields.history(inputs), dim=-1)
            else:
                elements_UNX = torch.stack(self.fields.group(raw, inputs), dim=1)
            if raw in self.gim.groups:
                flat_UX = elements_UNX.flatten(1)
                if raw == "behaviour" and self.config.gim_eb == "masked_mean":
                    flat_UX = torch.cat(self.fields.pooled_history(inputs), dim=-1)
                state[raw] = F.linear(flat_UX, *self.gim.kernel(raw))
            if local == "ibim" and local in self.local:
                state["mask"] = inputs["hist_mask"]
                elements_UNX = self.transformer(elements_UNX, state["mask"])
            if local in self.local:
                kernel_FX = self.gim.kernel(local)[0][:, self.item_width :]
                state[f"{local}.scores"] = self._scorer(local).read_elements(elements_UNX)
                sums_first = local in self.sums_first
                state[f"{local}.values"] = elements_UNX if sums_first else F.linear(elements_UNX, kernel_FX)
        if self.crosses is not None and (request := self.fields.request(inputs)):
            state["crosses"] = self.crosses.read(torch.cat(request, dim=-1))
        return state

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        user_index = inputs["user_index"]
        item_CI = torch.cat(self.fields.group("item", inputs), dim=-1)
        parts = []
        for group in self.gim.groups:
            if group in state:
                parts.append(state[group].index_select(0, user_index))
                continue
            kernel, bias = self.gim.kernel(group)
            kernel_FI, kernel_FX = kernel[:, : self.item_width], kernel[:, self.item_width :]
            part_CF = F.linear(item_CI, kernel_FI, bias)
            if group in self.local:
                # R = sum_n alpha_n [e_i; x_n] = [e_i; sum_n alpha_n x_n], as alpha sums to 1 (eq. 9, 11, 13).
                # That form also says what an empty history gives: [e_i; 0].
                scores_CN = self._scorer(group)(item_CI, state[f"{group}.scores"], user_index)
                mask_CN = state["mask"].index_select(0, user_index) if group == "ibim" else None
                alpha_CN = masked_softmax(scores_CN, mask_CN)
                record(f"alpha_{_ELEMENTS[group]}", alpha_CN)
                found_C = matmul_by_request(alpha_CN.unsqueeze(1), state[f"{group}.values"], user_index).squeeze(1)
                part_CF = part_CF + (F.linear(found_C, kernel_FX) if group in self.sums_first else found_C)
            parts.append(part_CF)
        logits_C: Tensor = self.gim(torch.stack(parts, dim=1))
        if self.crosses is not None:
            read_CR = state["crosses"].index_select(0, user_index) if "crosses" in state else None
            logits_C = logits_C + self.crosses(read_CR, item_CI)
        return logits_C

    def penalty(self) -> Tensor:
        kernels = [module.weight for module in self.modules() if isinstance(module, nn.Linear)]
        return l2(self.config.l2_dense, kernels) + self.fields.penalty(self.config.l2_emb)

    def explanations(self) -> tuple[Explanation, ...]:
        shown = []
        for raw, local in _LOCAL.items():
            if local in self.local:
                axis = BEHAVIOUR if raw == "behaviour" else of_fields(self.fields.schema, [raw], name=f"{raw}_field")
                element = axis.name.replace("_", " ")
                meaning = f"{local.upper()}: how much of each {element} this candidate takes up; {_SOFT}"
                shown.append(Explanation(name=f"alpha_{raw}", axes=(CANDIDATE, axis), meaning=meaning))
        if self.gim.attends:
            meaning = f"GIM: share of each group, raw or found by ibim, iuim, icim, in what the head reads; {_SOFT}"
            axis = Axis(name="group", labels=self.gim.groups)
            shown.append(Explanation(name="gim_weight", axes=(CANDIDATE, axis), meaning=meaning))
        if "ibim" in self.local and self.config.transformer != "none":
            axes = (REQUEST, numbered("head", self.config.heads), BEHAVIOUR, ATTENDED)
            meaning = "Which clicks each click (a row, which sums to 1) attends to, before any candidate is seen."
            shown.append(Explanation(name="self_attn", axes=axes, meaning=meaning))
        return tuple(shown)

    def _scorer(self, local: str) -> Scorer:
        scorer = self.local[local]
        assert isinstance(scorer, Scorer)
        return scorer


_LOCAL: dict[Group, str] = {"behaviour": "ibim", "user": "iuim", "context": "icim"}  # who attends to which group
_ELEMENTS = {local: raw for raw, local in _LOCAL.items()}
_SOFT = "sums to 1 (to 0 over nothing), and as its scores end in a tanh no two differ by more than a factor of 7.4."


class Transformer(nn.Module):
    """One block over the clicks, eq. (3)-(5), with the residuals that the paper leaves unwritten (M3)."""

    def __init__(self, config: MIANConfig, length: int, width: int) -> None:
        super().__init__()
        self.kind = config.transformer
        # Histories are left-padded, so position T - 1 is always the newest click.
        self.positions = nn.Parameter(torch.empty(length, width)) if config.position == "learned" else None
        if self.positions is not None:
            truncated_normal(self.positions)
        if self.kind != "none":
            inner = config.ffn_mult * width
            self.attention = SelfAttention(width, config.heads, dropout=config.dropout)
            self.ffn = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
            self.final_norm = nn.LayerNorm(width) if config.final_ln else nn.Identity()
            self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_UTB: Tensor, mask_UT: Tensor) -> Tensor:
        if self.positions is not None:
            x_UTB = x_UTB + self.positions
        if self.kind == "none":
            return x_UTB
        norm_1, norm_2 = self.norms
        if self.kind == "post_ln":
            y_UTB = norm_1(x_UTB + self.dropout(self.attention(x_UTB, mask_UT)))
            h_UTB: Tensor = norm_2(y_UTB + self.dropout(self.ffn(y_UTB)))
            return h_UTB
        y_UTB = x_UTB + self.dropout(self.attention(norm_1(x_UTB), mask_UT))
        h_UTB = self.final_norm(y_UTB + self.dropout(self.ffn(norm_2(y_UTB))))
        return h_UTB  # noqa: RET504


def _click_scorer(config: MIANConfig, length: int, item: int, event: int) -> Scorer:
    kinds: dict[str, Callable[[int, int, int], Scorer]]
    kinds = {"additive": AdditiveScorer, "bilinear": BilinearScorer, "mlp": MLPScorer}
    return kinds[config.ibim_scorer](length if config.ibim_score == "per_position" else 1, item, event)


def _check_schema(config: MIANConfig, schema: Schema) -> None:
    if not schema.group("item"):
        raise ValueError("MIAN attends from the candidate and needs an item field; the schema has none")
    for group, module in _LOCAL.items():
        if getattr(config, module) and not schema.group(group):
            raise ValueError(f"{module} attends to {group} fields and the schema has none; set {module} to false")
    width = len(schema.group("behaviour")) * config.emb_dim
    if config.ibim and config.transformer != "none" and width % config.heads:
        raise ValueError(
            f"a click is {width} wide ({len(schema.group('behaviour'))} sequence fields of {config.emb_dim}),"
            f" which {config.heads} heads do not divide; change heads or emb_dim"
        )
