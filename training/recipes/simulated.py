"""Quick runs on a simulated log, for the demo. Each docstring states the result to expect."""

from training.config import Run
from training.recipes.deviations import deviates


@deviates(
    "FTRL: Adam",
    "no L2 on the tables but FTRL's: 1e-5 on the tables",
    "the orthogonality penalty: none",
    "16 dimensions and batches of 4096: 8 and 512, to be quick",
)
def dynint_simulated() -> Run:
    """DynInt-DGP on a simulated log, a quick run. Not measured yet."""
    return Run(
        model="dynint",
        model_config={"emb_dim": 8, "mode": "dgp", "layers": 2, "l2_emb": 1e-5},
        batch_size=512,
        lr=1e-3,
        max_epochs=4,
        patience=2,
    )


@deviates(
    "the settings of its paper are for other data: 16 wide, two heads, a few epochs, for a quick run",
    "embeddings are added to their positions: times sqrt(d) before, as in the code",
    "the feed-forward layer's output alone: what it reads is added to it, as in the code",
    "no activation on query, key and value: ReLU, as in the code (R11)",
)
def deepmr_simulated() -> Run:
    """DeepMR on a simulated log, a quick run. Not measured yet."""
    return Run(
        model="deepmr",
        model_config={"emb_dim": 16, "heads": 2, "dropout": 0.1, "l2_emb": 1e-5},
        batch_size=512,
        lr=1e-3,
        max_epochs=4,
        patience=2,
    )


@deviates(
    "the click's score adds candidate and click: bilinear, they multiply inside it",
    "the global attention reads the clicks' concatenation: their masked mean",
    "a head of 32 and 8, 8 heads, dropout 0.2: 128 and 32, 4, 0.1; groups, of no published width, projected to 64",
    "residuals around attention and feed-forward layer are not written: with them",
    "an L2 of 1e-3, on which weights is not said: 1e-5 on dense kernels, 1e-4 on tables",
    "batches of 128 at a rate of 1e-3: 256 at 3e-3, a few epochs, for a quick run",
)
def mian_simulated() -> Run:
    """MIAN on a simulated log, the demo's quick run: test AUC 0.708 +- 0.021 (3 seeds; the demo's 0.703).

    The paper's settings learn few crosses from so few rows (docs/LOG.md).

    `make demo ONCE=1`
    """
    return Run(
        model="mian",
        model_config={
            "emb_dim": 8,
            "heads": 4,
            "ibim_scorer": "bilinear",
            "gim_eb": "masked_mean",
            "gim_width": 64,
            "hidden": (128, 32),
            "dropout": 0.1,
            "l2_dense": 1e-5,
            "l2_emb": 1e-4,
        },
        batch_size=256,
        lr=3e-3,
        max_epochs=5,
        patience=2,
    )


@deviates(
    "a W_q and a W_k for each head: one W for their product, eq. (7), of which each head reads a slice (S4)",
    "the rate falls where the log loss stops improving: where the AUC does",
    "a linear head, batches of 4096: an MLP of 64, smaller batches and a few epochs, for a quick run",
)
def stec_simulated() -> Run:
    """STEC on a simulated log, the demo's quick run: test AUC 0.743 (one seed). `make demo ONCE=1`."""
    return Run(
        model="stec",
        model_config={"emb_dim": 8, "blocks": 2, "heads": 2, "hidden": (64,), "dropout": 0.2, "l2_emb": 1e-5},
        batch_size=512,
        lr=1e-3,
        max_epochs=4,
        patience=2,
    )


def feseq_simulated() -> Run:
    """FESeq on a simulated log, a quick run. Not measured here yet."""
    return Run(
        model="feseq",
        model_config={
            "emb_dim": 8,
            "pool_width": 32,
            "hidden": (128, 64),
            "dropout_attention": 0.0,
            "dropout_interact": 0.0,
            "dropout_net": 0.1,
            "l2_emb": 1e-5,
        },
        batch_size=512,
        lr=1e-3,
        max_epochs=4,
        patience=2,
    )
