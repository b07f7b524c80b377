"""What others published on the data sets we prepare: AUC/logloss, from models.md sections 2.5, 3.5, 4.5, 5.8, 6.5, 7.

An ablation stands under the name that a `compare --variant` of it should bear, such as mian-no-ibim.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One published table on one data set, and what makes it comparable with ours, or what does not."""

    title: str
    dataset: str
    test_rows: int | None
    """Of its test part: another number is another split, whatever its name. None: a split of its own."""
    note: str

    def verdict(self, test_rows: int) -> str:
        """Whether its figures may stand beside ours, in words, where ours were measured on so many test rows."""
        if self.test_rows == test_rows:
            return f"comparable: {self.note}"
        if self.test_rows is None:
            return f"not comparable: {self.note}"
        return f"not comparable: its test part has {self.test_rows:,} rows, this one {test_rows:,} ({self.note})"


@dataclass(frozen=True)
class Figures:
    """What was published for one row of a table."""

    auc: float
    logloss: float | None
    source: Source


BARS, STEC, DYNINT = "BARS leaderboard, commit 5b5e61f", "STEC's paper", "DynInt's paper"
DEEPMR, MIAN, FESEQ = "DeepMR's paper", "MIAN's paper", "FESeq's paper"
FUXICTR = "FuxiCTR run on the rebuilt Frappe files, tuned as in BARS"

TABLES = {
    FUXICTR: """
                            frappe
        deepfm              .9850/.1510
        dcnv2               .9844/.1577
    """,
    BARS: """
                            frappe       movielens-tag  criteo       avazu        amazon
        lr                  .9356/.3076  .9342/.3201    .7886/.4609  .7516/.3735  -
        fm                  .9671/.2065  .9434/.2729    .8022/.4491  .7613/.3677  .8485/.5061
        widedeep            .9841/.1490  .9688/.2161    .8139/.4380  .7649/.3665  -
        deepfm              .9842/.1482  .9685/.2130    .8137/.4381  .7648/.3667  .8816/.4377
        dcn                 .9839/.1527  .9687/.2160    .8138/.4381  .7652/.3665  .8801/.4421
        dcnv2               .9845/.1491  .9691/.2147    .8142/.4378  .7656/.3664  .8812/.4445
        xdeepfm             .9845/.1466  .9697/.2409    .8139/.4380  .7647/.3671  .8813/.4387
        autoint             .9848/.1490  .9692/.2148    .8139/.4379  .7645/.3668  .8804/.4441
        finalmlp            .9861/.1484  .9720/.1966    .8149/.4370  .7666/.3658  -
        din                 -            -              -            -            .8860/.4302
        dien                -            -              -            -            .8888/.4257
        bst                 -            -              -            -            .8864/.4301
        dmr                 -            -              -            -            .8873/.4277
    """,
    STEC: """
                            frappe       movielens-tag  criteo       avazu
        stec                .9850/.1477  .9715/.2016    .8143/.4379  .7664/.3658
        stec-bl             .9844/-      .9703/-        .8122/-      .7622/-
        stec-nf             .9835/-      .9689/-        .8125/-      .7656/-
        stec-lo             .9842/-      .9703/-        .8139/-      .7583/-
        stec-f              .9843/-      .9708/-        .8134/-      .7608/-
        widedeep            .9835/.1490  .9687/.2161    .8138/.4380  .7631/.3665
        deepfm              .9842/.1482  .9687/.2130    .8137/.4381  .7648/.3667
        dcn                 .9840/.1491  .9688/.2147    .8138/.4378  .7628/.3664
        dcnv2               .9845/.1491  .9691/.2147    .8139/.4378  .7630/.3664
        xdeepfm             .9845/.1466  .9675/.2409    .8136/.4380  .7630/.3671
        autoint             .9844/.1490  .9689/.2148    .8137/.4379  .7639/.3668
        finalmlp            .9848/.1484  .9713/.2246    .8148/.4370  .7658/.3658
    """,
    DEEPMR: """
                            frappe       movielens-tag  lastfm
        deepmr              .9851/.1395  .9654/.2293    .9592/.2840
        deepmr-no-rezero    .9849/.1657  .9624/.2322    .9609/.3141
        deepmr-add-rezero   .9838/.1404  .9551/.2699    .9565/.2833
        deepmr-learned-beta .9856/.1408  .9611/.2260    .9589/.2850
        deepfm              .9713/.1922  .9399/.2846    .9388/.3038
        xdeepfm             .9803/.1795  .9570/.2365    .9469/.2847
        autoint             .9797/.1679  .9419/.3023    .9388/.3317
    """,
    DYNINT: """
                            criteo       avazu        ipinyou
        dynint              .8127/.4397  .7686/.3867  .7813/.005547
        dynint-dgp          .8127/.4397  .7686/.3867  .7813/.005547
        dynint-da           .8125/.4398  .7677/.3871  .7802/.005552
        dynint-dwp          .8132/.4393  .7671/.3878  .7798/.005564
        dynint-pin          .8111/.4408  .7672/.3876  .7790/.005567
        lr                  .7924/.4577  .7533/.3952  .7692/.005605
        fm                  .8030/.4487  .7652/.3889  .7737/.005576
        widedeep            .8062/.4451  .7637/.3889  .7763/.005589
        deepfm              .8069/.4445  .7665/.3879  .7749/.005609
        dcn                 .8056/.4457  .7661/.3880  .7758/.005682
        dcnv2               .8086/.4433  .7662/.3882  .7765/.005593
        xdeepfm             .8077/.4439  .7668/.3878  .7772/.005664
        autoint             .8053/.4462  .7650/.3883  .7732/.005758
    """,
    MIAN: """
                            amazon
        mian                .8913/.1136
        mian-no-iuim        .8875/.1197
        mian-no-icim        .8902/.1141
        mian-no-ibim        .8843/.1214
        mian-no-gim         .8872/.1186
        mian-no-iuim-icim   .8846/.1220
        lr                  .8214/.2116
        widedeep            .8385/.2033
        dcn                 .8540/.1824
        deepfm              .8636/.1708
        xdeepfm             .8683/.1662
        din                 .8807/.1273
        dien                .8836/.1225
    """,
    FESEQ: """
                            eleme
        feseq               .6127/.0918
        feseq-no-int        .5882/.0932
        feseq-no-nonseq     .5980/.0923
        feseq-no-pos        .5757/.0928
        feseq-no-time       .6040/.0921
        feseq-no-causal     .6124/.0920
        feseq-target-pool   .6084/.0923
        feseq-mean-pool     .6016/.0922
        feseq-scaled-dot    .6124/.0920
        feseq-din-attention .5987/.0939
        feseq-no-scale      .5926/.0926
        widedeep            .5489/.0950
        deepfm              .5460/.0935
        dcn                 .5495/.0932
        dcnv2               .5426/.0937
        autoint             .5392/.0950
        finalmlp            .5497/.0933
        din                 .5988/.0924
        dien                .5569/.0931
        bst                 .5497/.0933
        dmr                 .6039/.0921
    """,
}

