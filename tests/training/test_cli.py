import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from safetensors.torch import load_file

from models.artifact import folder as artifact
from tests.training.tiny import write_prepared
from training.__main__ import MODELS, main
from training.evaluation.metrics import auc

QUICK = ["--threads", "1", "--set", "max_epochs=2", "batch_size=100", "model.emb_dim=8"]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "stec"
    assert main(["train", "stec", "--data", str(data), "--out", str(folder), *QUICK]) == 0
    return folder


def refused(capsys, *words):
    """The one sentence on stderr with which a command is refused."""
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    *progress, said = err.splitlines()
    assert out == ""
    assert said.startswith("error: ")
    assert not any("Traceback" in line for line in progress)
    return said


def test_help_names_every_command_without_loading_torch():
    code = (
        "import sys, training.__main__ as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'matplotlib', 'polars', 'numpy'} & set(sys.modules)"
    )

    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert all(command in shown for command in ("simulate", "prepare", "train", "evaluate", "export"))


def test_the_door_offers_the_models_there_are():
    from models import zoo

    assert set(MODELS) == set(zoo.MODELS)


def test_a_trained_run_holds_all_that_the_contract_promises(run, data):
    names = {"config.json", "schema.json", "weights.safetensors", "calibration.json", "metrics.json", "log.jsonl"}
    assert {p.name for p in run.iterdir()} == names | {"curves.png", "reliability.png"}

    figures = json.loads((run / "metrics.json").read_text())
    assert figures["parameters"] >= sum(
        w.numel()
        for n, w in load_file(run / "weights.safetensors").items()
        if "running" not in n and "num_batches" not in n
    )
    assert (figures["model"], figures["dataset"], figures["data_hash"]) == ("stec", "tiny", "seed 0")
    assert figures["epochs"] == len((run / "log.jsonl").read_text().splitlines()) == 2
    for part in ("valid", "test"):
        assert {"auc", "gauc", "logloss", "ne", "calibration_error", "bayes_auc"} <= figures[part].keys()
    assert (run / "schema.json").read_bytes() == (data / "schema.json").read_bytes()
    settings = json.loads((run / "config.json").read_text())["run"]
    assert (settings["max_epochs"], settings["model_config"]["emb_dim"]) == (2, 8)


def test_runs_are_drawn_in_one_picture_finished_or_not(run, tmp_path, capsys):
    other = tmp_path / "other" / run.name
    other.mkdir(parents=True)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (other / "log.jsonl").write_text("".join(json.dumps({**line, "valid_auc": 0.5}) + "\n" for line in log))

    assert main(["plot", str(run), str(other), "--out", str(tmp_path / "both.svg")]) == 0

    picture = (tmp_path / "both.svg").read_text()
    assert f"other/{run.name}: 0.5000 at step" in picture
    assert f"{run.parent.name}/{run.name}: {max(line['valid_auc'] for line in log):.4f} at step" in picture
    assert "against steps" in capsys.readouterr().out
    assert "is named twice" in refused(capsys, "plot", run, run, "--out", tmp_path / "x.png")
    assert "holds no run" in refused(capsys, "plot", tmp_path, "--out", tmp_path / "x.png")
    assert "x.poem: Format 'poem' is not supported" in refused(capsys, "plot", run, "--out", tmp_path / "x.poem")
    (other / "log.jsonl").write_text('{"epoch": 1}\n')
    assert "log.jsonl: damaged, or of a run before" in refused(capsys, "plot", other, "--out", tmp_path / "x.png")


def test_evaluating_gives_the_metrics_of_training_again(run, capsys):
    figures = json.loads((run / "metrics.json").read_text())

    assert main(["evaluate", str(run)]) == 0

    shown = {line[:20].strip(): line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]}
    assert shown["AUC"] == f"{figures['test']['auc']:.4f}"
    assert shown["logloss"] == f"{figures['test']['logloss']:.4f}"


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
@pytest.mark.parametrize("part", ["test", "valid"])
def test_predictions_are_one_calibrated_probability_per_row_in_order(run, data, tmp_path, suffix, part):
    file = tmp_path / f"p.{suffix}"

    assert main(["evaluate", str(run), "--part", part, "--predictions", str(file)]) == 0

    frame = pl.read_csv(file) if suffix == "csv" else pl.read_parquet(file)
    assert frame.columns == ["row", "label", "logit", "ctr"]
    assert frame["row"].to_list() == list(range(400))
    assert frame["label"].to_list() == np.load(data / part / "label.npy").tolist()
    calibration = json.loads((run / "calibration.json").read_text())
    z = calibration["slope"] * frame["logit"].to_numpy() + calibration["intercept"]
    assert frame["ctr"].to_numpy() == pytest.approx(1 / (1 + np.exp(-z)), rel=1e-5)
    figures = json.loads((run / "metrics.json").read_text())
    assert auc(frame["label"].to_numpy(), frame["ctr"].to_numpy()) == pytest.approx(figures[part]["auc"], abs=1e-9)


def test_a_folder_that_holds_a_run_is_not_trained_into_again(run, data, capsys):
    before = (run / "weights.safetensors").read_bytes()

    said = refused(capsys, "train", "stec", "--data", data, "--out", run)

    assert "already holds a run; add --resume" in said
    assert (run / "weights.safetensors").read_bytes() == before


def test_a_finished_run_resumed_is_left_as_it_is(run, data, capsys):
    before = (run / "metrics.json").read_bytes()

    assert main(["train", "stec", "--data", str(data), "--out", str(run), "--resume"]) == 0

    assert "is finished" in capsys.readouterr().err
    assert (run / "metrics.json").read_bytes() == before


