"""What runs the graphs: the two backends agree, and a graph gets nothing but its arrays."""

import importlib.metadata
import io
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.artifact import folder
from models.artifact.errors import ArtifactError
from models.artifact.folder import Artifact
from models.features.arrays import Arrays, concat
from models.features.encoder import Encoder
from models.features.history import Event
from models.features.request import Request
from service.runtime import backends
from service.runtime.backend import Backend, BackendError
from service.runtime.onnx_cpu import OnnxBackend
from tests.service import tiny
from tests.service.conftest import Start

FED = [i.name for i in tiny.SIGNATURES["model.onnx"].inputs]
SIZES = [(1, 1), (1, 2), (1, 100), (1, 1000), (2, 1), (2, 100)]


def encoded(num_users: int, num_candidates: int) -> Arrays:
    """The encoder's arrays of requests that differ in their users, clicks and candidates."""
    return concat(
        [
            Encoder(tiny.SCHEMA).encode(
                Request(
                    user={"user_id": f"u{user + 1}"},
                    context={},
                    ts=5.0,
                    behaviours=tuple(Event(item=f"a{n}", ts=float(n), features={}) for n in range(user + 1)),
                    items={"item_id": [f"a{n % 5}" for n in range(num_candidates)]},
                    num_items=num_candidates,
                )
            )
            for user in range(num_users)
        ]
    )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return folder.read(tiny.write(tmp_path_factory.mktemp("artifact"), seed=1))


@pytest.fixture
def item_graph(artifact: Artifact) -> Iterator[OnnxBackend]:
    with closing(backends.load_item_graph(artifact)) as graph:
        yield graph


@pytest.fixture
def onnx_backend(artifact: Artifact) -> Iterator[Backend]:
    with closing(backends.load(artifact, "onnx")) as backend:
        yield backend


@pytest.mark.parametrize(("num_users", "num_candidates"), SIZES)
def test_onnx_scores_every_size(
    onnx_backend: Backend, item_graph: OnnxBackend, num_users: int, num_candidates: int
) -> None:
    arrays = encoded(num_users, num_candidates)

    logits = backends.score(onnx_backend, item_graph, tiny.LAYOUT.pack(arrays))

    assert logits.dtype == np.float32
    assert np.allclose(logits, tiny.score(arrays, seed=1), atol=1e-6)


@pytest.mark.parametrize(("num_users", "num_candidates"), SIZES)
def test_one_run_of_a_backend_that_joins_scores_as_a_run_for_each_request(
    onnx_backend: Backend, item_graph: OnnxBackend, tmp_path: Path, num_users: int, num_candidates: int
) -> None:
    pytest.importorskip("torch")
    from service.runtime.torchscript import TorchScriptBackend

    (tmp_path / "model.ts").write_bytes(to_torchscript(1))
    packed = tiny.LAYOUT.pack(encoded(num_users, num_candidates))
    with closing(TorchScriptBackend(tmp_path / "model.ts", inputs=BATCHED)) as joining:
        joined = backends.score(joining, item_graph, packed)

    assert joining.joins
    assert np.allclose(joined, backends.score(onnx_backend, item_graph, packed), atol=1e-6)


def test_arrays_that_do_not_fit_the_graph_are_a_backend_error(onnx_backend: Backend, item_graph: OnnxBackend) -> None:
    packed = tiny.LAYOUT.pack(encoded(1, 2))
    wrong = {**packed, "request_ids": packed["request_ids"][:, :1, None]}

    with pytest.raises(BackendError):
        backends.score(onnx_backend, item_graph, wrong)
    with pytest.raises(BackendError):
        backends.score(onnx_backend, item_graph, {**packed, "item_ids": packed["item_ids"][0]})


def test_a_graph_that_reads_other_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = numpy_helper.from_array(np.ones(64, dtype=np.float32), "weight")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="secret.bin")
    price, logit = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["C"]) for n in ("item.price", "logit")]
    adds = helper.make_node("Add", ["item.price", "weight"], ["logit"])
    graph = helper.make_graph([adds], "thief", [price], [logit], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "secret.bin").write_bytes(np.ones(64, dtype=np.float32).tobytes())
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ArtifactError, match="cannot load it: .*External data"):
        OnnxBackend(tmp_path / "model.onnx", fed=FED)


