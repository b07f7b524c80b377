"""Explanations of a trained run: as a graph of their own, as a file, and as pictures."""

import io
import json
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from models.artifact.manifest import EXPLAINING, MODEL, TORCHSCRIPT
from models.baselines import linear
from models.features.packing import PackedLayout
from models.layers import base
from models.papers import stec
from tests.models.small import encoded, lively, with_history
from tests.training.tiny import LENGTH
from training import export
from training.__main__ import main
from training.data.batches import Prepared
from training.explanation import explain, heatmaps
from training.export import ExportError
from training.fit import run_folder

SCHEMA = with_history()
QUICK = ["--threads", "1", "--set", "max_epochs=1", "batch_size=100", "model.emb_dim=4"]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mian"
    assert main(["train", "mian", "--data", str(data), "--out", str(folder), *QUICK, "model.heads=2"]) == 0
    return folder


@pytest.fixture(scope="module")
def graph():
    """A STEC whose every contribution is shown, and its explaining graph."""
    model = lively("stec", SCHEMA, emb_dim=4, blocks=1).float()
    return model, export.to_graphs(model, SCHEMA)[EXPLAINING]


def test_the_explaining_graph_shows_what_the_model_shows(graph):
    model, content = graph
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    arrays = export.example(SCHEMA, 1, 7)
    packed = PackedLayout(SCHEMA).pack(arrays)
    names = ["logit", *(e.name for e in model.explanations())]

    found = dict(zip(names, session.run(names, {i.name: packed[i.name] for i in session.get_inputs()}), strict=True))

    with torch.no_grad():
        logit, shown = base.explain(model, {name: torch.from_numpy(array) for name, array in arrays.items()})
    for name, expected in {"logit": logit, **shown}.items():
        np.testing.assert_allclose(found[name], expected.detach().numpy(), rtol=1e-4, atol=1e-5)
    together = found["pair_contrib"].sum(axis=(1, 2)) + found["bias"]
    np.testing.assert_allclose(together, found["logit"], rtol=1e-4, atol=1e-4)


def test_an_explaining_graph_of_another_model_is_refused(graph):
    model, content = graph
    other = lively("stec", SCHEMA, emb_dim=4, blocks=1).float()
    other.get_parameter("blocks.0.bilinear.right.0.weight").data += 0.5

    export.check(model, SCHEMA, {EXPLAINING: content}, golden=encoded(SCHEMA))
    with pytest.raises(ExportError, match=r"explain\.onnx: \w+ is up to .* off the model's at the golden requests"):
        export.check(other, SCHEMA, {EXPLAINING: content}, golden=encoded(SCHEMA))


def test_the_graphs_that_serve_are_bit_for_bit_what_they_are_where_nothing_is_recorded(monkeypatch):
    regression, attention = lively("lr", SCHEMA).float(), lively("stec", SCHEMA, emb_dim=4).float()
    onnx_graph, traced_graph = (
        export.signatures(model, SCHEMA)[file] for model, file in ((regression, MODEL), (attention, TORCHSCRIPT))
    )

    def graphs() -> tuple[bytes, str]:
        traced = export._to_torchscript(export._ScoringGraph(attention, traced_graph), traced_graph, SCHEMA)
        proto = export._to_onnx(export._ScoringGraph(regression, onnx_graph), onnx_graph, SCHEMA)
        with export._known_warnings():
            return proto.SerializeToString(), torch.jit.load(io.BytesIO(traced)).code

    as_they_are = graphs()
    for module in (linear, stec):
        monkeypatch.setattr(module, "record", lambda *_: None)

    assert graphs() == as_they_are


def explained(trained, out, *words: str) -> Any:
    assert main(["explain", str(trained), "--out", str(out), "--threads", "1", *words]) == 0
    return json.loads((out / "explain.json").read_text())


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(heatmaps, "draw", lambda *_: None)


def test_named_rows_are_explained_by_request_with_their_own_names(data, trained, undrawn, tmp_path):
    told = explained(trained, tmp_path / "out", "--rows", "3,7")

    rows, schema = Prepared.open(data).rows("test"), Prepared.open(data).schema
    items = schema.field("item_id").vocabulary or ()
    scores = run_folder.score(run_folder.read(trained), Prepared.open(data), "test")
    assert [r["predictions"][0]["row"] for r in told["requests"]] == [3, 7]
    for request, row in zip(told["requests"], (3, 7), strict=True):
        (prediction,) = request["predictions"]
        assert prediction["id"] == items[rows.inputs["item.item_id"][row] - 2]
        assert prediction["clicked"] == bool(rows.label[row])
        assert request["explanations"]["logit"]["values"] == pytest.approx([scores[row]], rel=1e-5)
        past = rows.events["hist.item_id"][rows.start[row] : rows.end[row]][-LENGTH:]
        alpha = request["explanations"]["alpha_behaviour"]
        assert alpha["axes"][1]["labels"] == [items[n - 2] if n > 1 else "unknown" for n in past]
        assert np.sum(alpha["values"]) == pytest.approx(1.0 if len(past) else 0.0)


