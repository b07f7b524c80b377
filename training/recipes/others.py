"""Runs on data sets without a file of their own."""

from training.config import Run, varied
from training.recipes.papers import mian_paper


def mian_amazon() -> Run:
    """MIAN as in mian_paper on Amazon's reviews, which have no context: without ICIM. Not measured here yet."""
    return varied(mian_paper(), icim=False)
