"""Complete runs, as functions; each docstring states the result to expect."""

from collections.abc import Callable
from types import ModuleType

from training.config import Run
from training.errors import UserError
from training.recipes import frappe, movielens, others, papers, simulated


def _of(module: ModuleType) -> dict[str, Callable[[], Run]]:
    """Its public functions, as they stand in the file."""
    functions = {n: f for n, f in vars(module).items() if getattr(f, "__module__", "") == module.__name__}
    return {n: f for n, f in functions.items() if not n.startswith("_")}


RECIPES: dict[str, Callable[[], Run]] = _of(movielens) | _of(frappe) | _of(simulated) | _of(others) | _of(papers)
# Whose recipes a data set takes: its own, or those of its kind (Frappe's are of flat rows, MovieLens's of histories).
FAMILIES = {
    "movielens-1m": "movielens",
    "amazon": "movielens",
    "eleme": "movielens",
    **dict.fromkeys(("frappe", "movielens-tag", "lastfm", "criteo", "avazu", "ipinyou"), "frappe"),
    "simulated": "simulated",
}


def default(model: str, dataset: str) -> str:
    """The recipe for a model on a data set: its own, its family's, that on MovieLens-1M, or else the model's first."""
    known = [name for name in RECIPES if RECIPES[name]().model == model]
    candidates = (f"{model}_{dataset}", f"{model}_{FAMILIES.get(dataset, 'movielens')}", f"{model}_movielens")
    return next(name for name in (*candidates, *known) if name in known)


def recipe(name: str, model: str) -> Run:
    """The run of a recipe, which must be one for `model`."""
    fitting = [known for known in RECIPES if RECIPES[known]().model == model]
    if name not in fitting:
        raise UserError(f"--recipe {name}: no such recipe for {model}; there are {', '.join(fitting)}")
    return RECIPES[name]()
