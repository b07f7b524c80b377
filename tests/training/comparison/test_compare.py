"""A comparison trains every cell once, and says what came of each."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from statistics import mean, stdev

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file

from tests.training.tiny import KILLED, write_prepared
from training.__main__ import main
from training.data.batches import Prepared
from training.evaluation import metrics, significance

pytestmark = pytest.mark.usefixtures("undrawn_runs")
QUICK = ["--threads", "1", "--set", "batch_size=100", "max_epochs=2"]


def command(data, out, *words):
    return [str(word) for word in ("compare", "--data", data, "--out", out, *words)]


@pytest.fixture(scope="module")
def compared(data, tmp_path_factory):
    """Two baselines and a paper's model without one of its parts, two seeds each."""
    out = tmp_path_factory.mktemp("compare") / "first"
    wanted = ["--models", "lr,fm", "--variant", "mian-no-ibim=mian", "model.ibim=false", "model.emb_dim=8"]
    assert main(command(data, out, *wanted, "--seeds", 2, *QUICK)) == 0
    return out


def lines(file):
    with file.open() as opened:
        return list(csv.DictReader(opened))


def times(out):
    return {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}


def refused(capsys, *words):
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: ")
    assert not any("Traceback" in line for line in said)
    return said[-1]


def test_every_cell_is_the_run_that_train_makes(compared, data, tmp_path):
    words = ["--data", str(data), "--out", str(tmp_path / "run"), *QUICK, "seed=2027"]
    assert main(["train", "fm", *words]) == 0

    cell = compared / "runs" / "fm-2027"
    own, other = (load_file(folder / "weights.safetensors") for folder in (cell, tmp_path / "run"))
    assert {p.name for p in cell.iterdir()} == {p.name for p in (tmp_path / "run").iterdir()} | {"test_logits.npy"}
    assert all(torch.equal(own[name], other[name]) for name in other)
    figures = json.loads((cell / "metrics.json").read_text())
    assert metrics.auc(np.load(data / "test/label.npy"), np.load(cell / "test_logits.npy")) == figures["test"]["auc"]
    config = json.loads((compared / "runs/mian-no-ibim-2026/config.json").read_text())["run"]
    assert (config["model"], config["model_config"]["ibim"], config["seed"]) == ("mian", False, 2026)


def test_the_csv_tells_mean_deviation_and_both_tests_of_every_model(compared, data):
    rows = {row["name"]: row for row in lines(compared / "compare.csv")}

    assert set(rows) == {"lr", "fm", "mian-no-ibim"}
    found = {}
    for name, row in rows.items():
        cells = [json.loads((compared / f"runs/{name}-{s}/metrics.json").read_text()) for s in (2026, 2027)]
        found[name] = cells
        for figure, of in (
            ("auc", [c["test"]["auc"] for c in cells]),
            ("gauc", [c["test"]["gauc"] for c in cells]),
            ("logloss", [c["test"]["logloss"] for c in cells]),
            ("calibrated_logloss", [c["test"]["calibrated"]["logloss"] for c in cells]),
        ):
            assert float(row[f"{figure}_mean"]) == pytest.approx(mean(of))
            assert float(row[f"{figure}_sd"]) == pytest.approx(stdev(of))
        assert float(row["samples_per_s_median"]) == pytest.approx(mean(c["samples_per_s"] for c in cells))
        assert int(float(row["parameters"])) == cells[0]["parameters"]
    best = max(("lr", "fm"), key=lambda name: mean(c["valid"]["auc"] for c in found[name]))
    assert rows[best]["reference"] == "" and rows["mian-no-ibim"]["reference"] == best
    aucs = [[c["test"]["auc"] for c in found[name]] for name in ("mian-no-ibim", best)]
    over_seeds = significance.over_seeds(*aucs)
    assert float(rows["mian-no-ibim"]["over_seeds_p"]) == pytest.approx(over_seeds.p)
    assert float(rows["mian-no-ibim"]["auc_difference"]) == pytest.approx(mean(aucs[0]) - mean(aucs[1]))
    test = Prepared.open(data).rows("test")
    own, of_best = (
        significance.placements(test.label, [np.load(compared / f"runs/{n}-{s}/test_logits.npy") for s in (2026, 2027)])
        for n in ("mian-no-ibim", best)
    )
    over_rows = significance.over_rows(test.label, own, of_best, test.group)
    assert float(rows["mian-no-ibim"]["over_rows_p"]) == pytest.approx(over_rows.p)
    cells = lines(compared / "runs.csv")
    assert sorted(row["run"] for row in cells) == sorted(f"{n}-{s}" for n in rows for s in (2026, 2027))


