"""What /docs and /openapi.json say of the routes: the JSON shapes of shapes.py, with examples."""

import copy
import re
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from service.errors import FieldError
from service.http.event_schemas import MAX_EVENTS, Receipt, SentEvent
from service.http.problems import MEDIA_TYPE
from service.http.schemas import ExplainAnswer, PredictAnswer, PredictRequest
from service.http.tensors import SHAPES as TENSOR_SHAPES
from service.ids import Id

Json = dict[str, Any]

DESCRIPTION = """\
Click probabilities for ads, within a deadline.

**Ids** (of users, items, requests, events) are strings or integers; 42 and "42" are the same one everywhere, and an
answer repeats them as they were sent. 42.0 is none.

**Times** are Unix seconds. A prediction is made as of its `ts` (default: now) and sees only what is strictly earlier.

**Features** a model does not know are counted and otherwise ignored; null is the same as not given.
"""

_ROWS = {
    "request_id": "r-1",
    "ts": 1795000000.25,
    "user": {"id": "u42", "features": {"gender": "F"}},
    "context": {"device": "mobile"},
    "candidates": [{"id": "ad7", "features": {"price": 9.5}}, {"id": "ad9"}],
    "timeout_ms": 200,
}
_COLUMNS = {"user": {"id": "u42"}, "candidates": {"id": ["ad7", "ad9"], "price": [9.5, None]}}
EVENTS_EXAMPLE = [
    {"event_id": "e-1", "type": "impression", "ts": 1795000000.3, "user": "u42", "item": "ad7", "request_id": "r-1"},
    {"event_id": "e-2", "type": "click", "ts": 1795000002.0, "user": "u42", "item": "ad7", "request_id": "r-1"},
]


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _body(schema: Json, examples: Json) -> Json:
    content = {"application/json": {"schema": schema, "examples": {n: {"value": v} for n, v in examples.items()}}}
    return {"requestBody": {"required": True, "content": content}}


def _answers(**schemas: Json) -> dict[int | str, Json]:
    """Answers by status, as `ok_200`, each with its schema; those from 400 on are problems."""
    answers: dict[int | str, Json] = {}
    for name, schema in schemas.items():
        words, _, status = name.rpartition("_")
        media = MEDIA_TYPE if status >= "400" else "application/json"
        answers[int(status)] = {"description": words.replace("_", " "), "content": {media: {"schema": schema}}}
    return answers


def _answers_v2(**schemas: Json) -> dict[int | str, Json]:
    """The same for the Open Inference Protocol, whose refusals are plain JSON."""
    answers = _answers(**schemas)
    for answer in answers.values():
        (content,) = answer["content"].values()
        answer["content"] = {"application/json": content}
    return answers


_PROBLEM = _ref("Problem")
_REFUSED = {
    "not_JSON_400": _PROBLEM,
    "the_body_did_not_arrive_in_time_408": _PROBLEM,
    "the_body_is_too_large_413": _PROBLEM,
    "the_body_is_compressed_415": _PROBLEM,
    "bad_fields_each_with_its_JSON_pointer_422": _PROBLEM,
    "overloaded_or_out_of_order_try_again_503": _PROBLEM,
}

_EXPLAINED = {
    **_REFUSED,
    "this_user's_arm_explains_nothing_409": _PROBLEM,
    "the_deadline_passed_504": _PROBLEM,
}

PREDICT: Json = {
    "summary": "Click probabilities of a user's candidates, in their order",
    "description": "With `explain` true it answers, and refuses, as /explain does.",
    "openapi_extra": _body(_ref("PredictRequest"), {"rows": _ROWS, "columns": _COLUMNS}),
    "responses": _answers(scored_200={"anyOf": [_ref("PredictAnswer"), _ref("ExplainAnswer")]}, **_EXPLAINED),
}
EXPLAIN: Json = {
    "summary": "The same for a few candidates, and what the model attended to, with field and item names",
    "description": "For people: it has a short line of its own, and what it scores is not counted as a prediction.",
    "openapi_extra": _body(_ref("ExplainRequest"), {"rows": _ROWS, "columns": _COLUMNS}),
    "responses": _answers(explained_200=_ref("ExplainAnswer"), **_EXPLAINED),
}
EVENTS: Json = {
    "summary": "Impressions and clicks in, each taken once by its event_id",
    "status_code": 202,
    "openapi_extra": _body(
        {
            "type": "array",
            "maxItems": MAX_EVENTS,
            "items": {
                "anyOf": [_ref("SentEvent"), {"description": "anything else: rejected by its place in the list"}]
            },
        },
        {"a view and its click": EVENTS_EXAMPLE},
    ),
    "responses": _answers(taken_202=_ref("Receipt"), **_REFUSED),
}
HEALTHZ: Json = {"summary": "The process is alive", "responses": _answers(alive_200={"type": "object"})}
READYZ: Json = {
    "summary": "Every arm is verified and warm; tells whether the store answers",
    "responses": {
        status: {"description": words, "content": {"application/json": {"schema": {"type": "object"}}}}
        for status, words in ((200, "send requests"), (503, "send none"))
    },
}
MODELS: Json = {"summary": "What each arm serves", "responses": _answers(models_200={"type": "array"})}
EXPERIMENTS: Json = {"summary": "Who gets which arm", "responses": _answers(experiments_200={"type": "array"})}


