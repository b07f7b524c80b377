"""The OpenAPI document and the service agree, whatever a client sends."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from service.app import create_app
from service.http import openapi
from service.settings import Settings
from tests.service import tiny


def never_a_500(_context: Any, response: Any, _case: Any) -> None:
    """503 and 504 are in the document: a request may state a deadline that nobody can meet."""
    assert response.status_code != 500


# Not among them: that whatever the document allows is accepted. It cannot say that columns are of one length, nor which
# values the fields of an arm take.
CHECKS = [
    never_a_500,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service on a real port, in a thread."""
    root = tmp_path_factory.mktemp("artifacts")
    tiny.write(root, explaining_seed=1)
    alone = {"experiment": "test", "salt": "s", "arms": [{"name": "one", "model": "tiny", "share": 100}]}
    app = create_app(Settings(artifacts_dir=root, experiment=alone, redis_url=None))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listener:  # who connects early waits in its queue
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def api_schema(url: str) -> Any:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


READS = ("/healthz", "/readyz", "/models", "/experiments", "/v2", "/v2/health/live", "/v2/health/ready")
V2 = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
OPERATIONS = [
    ("/predict", "POST", GenerationMode.POSITIVE, 80),
    ("/predict", "POST", GenerationMode.NEGATIVE, 60),
    ("/explain", "POST", GenerationMode.POSITIVE, 40),
    ("/explain", "POST", GenerationMode.NEGATIVE, 40),
    ("/events", "POST", GenerationMode.POSITIVE, 40),  # no bad events: each is rejected by itself, in a good answer
    *((path, "GET", GenerationMode.POSITIVE, 3) for path in READS),
    *((path + end, "GET", GenerationMode.POSITIVE, 5) for path in V2 for end in ("", "/ready")),
    *((f"{path}/infer", "POST", GenerationMode.POSITIVE, 20) for path in V2),
    (f"{V2[0]}/infer", "POST", GenerationMode.NEGATIVE, 40),
]


@pytest.mark.parametrize(("path", "method", "mode", "num_examples"), OPERATIONS)
def test_the_service_does_what_its_document_says(
    api_schema: Any, path: str, method: str, mode: GenerationMode, num_examples: int
) -> None:
    operation = api_schema[path][method]
    checked = settings(max_examples=num_examples, deadline=None, derandomize=True, database=None)

    @settings(checked, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if path.endswith("/infer"):
            case.path_parameters["model"] = "one"  # any other ends before its body is read
        case.call_and_validate(checks=CHECKS)

    check()


def test_the_examples_of_the_document_are_answered(url: str) -> None:
    document = httpx.get(f"{url}/openapi.json").json()

    for path, status in (("/predict", 200), ("/explain", 200), ("/events", 202)):
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for example in content["examples"].values():
            answer = httpx.post(url + path, json=example["value"])
            assert answer.status_code == status, answer.text
            assert answer.json().get("rejected", []) == []


def test_the_document_names_every_route_and_limit_of_the_contract(url: str) -> None:
    document = httpx.get(f"{url}/openapi.json").json()

    paths = document["paths"]
    tensors = {path + end for path in V2 for end in ("", "/ready", "/infer")}
    admin = {
        "/experiments/{name}",
        "/experiments/{name}/audit",
        "/models/{arm}/load",
        "/models/{arm}/rollback",
        "/users/{user}",
    }
    assert set(paths) == {"/predict", "/explain", "/events", *READS, *tensors, *admin}
    assert openapi.PREDICT["responses"].keys() <= {200, 400, 408, 409, 413, 415, 422, 503, 504}
    for name, limit in (("PredictRequest", 1000), ("ExplainRequest", 20)):
        rows, columns = document["components"]["schemas"][name]["properties"]["candidates"]["anyOf"]
        ids = columns["properties"]["id"]
        assert [(a["minItems"], a["maxItems"]) for a in (rows, ids)] == [(1, limit), (1, limit)]
