"""How finished cells are judged: the reference, what is best, what stands beside it."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from models import zoo
from training import recipes
from training.comparison import leaderboard, published, tables
from training.config import Run
from training.data.batches import Prepared
from training.errors import UserError


def cells(name, model, aucs, *, valid=0.5, config=None):
    """Finished cells without files, for what needs no test logits."""
    part = {"gauc": None, "logloss": 0.5, "calibrated": {"logloss": 0.5}}
    return [
        leaderboard.Cell(
            path=Path(f"{name}-{seed}"),
            name=name,
            model=model,
            seed=seed,
            data={},
            run=Run(model=model, model_config=config or {}, batch_size=2, lr=1, max_epochs=1, patience=1).to_json(),
            figures={
                "test": {**part, "auc": auc},
                "valid": {"auc": valid},
                "parameters": 1000,
                "epochs": 3,
                "samples_per_s": 10.0,
            },
            failure=None,
        )
        for seed, auc in enumerate(aucs, start=2026)
    ]


@pytest.fixture
def without_test_rows(monkeypatch):
    monkeypatch.setattr(leaderboard, "_against", lambda *_: lambda standing: standing)


def test_the_reference_is_the_best_baseline_on_validation_never_a_papers_model(data, without_test_rows):
    every = [
        *cells("stec", "stec", [0.9], valid=0.9),
        *cells("dcn", "dcn", [0.8], valid=0.6),
        *cells("fm-wide", "fm", [0.6], valid=0.7),
    ]

    judged, reference = leaderboard.judge(every, Prepared.open(data))

    assert reference == "fm-wide"
    assert [s.name for s in judged] == ["stec", "dcn", "fm-wide"]
    assert leaderboard.judge(every[:1], Prepared.open(data))[1] is None
    with pytest.raises(UserError, match="--against bst: no finished cell has this name; there are stec, dcn"):
        leaderboard.judge(every, Prepared.open(data), "bst")


def test_bold_is_the_best_and_what_lies_within_one_deviation_of_it(data, without_test_rows):
    every = [
        *cells("dcn", "dcn", [0.80, 0.82]),
        *cells("fm", "fm", [0.79, 0.81]),
        *cells("lr", "lr", [0.78, 0.781]),
    ]
    judged, _ = leaderboard.judge(every, Prepared.open(data))
    alone, _ = leaderboard.judge([*cells("dcn", "dcn", [0.9]), *every[2:]], Prepared.open(data))

    several, single = (
        tables.markdown(found, Prepared.open(data), reference=None, chosen=True, commands="")
        for found in (judged, alone)
    )

    assert "| dcn | 2 | **0.8100** ± 0.0141 |" in several
    assert "| fm | 2 | **0.8000** ± 0.0141 |" in several
    assert "| lr | 2 | 0.7805 ± 0.0007 |" in several
    assert "| dcn | 1 | 0.9000 |" in single


def test_a_model_far_below_the_others_is_an_arrow_that_leaves_them_room(data, without_test_rows, tmp_path, monkeypatch):
    names = {"dcn": 0.981, "fm": 0.982, "stec": 0.983, "bst": 0.984, "lr": 0.7}
    every = [cell for name, auc in names.items() for cell in cells(name, name, [auc, auc + 0.0002])]
    judged, _ = leaderboard.judge(every, Prepared.open(data))
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, _: drawn.append(figure.axes[0]))

    tables.plot(judged, "tiny", tmp_path / "p.png")
    tables.plot(judged[-1:], "tiny", tmp_path / "p.png")

    many, alone = drawn
    assert [text.get_text() for text in many.texts] == ["← 0.7001"]
    assert many.get_xlim()[0] > 0.98
    assert [label.get_text() for label in many.get_yticklabels()] == ["lr", "dcn", "fm", "stec", "bst"]
    assert not alone.texts


def test_published_figures_stand_beside_the_same_model_in_the_same_form_on_the_same_rows(
    data, without_test_rows, monkeypatch
):
    about = Prepared.open(data)
    frappe = replace(about, name="frappe")
    on_these_rows = tuple(replace(f, test_rows=400) if f.test_rows == 28_860 else f for f in published.read())
    monkeypatch.setattr(published, "read", lambda: on_these_rows)
    as_published = recipes.RECIPES["stec_paper"]().model_config
    every = [
        *cells("mine", "dcnv2", [0.98]),
        *cells("deepmr", "deepmr", [0.97]),
        *cells("dcnv2", "lr", [0.96]),
        *cells("stec_lo", "stec", [0.95], config=as_published),
        *cells("stec", "stec", [0.94]),
    ]
    judged, _ = leaderboard.judge(every, frappe)

    text = tables.markdown(judged, frappe, reference=None, chosen=True, commands="")

    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    column = lines[0].index("published AUC / log loss")
    shown = {line[1]: line[column] for line in lines[2:]}
    assert shown == {
        "mine": "0.9844 / 0.1577 [1], 0.9845 / 0.1491 [2], 0.9845 / 0.1491 [3]",
        "deepmr": "",
        "dcnv2": "0.9356 / 0.3076 [2]",  # what it is called is not what it is
        "stec_lo": "0.9850 / 0.1477 [3]",
        "stec": "",
    }
    _, _, notes = text.partition("## Published figures\n\n")
    assert notes.splitlines() == [
        "1. FuxiCTR run on the rebuilt Frappe files, tuned as in BARS: x1, the split of AFN.",
        "2. BARS leaderboard, commit 5b5e61f: x1, the split of AFN, whose training file is rebuilt here.",
        "3. STEC's paper: x1, the split of AFN, whose training file is rebuilt here.",
        "",
        (
            "Of other rows or forms, and not shown: DeepMR's paper: 8:1:1, two drawn negatives for each positive;"
            " STEC's paper: another form of stec, that of stec_paper. Here: 400 test rows."
        ),
    ]
    assert lines_of(tables.of_models(judged, frappe, None))["mine"]["published"].startswith("0.9844 / 0.1577 (FuxiCTR")


@pytest.mark.parametrize("dataset", sorted({figures.dataset for figures in published.read()}))
def test_a_table_of_other_rows_has_no_published_figure_and_says_so_in_one_line(data, without_test_rows, dataset):
    of_other_rows = replace(Prepared.open(data), name=dataset)
    models = {figures.model for figures in published.read() if figures.dataset == dataset} & set(zoo.MODELS)
    judged, _ = leaderboard.judge([cell for model in models for cell in cells(model, model, [0.9])], of_other_rows)

    text = tables.markdown(judged, of_other_rows, reference=None, chosen=True, commands="")

    table, _, notes = text.partition("## Published figures\n\n")
    assert "published" not in table
    assert notes.startswith("None is of these rows and models: ")
    assert notes.endswith(". Here: 400 test rows.\n")
    assert notes.count("\n") == 1
    assert {row["published"] for row in lines_of(tables.of_models(judged, of_other_rows, None)).values()} == {""}


def lines_of(text):
    return {row["name"]: row for row in csv.DictReader(text.splitlines())}
