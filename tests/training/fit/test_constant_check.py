import json

import numpy as np
import pytest

from models import zoo
from training.__main__ import main
from training.config import Run
from training.data.batches import Prepared
from training.errors import ConstantModelError
from training.evaluation import metrics
from training.fit import constant_check

pytestmark = pytest.mark.usefixtures("undrawn_runs")
ABSURD = ["max_epochs=6", "patience=2", "batch_size=50", "lr=0.001"]


def train(data, run, *words):
    return main(["train", "deepfm", "--data", str(data), "--out", str(run), "--threads", "1", *words])


def test_a_model_that_an_absurd_penalty_made_constant_ends_with_code_3_and_the_remedy(data, tmp_path, capsys):
    words = ["--set", *ABSURD, "model.l2_emb=1e6", "model.hidden=[8]"]

    code = train(data, tmp_path / "run", *words)

    out, err = capsys.readouterr()
    assert code == 3
    assert "next:" not in out
    *_, said = err.splitlines()
    assert said.startswith("error: the model ")
    assert "constant: over the 400 validation rows" in said
    assert "--set model.l2_emb=1000)" in said
    assert "lr=0.01" in said
    assert "seed=N" in said
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) >= 3
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "artifacts")]) == 2
    assert train(data, tmp_path / "run", "--resume") == 3


def test_the_same_model_without_the_penalty_is_finished(data, tmp_path, capsys):
    assert train(data, tmp_path / "run", "--set", *ABSURD, "lr=0.01", "model.hidden=[8]") == 0

    assert "next: python -m training export" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["valid"]["auc"] > 0.6


def test_a_comparison_counts_a_constant_model_as_failed(data, tmp_path, capsys):
    words = ["compare", "--data", str(data), "--models", "deepfm", "--seeds", "1", "--out", str(tmp_path / "c")]

    assert main([*words, "--threads", "1", "--set", *ABSURD, "model.l2_emb=1e6", "model.hidden=[8]"]) == 2

    assert (
        "constant: over the 400 validation rows"
        in json.loads((tmp_path / "c" / "runs" / "deepfm-2026" / "failed.json").read_text())["reason"]
    )
    capsys.readouterr()


@pytest.mark.parametrize(
    ("scale", "follows_clicks", "out_of_patience", "constant"),
    [
        (0.0, False, False, True),
        (1e-5, False, False, True),
        (1e-5, True, False, False),  # a tiny spread that ranks rightly: calibration makes probabilities of it
        (1.0, False, False, False),  # has not been trained to its end
        (1.0, False, True, True),
        (1.0, True, True, False),
    ],
)
def test_what_counts_as_constant(data, scale, follows_clicks, out_of_patience, constant):
    rows = Prepared.open(data).rows("valid")
    model = zoo.build("lr", {}, Prepared.open(data).schema)
    run = Run(model="lr", batch_size=10, lr=0.1, max_epochs=1, patience=1)
    order = np.zeros(len(rows), np.float32)
    for value in (0, 1):  # both classes spread alike: AUC 0.5
        order[rows.label == value] = np.linspace(-1, 1, int((rows.label == value).sum()))
    logits = (scale * (order + 2 * follows_clicks * rows.label)).astype(np.float32)

    auc = metrics.auc(rows.label, logits)
    try:
        constant_check.check(model, rows, logits, run, aucs=[auc], out_of_patience=out_of_patience)
        found = False
    except ConstantModelError:
        found = True

    assert found == constant


def test_tables_whose_gradients_are_below_the_eps_of_adam_are_said_to_stand_still(data):
    rows = Prepared.open(data).rows("valid")
    model = zoo.build("dcnv2", {"emb_dim": 4}, Prepared.open(data).schema)
    for weights in model.parameters():
        weights.data.zero_()
    run = Run(model="dcnv2", batch_size=10, lr=0.1, max_epochs=1, patience=1)

    with pytest.raises(ConstantModelError, match="of its embedding tables is 0.0e[+]00, below the eps of Adam"):
        constant_check.check(model, rows, np.zeros(len(rows), np.float32), run, aucs=[0.5], out_of_patience=False)
