"""Neutral settings: what a model is trained with on data that no recipe is made for."""

from collections.abc import Callable, Mapping
from typing import Any

from models import zoo
from training.config import Run

FITTING: Mapping[str, Mapping[str, Any]] = {
    "dynint": {"kernel_size": 8},  # fits two fields in its four subspaces
    "mian": {"kernel_start": "xavier_normal"},  # from its paper's start it may stay a constant
    "finalmlp": {"gate_1": "learned", "gate_2": "learned"},  # asks for no group of fields
}
"""Where a model's defaults suppose more of the data than every data set has."""


def neutral(model: str) -> Run:
    """The model's own defaults and a light penalty on its tables, trained as is usual; tuned on nothing."""
    options = {"l2_emb": 1e-5, **FITTING.get(model, {})}
    return Run(model=model, model_config=options, batch_size=1024, lr=1e-3, max_epochs=20, patience=2)


def recipes() -> dict[str, Callable[[], Run]]:
    """{MODEL_neutral: its recipe} for every model."""
    return {f"{model}_neutral": _recipe(model) for model in zoo.MODELS}


def _recipe(model: str) -> Callable[[], Run]:
    def recipe() -> Run:
        return neutral(model)

    recipe.__name__ = f"{model}_neutral"
    recipe.__doc__ = "The model's defaults, tuned on no data. Not measured here yet."
    return recipe
