"""Deviations: where a recipe of a paper departs from its paper, in one line each."""

from collections.abc import Callable

from training.config import Run

Recipe = Callable[[], Run]

DEVIATIONS: dict[str, tuple[str, ...]] = {}
"""{recipe's name: its deviations}; an empty tuple says that there are none."""


def deviates(*deviations: str) -> Callable[[Recipe], Recipe]:
    """Decorates a recipe of a paper with all that is not as its paper has it: `PAPER'S: OURS, why`, a line each.

    `train` prints the lines when it starts, `train --help` beside the recipe.
    """

    def decorated(recipe: Recipe) -> Recipe:
        if any("\n" in line or not line.strip() for line in deviations):
            raise ValueError(f"{recipe.__name__}: each deviation is one line of text")
        DEVIATIONS[recipe.__name__] = deviations
        return recipe

    return decorated
