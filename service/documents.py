"""What /docs and /openapi.json say of the routes: the JSON shapes of shapes.py, with examples."""

import copy
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from service.errors import MEDIA_TYPE, FieldError
from service.events import MAX_EVENTS, Receipt, SentEvent
from service.shapes import ExplainAnswer, PredictAnswer, PredictRequest
from service.values import Id

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
            document["components"] = {"schemas": _schemas(max_candidates, max_explained)}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's documented way to extend the document


def _schemas(max_candidates: int, max_explained: int) -> Json:
    shapes = (PredictRequest, PredictAnswer, ExplainAnswer, SentEvent, Receipt, FieldError)
    _, schemas = msgspec.json.schema_components(shapes, ref_template="#/components/schemas/{name}")
    schemas["ExplainRequest"] = copy.deepcopy(schemas["PredictRequest"])
    for name, limit in (("PredictRequest", max_candidates), ("ExplainRequest", min(max_explained, max_candidates))):
        rows, columns = schemas[name]["properties"]["candidates"]["anyOf"]
        rows |= {"minItems": 1, "maxItems": limit}
        ids = {"type": "array", "items": msgspec.json.schema(Id), "minItems": 1, "maxItems": limit}
        columns |= {"required": ["id"], "properties": {"id": ids}}
    return {**schemas, "Problem": _PROBLEM_SCHEMA}
