"""How finished cells are judged: the reference, what is best, what stands beside it."""

import csv
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from training.comparison import leaderboard, tables
from training.data.batches import Prepared
from training.errors import UserError


def cells(name, model, aucs, *, valid=0.5):
    """Finished cells without files, for what needs no test logits."""
    part = {"gauc": None, "logloss": 0.5, "calibrated": {"logloss": 0.5}}
    return [
        leaderboard.Cell(
            path=Path(f"{name}-{seed}"),
            name=name,
            model=model,
            seed=seed,
            data={},
            run={},
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


def test_published_figures_stand_beside_the_models_of_their_data_set(data, without_test_rows):
    about = Prepared.open(data)
    frappe = Prepared(path=about.path, name="frappe", data_hash=about.data_hash, schema=about.schema)
    judged, _ = leaderboard.judge([*cells("dcnv2", "dcnv2", [0.98]), *cells("mine", "dcnv2", [0.97])], frappe)

    text = tables.markdown(judged, frappe, reference=None, chosen=True, commands="")

    assert "0.9844 / 0.1577 [1], 0.9845 / 0.1491 [2]" in text
    assert "\n1. FuxiCTR run on the rebuilt Frappe files, tuned as in BARS; not comparable: its test part has" in text
    mine = next(line for line in text.splitlines() if line.startswith("| mine |"))
    assert "/" not in mine  # a variant is not the model that was published
    assert lines_of(tables.of_models(judged, frappe, None))["dcnv2"]["published"].startswith("0.9844 / 0.1577 (FuxiCTR")


def lines_of(text):
    return {row["name"]: row for row in csv.DictReader(text.splitlines())}
