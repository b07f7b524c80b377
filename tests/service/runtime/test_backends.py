"""What runs the graphs: the two backends agree, and a graph gets nothing but its arrays."""

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.artifact.errors import ArtifactError
from models.features.arrays import Arrays, concat
from models.features.encoder import Encoder
from models.features.request import Request
from service.runtime.backend import BackendError
from service.runtime.onnx_cpu import OnnxBackend
from tests.service import tiny
from tests.service.conftest import Start

FED = [i.name for i in tiny.SCHEMA.inputs]


def arrays(num_users: int, num_candidates: int) -> Arrays:
    request = Request(
        user={"user_id": "u2"}, context={}, ts=5.0, behaviours=(), items={"item_id": ["a2"] * num_candidates},
        num_items=num_candidates,
    )  # fmt: skip
    return concat([Encoder(tiny.SCHEMA).encode(request)] * num_users)


@pytest.fixture
def onnx_backend(tmp_path: Path) -> Iterator[OnnxBackend]:
    (tmp_path / "model.onnx").write_bytes(tiny.to_onnx(1))
    backend = OnnxBackend(tmp_path / "model.onnx", fed=FED)
    yield backend
    backend.close()


@pytest.mark.parametrize(("num_users", "num_candidates"), [(1, 1), (1, 2), (1, 100), (1, 1000), (2, 1), (2, 100)])
def test_onnx_scores_every_size(onnx_backend: OnnxBackend, num_users: int, num_candidates: int) -> None:
    whole = arrays(num_users, num_candidates)

    logits = onnx_backend.run(whole)

    assert logits.dtype == np.float32
    assert np.allclose(logits, tiny.score(whole, seed=1), atol=1e-6)


def test_arrays_that_do_not_fit_the_graph_are_a_backend_error(onnx_backend: OnnxBackend) -> None:
    wrong = {**arrays(1, 2), "item.price": np.zeros((2, 2), dtype=np.float32)}

    with pytest.raises(BackendError):
        onnx_backend.run(wrong)


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


def test_a_graph_must_take_what_the_schema_gives_and_give_logits(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(tiny.to_onnx(1))
    renamed = onnx.load_from_string(tiny.to_onnx(1).replace(b"logit", b"lagit"))
    (tmp_path / "other.onnx").write_bytes(renamed.SerializeToString())

    with pytest.raises(ArtifactError, match=r"takes item\.price, which its schema does not describe"):
        OnnxBackend(tmp_path / "model.onnx", fed=[name for name in FED if name != "item.price"])
    with pytest.raises(ArtifactError, match="no output called logit"):
        OnnxBackend(tmp_path / "other.onnx", fed=FED)


def test_two_onnx_runtimes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_bytes(tiny.to_onnx(1))
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.31")

    with pytest.raises(ArtifactError, match="onnxruntime and onnxruntime-gpu are both installed"):
        OnnxBackend(tmp_path / "model.onnx", fed=FED)


def to_torchscript(seed: int) -> bytes:
    """The tiny model once more, in torch: inputs by position, in the manifest's order."""
    import io

    import torch

    names = [name for name in FED if name not in tiny.UNREAD]
    numbers = {name: torch.from_numpy(table) for name, table in tiny.tables(seed).items()}
    positions = torch.from_numpy(tiny.POSITIONS)

    class Tiny(torch.nn.Module):
        def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            given = dict(zip(names, values, strict=True))
            user, item = torch.zeros(1), 0.5 * given["item.price"]
            for name, table in numbers.items():
                found = table[given[name]]
                if name.startswith("hist."):
                    found = found * (positions if found.dim() == 2 else positions[:, None])
                found = found.flatten(1).sum(1) if found.dim() > 1 else found
                user, item = (user, item + found) if name.startswith("item.") else (user + found, item)
            logit = item + user[given["user_index"]]
            return logit, logit.sigmoid()

    example = arrays(2, 3)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(Tiny(), tuple(torch.from_numpy(example[name]) for name in names)), buffer)
    return buffer.getvalue()


async def test_torchscript_answers_over_http_as_onnx_does(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    tiny.write(tmp_path, files={"model.onnx": tiny.to_onnx(1), "model.ts": to_torchscript(1)})
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
    assert len(set(by_onnx["predictions"]["ctr"])) == 100
    assert by_torch["predictions"]["ctr"] == pytest.approx(by_onnx["predictions"]["ctr"], abs=1e-6)


def test_a_file_that_is_no_torchscript_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from service.runtime.torchscript import TorchScriptBackend

    (tmp_path / "model.ts").write_bytes(b"not a program")

    with pytest.raises(ArtifactError, match="libtorch cannot load it"):
        TorchScriptBackend(tmp_path / "model.ts", inputs=FED)
