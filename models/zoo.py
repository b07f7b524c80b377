"""Which models there are: name to config and module, written out by hand."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from models.baselines.autoint import AutoInt, AutoIntConfig
from models.baselines.bst import BST, BSTConfig
from models.baselines.cross import DCN, DCNConfig, DCNv2, DCNv2Config, XDeepFM, XDeepFMConfig
from models.baselines.deep import DeepFM, DeepFMConfig, WideDeep, WideDeepConfig
from models.baselines.dien import DIEN, DIENConfig
from models.baselines.din import DIN, DINConfig
from models.baselines.dmr import DMR, DMRConfig
from models.baselines.finalmlp import FinalMLP, FinalMLPConfig
from models.baselines.linear import FM, LR, FMConfig, LRConfig
from models.features.schema import Schema
from models.layers.base import CTRModel
from models.layers.config import Config
from models.papers.deepmr import DeepMR, DeepMRConfig
from models.papers.dynint import DynInt, DynIntConfig
from models.papers.feseq import FESeq, FESeqConfig
from models.papers.mian import MIAN, MIANConfig
from models.papers.stec import STEC, STECConfig

# Any: each model takes its own config, and only its own.
MODELS: dict[str, tuple[type[Config], Callable[[Any, Schema], CTRModel]]] = {
    "mian": (MIANConfig, MIAN),
    "stec": (STECConfig, STEC),
    "dynint": (DynIntConfig, DynInt),
    "deepmr": (DeepMRConfig, DeepMR),
    "feseq": (FESeqConfig, FESeq),
    "deepfm": (DeepFMConfig, DeepFM),
    "lr": (LRConfig, LR),
    "fm": (FMConfig, FM),
    "widedeep": (WideDeepConfig, WideDeep),
    "dcn": (DCNConfig, DCN),
    "dcnv2": (DCNv2Config, DCNv2),
    "xdeepfm": (XDeepFMConfig, XDeepFM),
    "autoint": (AutoIntConfig, AutoInt),
    "finalmlp": (FinalMLPConfig, FinalMLP),
    "din": (DINConfig, DIN),
    "dien": (DIENConfig, DIEN),
    "dmr": (DMRConfig, DMR),
    "bst": (BSTConfig, BST),
}


def configure(name: str, options: Mapping[str, Any]) -> Config:
    """The config of model `name` with these options, defaults otherwise; lists, as JSON and YAML have, become tuples.

    Raises ValueError for an unknown model, an unknown option or an unfit value.
    """
    if name not in MODELS:
        raise ValueError(_unknown("model", name, list(MODELS)))
    config, _ = MODELS[name]
    known = [f.name for f in fields(config)]
    for option in options:
        if option not in known:
            raise ValueError(_unknown(f"option of {name}", option, known))
    try:
        return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
    except ValueError as err:
        raise ValueError(f"{name}: {err}") from err


def build(name: str, options: Mapping[str, Any], schema: Schema) -> CTRModel:
    """A freshly initialised model; raises ValueError as `configure` does, and where it does not fit the schema."""
    config = configure(name, options)
    _, module = MODELS[name]
    return module(config, schema)


def _unknown(kind: str, name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"unknown {kind} {name!r}{hint} (there are {', '.join(known)})"
