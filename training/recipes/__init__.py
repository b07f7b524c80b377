"""Complete runs, as functions; each docstring states the result to expect. And which of them a data set takes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

from training.config import Run, assignments
from training.errors import UserError
from training.recipes import frappe, movielens, neutral, others, papers, simulated
from training.recipes.deviations import DEVIATIONS


def _of(module: ModuleType) -> dict[str, Callable[[], Run]]:
    """Its public functions, as they stand in the file."""
    functions = {n: f for n, f in vars(module).items() if getattr(f, "__module__", "") == module.__name__}
    return {n: f for n, f in functions.items() if not n.startswith("_")}


RECIPES: dict[str, Callable[[], Run]] = (
    _of(movielens) | _of(frappe) | _of(simulated) | _of(others) | _of(papers) | neutral.recipes()
)
SUFFIXES: Mapping[str, str] = {
    "movielens-1m": "movielens",
    "movielens-tag": "movielens_tag",
    **{name: name for name in ("frappe", "lastfm", "criteo", "avazu", "amazon", "eleme", "ipinyou", "simulated")},
}
"""{known data set: how the names of its recipes end}"""
PAPERS: Mapping[tuple[str, str], str] = {
    **{("stec", dataset): "stec_paper" for dataset in ("frappe", "movielens-tag", "criteo", "avazu")},
    **{("deepmr", dataset): "deepmr_paper" for dataset in ("frappe", "movielens-tag")},
    **{("dynint", dataset): "dynint_dgp_paper" for dataset in ("criteo", "avazu")},
    ("dynint", "ipinyou"): "dynint_ipinyou_paper",
    ("feseq", "eleme"): "feseq_paper",
}
"""{(model, data set of its paper): the paper's recipe}; MIAN has mian_amazon on its, a form that trains there."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A recipe's name, and why it is this one."""

    name: str
    reason: str


def choose(model: str, dataset: str) -> Choice:
    """The recipe for a model on a data set: made for the two, else the paper's on its own data, else neutral settings.

    No data set takes another's recipe.
    """
    name = f"{model}_{SUFFIXES.get(dataset, '')}"
    if name in RECIPES:
        return Choice(name=name, reason=f"made for {model} on {dataset}")
    if (model, dataset) in PAPERS:
        return Choice(name=PAPERS[model, dataset], reason=f"{dataset} is a data set of {model}'s paper")
    return Choice(name=f"{model}_neutral", reason=f"no recipe is made for {model} on {dataset}: neutral settings")


def recipe(name: str, model: str) -> Run:
    """The run of a recipe, which must be one for `model`."""
    fitting = [known for known in RECIPES if RECIPES[known]().model == model]
    if name not in fitting:
        raise UserError(f"--recipe {name}: no such recipe for {model}; there are {', '.join(fitting)}")
    return RECIPES[name]()


def is_measured(name: str) -> bool:
    """Whether the recipe's docstring states a result that it had here."""
    return "not measured" not in " ".join((RECIPES[name].__doc__ or "not measured").lower().split())


def announcement(choice: Choice, run: Run) -> str:
    """What `train` says before it starts: the recipe, why this one, every value, and its deviations from its paper."""
    measured = "" if is_measured(choice.name) else "; never measured here"
    lines = [f"recipe {choice.name} ({choice.reason}{measured})", f"settings: {' '.join(assignments(run))}"]
    return "\n".join([*lines, *(f"not as in the paper: {line}" for line in DEVIATIONS.get(choice.name, ()))])


def listing() -> str:
    """Every recipe for `train --help`: its summary, whether it was measured here, its deviations from its paper."""
    lines = ["recipes (--recipe NAME; without it: the one made for the data set, its paper's, or MODEL_neutral):"]
    for name, function in RECIPES.items():
        summary = (function.__doc__ or "").strip().splitlines()[0]
        lines.append(f"  {name}{'' if is_measured(name) else ' [never measured here]'}: {summary}")
        lines += [f"      not as in the paper: {line}" for line in DEVIATIONS.get(name, ())]
    return "\n".join(lines)