def placed(operation: Json, path: str) -> Json:
    """The same with the parameters that stand in a path."""
    string = {"type": "string"}
    parameters = [{"name": n, "in": "path", "required": True, "schema": string} for n in re.findall(r"{(\w+)}", path)]
    return {**operation, "openapi_extra": {**operation.get("openapi_extra", {}), "parameters": parameters}}


_REFUSED_V2 = _ref("InferError")
V2_SERVER: Json = {"summary": "The server, for tensor clients", "responses": _answers(server_200={"type": "object"})}
V2_HEALTH: Json = {
    "summary": "Whether to send requests, as its status says",
    "responses": _answers_v2(yes_200={"type": "object"}, no_503={"type": "object"}),
}
_V2_NAMED: Json = {"no_such_arm_or_version_404": _REFUSED_V2, "starting_or_stopping_503": _REFUSED_V2}
V2_MODEL: Json = {
    "summary": "What an arm's model takes and gives, as tensors",
    "responses": _answers_v2(model_200=_ref("ModelTensors"), **_V2_NAMED),
}
V2_MODEL_READY: Json = {
    "summary": "An arm's model is verified and warm",
    "responses": _answers_v2(ready_200={"type": "object"}, **_V2_NAMED),
}
V2_INFER: Json = {
    "summary": "Logits and click probabilities of candidates that the client encoded, as tensors",
    "description": "Open Inference Protocol v2, with the extension for binary tensors.",
    "openapi_extra": _body(_ref("InferRequest"), {}),
    "responses": _answers_v2(
        inferred_200=_ref("InferAnswer"),
        bad_tensors_400=_REFUSED_V2,
        the_body_did_not_arrive_in_time_408=_REFUSED_V2,
        the_body_is_too_large_413=_REFUSED_V2,
        the_body_is_compressed_415=_REFUSED_V2,
        the_deadline_passed_504=_REFUSED_V2,
        **_V2_NAMED,
    ),
}
_CHANGED = {
    "without_a_token_401": _PROBLEM,
    "no_token_is_set_403": _PROBLEM,
    "no_such_arm_or_experiment_404": _PROBLEM,
    "If_Match_names_another_version_412": _PROBLEM,
    "the_store_does_not_answer_or_the_service_starts_or_stops_503": _PROBLEM,
}
_IF_MATCH: Json = {
    "parameters": [
        {
            "name": "If-Match",
            "in": "header",
            "required": False,
            "description": "the control version, as `ETag` tells it, that the change is meant for",
            "schema": {"type": "string"},
            "example": '"7"',
        }
    ],
    "security": [{"token": []}],
}
_OPTIONAL_VERSION = {"type": "object", "properties": {"version": {"type": "string", "default": "current"}}}
LOAD: Json = {
    "summary": "Swap an arm to a version of its model's artifact",
    "description": (
        "The artifact is verified, and warmed by the requests that the arm answered last, while the old one serves."
        " What must not serve is refused, and changes nothing. Then the change is written to the store, and one step"
        " makes the version serve here; every other worker loads it for itself and follows. It lasts."
    ),
    "openapi_extra": {
        "requestBody": {"required": False, "content": {"application/json": {"schema": _OPTIONAL_VERSION}}},
        **_IF_MATCH,
    },
    "responses": _answers(
        serving_200={"type": "object"},
        **{**_REFUSED, **_CHANGED},
        the_artifact_must_not_serve_409=_PROBLEM,
        no_such_version_422=_PROBLEM,
    ),
}
ROLLBACK: Json = {
    "summary": "Back to the version that the arm served before",
    "description": "At once where it is still loaded. What served is given up; it comes back by loading it.",
    "openapi_extra": _IF_MATCH,
    "responses": _answers(
        serving_200={"type": "object"},
        **_CHANGED,
        the_artifact_must_not_serve_409=_PROBLEM,
        there_is_no_previous_version_422=_PROBLEM,
    ),
}
EXPERIMENT: Json = {
    "summary": "Who gets which arm, and the control version in `ETag`",
    "responses": _answers(
        running_200={"type": "object"}, no_such_experiment_404=_PROBLEM, starting_or_stopping_503=_PROBLEM
    ),
}
AUDIT: Json = {
    "summary": "Who changed what, the latest first",
    "openapi_extra": {"security": [{"token": []}]},
    "responses": _answers(
        changes_200={"type": "array"},
        without_a_token_401=_PROBLEM,
        no_token_is_set_403=_PROBLEM,
        no_such_experiment_404=_PROBLEM,
        the_store_does_not_answer_or_the_service_starts_or_stops_503=_PROBLEM,
    ),
}
_TOKEN: Json = {"security": [{"token": []}]}
_USER_REFUSALS: Json = {
    "without_a_token_401": _PROBLEM,
    "no_token_is_set_403": _PROBLEM,
    "the_store_does_not_answer_or_the_service_starts_or_stops_503": _PROBLEM,
}
USER: Json = {
    "summary": "Everything that is stored of a user",
    "openapi_extra": _TOKEN,
    "responses": _answers(stored_200={"type": "object"}, **_USER_REFUSALS),
}
DELETE_USER: Json = {
    "summary": "Remove everything that is stored of a user",
    "description": "Clicks of before that come later stay out of the history.",
    "openapi_extra": _TOKEN,
    "responses": _answers(gone_204={}, **_USER_REFUSALS),
}
_PERCENT = {"type": "object", "additionalProperties": {"type": "number", "minimum": 0, "maximum": 100}}
SET_SHARES: Json = {
    "summary": "Other shares, and the kill switch",
    "description": (
        "`shares` by arm, in percent that sum to 100; `shadow` by shadow arm, in percent of the requests; `kill` and"
        " `unkill` name arms of either kind. An arm that is not named stays as it is. A killed arm keeps its share and"
        " answers nobody: its users go to the others, and nobody else moves, until it comes back. Overrides stay."
        " Every worker of every host follows within a second, and it lasts."
    ),
    "openapi_extra": {
        **_body(
            {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "shares": _PERCENT,
                    "shadow": _PERCENT,
                    "kill": {"type": "array", "items": {"type": "string"}},
                    "unkill": {"type": "array", "items": {"type": "string"}},
                },
            },
            {"shares": {"shares": {"mian": 60, "stec": 40}}, "kill switch": {"kill": ["stec"]}},
        ),
        **_IF_MATCH,
    },
    "responses": _answers(
        running_200={"type": "object"},
        **{**_REFUSED, **_CHANGED},
        this_worker_has_another_experiment_file_409=_PROBLEM,
    ),
}