def test_the_markdown_names_data_seeds_reference_and_the_command_that_made_it(compared, data):
    text = (compared / "compare.md").read_text()

    assert text.startswith("# tiny: 3 models compared\n\nRows: 1,200 train, 400 valid, 400 test (60/20/20 %)")
    assert "Seeds: 2026, 2027." in text
    assert "baseline of the best mean validation AUC" in text
    assert "drawn user by user" in text
    assert f"python -m training compare --data {data} --out {compared} --models lr,fm" in text
    header, rule, *body = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("|")]
    assert all(line.count("|") == header.count("|") for line in (rule, *body))
    assert "published" not in header  # nobody published on this data set
    aucs = [float(line.split("|")[3].replace("*", "").split("±")[0]) for line in body]
    assert aucs == sorted(aucs, reverse=True)


def test_the_plot_is_a_picture_that_grows_with_the_models(compared):
    picture = imread(compared / "compare.png")

    assert picture.shape[1] == 960
    assert 200 < picture.shape[0] < 400
    assert picture.std() > 0.05


def test_finished_cells_are_left_alone_and_more_seeds_and_models_train_only_the_new_ones(compared, data, capsys):
    before = times(compared / "runs")

    assert main(command(data, compared, "--models", "lr", "--seeds", 3, *QUICK)) == 0
    assert main(command(data, compared, "--models", "widedeep", "--seeds", 1, *QUICK, "model.emb_dim=8")) == 0

    after = times(compared / "runs")
    assert {file: after[file] for file in before} == before
    new = {file.parent.name for file in after.keys() - before.keys()}
    assert new == {"lr-2028", "widedeep-2026"}
    assert "[1 of 3] lr-2026 is finished" in capsys.readouterr().err
    rows = {row["name"]: row for row in lines(compared / "compare.csv")}
    assert rows["lr"]["seeds"] == "2026 2027 2028" and rows["widedeep"]["seeds"] == "2026"
    assert rows["mian-no-ibim"]["seeds"] == "2026 2027"
    assert rows["widedeep"]["auc_sd"] == "" and rows["widedeep"]["over_seeds_p"] == ""
    assert (compared / "compare.md").read_text().count("python -m training compare") == 3


def test_the_report_alone_trains_nothing_and_names_what_is_not_finished(compared, data, capsys):
    begun = compared / "runs" / "dcn-2026"
    begun.mkdir()
    config = json.loads((compared / "runs/lr-2026/config.json").read_text())
    (begun / "config.json").write_text(json.dumps(config | {"run": {**config["run"], "model": "dcn"}}))
    before = times(compared / "runs")
    (compared / "compare.md").unlink()

    assert main(command(data, compared, "--report-only", "--against", "lr")) == 0

    assert times(compared / "runs") == before
    shown = capsys.readouterr().out
    assert shown.strip() == (compared / "compare.md").read_text().strip()
    assert "- dcn-2026 is not finished" in shown
    assert "lr is asked for with --against" in shown
    assert "[" not in (compared / "commands.txt").read_text()


