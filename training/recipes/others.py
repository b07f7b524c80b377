"""Runs on data sets without a file of their own."""

from training.config import Run, varied
from training.recipes.movielens import mian_movielens


def mian_amazon() -> Run:
    """MIAN on Amazon's reviews, in a form that trains: on groceries test AUC 0.7227 +- 0.0038, logloss 0.629.

    3 seeds of 4 to 6 epochs; mian_paper, and this from the paper's start (kernel_start=truncated_normal) have 0.5000.
    Departs from the paper:
    - dense kernels start Xavier-normal, not truncated normal with deviation 0.02;
    - their L2 is 1e-5, not 1e-3;
    - the tables have an L2 of 1e-5, of which the paper tells nothing;
    - batches of 512 rows, not 128;
    - the user has one field, the id, where the paper speaks of several.

    `python -m training compare --data data/groceries --models mian:mian_amazon --seeds 3 --out DIR`
    """
    return varied(mian_movielens(), kernel_start="xavier_normal")