def test_a_graph_must_take_what_its_manifest_names_and_give_logits(tmp_path: Path) -> None:
    graph = tiny.request_graph(1)
    (tmp_path / "model.onnx").write_bytes(graph)
    renamed = onnx.load_from_string(graph.replace(b"logit", b"lagit"))
    (tmp_path / "other.onnx").write_bytes(renamed.SerializeToString())

    with pytest.raises(ArtifactError, match="takes history_ids, which its manifest does not name"):
        OnnxBackend(tmp_path / "model.onnx", fed=[name for name in FED if name != "history_ids"])
    with pytest.raises(ArtifactError, match="no output called logit"):
        OnnxBackend(tmp_path / "other.onnx", fed=FED)


def test_two_onnx_runtimes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_bytes(tiny.request_graph(1))
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.31")

    with pytest.raises(ArtifactError, match="onnxruntime and onnxruntime-gpu are both installed"):
        OnnxBackend(tmp_path / "model.onnx", fed=FED)


BATCHED = [i.name for i in tiny.SIGNATURES["model.ts"].inputs]


@cache
def to_torchscript(seed: int) -> bytes:
    """The tiny model's request half once more, in torch: inputs by position, in the manifest's order."""
    import torch

    tables = {g.name: torch.from_numpy(tiny.table(g, seed)) for g in (tiny.LAYOUT.request, tiny.LAYOUT.history)}
    positions = torch.from_numpy(tiny.POSITIONS)

    class Tiny(torch.nn.Module):
        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            inputs = dict(zip(BATCHED, values, strict=True))
            request = tables["request"][inputs["request_ids"]].sum(1)
            clicks = (tables["history"][inputs["history_ids"]] * inputs["history_weights"]).sum(2)
            user_part = request + (clicks * positions).sum(1)
            return inputs["items"][:, 0] + user_part[inputs["user_index"]]

    packed = tiny.LAYOUT.pack(encoded(2, 3))
    packed["items"] = np.zeros((6, 1), dtype=np.float32)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(Tiny(), tuple(torch.from_numpy(packed[name]) for name in BATCHED)), buffer)
    return buffer.getvalue()


async def test_torchscript_answers_over_http_as_onnx_does(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    tiny.write(tmp_path, files={**tiny.graphs(1), "model.ts": to_torchscript(1)})
    arms = [{"name": kind, "model": "tiny", "share": 50, "backend": kind} for kind in ("onnx", "torchscript")]
    overrides = {"new-1": "onnx", "new-2": "torchscript"}  # both unknown to the model, and so alike
    request: dict[str, Any] = {
        "ts": 99.0,
        "behaviours": [{"item": "a1", "ts": 1, "features": {"genres": ["x", "y"]}}, {"item": "a2", "ts": 2}],
        "candidates": {"id": [f"a{i % 9}" for i in range(100)], "price": [i / 20 for i in range(100)]},
    }

    experiment = {"experiment": "test", "salt": "s", "arms": arms, "overrides": overrides}
    async with start(artifacts_dir=tmp_path, experiment=experiment) as service:
        by_onnx, by_torch = [(await service.predict(user={"id": u}, **request)).json() for u in overrides]

    assert (by_onnx["arm"], by_torch["arm"]) == ("onnx", "torchscript")
    assert len(set(by_onnx["predictions"]["ctr"])) > 50  # each candidate has its own score, not the first one's
    assert by_torch["predictions"]["ctr"] == pytest.approx(by_onnx["predictions"]["ctr"], abs=1e-6)


def test_a_file_that_is_no_torchscript_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from service.runtime.torchscript import TorchScriptBackend

    (tmp_path / "model.ts").write_bytes(b"not a program")

    with pytest.raises(ArtifactError, match="libtorch cannot load it"):
        TorchScriptBackend(tmp_path / "model.ts", inputs=FED)