def test_a_comparison_killed_in_an_epoch_of_its_second_cell_goes_on_from_the_checkpoint(
    compared, data, tmp_path, capsys
):
    words = command(data, tmp_path / "torn", "--models", "lr,fm", "--seeds", 1, *QUICK, "checkpoint_s=0")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "51", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    finished = (tmp_path / "torn/runs/lr-2026/test_logits.npy").stat().st_mtime_ns
    assert (tmp_path / "torn/runs/fm-2026/checkpoint.pt").exists()

    assert main(words) == 0

    assert "resuming in epoch" in capsys.readouterr().err
    assert (tmp_path / "torn/runs/lr-2026/test_logits.npy").stat().st_mtime_ns == finished
    for name in ("lr-2026", "fm-2026"):
        torn, whole = (load_file(out / "runs" / name / "weights.safetensors") for out in (tmp_path / "torn", compared))
        assert all(torch.equal(torn[key], whole[key]) for key in whole)


def test_an_interrupted_comparison_says_how_to_go_on(data, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.fit.loop._step", interrupted)
    words = command(data, tmp_path / "c", "--models", "lr", "--seeds", 1)

    assert main(words) == 130

    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"interrupted; go on with: python -m training {' '.join(words)}"


def test_a_cell_that_fails_is_told_with_its_reason_and_the_others_go_on(data, tmp_path, capsys):
    out = tmp_path / "c"
    diverging = ["--variant", "wild=fm", "lr=1e30", "clip_norm=1e30", "model.emb_dim=8"]
    words = command(data, out, *diverging, "--models", "lr", "--seeds", 1, *QUICK)

    said = refused(capsys, *words)

    assert said.startswith("error: 1 of the runs failed, the others are done: wild-2026: the loss is")
    text = (out / "compare.md").read_text()
    assert "- wild-2026 failed: the loss is" in text
    assert "| wild | 1 failed |" in text
    rows = {row["name"]: row for row in lines(out / "compare.csv")}
    assert rows["wild"]["failed"].startswith("2026: the loss is") and rows["wild"]["auc_mean"] == ""
    assert float(rows["lr"]["auc_mean"]) > 0.5
    finished = times(out / "runs/lr-2026")
    assert main(command(data, out, "--report-only")) == 0
    assert "the loss is" in refused(capsys, *words)  # tried again, and only it
    assert times(out / "runs/lr-2026") == finished


def test_a_comparison_of_which_all_failed_is_told_too(data, tmp_path, capsys):
    refused(capsys, *command(data, tmp_path / "c", "--variant", "wild=fm", "lr=1e30", "clip_norm=1e30", "--seeds", 1))

    assert "| wild | 1 failed |" in (tmp_path / "c/compare.md").read_text()
    assert not (tmp_path / "c/compare.png").exists()


def test_cells_begun_with_other_settings_or_on_other_data_are_refused_before_anything_is_trained(
    compared, data, tmp_path, capsys
):
    other = write_prepared(tmp_path / "other", seed=1)
    before = times(compared / "runs")

    changed = refused(capsys, *command(data, compared, "--models", "bst,lr", "--seeds", 1, *QUICK, "lr=0.5"))
    moved = refused(capsys, *command(other, compared, "--models", "bst,lr", "--seeds", 1, *QUICK))

    assert "lr-2026 was begun with other settings: lr was 0.001, now 0.5" in changed
    assert f"other data: on {data} as it was then, not on {other}" in moved
    assert times(compared / "runs") == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "bert", "--seeds", "1"], "--models: unknown model 'bert'"),
        (["--models", "lr,fm,lr", "--seeds", "1"], "lr is named twice"),
        (["--models", "lr", "--variant", "lr=lr", "lr=0.5", "--seeds", "1"], "lr is named twice"),
        (["--models", "lr", "--seeds", "0"], "argument --seeds: expected a whole number from 1 to 1,000, got '0'"),
        (["--models", "lr"], "compare wants --seeds and --models or --variant, or else --report-only"),
        (["--seeds", "2"], "compare wants --seeds and --models or --variant, or else --report-only"),
        (["--models", "deepmr:stec_frappe", "--seeds", "1"], "--models: stec_frappe: no such recipe for deepmr"),
        (["--variant", "../up=lr", "--seeds", "1"], "expected NAME=MODEL[:RECIPE]"),
        (["--variant", "lr", "--seeds", "1"], "expected NAME=MODEL[:RECIPE] [key=value ...]"),
        (["--variant", "x=mian", "ibim=false", "--seeds", "1"], "x: ibim: no such setting; did you mean model.ibim?"),
        (["--models", "lr", "--variant", "x=bst", "model.heads=7", "--seeds", "1"], "x: "),
        (["--models", "lr", "--seeds", "1", "--set", "seed=7"], "seed cannot be set for a model"),
        (["--models", "lr", "--seeds", "1", "--against", "din"], "--against din: no model has this name; there are lr"),
        (["--report-only"], "holds no comparison"),
    ],
)
def test_a_wrong_command_ends_with_one_sentence_and_makes_nothing(words, message, data, tmp_path, capsys):
    assert message in refused(capsys, *command(data, tmp_path / "c", *words))
    assert not (tmp_path / "c").exists()


