"""Runs on data sets whose fields a family's own recipe cannot take. None is measured here yet."""

from training.config import Run, varied
from training.recipes.frappe import finalmlp_frappe
from training.recipes.movielens import dynint_movielens, mian_movielens


def mian_amazon() -> Run:
    """MIAN on Amazon's reviews, which have no context, and so without its ICIM."""
    return varied(mian_movielens(), icim=False)


# Deviations from the paper of DynInt: as dynint_movielens
def dynint_amazon() -> Run:
    """DynInt-DGP on Amazon's reviews, with kernels narrower than the twelve rows of three fields in four subspaces."""
    return varied(dynint_movielens(), kernel_size=8)


def finalmlp_criteo() -> Run:
    """FinalMLP on Criteo, whose fields are not told apart by whose they are: both gates are learned vectors."""
    return varied(finalmlp_frappe(), gate_1="learned", gate_2="learned")


def finalmlp_avazu() -> Run:
    """FinalMLP on Avazu, as on Criteo."""
    return finalmlp_criteo()
