"""A public client of the Open Inference Protocol, Triton's, reads and scores as /predict does."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

from models.features.arrays import Arrays
from models.features.encoder import Encoder
from models.features.history import Event
from models.features.request import Request
from service.app import create_app
from service.settings import Settings
from tests.service import tiny

CANDIDATES: list[dict[str, Any]] = [
    {"id": "a1", "features": {"price": 2.5, "genres": ["x", "y"]}},
    {"id": "a9"},
    {"id": "a3"},
]
CLICKS: list[dict[str, Any]] = [{"item": "a2", "ts": 10.0}, {"item": "a4", "ts": 20.0}]
DATATYPES = {"int64": "INT64", "float32": "FP32", "bool": "BOOL"}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service on a real port, in a thread."""
    root = tmp_path_factory.mktemp("artifacts")
    tiny.write(root)
    alone = {"experiment": "test", "salt": "s", "arms": [{"name": "one", "model": "tiny", "share": 100}]}
    app = create_app(Settings(artifacts_dir=root, experiment=alone, timeout_ms=30_000))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listener:  # who connects early waits in its queue
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    client = triton.InferenceServerClient(address)
    httpx.get(f"http://{address}/healthz", timeout=30)  # it opens first
    yield client
    client.close()


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    """What the client's own encoder makes of the request that `predicted` sends raw."""
    columns = {
        "item_id": [candidate["id"] for candidate in CANDIDATES],
        "price": [2.5, None, None],
        "genres": [["x", "y"], None, None],
    }
    request = Request(
        user={"user_id": "u3", "gender": "F"}, context={"device": "tv"}, ts=1_000_000.0,
        behaviours=[Event(item=c["item"], ts=c["ts"], features={}) for c in CLICKS], items=columns, num_items=3,
    )  # fmt: skip
    return Encoder(tiny.SCHEMA).encode(request)


@pytest.fixture(scope="module")
def predicted(address: str) -> list[float]:
    body = {
        "user": {"id": "u3", "features": {"gender": "F"}},
        "context": {"device": "tv"},
        "ts": 1_000_000.0,
        "behaviours": CLICKS,
        "candidates": CANDIDATES,
    }
    answer = httpx.post(f"http://{address}/predict", json=body, timeout=30).json()
    return [prediction["ctr"] for prediction in answer["predictions"]]


def inputs(arrays: Arrays, *, binary: bool) -> list[Any]:
    made = []
    for name in (i.name for i in tiny.SCHEMA.inputs if i.name not in tiny.UNREAD):
        made.append(triton.InferInput(name, list(arrays[name].shape), DATATYPES[arrays[name].dtype.name]))
        made[-1].set_data_from_numpy(arrays[name], binary_data=binary)
    return made


def test_it_finds_the_server_and_the_model(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("one")
    assert not client.is_model_ready("two")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]


def test_it_reads_what_the_model_takes(client: Any) -> None:
    told = client.get_model_metadata("one")

    assert told["platform"] == "onnx_onnxv1"
    shapes = {i["name"]: (i["datatype"], i["shape"]) for i in told["inputs"]}
    assert shapes["hist.genres"] == ("INT64", [-1, 3, 2])
    assert shapes["item.price"] == ("FP32", [-1])
    assert [output["name"] for output in told["outputs"]] == ["logit", "prob"]
    assert client.is_model_ready("one", told["versions"][0])
    assert client.get_model_metadata("one", told["versions"][0]) == told


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_it_scores_as_a_prediction_does(
    client: Any, arrays: Arrays, predicted: list[float], binary: bool, binary_out: bool | None
) -> None:
    asked = [triton.InferRequestedOutput(n, binary_data=binary_out) for n in ("prob", "logit")]

    answer = client.infer(
        "one", inputs(arrays, binary=binary), outputs=None if binary_out is None else asked, request_id="r-7"
    )

    assert np.allclose(answer.as_numpy("prob"), predicted, rtol=1e-6)
    assert np.allclose(answer.as_numpy("logit"), tiny.score(arrays, seed=1), atol=1e-6)
    assert answer.get_response()["id"] == "r-7"


def test_several_users_are_scored_in_one_call(client: Any, arrays: Arrays) -> None:
    two = {n: a if n.startswith("item.") else np.concatenate([np.zeros_like(a), a]) for n, a in arrays.items()}
    two["user_index"] = np.array([1, 0, 1])

    logits = client.infer("one", inputs(two, binary=True)).as_numpy("logit")

    assert np.allclose(logits, tiny.score(two, seed=1), atol=1e-6)
    assert np.allclose(logits[[0, 2]], tiny.score(arrays, seed=1)[[0, 2]], atol=1e-6)


def test_it_is_told_what_is_wrong(client: Any, arrays: Arrays) -> None:
    unknown = {**arrays, "user.gender": np.array([4])}

    with pytest.raises(InferenceServerException, match=r"input user\.gender: expected 0 to 3, got 4") as refused:
        client.infer("one", inputs(unknown, binary=True))
    assert refused.value.status() == "400"
    with pytest.raises(InferenceServerException, match="no arm is called two; there are one"):
        client.infer("two", inputs(arrays, binary=True))
    with pytest.raises(InferenceServerException, match="serves version"):
        client.infer("one", inputs(arrays, binary=True), model_version="1")