def test_resuming_with_other_settings_or_data_is_refused(run, data, tmp_path, capsys):
    other = write_prepared(tmp_path / "other", seed=1)

    changed = refused(capsys, "train", "stec", "--data", data, "--out", run, "--resume", *QUICK, "seed=9")
    another = refused(capsys, "train", "lr", "--data", data, "--out", run, "--resume")
    moved = refused(capsys, "train", "stec", "--data", other, "--out", run, "--resume")

    assert "other settings: seed was 2026, now 9" in changed
    assert "model was stec, now lr" in another
    assert f"other data: it was begun on {data}" in moved


def test_a_run_is_not_evaluated_on_data_of_another_schema(run, tmp_path, capsys):
    other = write_prepared(tmp_path / "other", seed=1)

    assert "encoded by another schema" in refused(capsys, "evaluate", run, "--data", other)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "bert", "--data", "d", "--out", "r"], "invalid choice: 'bert' (choose from"),
        (["train", "stec", "--out", "r"], "required: --data"),
        (["train", "stec", "--data", "nowhere", "--out", "r"], "nowhere is no prepared data set"),
        (["train", "stec", "--data", "d", "--out", "r", "--threads", "0"], "from 1 to 1,000, got '0'"),
        (["train", "stec", "--data", "d", "--out", "r", "--threads", "1000000"], "from 1 to 1,000, got '1000000'"),
        (["evaluate", "nowhere"], "nowhere holds no run"),
        (["export", "nowhere", "--out", "a"], "nowhere holds no run"),
        (["prepare", "frappe", "--source", "nowhere", "--out", "d"], "nowhere: no such file"),
    ],
)
def test_a_wrong_command_line_ends_with_one_sentence_and_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert message in refused(capsys, *words)


def test_a_folder_with_something_else_in_it_is_left_alone(data, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")

    assert "found something else there" in refused(capsys, "train", "lr", "--data", data, "--out", tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("weights.safetensors", lambda old: old[:40], "damaged run, train it again"),
        (
            "weights.safetensors",
            lambda old: old[:-1] + bytes([old[-1] ^ 64]),
            "other weights than metrics.json tells",
        ),
        ("config.json", lambda _: b"{}", "config.json: damaged"),
        ("config.json", lambda _: b"[]", "config.json: damaged"),
        ("metrics.json", lambda _: b"[]", "metrics.json: damaged"),
        ("calibration.json", lambda _: b"[]", "damaged run, train it again"),
    ],
)
def test_a_damaged_run_is_one_clear_error(run, tmp_path, capsys, file, content, message):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / file).write_bytes(content((run / file).read_bytes()))

    assert message in refused(capsys, "evaluate", copy)


def test_a_folder_that_cannot_be_made_is_one_clear_error(data, tmp_path, capsys):
    (tmp_path / "file").touch()

    assert "Not a directory" in refused(capsys, "train", "lr", "--data", data, "--out", tmp_path / "file" / "run")


def test_more_than_the_memory_holds_is_one_clear_error(tmp_path, capsys, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr("training.simulator.simulate.simulate", no_memory)

    words = ["simulate", "--out", "x", "--users", "5", "--items", "40", "--rows", "80", "--seed", "1"]
    assert "not enough memory" in refused(capsys, *words)


def test_a_model_that_does_not_fit_into_memory_is_one_clear_error(data, tmp_path, capsys):
    words = ["train", "fm", "--data", data, "--out", tmp_path / "run", "--set", "model.emb_dim=900000000"]

    assert "not enough memory for fm with these settings" in refused(capsys, *words)


def test_a_run_that_another_process_trains_is_left_to_it(run, data, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    shutil.copy(run / "config.json", tmp_path / "run")
    other = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)

    words = ["train", "stec", "--data", data, "--out", tmp_path / "run", "--resume"]
    assert "run is being trained by another process" in refused(capsys, *words)

    os.close(other)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
@pytest.mark.parametrize("name", ["p.csv", "p.parquet"])
def test_a_full_disk_is_one_clear_error(run, tmp_path, capsys, name):
    (tmp_path / name).symlink_to("/dev/full")

    assert "No space left on device" in refused(capsys, "evaluate", run, "--predictions", tmp_path / name)


def test_an_interrupted_run_says_how_to_go_on(data, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.fit.loop._step", interrupted)

    assert main(["train", "lr", "--data", str(data), "--out", str(tmp_path / "my run")]) == 130

    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        f"interrupted; go on with: python -m training train lr --data {data} --out '{tmp_path}/my run' --resume"
    )


def test_the_whole_path_from_a_simulated_log_to_a_verified_artifact(tmp_path, capsys):
    log, data, run, out = (tmp_path / name for name in ("log", "data", "run", "artifacts"))

    assert main(f"simulate --out {log} --users 50 --items 40 --rows 2000 --seed 1".split()) == 0
    assert main(f"prepare simulated --source {log} --out {data}".split()) == 0
    assert main(f"train lr --data {data} --out {run} --threads 1 --set max_epochs=2".split()) == 0
    assert main(f"export {run} --out {out}".split()) == 0

    shown = artifact.read(artifact.resolve(out, "lr"))
    assert shown.manifest.metrics == json.loads((run / "metrics.json").read_text())
    assert shown.calibration.model_dump() == json.loads((run / "calibration.json").read_text())
    assert len(shown.golden.logits) > 0


def test_an_export_without_a_runtime_to_prove_it_says_what_to_install(run, tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "training.export", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    assert "install the extra serve or gpu beside train" in refused(capsys, "export", run, "--out", tmp_path)