_PROBLEM_SCHEMA = {
    "type": "object",
    "description": "RFC 9457",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "errors": {"type": "array", "items": _ref("FieldError")},
    },
}


def describe(app: FastAPI, *, max_candidates: int, max_explained: int) -> None:
    """Give the app an OpenAPI document with the shapes that its routes name."""

    def openapi() -> Json:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            document["components"] = {
                "schemas": _schemas(max_candidates, max_explained),
                "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            }
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's documented way to extend the document


def _schemas(max_candidates: int, max_explained: int) -> Json:
    shapes = (PredictRequest, PredictAnswer, ExplainAnswer, SentEvent, Receipt, FieldError, *TENSOR_SHAPES)
    _, schemas = msgspec.json.schema_components(shapes, ref_template="#/components/schemas/{name}")
    schemas["ExplainRequest"] = copy.deepcopy(schemas["PredictRequest"])
    for name, limit in (("PredictRequest", max_candidates), ("ExplainRequest", min(max_explained, max_candidates))):
        rows, columns = schemas[name]["properties"]["candidates"]["anyOf"]
        rows |= {"minItems": 1, "maxItems": limit}
        ids = {"type": "array", "items": msgspec.json.schema(Id), "minItems": 1, "maxItems": limit}
        columns |= {"required": ["id"], "properties": {"id": ids}}
    return {**schemas, "Problem": _PROBLEM_SCHEMA}
