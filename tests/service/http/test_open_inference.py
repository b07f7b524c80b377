"""The Open Inference Protocol: whatever a client sends, the graph sees only what its tables have."""

import json
from copy import deepcopy
from typing import Any

import httpx
import numpy as np
import pytest

from models.features.arrays import Arrays, concat
from models.features.encoder import Encoder
from tests.service import tiny
from tests.service.conftest import Running, Start

ARRAYS = concat([Encoder(tiny.SCHEMA).encode(request) for request in tiny.GOLDEN])  # U = 2, C = 3
DATATYPES = {"int64": "INT64", "float32": "FP32", "bool": "BOOL"}
READ = [i for i in tiny.SCHEMA.inputs if i.name not in tiny.UNREAD]
ONE = "/v2/models/one/infer"


def body(arrays: Arrays = ARRAYS) -> dict[str, Any]:
    def tensor(name: str) -> dict[str, Any]:
        array = arrays[name]
        told = {"name": name, "shape": list(array.shape), "datatype": DATATYPES[array.dtype.name]}
        return {**told, "data": array.ravel().tolist()}

    return {"inputs": [tensor(i.name) for i in READ]}


def with_input(name: str, /, **other: Any) -> dict[str, Any]:
    """The good request with something else at one of its inputs; None leaves it out."""
    changed = deepcopy(body())
    (tensor,) = (t for t in changed["inputs"] if t["name"] == name)
    tensor.update(other)
    for key in [key for key, value in other.items() if value is None]:
        del tensor[key]
    return changed


async def refusal(service: Running, sent: Any, path: str = ONE, **headers: str) -> tuple[int, str]:
    content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    answer = await service.client.post(path, content=content, headers=headers)
    told = answer.json()
    assert list(told) == ["error"]
    return answer.status_code, told["error"]


async def test_tensors_are_scored_by_the_arm_they_name(service: Running) -> None:
    for arm, seed in (("one", 1), ("two", 2)):
        answer = (await service.client.post(f"/v2/models/{arm}/infer", json=body())).json()

        outputs = {o["name"]: o["data"] for o in answer["outputs"]}
        logits = tiny.score(ARRAYS, seed=seed)
        assert np.allclose(outputs["logit"], logits, atol=1e-6)
        assert np.allclose(outputs["prob"], tiny.CALIBRATION(logits), atol=1e-6)
        assert (answer["model_name"], "id" in answer) == (arm, False)


async def test_a_nested_list_is_the_same_tensor(service: Running) -> None:
    nested = with_input("hist.genres", data=ARRAYS["hist.genres"].tolist())

    answers = [(await service.client.post(ONE, json=sent)).json() for sent in (body(), nested)]

    assert answers[0] == answers[1]


async def test_only_the_outputs_asked_for_are_told(service: Running) -> None:
    answer = (await service.client.post(ONE, json={**body(), "outputs": [{"name": "prob"}]})).json()

    assert [output["name"] for output in answer["outputs"]] == ["prob"]
    assert (await refusal(service, {**body(), "outputs": [{"name": "x"}]}))[1].startswith("outputs: expected logit or")


async def test_an_output_is_told_once(service: Running) -> None:
    status, told = await refusal(service, {**body(), "outputs": [{"name": "prob"}] * 2})

    assert (status, told) == (400, "outputs: each may be there once, some are there twice")


@pytest.mark.parametrize(
    ("name", "other", "told"),
    [
        ("user.gender", {"data": [4, 0]}, "expected 0 to 3, got 4"),
        ("user.gender", {"data": [-1, 0]}, "expected 0 to 3, got -1"),
        ("hist.item_id", {"data": [0, 0, 6, 0, 0, 0]}, "expected 0 to 5, got 6"),
        ("ctx.hour", {"data": [26, 0]}, "expected 0 to 25, got 26"),
        ("user_index", {"data": [0, 0, 2]}, "expected 0 to 1, got 2"),
        ("user_index", {"data": [0, 0, True]}, "expected 3 values of INT64"),
        ("user_index", {"data": [0, 0, 0.5]}, "expected 3 values of INT64"),
        ("user_index", {"data": [0, 0, 2**63]}, "expected 3 values of INT64"),
        ("user_index", {"data": [0, 0]}, "expected 3 values of INT64, flat or nested: 2 values came"),
        ("user_index", {"data": None}, "neither"),
        ("item.price", {"data": [0, 0, 1e300]}, "expected numbers from -100 to 100"),
        ("item.price", {"data": [0, 0, 101]}, "expected numbers from -100 to 100"),
        ("item.price", {"data": [0, 0, "1"]}, "expected 3 values of FP32"),
        ("item.price", {"datatype": "FP64"}, 'expected datatype FP32, got "FP64"'),
        ("item.price", {"shape": [2]}, "item.price: expected shape [3], got [2]"),
        ("item.price", {"shape": [3, 1]}, "expected shape [3], got [3, 1]"),
        ("item.genres", {"shape": [3, 3], "data": [0] * 9}, "expected shape [3, 2], got [3, 3]"),
        ("item.genres", {"data": [[0, 0], [0], [0, 0]]}, "expected 6 values of INT64"),
        ("user.gender", {"shape": [1], "data": [0]}, "expected shape [2], got [1]"),
        ("user.gender", {"shape": []}, "expected shape [2], got []"),
        ("user.gender", {"name": "user.age"}, 'missing: user.gender, unknown: "user.age"'),
        ("user.gender", {"name": "user.user_id"}, "some are there twice"),
        ("user.gender", {"parameters": {"binary_data_size": 16}}, "expected data, or binary_data_size"),
    ],
)
async def test_a_tensor_that_does_not_fit_is_named(
    service: Running, name: str, other: dict[str, Any], told: str
) -> None:
    status, error = await refusal(service, with_input(name, **other))

    assert (status, told in error) == (400, True), error
    assert error.startswith(("input", "inputs"))


