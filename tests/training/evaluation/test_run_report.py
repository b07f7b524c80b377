import math
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from models.artifact.calibration import Calibration
from tests.training.tiny import write_prepared
from training.data.batches import Prepared
from training.evaluation import metrics, run_report


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return Prepared.open(write_prepared(tmp_path_factory.mktemp("data") / "tiny")).rows("test")


def test_raw_figures_stand_beside_the_calibrated_ones(rows):
    logits = np.linspace(-3, 1, len(rows)).astype(np.float32)
    halved = Calibration(intercept=math.log(0.5))

    figures = run_report.measure(rows, logits, halved)

    assert figures["rows"] == len(rows)
    assert figures["click_rate"] == pytest.approx(rows.label.mean())
    assert figures["calibration_ratio"] == pytest.approx(np.sum(1 / (1 + np.exp(-logits))) / rows.label.sum())
    assert figures["calibrated"]["calibration_ratio"] < figures["calibration_ratio"]
    assert run_report.measure(rows, logits, Calibration())["calibrated"]["logloss"] == figures["logloss"]


def test_a_figure_that_the_part_does_not_define_is_none(rows):
    no_clicks = type(rows)(**{**vars(rows), "label": np.zeros(len(rows), np.float32)})

    figures = run_report.measure(no_clicks, np.zeros(len(rows), np.float32), Calibration())

    assert (figures["auc"], figures["gauc"], figures["ne"], figures["calibration_ratio"]) == (None,) * 4
    assert figures["gauc_users_left_out"] == len(np.unique(rows.group))
    assert "AUC" not in run_report.table({"test": figures})


def test_rows_without_a_user_are_no_user_and_requests_are_judged_too(rows):
    logits = np.linspace(-3, 1, len(rows)).astype(np.float32)
    half = np.where(np.arange(len(rows)) % 2, rows.group, -1)
    paired = {**vars(rows), "request": np.arange(len(rows)) // 2}
    rows = type(rows)(**paired)
    some, none = (type(rows)(**{**paired, "group": group}) for group in (half, np.full(len(rows), -1)))

    whole, part, anonymous = (run_report.measure(each, logits, Calibration()) for each in (rows, some, none))

    mine = half >= 0
    assert part["gauc"] == metrics.gauc(rows.label[mine], logits[mine], half[mine]).value
    assert (anonymous["gauc"], anonymous["gauc_users"], anonymous["gauc_users_left_out"]) == (None, 0, 0)
    assert anonymous["gauc_by_request"] == whole["gauc_by_request"]
    assert whole["gauc_by_request"] == metrics.gauc(rows.label, logits, rows.request).value
    assert 0 < whole["gauc_requests"] < len(rows) / 2


def test_the_table_leaves_out_what_no_part_has_and_marks_what_one_lacks():
    parts: dict[str, dict[str, Any]] = {
        "valid": {"rows": 10, "auc": 0.75, "calibrated": {"logloss": 0.5}},
        "test": {"rows": 2000, "auc": None, "calibrated": {"logloss": 0.25}},
    }

    table = run_report.table(parts).splitlines()

    assert table[0].split() == ["valid", "test"]
    assert table[1].split() == ["rows", "10", "2,000"]
    assert table[2].split() == ["AUC", "0.7500", "-"]
    assert table[3].split() == ["calibrated", "0.5000", "0.2500"]
    assert len(table) == 4


def test_plots_are_pictures_with_something_on_them(rows, tmp_path):
    log = [{"step": n, "loss": 0.6 / n, "valid_auc": 0.7, "valid_logloss": 0.5, "best": n < 3} for n in (1, 2, 3)]
    logits = np.random.default_rng(0).normal(size=len(rows)).astype(np.float32)

    run_report.plot_curves({"one": log, "other": log[:2]}, tmp_path / "curves.png")
    run_report.plot_reliability(rows, logits, Calibration(slope=2.0), "test", tmp_path / "reliability.png")

    for name in ("curves.png", "reliability.png"):
        picture = imread(tmp_path / name)
        assert picture.shape[0] > 300
        assert picture.std() > 0.05