def test_the_mean_is_that_of_the_rows_one_by_one(data, trained, undrawn, tmp_path, monkeypatch):
    monkeypatch.setattr("training.explanation.explain.AVERAGED_ROWS", 10**9)
    monkeypatch.setattr("training.explanation.explain.BATCH", 37)
    told = explained(trained, tmp_path / "out", "--requests", "1")["mean"]

    rows, run = Prepared.open(data).rows("test"), run_folder.read(trained)
    with torch.no_grad():
        batch = rows.take(np.arange(len(rows)))
        _, shown = base.explain(run.model, batch.inputs)
    alpha, mask = shown["alpha_behaviour"].numpy(), batch.inputs["hist_mask"].numpy()[batch.inputs["user_index"]]
    by_hand = [np.mean(alpha[mask[:, t], t]) for t in range(LENGTH)]
    assert told["rows"] == len(rows)
    np.testing.assert_allclose(told["explanations"]["alpha_behaviour"]["values"], by_hand, rtol=1e-5)
    gim = told["explanations"]["gim_weight"]
    np.testing.assert_allclose(gim["values"], shown["gim_weight"].numpy().mean(axis=0), rtol=1e-5)
    assert gim["axes"][0]["labels"] == ["item", "context", "behaviour", "user", "ibim", "iuim", "icim"]


def test_every_tensor_is_drawn(trained, tmp_path):
    told = explained(trained, tmp_path / "out", "--requests", "1")

    names = {e for e, shown in told["mean"]["explanations"].items() if shown["axes"]}
    drawn = {file.stem for file in (tmp_path / "out").glob("*.png")}
    assert drawn >= {f"mean-{name}" for name in names}
    for request in told["requests"]:
        assert {f"{request['request_id']}-{name}" for name in names} <= drawn


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 2)])
def test_names_are_drawn_as_they_are_and_not_as_formulas(tmp_path, shape):
    axes = [{"name": f"axis_{n}", "labels": ["$a_b_c$", "100% $x^y^z$ off", "$"][:n]} for n in shape]

    heatmaps.draw({"meaning": "$m_m_m$", "axes": axes, "values": np.zeros(shape)}, "$t_t_t$", tmp_path / "a.png")

    assert (tmp_path / "a.png").stat().st_size > 0


@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 45, 2), (2, 0), (2, 3, 2, 2)])
def test_any_tensor_has_a_picture_whose_colours_follow_its_values(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(heatmaps, "MAX_PANELS", 4)
    axes = [{"name": f"axis_{n}", "labels": [f"label {m}" for m in range(size)]} for n, size in enumerate(shape)]
    told = {"meaning": "What it is.", "axes": axes}
    flat, peaked = np.zeros(shape), np.zeros(shape)
    if peaked.size:
        peaked.flat[0] = 1.0

    for name, values in (("flat", flat), ("peaked", peaked)):
        heatmaps.draw({**told, "values": values}, "a title", tmp_path / f"{name}.png")

    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("flat", "peaked")]
    assert all(picture.shape[0] > 100 < picture.shape[1] for picture in pictures)
    assert np.array_equal(pictures[0], pictures[1]) == (peaked.size == 0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rows", "3,100000"], "expected rows below 400, got 100000"),
        (["--rows", "a"], "expected row numbers"),
        (["--rows", "1", "--requests", "2"], "not allowed with"),
        (["--rows", "1", "--requests", "3"], "not allowed with"),  # as many as without the option
    ],
)
def test_a_wrong_choice_of_rows_is_told_in_one_sentence(trained, tmp_path, capsys, words, told):
    assert main(["explain", str(trained), "--out", str(tmp_path), *words]) == 2

    assert told in capsys.readouterr().err


def test_more_requests_than_there_are_are_all_of_them(data, trained):
    source = Prepared.open(data).rows("test")

    chosen = list(explain._chosen(source, None, 10**12))

    assert np.concatenate(chosen).tolist() == list(range(len(source)))


def test_a_file_in_the_place_of_the_folder_is_told_before_anything_is_computed(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "taken").touch()
    monkeypatch.setattr(explain, "_mean", None)

    assert main(["explain", str(trained), "--out", str(tmp_path / "taken")]) == 2

    assert "taken: expected a folder, or a new one, found a file" in capsys.readouterr().err


def test_a_model_with_nothing_to_show_says_so(data, tmp_path, capsys):
    assert main(["train", "fm", "--data", str(data), "--out", str(tmp_path / "fm"), *QUICK]) == 0

    assert main(["explain", str(tmp_path / "fm"), "--out", str(tmp_path / "out")]) == 2

    assert "a model fm of this form shows nothing of itself" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