async def test_sizes_have_limits(start: Start) -> None:
    async with start(max_candidates=2) as service:
        assert await refusal(service, body()) == (400, "expected 1 to 2 candidates, got 3")

        nobody = {n: a if n.startswith("item.") or n == "user_index" else a[:0] for n, a in ARRAYS.items()}
        nothing = {n: a[:0] if n.startswith("item.") or n == "user_index" else a for n, a in ARRAYS.items()}
        assert await refusal(service, body(nothing)) == (400, "expected 1 to 2 candidates, got 0")
        few = {n: a[:1] if n.startswith("item.") or n == "user_index" else a for n, a in nobody.items()}
        assert await refusal(service, body(few)) == (400, "expected 1 to 2 users, got 0")
    async with start(max_body_bytes=1024) as service:
        assert (await refusal(service, {**body(), "id": "x" * 1024}))[0] == 413


@pytest.mark.parametrize("sent", [b"", b"{", b"[]", b"null", b'{"inputs": {}}', b"\xff", b'{"inputs": [' * 3000])
async def test_what_is_no_request_is_refused(service: Running, sent: bytes) -> None:
    status, _ = await refusal(service, sent)

    assert status == 400


def binary(**sizes: int) -> tuple[bytes, bytes]:
    """The good request's JSON and tail; `sizes` gives a tensor another size than it has."""
    inputs, tail = body()["inputs"], b""
    for tensor in inputs:
        raw = ARRAYS[tensor["name"]].tobytes()
        del tensor["data"]
        tensor["parameters"] = {"binary_data_size": sizes.get(tensor["name"], len(raw))}
        tail += raw
    return json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode(), tail


async def test_bytes_are_the_same_tensors(service: Running) -> None:
    told, tail = binary()
    headers = {"Inference-Header-Content-Length": str(len(told))}

    answer = await service.client.post(ONE, content=told + tail, headers=headers)

    length = int(answer.headers["Inference-Header-Content-Length"])
    names = [output["name"] for output in json.loads(answer.content[:length])["outputs"]]
    logits = np.frombuffer(answer.content[length:], "<f4").reshape(2, 3)[names.index("logit")]
    assert np.allclose(logits, tiny.score(ARRAYS, seed=1), atol=1e-6)


async def test_bytes_that_do_not_fit_are_refused(service: Running) -> None:
    told, tail = binary()
    length = str(len(told))

    for sent, header, words in (
        (told + tail, str(len(told + tail) + 1), "Inference-Header-Content-Length: expected 0 to"),
        (told + tail, "-1", "Inference-Header-Content-Length: expected 0 to"),
        (told + tail, "x", "Inference-Header-Content-Length: expected 0 to"),
        (told + tail + b"x", length, f"{len(tail)} bytes of tensors are announced"),
        (told + tail[:-1], length, f"{len(tail) - 1} came"),
    ):
        status, error = await refusal(service, sent, **{"Inference-Header-Content-Length": header})
        assert (status, words in error) == (400, True), error
    for size, sent, words in ((16, tail[:-8], "user_index: expected 24 bytes, got 16"), (10**400, tail, "announced")):
        told, _ = binary(user_index=size)
        status, error = await refusal(service, told + sent, **{"Inference-Header-Content-Length": str(len(told))})
        assert (status, words in error) == (400, True), error


async def test_a_model_in_a_version_it_has_not_is_not_found(service: Running) -> None:
    version = (await service.client.get("/v2/models/one")).json()["versions"][0]

    for path in ("", "/ready"):
        assert (await service.client.get(f"/v2/models/one/versions/{version}{path}")).status_code == 200
        assert (await service.client.get(f"/v2/models/one/versions/0{path}")).status_code == 404
        assert (
            (await service.client.get(f"/v2/models/three{path}")).json()["error"].startswith("no arm is called three")
        )
    assert (await refusal(service, body(), "/v2/models/one/versions/0/infer"))[0] == 404
    assert (await refusal(service, body(), f"/v2/models/one/versions/{version}/x"))[0] == 404


async def test_it_is_counted_by_its_route_and_arm_and_is_no_prediction(service: Running) -> None:
    await service.client.post(ONE, json=body())
    await service.client.post(ONE, json=with_input("user.gender", data=[9, 0]))

    route = 'route="/v2/models/{model}/infer"'
    for status in (200, 400):
        assert await service.metric(f'clickserve_requests_total{{arm="one",{route},status="{status}"}}') == 1
    assert await service.metric('clickserve_predicted_ctr_count{arm="one"}') == 0


async def test_a_service_that_is_not_open_is_alive_and_not_ready(start: Start) -> None:
    async with start() as service:
        parts, service.api.service = service.api.service, None
        try:
            live, ready, model = [
                await service.client.get(f"/v2/{path}") for path in ("health/live", "health/ready", "models/one/ready")
            ]
        finally:
            service.api.service = parts

    assert [live.status_code, ready.status_code, model.status_code] == [200, 503, 503]
    assert ready.json() == {"ready": False}
    assert isinstance(model, httpx.Response) and model.headers["Retry-After"] == "1"
