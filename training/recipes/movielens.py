"""Runs on MovieLens-1M, split by global time. Each docstring states the result to expect."""

from training.config import Run
from training.recipes.deviations import deviates

MIAN = (
    "no width is published: embeddings 16 wide, the feed-forward layer 4 times a click, groups projected to 64",
    "residuals around attention and feed-forward layer are not written: with them",
)


@deviates(
    *MIAN,
    "an L2 of 1e-3, on which weights is not said: 1e-5 on dense kernels and tables",
    "batches of 128: 512",
)
def mian_movielens() -> Run:
    """MIAN in the paper's form on MovieLens-1M: test AUC 0.7554, logloss 0.5897 (one seed, 6 epochs, 18 minutes).

    `python -m training train mian --data data/ml-1m --out RUN`
    """
    return Run(
        model="mian",
        model_config={"emb_dim": 16, "l2_dense": 1e-5, "l2_emb": 1e-5},
        batch_size=512,
        lr=1e-3,
        max_epochs=20,
        patience=2,
    )


@deviates(
    "a W_q and a W_k for each head: one W for their product, eq. (7), of which each head reads a slice (S4)",
    "the rate falls where the log loss stops improving: where the AUC does",
    "batches of 4096; layers, width and penalty unpublished: 2048; 2 blocks, 16 wide, 1e-2 on the tables, dropout 0.3",
)
def stec_movielens() -> Run:
    """STEC on MovieLens-1M: test AUC 0.7649, logloss 0.5809 (one seed, 6 epochs, 15 minutes).

    `python -m training train stec --data data/ml-1m --out RUN`
    """
    return Run(
        model="stec",
        model_config={"emb_dim": 16, "blocks": 2, "heads": 2, "dropout": 0.3, "l2_emb": 1e-2},
        batch_size=2048,
        lr=1e-3,
        max_epochs=20,
        patience=2,
    )


def deepfm_movielens() -> Run:
    """DeepFM on MovieLens-1M: test AUC 0.7708 +- 0.0008, logloss 0.5801 (3 seeds of 7 or 8 epochs, 4 minutes each).

    `python -m training compare --data data/ml-1m --models deepfm --seeds 3 --out DIR`
    With averaged weights (ema_decay 0.995, plateau_factor 1) 0.7706 +- 0.0002, 0.5782.
    """
    return Run(
        model="deepfm",
        model_config={"emb_dim": 16, "dropout": 0.2, "l2_emb": 1e-5},
        batch_size=4096,
        lr=1e-3,
        max_epochs=20,
        patience=2,
    )


def lr_movielens() -> Run:
    """Logistic regression on MovieLens-1M: test AUC 0.7554, logloss 0.5865 (one seed, 9 epochs, half a minute).

    `python -m training train lr --data data/ml-1m --out RUN`
    """
    return Run(model="lr", batch_size=4096, lr=1e-2, max_epochs=30, patience=2)


def dcnv2_movielens() -> Run:
    """DCNv2 on MovieLens-1M, with DeepFM's settings: test AUC 0.7708 +- 0.0007, logloss 0.5804 (3 seeds).

    `python -m training compare --data data/ml-1m --models dcnv2 --seeds 3 --out DIR`
    With averaged weights (ema_decay 0.995, plateau_factor 1) 0.7709 +- 0.0004, 0.5790.
    """
    return _movielens("dcnv2")


def din_movielens() -> Run:
    """DIN on MovieLens-1M, with DeepFM's settings: test AUC 0.7669 +- 0.0021, logloss 0.5865 (3 seeds).

    `python -m training compare --data data/ml-1m --models din --seeds 3 --out DIR`
    """
    return _movielens("din")


def dien_movielens() -> Run:
    """DIEN with its auxiliary loss on MovieLens-1M, else with DeepFM's settings: 0.7635 +- 0.0010, 0.5803 (3 seeds).

    `python -m training compare --data data/ml-1m --models dien --seeds 3 --out DIR`
    """
    return _movielens("dien", aux_weight=1.0)


def dmr_movielens() -> Run:
    """DMR with its auxiliary loss on MovieLens-1M, else with DeepFM's settings. Not measured here yet."""
    return _movielens("dmr", aux_weight=0.1)


def bst_movielens() -> Run:
    """BST on MovieLens-1M, with DeepFM's settings: test AUC 0.7557 +- 0.0008, logloss 0.5818 (3 seeds).

    `python -m training compare --data data/ml-1m --models bst --seeds 3 --out DIR`
    """
    return _movielens("bst")


@deviates("FTRL: Adam", "no L2 on the tables but FTRL's: 1e-5 on the tables", "the orthogonality penalty: none")
def dynint_movielens() -> Run:
    """DynInt-DGP on MovieLens-1M; it reads no history. Not measured here yet."""
    return Run(
        model="dynint",
        model_config={"emb_dim": 16, "mode": "dgp", "l2_emb": 1e-5},
        batch_size=4096,
        lr=1e-3,
        max_epochs=20,
        patience=2,
    )


@deviates(
    "the settings of its paper are for other data: those of DeepFM here, 16 wide, two heads, Adam's usual beta_2",
    "embeddings are added to their positions: times sqrt(d) before, as in the code",
    "the feed-forward layer's output alone: what it reads is added to it, as in the code",
    "no activation on query, key and value: ReLU, as in the code (R11)",
)
def deepmr_movielens() -> Run:
    """DeepMR on MovieLens-1M, with DeepFM's settings; it reads no history. Not measured here yet."""
    return _movielens("deepmr")


def feseq_movielens() -> Run:
    """FESeq on MovieLens-1M, narrow enough for two cores: test AUC 0.7588 +- 0.0012, logloss 0.5834 (2 seeds).

    Ages in buckets of a day, so that they reach as far as the test part's: docs/LOG.md.
    `python -m training compare --data data/ml-1m --models feseq --seeds 2 --out DIR`
    """
    return Run(
        model="feseq",
        model_config={
            "emb_dim": 8,
            "time_unit_s": 86_400,
            "pool_width": 32,
            "hidden": (256, 128, 64),
            "dropout_attention": 0.0,
            "dropout_interact": 0.0,
            "dropout_net": 0.1,
            "l2_emb": 1e-5,
        },
        batch_size=1024,
        lr=1e-3,
        max_epochs=20,
        patience=2,
    )


def _movielens(model: str, **options: float) -> Run:
    config = {"emb_dim": 16, "dropout": 0.2, "l2_emb": 1e-5, **options}
    return Run(model=model, model_config=config, batch_size=4096, lr=1e-3, max_epochs=20, patience=2)
