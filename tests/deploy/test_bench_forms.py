"""The cross table of the two forms, made of two small models; and of what cannot be measured."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pytest
import torch

from tests.training.tiny import write_prepared
from training.data.batches import Prepared

BENCH = Path(__file__).parents[2] / "deploy" / "bench"


@pytest.fixture(scope="module")
def forms() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield importlib.import_module("model_latency")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("data") / "tiny", num_rows=400)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The command takes one thread for good; other tests keep theirs."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_table_holds_both_forms_of_every_model_in_both_runtimes(forms, data, tmp_path, capsys, one_thread):
    few = ["--sizes", "2,5", "--repeats", "3", "--train-s", "0.01"]
    code = forms.main(["--data", str(data), "--models", "lr,fm:fm_frappe", *few, "--out", str(tmp_path)])

    printed = capsys.readouterr().out
    table = pl.read_csv(tmp_path / "forms.csv")
    assert code == 0
    assert printed == (tmp_path / "forms.md").read_text()
    titles = [
        "model", "parameters", "training samples/s",
        "ONNX, N = 2", "TorchScript, N = 2", "ONNX, N = 5", "TorchScript, N = 5",
    ]  # fmt: skip
    head, _, lr, fm, *_ = printed.splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == titles
    assert lr.startswith("| lr_movielens |")
    assert fm.startswith("| fm_frappe |")
    assert table.columns == [
        "model", "recipe", "parameters", "samples_per_s",
        "runtime", "candidates", "row_ms", "request_ms", "ratio", "error",
    ]  # fmt: skip
    assert table.height == 2 * 2 * 2
    assert (table.select("row_ms", "request_ms", "samples_per_s", "parameters").to_numpy() > 0).all()
    np.testing.assert_allclose(table["ratio"], table["row_ms"] / table["request_ms"])
    assert (tmp_path / "forms.png").stat().st_size > 0


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_what_cannot_be_measured_is_listed_with_the_reason(
    forms, data, tmp_path, capsys, one_thread, monkeypatch, kind
):
    def refuses(*_args):
        raise kind("no graph\n  today")

    monkeypatch.setattr(forms, "to_onnx", refuses)

    code = forms.main(["--data", str(data), "--models", "lr", "--out", str(tmp_path)])

    assert code == 1
    assert "Not measured: lr_movielens: no graph today\n" in capsys.readouterr().out
    assert pl.read_csv(tmp_path / "forms.csv")["error"].to_list() == ["no graph today"]


@pytest.mark.parametrize(
    ("models", "said"), [("dimn", "--models dimn: no such model"), ("lr:stec_simulated", "--recipe stec_simulated: no")]
)
def test_an_unknown_model_or_recipe_is_refused_before_anything_is_measured(forms, data, capsys, models, said):
    assert forms.main(["--data", str(data), "--models", models]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sizes", "10,x"], "argument --sizes: expected a whole number from 1 to 10^6, got 'x'"),
        (["--sizes", "0"], "argument --sizes: expected a whole number"),
        (["--repeats", "0"], "argument --repeats: expected a whole number"),
        (["--train-s", "nan"], "argument --train-s: expected seconds above 0, got 'nan'"),
        (["--out", __file__], f"--out {__file__}: File exists"),
    ],
)
def test_a_wrong_option_is_one_sentence_before_anything_is_measured(forms, data, capsys, one_thread, words, said):
    assert forms.main(["--data", str(data), *words]) == 2

    told = capsys.readouterr()
    assert said in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""


def test_both_forms_hold_the_same_rows(forms, data):
    rows = Prepared.open(data).rows("test")
    request = forms.request_form(rows, 7)

    row = forms.row_form(request)

    assert request.keys() == row.keys() == {i.name for i in Prepared.open(data).schema.inputs}
    for name, array in row.items():
        own = name.startswith("item.")
        assert len(array) == 7
        assert len(request[name]) == (7 if own or name == "user_index" else 1)
        if name != "user_index":
            np.testing.assert_array_equal(array, request[name] if own else request[name][np.zeros(7, dtype=int)])
    assert request["user_index"].tolist() == [0] * 7
    assert row["user_index"].tolist() == list(range(7))
    assert request["hist_mask"].sum() == (rows.end - rows.start).clip(max=5).max()
