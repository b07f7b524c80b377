"""DeepMR's two branches: the MLP, and self-attention over the fields.

arXiv 2210.10664. R1..R14 are the ambiguities listed in models.md section 6.3, "the code" is the authors'.
"""

# U requests, C candidates, n: U or C; F flat fields (R of the request first, G of the item), H heads
# D width, E = 2 * D; X fields that attend, Y fields attended to

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import UserState, masked_softmax, merge_heads, split_heads
from models.taps import tap, tapped

if TYPE_CHECKING:
    from models.deepmr import DeepMRConfig


class Deep(nn.Module):
    """The MLP: l_0 = ReLU(W_0 x + b_0), x all fields, then l_j = l_{j-1} + alpha_j ReLU(W_j l_{j-1} + b_j).

    mult: l_j = l_{j-1} * alpha_j ReLU(..). none: l_j = ReLU(..).
    """

    def __init__(self, config: "DeepMRConfig", num_fields: int) -> None:
        super().__init__()
        width, num = config.emb_dim, config.dnn_layers - 1
        self.kind = config.dnn_rezero
        self.first = nn.Linear(num_fields * width, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num))
        self.alphas = nn.ParameterList() if self.kind == "none" else _alphas(config, num)
        self.dropout = nn.Dropout(config.dropout)

    def read(self, x_nFD: Tensor, fields: slice) -> Tensor:
        """These fields' part in W_0 x."""
        weight_DFD = torch.unflatten(self.first.weight, 1, (-1, self.first.out_features))
        return F.linear(x_nFD.flatten(1), weight_DFD[:, fields].flatten(1))

    def forward(self, z_CD: Tensor) -> Tensor:
        """O_DNN, given W_0 x."""
        l_CD: Tensor = self.dropout(F.relu(z_CD + self.first.bias))
        for n, layer in enumerate(self.layers):
            next_CD = F.relu(layer(l_CD))
            if self.kind == "add":
                l_CD = l_CD + self.dropout(self.alphas[n] * next_CD)
            elif self.kind == "mult":
                l_CD = l_CD * self.dropout(self.alphas[n] * next_CD)
            else:
                l_CD = self.dropout(next_CD)
        return l_CD


class FieldAttention(nn.Module):
    """The self-attention branch: blocks over the fields, summed over them to O_SA (R2), of which one direction is read.

    So the last block's W_2 is only ever read in that direction (R14), and one vector is made of the matrix.
    """

    mask: Tensor

    def __init__(self, config: "DeepMRConfig", num_request: int, num_fields: int) -> None:
        super().__init__()
        self.num_request, self.num_fields = num_request, num_fields
        self.field_mask, self.mean = config.field_mask, config.sa_readout == "mean"
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.sa_blocks))
        self.final_norm = nn.LayerNorm(config.emb_dim) if config.sa_final_ln else nn.Identity()
        self.register_buffer("mask", torch.ones(num_fields, num_fields, dtype=torch.bool).tril(), persistent=False)

    def read_request(self, x_URD: Tensor, direction_D: Tensor) -> UserState:
        """What the request's fields bring to every candidate: their first block's Q, K, V, or their whole branch."""
        state: UserState = {}
        if self.field_mask == "none":
            state["asking"], state["shown.0"] = self._block(0).read(x_URD)
            return state
        mask_RR = self.mask[: self.num_request, : self.num_request] if self.field_mask == "causal" else None
        for n in range(len(self.blocks)):
            if n > 0:
                x_URD = self._block(n - 1).feed(x_URD)
            asking_URE, shown_URE = self._block(n).read(x_URD)
            state[f"shown.{n}"] = shown_URE
            x_URD, weights_UHRR = self._block(n)(asking_URE, shown_URE, mask_RR)
            if tapped():
                state[f"weights.{n}"] = weights_UHRR
        state["sum"] = self._read_out(x_URD, direction_D)
        return state

    def forward(self, state: UserState, x_CGD: Tensor, direction_D: Tensor) -> Tensor:
        """O_SA in that direction [C], given each candidate's own request's part."""
        mask_GF = self.mask[self.num_request :] if self.field_mask == "causal" else None
        x_CXD = x_CGD
        for n in range(len(self.blocks)):
            if n > 0:
                x_CXD = self._block(n - 1).feed(x_CXD)
            asking_CXE, shown_CYE = self._block(n).read(x_CXD)
            if n == 0 and "asking" in state:
                asking_CXE = torch.cat([state["asking"], asking_CXE], dim=1)
            if f"shown.{n}" in state:
                shown_CYE = torch.cat([state[f"shown.{n}"], shown_CYE], dim=1)
            x_CXD, weights_CHXY = self._block(n)(asking_CXE, shown_CYE, mask_GF)
            if f"weights.{n}" in state:  # the request's fields do not attend to the item's
                of_request_CHRF = F.pad(state[f"weights.{n}"], (0, x_CGD.shape[1]))
                weights_CHXY = torch.cat([of_request_CHRF, weights_CHXY], dim=2)
            tap("field_attn", weights_CHXY)
        out_C = self._read_out(x_CXD, direction_D)
        if "sum" in state:
            out_C = out_C + state["sum"]
        return out_C / self.num_fields if self.mean else out_C

    def _read_out(self, z_nXD: Tensor, direction_D: Tensor) -> Tensor:
        """The fields' sum in that direction [n], given what the last block's feed-forward layer reads."""
        last = self._block(len(self.blocks) - 1)
        if not isinstance(self.final_norm, nn.Identity):
            out_nXD: Tensor = self.final_norm(last.feed(z_nXD))
            return out_nXD.sum(dim=1) @ direction_D
        return last.feed_summed(z_nXD, direction_D)

    def _block(self, n: int) -> "Block":
        block = self.blocks[n]
        assert isinstance(block, Block)
        return block


