"""MIAN: K. Zhang et al., "Multi-Interactive Attention Network for Fine-grained Feature Learning in CTR Prediction".

WSDM 2021, arXiv 2012.06968. Equation numbers are the paper's; M1..M18 are the ambiguities of models.md section 2.3.
"""

# U requests, C candidates, T history length, D width of a field, G width of the global attention
# I width of the candidate's fields together, R of the request's, X of one element (a click, a user or context field)
# N elements a candidate attends to: T clicks, user fields, context fields
# H first layer of the head, F = a group's score, where there are scores, and then H
# L groups: the request's, or those that hold the candidate (its own fields, then one for each local module)

import math
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.artifact.explanation import ATTENDED, BEHAVIOUR, CANDIDATE, REQUEST, Axis, Explanation, numbered, of_fields
from models.features.field import Group
from models.features.schema import Schema
from models.layers.attention import SelfAttention, masked_mean
from models.layers.base import CTRModel, Inputs, UserState, history_mask
from models.layers.config import Config, Count, Share, Weight, Within
from models.layers.embeddings import FieldEmbeddings
from models.layers.folding import of_weights
from models.layers.initialisation import l2, start_linears, truncated_normal
from models.layers.intermediates import is_recording, record
from models.layers.mlp import MLP
from models.layers.request_matmul import of_request, vector_by_request

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
    kernel_start: Literal["truncated_normal", "xavier_normal"] = "truncated_normal"  # M18
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

    A local module finds R = sum_n alpha_n [e_i; x_n], which is [e_i; sum_n alpha_n x_n], as alpha sums to 1 (eq. 9, 11,
    13); that form also says what an empty history gives: [e_i; 0]. The global module reads a group r by K r + k alone.
    So an item row holds K_i e_i + k, the request's state K_x x_n, and both hold their parts of the scores that alpha
    is the softmax of (models.md section 8.1).
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
            self.local["iuim"] = AdditiveScorer(num_user, num_user, item, width)
        if config.icim:
            self.local["icim"] = AdditiveScorer(num_context, num_context, item, width)
        raw = {
            "item": item,
            "context": num_context * width,
            "behaviour": event * (length if config.gim_eb == "concat" else 1),
            "user": num_user * width,
        }
        if config.ablate_drop_raw:
            gone = [group for group, name in _LOCAL.items() if name not in self.local]
            raw = {name: raw[name] for name in raw if name not in gone}
        widths = {"ibim": event, "iuim": width, "icim": width}
        groups = {n: w for n, w in raw.items() if w} | {n: item + widths[n] for n in self.local}
        self.gim = GlobalInteraction(config, groups, config.gim_width or -(-2 * item // 8) * 8)
        self.crosses: Crosses | None = None
        if config.cross_layers:
            self.crosses = Crosses((num_user + num_context) * width + event, item, config.cross_layers)
        self.num_fields, self.user_width, self.item_width = [num_user, num_context], num_user * width, item
        self.request_width = (num_user + num_context) * width
        self.reads_clicks = "ibim" in groups or "behaviour" in groups or (self.crosses is not None and event > 0)
        # A batch of many requests copies what is summed for each candidate: K_x x or x, whichever is narrower.
        self.sums_first = self.gim.head_width > sum(widths[name] for name in self.local)
        self.counts = {"ibim": length, "iuim": num_user, "icim": num_context}
        counts = torch.tensor([0, *(self.counts[name] for name in self.local)])
        self.membership_LN: Tensor  # 1 where an element is one of those that a group sums
        self.register_buffer("membership_LN", torch.eye(len(counts)).repeat_interleave(counts, dim=1), persistent=False)
        self.row_widths = {name: len(bias) for name, (_, bias) in self._item_layers().items()}
        start_linears(self, truncated_normal if config.kernel_start == "truncated_normal" else nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        """The request's groups in the global attention, and what each element brings to any candidate."""
        state: UserState = {}
        elements: dict[str, Tensor] = {}
        raw, scores, vectors = [], [], []
        if self.reads_clicks:
            clicks_UTX, mask_UT = self.fields.history(inputs).flatten(2), history_mask(inputs)
            mean_UX = masked_mean(clicks_UTX, mask_UT)
            vectors.append(mean_UX)
            if "behaviour" in self.gim.groups:
                flat_UX = clicks_UTX.flatten(1) if self.config.gim_eb == "concat" else mean_UX
                raw.append(F.linear(flat_UX, *self.gim.kernel("behaviour")))
            if "ibim" in self.local:
                elements["ibim"], state["mask"] = self.transformer(clicks_UTX, mask_UT), mask_UT
                scorer = self._scorer("ibim")
                read = scorer.read(elements["ibim"])
                if isinstance(scorer, AdditiveScorer):
                    scores.append(read)
                else:
                    state["clicks"] = read
        if self.fields.num_request:
            request_URD = self.fields.request(inputs)
            elements["iuim"], elements["icim"] = torch.split(request_URD, self.num_fields, dim=1)
            vectors.insert(0, request_URD.flatten(1))
            products_UX = F.linear(vectors[0], *self._request_layer())
            num_parts = len({"user", "context"} & {*self.gim.groups}) * self.gim.part_width
            raw_UX, scores_UN = torch.split(products_UX, [num_parts, products_UX.shape[-1] - num_parts], dim=-1)
            raw.append(raw_UX)
            scores.append(scores_UN)
        if self.gim.request_groups:
            state |= self.gim.sum_request(torch.cat(raw, dim=-1))
        if scores:
            state["scores"] = torch.cat(scores, dim=-1)
        if self.crosses is not None and vectors:
            state["crosses"] = self.crosses.read(torch.cat(vectors, dim=-1))
        return state | self._read_elements(elements, state.get("mask"))

    def encode_items(self, inputs: Inputs) -> Tensor:
        """One product for all that is linear in the candidate: the parts of `_item_layers` in their order."""
        return F.linear(self.fields.item(inputs).flatten(1), *self._item_layer())

    def score(self, state: UserState, items_CW: Tensor, user_index: Tensor | None) -> Tensor:
        row = dict(zip(self.row_widths, torch.split(items_CW, [*self.row_widths.values()], dim=-1), strict=True))
        score_CL = row.get("score")
        if self.local:
            # A tanh is between -1 and 1, so the softmaxes take exp of it as it is.
            exp_CN = torch.exp(torch.tanh(self._element_scores(state, row, user_index)))
            sums_CX = vector_by_request(exp_CN, state["sums"], user_index)
            *group_scores, total_CL = sums_CX.chunk(1 + self.gim.attends, dim=-1)
            total_CL = total_CL.clamp(min=0.25)  # it is at least 1/e where there is an element, else 0
            if is_recording():
                self._record_alphas(exp_CN, total_CL, state, user_index)
            if score_CL is not None:
                score_CL = score_CL + group_scores[0] / total_CL
        omega_CL = None if score_CL is None else torch.exp(torch.tanh(score_CL))
        found_CH = self.gim.sum_candidate(row["part"], omega_CL)
        if self.local:
            share_CL = 1 / total_CL if omega_CL is None else omega_CL / total_CL
            found_CH = found_CH + self._sum_elements(exp_CN * (share_CL @ self.membership_LN), state, user_index)
        logits_C: Tensor = self.gim(found_CH, omega_CL, state, user_index)
        if self.crosses is not None:
            logits_C = logits_C + self.crosses(state.get("crosses"), row["crosses"], row["item"], user_index)
        return logits_C

    @of_weights
    def _item_layer(self) -> tuple[Tensor, Tensor]:
        weights, biases = zip(*self._item_layers().values(), strict=True)
        return torch.cat(weights), torch.cat(biases)

    def _item_layers(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The parts of an item row, each a weight and a bias over the candidate's vectors together."""
        layers: dict[str, tuple[Tensor, Tensor]] = {}
        kernels = [self.gim.kernel(group) for group in self.gim.candidate_groups]
        weights, biases = [weight[:, : self.item_width] for weight, _ in kernels], [bias for _, bias in kernels]
        if self.gim.attends:
            layers["score"] = torch.cat([weight[:1] for weight in weights]), torch.cat([bias[:1] for bias in biases])
            layers["part"] = torch.cat([weight[1:] for weight in weights]), torch.cat([bias[1:] for bias in biases])
        else:
            layers["part"] = torch.stack(weights).sum(dim=0), torch.stack(biases).sum(dim=0)
        scorers = [self._scorer(name) for name in self.local]
        additive = [scorer.item_layer() for scorer in scorers if isinstance(scorer, AdditiveScorer)]
        if additive:
            layers["scores"] = torch.cat([weight for weight, _ in additive]), torch.cat([bias for _, bias in additive])
        if len(additive) < len(scorers):
            layers["clicks"] = self._scorer("ibim").item_layer()
        if self.crosses is not None:
            layers["crosses"] = self.crosses.item_layer()
            identity_II = torch.eye(self.item_width).to(weights[0])
            layers["item"] = identity_II, torch.zeros_like(identity_II[0])
        return layers

    @of_weights
    def _request_layer(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of all that is linear in user and context fields: their groups' parts, then their scores."""
        starts = {"user": 0, "iuim": 0, "context": self.user_width, "icim": self.user_width}
        layers: dict[str, tuple[Tensor, Tensor]]
        layers = {group: self.gim.kernel(group) for group in self.gim.request_groups if group != "behaviour"}
        for name, scorer in self.local.items():
            if name != "ibim" and isinstance(scorer, AdditiveScorer):
                layers[name] = scorer.request_layer()
        of_head_H = self.gim.head.first.bias
        weights, biases = [of_head_H.new_zeros(0, self.request_width)], [of_head_H.new_zeros(0)]
        for name, (weight, bias) in layers.items():
            weights.append(F.pad(weight, (starts[name], self.request_width - starts[name] - weight.shape[1])))
            biases.append(bias)
        return torch.cat(weights), torch.cat(biases)

    def _read_elements(self, elements: dict[str, Tensor], mask_UT: Tensor | None) -> UserState:
        """What a candidate's attention sums over the elements x [U, N, *], zero where there is no click.

        `sums`: in a group's own column its score, where groups have one, and in another 1, for the softmax. `values`:
        K_x x; where they are summed first, x itself by module.
        """
        state: UserState = {}
        products = []
        for name in self.local:
            x_UNX = elements[name]
            product_UNX = F.linear(x_UNX, *self._element_layer(name))
            if name == "ibim" and mask_UT is not None:
                mask_UT1 = mask_UT.unsqueeze(-1).to(x_UNX.dtype)
                x_UNX, product_UNX = x_UNX * mask_UT1, product_UNX * mask_UT1
            if self.sums_first:
                state[f"{name}.elements"] = x_UNX
            products.append(product_UNX)
        if products:
            state["sums"] = torch.cat(products, dim=1)
            if not self.sums_first:
                width = self.gim.head_width
                num_sums = state["sums"].shape[-1] - width
                state["sums"], state["values"] = torch.split(state["sums"], [num_sums, width], dim=-1)
        return state

    @of_weights
    def _element_layer(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight and bias that make of an element x of this module its `sums` and, unless they come first, K_x x."""
        group = self.gim.candidate_groups.index(name)
        num_before, num_after = group, len(self.local) - group
        kernel_FX = self.gim.kernel(name)[0][:, self.item_width :]
        bias_L = F.pad(kernel_FX.new_ones(1), (num_before, num_after))
        weights, biases = [kernel_FX.new_zeros(len(bias_L), kernel_FX.shape[1])], [bias_L]
        if self.gim.attends:
            weights.insert(0, F.pad(kernel_FX[:1], (0, 0, num_before, num_after)))
            biases.insert(0, torch.zeros_like(bias_L))
        if not self.sums_first:
            weights.append(kernel_FX[-self.gim.head_width :])
            biases.append(torch.zeros_like(kernel_FX[-self.gim.head_width :, 0]))
        return torch.cat(weights), torch.cat(biases)

    def _element_scores(self, state: UserState, row: dict[str, Tensor], user_index: Tensor | None) -> Tensor:
        """Gamma before its tanh, of all elements [C, N]."""
        scores = [row["scores"] + of_request(state["scores"], user_index)] if "scores" in row else []
        if "clicks" in row:
            scorer = self._scorer("ibim")
            assert isinstance(scorer, BilinearScorer | MLPScorer)
            scores.insert(0, scorer(row["clicks"], state["clicks"], user_index))
        return torch.cat(scores, dim=-1) if len(scores) > 1 else scores[0]

    def _sum_elements(self, weight_CN: Tensor, state: UserState, user_index: Tensor | None) -> Tensor:
        """sum_n weight_n K_x x_n, [C, H]."""
        if not self.sums_first:
            return vector_by_request(weight_CN, state["values"], user_index)
        kernels = self._value_kernels()
        elements = [state[f"{name}.elements"] for name in self.local]
        if user_index is None:
            products = [F.linear(x_UNX, kernel) for x_UNX, kernel in zip(elements, kernels, strict=True)]
            return vector_by_request(weight_CN, torch.cat(products, dim=1), user_index)
        weights = torch.split(weight_CN, [self.counts[name] for name in self.local], dim=-1)
        sums = [vector_by_request(w_CN, x, user_index) for w_CN, x in zip(weights, elements, strict=True)]
        return F.linear(torch.cat(sums, dim=-1), torch.cat(kernels, dim=-1))

    @of_weights
    def _value_kernels(self) -> list[Tensor]:
        """K_x of each local module."""
        return [self.gim.kernel(name)[0][-self.gim.head_width :, self.item_width :] for name in self.local]

    def _record_alphas(self, exp_CN: Tensor, total_CL: Tensor, state: UserState, user_index: Tensor | None) -> None:
        parts = torch.split(exp_CN, [self.counts[name] for name in self.local], dim=-1)
        for n, (name, part_CN) in enumerate(zip(self.local, parts, strict=True), start=1):
            mask_CN = of_request(state["mask"], user_index) if name == "ibim" else torch.ones_like(part_CN)
            alpha_CN = part_CN * mask_CN / total_CL[:, n : n + 1]
            record(f"alpha_{_ELEMENTS[name]}", alpha_CN)

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

    def _scorer(self, local: str) -> "Scorer":
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

    def forward(self, x_UTX: Tensor, mask_UT: Tensor) -> Tensor:
        if self.positions is not None:
            x_UTX = x_UTX + self.positions
        if self.kind == "none":
            return x_UTX
        norm_1, norm_2 = self.norms
        if self.kind == "post_ln":
            y_UTX = norm_1(x_UTX + self.dropout(self.attention(x_UTX, mask_UT)))
            h_UTX: Tensor = norm_2(y_UTX + self.dropout(self.ffn(y_UTX)))
            return h_UTX
        y_UTX = x_UTX + self.dropout(self.attention(norm_1(x_UTX), mask_UT))
        h_UTX = self.final_norm(y_UTX + self.dropout(self.ffn(norm_2(y_UTX))))
        return h_UTX  # noqa: RET504


class Scorer(nn.Module):
    """gamma(V_n) before its tanh, V_n = [e_i; x_n]: a layer over the candidate, and what is read of the elements."""

    def item_layer(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of what enters the scores of the candidate alone."""
        raise NotImplementedError

    def read(self, x_UNX: Tensor) -> Tensor:
        """What enters them of the elements alone."""
        raise NotImplementedError


class AdditiveScorer(Scorer):
    """[e_i; x_n] w_n + b_n, eq. (8) and (10): one w per element, or one for all (M6). The score is the sum of both."""

    def __init__(self, num_weights: int, num_elements: int, item: int, element: int) -> None:
        super().__init__()
        self.kernel = nn.Linear(item + element, num_weights)
        self.num_elements, self.item = num_elements, item

    def item_layer(self) -> tuple[Tensor, Tensor]:
        weight_NI = self.kernel.weight[:, : self.item].expand(self.num_elements, -1)
        return weight_NI, self.kernel.bias.expand(self.num_elements)

    def read(self, x_UNX: Tensor) -> Tensor:
        return (x_UNX * self._element_weight()).sum(dim=-1)

    @of_weights
    def _element_weight(self) -> Tensor:
        return self.kernel.weight[:, self.item :]

    def request_layer(self) -> tuple[Tensor, Tensor]:
        """`read` as a layer over the elements' vectors together."""
        weights = self.kernel.weight[:, self.item :]
        return torch.block_diag(*weights), torch.zeros_like(self.kernel.bias)  # type: ignore[no-untyped-call]  # torch's


class BilinearScorer(Scorer):
    """e_i^T M x_n / sqrt(I) + b_n: candidate and click multiply inside the score, where the paper adds them (M8)."""

    def __init__(self, num_biases: int, item: int, element: int) -> None:
        super().__init__()
        self.kernel = nn.Linear(element, item, bias=False)
        self.bias = nn.Parameter(torch.zeros(num_biases))

    def item_layer(self) -> tuple[Tensor, Tensor]:
        weight_XI = self.kernel.weight.T / math.sqrt(self.kernel.out_features)
        return weight_XI, torch.zeros_like(weight_XI[:, 0])

    def read(self, x_UNX: Tensor) -> Tensor:
        return x_UNX.transpose(1, 2)

    def forward(self, item_CX: Tensor, read_UXN: Tensor, user_index: Tensor | None) -> Tensor:
        return vector_by_request(item_CX, read_UXN, user_index) + self.bias


class MLPScorer(Scorer):
    """v ReLU(W [e_i; x_n] + c) + b_n, as wide inside as a click (M8)."""

    def __init__(self, num_biases: int, item: int, element: int) -> None:
        super().__init__()
        self.kernel = nn.Linear(item + element, element)
        self.out = nn.Linear(element, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(num_biases))
        self.item = item

    def item_layer(self) -> tuple[Tensor, Tensor]:
        return self.kernel.weight[:, : self.item], self.kernel.bias

    def read(self, x_UNX: Tensor) -> Tensor:
        return F.linear(x_UNX, self._element_weight())

    @of_weights
    def _element_weight(self) -> Tensor:
        return self.kernel.weight[:, self.item :]

    def forward(self, item_CX: Tensor, read_UNX: Tensor, user_index: Tensor | None) -> Tensor:
        inner_CNX = F.relu(item_CX.unsqueeze(1) + of_request(read_UNX, user_index))
        scores_CN: Tensor = self.out(inner_CNX).squeeze(-1) + self.bias
        return scores_CN


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
        # In the order in which they are computed.
        self.request_groups = [group for group in ("behaviour", "user", "context") if group in groups]
        self.candidate_groups = ["item", *(name for name in _LOCAL.values() if name in groups)]
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
        self.head_width = self.head.first.out_features  # H
        self.part_width = self.head_width + self.attends  # F, rows of each group's kernel
        self.spread_LX: Tensor  # a weight to each of a part's H numbers
        spread_LX = torch.eye(len(self.candidate_groups)).repeat_interleave(self.head_width, dim=1)
        self.register_buffer("spread_LX", spread_LX, persistent=False)

    @of_weights
    def kernel(self, group: str) -> tuple[Tensor, Tensor]:
        """Weight and bias that take r_l to its score (first, if there are scores) and its part of the first layer.

        As the weights of all groups sum to 1, the first layer's bias stands in every group's part; without weights, in
        that of the candidate's own fields.
        """
        first_HG = self.head.first.weight[:, self.columns[group]]
        weight, bias = first_HG, torch.zeros_like(first_HG[:, 0])
        if self.attends:
            score = _linear(self.scores, group)
            weight = torch.cat([score.weight, first_HG])
            bias = torch.cat([score.bias, self.head.first.bias])
        elif group == "item":
            bias = self.head.first.bias
        if group in self.projections:
            projection = _linear(self.projections, group)
            bias = bias + weight @ projection.bias
            weight = weight @ projection.weight
        return weight, bias

    def sum_request(self, parts_UX: Tensor) -> UserState:
        """Of the request's groups side by side, F numbers each: their weighted sum, and the weights."""
        parts_ULF = torch.unflatten(parts_UX, -1, (-1, self.part_width))
        if not self.attends:
            return {"found": parts_ULF.sum(dim=1)}
        score_UL1, parts_ULH = torch.split(parts_ULF, [1, self.head_width], dim=-1)
        omega_UL = torch.exp(torch.tanh(score_UL1.squeeze(-1)))
        found_UH = (omega_UL.unsqueeze(1) @ parts_ULH).squeeze(1)
        return {"found": found_UH, "omega": omega_UL, "total": omega_UL.sum(dim=1, keepdim=True)}

    def sum_candidate(self, parts_CX: Tensor, omega_CL: Tensor | None) -> Tensor:
        """The same of the candidate's groups, each of H numbers: [C, H]."""
        if omega_CL is None:
            return parts_CX
        weighted_CX = (omega_CL @ self.spread_LX) * parts_CX  # faster than a sum over an axis in the middle
        return reduce(torch.add, weighted_CX.chunk(self.spread_LX.shape[0], dim=-1))

    def forward(self, found_CH: Tensor, omega_CL: Tensor | None, state: UserState, user_index: Tensor | None) -> Tensor:
        """Logits of what the candidate's groups found, together with what `sum_request` left in the state."""
        if "found" in state:
            found_CH = found_CH + of_request(state["found"], user_index)
        if omega_CL is not None:
            total_C1 = omega_CL.sum(dim=1, keepdim=True)
            if "total" in state:
                total_C1 = total_C1 + of_request(state["total"], user_index)
            record("gim_weight", lambda: self._weights(omega_CL, total_C1, state, user_index))
            found_CH = found_CH / total_C1
        return self.head.finish(found_CH)

    def _weights(self, omega_CL: Tensor, total_C1: Tensor, state: UserState, user_index: Tensor | None) -> Tensor:
        """The softmax over all groups, in their order."""
        groups = list(self.candidate_groups)
        if "omega" in state:
            omega_CL = torch.cat([omega_CL, of_request(state["omega"], user_index, omega_CL.shape[0])], dim=1)
            groups += self.request_groups
        return torch.stack([omega_CL[:, groups.index(group)] for group in self.groups], dim=1) / total_C1


class Crosses(nn.Module):
    """DCNv2's cross layers, whose logit is added to the head's: x_{l+1} = x_0 * (W_l x_l + b_l) + x_l over all vectors.

    MIAN itself multiplies attention weights with vectors (alpha h, omega r) and clicks with clicks (Q K^T), but never a
    vector of the candidate with one of the request. R. Wang et al., "DCN V2", WWW 2021. The request's columns of W_0
    meet it once, the candidate's once per version.
    """

    def __init__(self, request: int, item: int, layers: int) -> None:
        super().__init__()
        self.request_width, width = request, request + item
        self.first = nn.Linear(width, width)
        self.rest = nn.ModuleList(nn.Linear(width, width) for _ in range(layers - 1))
        self.out = nn.Linear(width, 1, bias=False)

    def item_layer(self) -> tuple[Tensor, Tensor]:
        """What W_0 makes of the candidate's part of x_0."""
        return self.first.weight[:, self.request_width :], self.first.bias

    def read(self, request_UR: Tensor) -> Tensor:
        """The request's part of x_0, and then what W_0 makes of that."""
        return torch.cat([request_UR, F.linear(request_UR, self._request_weight())], dim=-1)

    @of_weights
    def _request_weight(self) -> Tensor:
        return self.first.weight[:, : self.request_width]

    def forward(self, read_UX: Tensor | None, first_CX: Tensor, item_CI: Tensor, user_index: Tensor | None) -> Tensor:
        """The logits [C], given what `read` says of the requests, None where they have no fields."""
        x0_CX = item_CI
        if read_UX is not None:
            request_UR, first_UX = torch.split(read_UX, [self.request_width, self.first.out_features], dim=-1)
            first_CX = first_CX + of_request(first_UX, user_index)
            x0_CX = torch.cat([of_request(request_UR, user_index, item_CI.shape[0]), item_CI], dim=-1)
        x_CX = x0_CX * first_CX + x0_CX
        for layer in self.rest:
            x_CX = x0_CX * layer(x_CX) + x_CX
        logits_C: Tensor = self.out(x_CX).squeeze(-1)
        return logits_C


def _linear(layers: nn.ModuleDict, group: str) -> nn.Linear:
    layer = layers[group]
    assert isinstance(layer, nn.Linear)
    return layer


def _click_scorer(config: MIANConfig, length: int, item: int, event: int) -> Scorer:
    num_scores = length if config.ibim_score == "per_position" else 1
    match config.ibim_scorer:
        case "additive":
            return AdditiveScorer(num_scores, length, item, event)
        case "bilinear":
            return BilinearScorer(num_scores, item, event)
        case "mlp":
            return MLPScorer(num_scores, item, event)


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