_BEST = "the same split (x1), each model's best run"
_SAME = "the same split (x1)"
_LAST = "Electronics (x1), each user's last review and one drawn negative"
_REBUILT = "in the rebuilt training file the items of the negatives are drawn anew"
_TWO_NEGATIVES = "an 8:1:1 split of its own, two drawn negatives per positive"
_RANDOM = "a random 70/10/20 split of its own, rare values without an embedding"
_SAME_LAW = f"{_RANDOM}; ours is drawn by the same law"

SOURCES = (
    Source(FUXICTR, "frappe", 28_860, "these very rows, where training reads the rebuilt file"),
    Source(BARS, "frappe", 28_860, f"{_BEST}; {_REBUILT}"),
    Source(BARS, "movielens-tag", 200_686, _BEST),
    Source(BARS, "criteo", 4_587_167, _BEST),
    Source(BARS, "avazu", 8_085_794, _BEST),
    Source(BARS, "amazon", 384_806, f"{_LAST}; ours are drawn anew, and x1 has no validation part to stop by"),
    Source(STEC, "frappe", 28_860, f"{_SAME}; {_REBUILT}"),
    Source(STEC, "movielens-tag", 200_686, _SAME),
    Source(STEC, "criteo", 4_587_167, _SAME),
    Source(STEC, "avazu", 8_085_794, _SAME),
    Source(DEEPMR, "frappe", None, f"{_TWO_NEGATIVES}; DeepFM reaches 0.9713 there, 0.9842 on the split of BARS"),
    Source(DEEPMR, "movielens-tag", None, f"{_TWO_NEGATIVES}; DeepFM reaches 0.9399 there, 0.9685 on that of BARS"),
    Source(DEEPMR, "lastfm", None, f"{_TWO_NEGATIVES}; its code reads five fields, the paper tells of six"),
    Source(DYNINT, "criteo", None, _SAME_LAW),
    Source(DYNINT, "avazu", None, _SAME_LAW),
    Source(DYNINT, "ipinyou", None, _RANDOM),
    Source(MIAN, "amazon", None, "Electronics, split and negatives not told: only the order can be compared"),
    Source(FESEQ, "eleme", None, "the 1,228,589 rows of its own preprocessing, 8:1:1 in time order"),
)


def figures(dataset: str, name: str) -> list[Figures]:
    """What was published on a data set for the row of a comparison that bears this name.

    A `_paper` recipe's is its model's, or its variant's: dynint_da_paper stands for dynint-da.
    """
    key = name.removesuffix("_paper").replace("_", "-")
    return PUBLISHED.get(dataset, {}).get("dynint-pin" if key == "pin" else key, [])


def _read() -> dict[str, dict[str, list[Figures]]]:
    published: dict[str, dict[str, list[Figures]]] = {}
    known = {(source.title, source.dataset): source for source in SOURCES}
    for title, table in TABLES.items():
        datasets, *lines = [line.split() for line in table.split("\n") if line.strip()]
        for name, *cells in lines:
            for dataset, cell in zip(datasets, cells, strict=True):
                auc, _, logloss = cell.partition("/")
                if auc != "-":
                    loss = None if logloss == "-" else float(logloss)
                    row = published.setdefault(dataset, {}).setdefault(name, [])
                    row.append(Figures(float(auc), loss, known[title, dataset]))
    return published


PUBLISHED = _read()
"""{data set: {row's name: its figures}}"""