class Block(nn.Module):
    """Attention S of the fields over each other, joined to its input X by alpha, then a feed-forward layer per field.

    mult: Z = alpha S * X, which has no identity path; add: X + alpha S; mult_res: X * (1 + alpha S); none: X + S (R5).
    """

    def __init__(self, config: "DeepMRConfig") -> None:
        super().__init__()
        width = config.emb_dim
        self.kind, self.relu, self.heads = config.sa_rezero, config.qkv_act == "relu", config.heads
        self.scale = math.sqrt(width / self.heads)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.ffn = nn.Sequential(
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),  # TensorFlow's slope
            nn.Dropout(config.dropout),
            nn.Linear(width, width),
        )
        self.alphas = nn.ParameterList() if self.kind == "none" else _alphas(config, 1)
        self.query_norm = nn.LayerNorm(width) if config.query_ln else nn.Identity()
        self.ffn_norm = nn.LayerNorm(width) if config.ffn_ln else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def read(self, x_nFD: Tensor) -> tuple[Tensor, Tensor]:
        """Of each field, what it attends with (itself and its query) and what it shows (its key and value)."""
        asking_nFD = self.query_norm(x_nFD)
        query_nFD, key_nFD, value_nFD = self.query(asking_nFD), self.key(x_nFD), self.value(x_nFD)
        if self.relu:
            query_nFD, key_nFD, value_nFD = F.relu(query_nFD), F.relu(key_nFD), F.relu(value_nFD)
        return torch.cat([asking_nFD, query_nFD], dim=-1), torch.cat([key_nFD, value_nFD], dim=-1)

    def forward(self, asking_nXE: Tensor, shown_nYE: Tensor, mask_XY: Tensor | None) -> tuple[Tensor, Tensor]:
        """The attending fields before the feed-forward layer, and their attention [n, H, X, Y]."""
        x_nXD, query_nXD = asking_nXE.chunk(2, dim=-1)
        key_nHYW, value_nHYW = (split_heads(part, self.heads) for part in shown_nYE.chunk(2, dim=-1))
        query_nHXW = split_heads(query_nXD / self.scale, self.heads)
        weights_nHXY = masked_softmax(query_nHXW @ key_nHYW.transpose(-1, -2), mask_XY)
        z_nXD: Tensor = self.ffn_norm(self._join(x_nXD, merge_heads(self.dropout(weights_nHXY) @ value_nHYW)))
        return z_nXD, weights_nHXY

    def feed(self, z_nXD: Tensor) -> Tensor:
        """The feed-forward layer, W_2 LeakyReLU(W_1 z + b_1) + b_2 + z."""
        out_nXD: Tensor = self.ffn(z_nXD) + z_nXD
        return out_nXD

    def feed_summed(self, z_nXD: Tensor, direction_D: Tensor) -> Tensor:
        """The same, summed over the fields and read in one direction [n]."""
        *inner, last = self.ffn
        assert isinstance(last, nn.Linear)
        hidden_nXD = z_nXD
        for layer in inner:
            hidden_nXD = layer(hidden_nXD)
        read_n = hidden_nXD.sum(dim=1) @ (direction_D @ last.weight) + z_nXD.sum(dim=1) @ direction_D
        return read_n + z_nXD.shape[1] * (direction_D @ last.bias)

    def _join(self, x_nXD: Tensor, s_nXD: Tensor) -> Tensor:
        if self.kind == "none":
            return x_nXD + s_nXD
        s_nXD = self.alphas[0] * s_nXD
        if self.kind == "add":
            return x_nXD + s_nXD
        return x_nXD * (s_nXD if self.kind == "mult" else 1 + s_nXD)


def _alphas(config: "DeepMRConfig", num: int) -> nn.ParameterList:
    return nn.ParameterList(torch.full((1,), float(config.alpha_init)) for _ in range(num))