def test_data_that_is_missing_and_a_folder_of_something_else_are_one_clear_sentence(data, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")

    missing = refused(capsys, *command("nowhere", tmp_path / "c", "--models", "lr", "--seeds", 1))
    taken = refused(capsys, *command(data, tmp_path, "--models", "lr", "--seeds", 1))

    assert "nowhere is no prepared data set" in missing
    assert "found something else there" in taken


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", '{"run": {"model": "lr", "seed": 2026}, "data": {}}'),
        ("config.json", None),  # a setting that there is no more
        ("metrics.json", '{"test": {"auc": 0.5}}'),
        ("failed.json", "{"),
    ],
)
@pytest.mark.parametrize("words", [["--report-only"], ["--models", "lr", "--seeds", 1, *QUICK]])
def test_a_damaged_cell_is_one_clear_sentence(compared, data, tmp_path, capsys, file, content, words):
    out = tmp_path / "c"
    shutil.copytree(compared, out)
    cell = out / "runs" / "lr-2026"
    if content is None:
        config = json.loads((cell / file).read_text())
        content = json.dumps({**config, "run": {**config["run"], "weight_decay": 0.1}})
    (cell / file).write_text(content)

    assert f"{cell}: damaged run, remove it and compare again" in refused(capsys, *command(data, out, *words))


def test_a_copy_of_a_cell_under_another_name_is_not_counted_twice(compared, data, tmp_path, capsys):
    out = tmp_path / "c"
    shutil.copytree(compared, out)
    shutil.copytree(out / "runs" / "lr-2026", out / "runs" / "lr-copy")

    assert "lr-copy: damaged run" in refused(capsys, *command(data, out, "--report-only"))


def test_what_stands_in_the_way_of_a_later_cell_is_told_before_anything_is_trained(data, tmp_path, capsys):
    (tmp_path / "c" / "runs" / "fm-2026").mkdir(parents=True)
    (tmp_path / "c" / "runs" / "fm-2026" / "thesis.txt").touch()

    told = refused(capsys, *command(data, tmp_path / "c", "--models", "lr,fm", "--seeds", 1, *QUICK))

    assert "fm-2026: expected a new or an empty folder for the run" in told
    assert not (tmp_path / "c" / "runs" / "lr-2026").exists()


def test_command_lines_that_are_no_text_any_more_do_not_hinder_the_report(compared, data, tmp_path):
    shutil.copytree(compared, tmp_path / "c")
    (tmp_path / "c" / "commands.txt").write_bytes(b"\xff\xfe")

    assert main(command(data, tmp_path / "c", "--report-only")) == 0
