"""What is counted, under the names of the contract, and once."""

import asyncio
import json
import logging

import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from service.errors import Degraded, Reason
from service.observability.instruments import OTHER
from service.observability.json_log import JsonFormatter
from service.observability.metrics import NO_ARM, STAGES, STORE_OPS, Metrics
from service.store.faults import Fault
from tests.service.conftest import Running, Start

# contract section 4, but for what later issues record
NAMES = {
    "clickserve_requests": {"route", "status", "arm"},
    "clickserve_request_seconds": {"route", "arm"},
    "clickserve_stage_seconds": {"stage"},
    "clickserve_candidates": {"arm"},
    "clickserve_batch_candidates": set(),
    "clickserve_queue_candidates": set(),
    "clickserve_rejected": {"reason"},
    "clickserve_degraded": {"reason"},
    "clickserve_store_seconds": {"op"},
    "clickserve_store_errors": {"op"},
    "clickserve_store_failures": {"cause"},
    "clickserve_store_state": {"cause"},
    "clickserve_unknown_values": {"field"},
    "clickserve_predicted_ctr": {"arm"},
    "clickserve_impressions": {"arm"},
    "clickserve_clicks": {"arm"},
    "clickserve_model_info": {"arm", "model", "version"},
    "clickserve_history_length": set(),
    "clickserve_freshness_seconds": set(),
    "clickserve_control_version": set(),
}


async def test_every_series_whose_labels_are_known_starts_at_zero(service: Running) -> None:
    scraped = (await service.client.get("/metrics")).text

    families = {f.name: f for f in text_string_to_metric_families(scraped) if f.name.startswith("clickserve_")}
    samples = [sample for family in families.values() for sample in family.samples]
    assert set(families) == set(NAMES)
    assert all(family.samples for family in families.values())
    assert {sample.name for sample in samples if sample.value} == {
        "clickserve_model_info",
        "clickserve_control_version",
    }
    known: dict[str, set[str]] = {
        "reason": set(Reason) | set(Degraded),
        "stage": set(STAGES),
        "op": set(STORE_OPS),
        "cause": set(Fault),
        "arm": {"one", "two", NO_ARM},
        "route": {"/predict", "/explain", "/events", "/healthz", "/readyz", "/metrics", "/models", OTHER},
        "field": {"item_id", OTHER},
    }
    for label, expected in known.items():
        assert expected <= {sample.labels[label] for sample in samples if label in sample.labels}, label


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text;version=1.0.0"])
def test_what_is_exposed_is_read_back_number_by_number(accept: str) -> None:
    metrics = Metrics()
    metrics.arm('a"\\b\n').scored(np.array([0.001, 0.3, 0.31]))
    metrics.control_version.set(7)

    text, content_type = metrics.exposition(accept)

    parse = openmetrics_families if "openmetrics" in content_type else text_string_to_metric_families
    assert content_type.startswith(accept.split(";", maxsplit=1)[0])
    samples = {
        (s.name, *(s.labels.get(label) for label in ("arm", "le"))): s.value
        for family in parse(text.decode())
        for s in family.samples
    }
    assert samples["clickserve_control_version", None, None] == 7
    assert samples["clickserve_candidates_total", 'a"\\b\n', None] == 3
    assert samples["clickserve_predicted_ctr_sum", 'a"\\b\n', None] == pytest.approx(0.611)
    below = {le: n for (name, _, le), n in samples.items() if name == "clickserve_predicted_ctr_bucket"}
    assert (below["0.001"], below["0.2"], below["0.3"], below["0.5"], below["+Inf"]) == (1, 1, 2, 3, 3)


async def test_every_metric_has_its_name_and_labels_after_some_traffic(service: Running) -> None:
    await service.predict(user={"id": "new"}, candidates=[{"id": "a1"}])
    await service.predict(candidates=[])
    await service.store.put_items({"a1": {"price": "cheap"}})
    await service.predict(candidates=[{"id": "a1"}])

    scraped = await service.client.get("/metrics", headers={"accept": "text/plain"})

    assert scraped.headers["content-type"].startswith("text/plain; version=")
    families = {f.name: f for f in text_string_to_metric_families(scraped.text) if f.name.startswith("clickserve_")}
    assert set(families) == set(NAMES)
    for name, labels in NAMES.items():
        for sample in families[name].samples:
            assert set(sample.labels) - {"le"} == labels


@pytest.mark.parametrize(("inline_run_ms", "queued"), [(1000, 0), (0, 1)])
async def test_a_request_is_recorded_once_in_every_place(start: Start, inline_run_ms: float, queued: int) -> None:
    async with start(inline_run_ms=inline_run_ms) as service:
        await service.predict(
            user={"id": "u1"}, context={"moon": 1}, candidates=[{"id": "a1"}, {"id": "?"}, {"id": "!"}]
        )
        await is_recorded_once(service, queued=queued)


async def is_recorded_once(service: Running, *, queued: int) -> None:
    """`queued`: whether its run waited for the model's thread, or the event loop made it at once."""

    assert await service.metric('clickserve_requests_total{arm="one",route="/predict",status="200"}') == 1
    assert await service.metric('clickserve_request_seconds_count{arm="one",route="/predict"}') == 1
    assert await service.metric('clickserve_candidates_total{arm="one"}') == 3
    assert await service.metric('clickserve_predicted_ctr_count{arm="one"}') == 3
    assert await service.metric('clickserve_predicted_ctr_count{arm="two"}') == 0
    assert await service.metric("clickserve_batch_candidates_sum") == 3
    assert await service.metric('clickserve_unknown_values_total{field="item_id"}') == 2
    assert await service.metric('clickserve_unknown_values_total{field="other"}') == 1
    assert await service.metric('clickserve_store_seconds_count{op="fetch"}') == 1
    for stage in STAGES:
        expected = queued if stage == "queue" else 1
        assert await service.metric(f'clickserve_stage_seconds_count{{stage="{stage}"}}') == expected, stage


async def test_labels_are_bounded_whatever_clients_send(service: Running) -> None:
    for path in ("/a", "/b", "/predict/1"):
        await service.client.get(path)
    await service.predict(context={"x1": 1, "x2": 1}, candidates=[{"id": "a1"}])

    assert await service.metric('clickserve_requests_total{arm="none",route="other",status="404"}') == 3
    assert "x1" not in (await service.client.get("/metrics")).text


async def test_events_are_counted_for_the_arm_of_their_user(service: Running) -> None:
    events = [
        {"event_id": f"{kind}-{user}", "type": kind, "ts": 1.0, "user": user, "item": "a1"}
        for kind, users in (("impression", ("u1", "u2")), ("click", ("u2",)))
        for user in users
    ]

    await service.client.post("/events", json=events)

    assert await service.metric('clickserve_impressions_total{arm="one"}') == 1
    assert await service.metric('clickserve_impressions_total{arm="two"}') == 1
    assert await service.metric('clickserve_clicks_total{arm="one"}') == 0
    assert await service.metric('clickserve_clicks_total{arm="two"}') == 1


def test_an_unknown_route_is_counted_as_other() -> None:
    metrics = Metrics()
    metrics.declare_routes(["/predict"])

    for route in ("/predict", "/wp-login", "/.env"):
        metrics.requests(route, "404", NO_ARM).inc()
        metrics.request_seconds(route, NO_ARM).observe(0.001)

    text = metrics.exposition("")[0].decode()
    assert 'clickserve_requests_total{arm="none",route="other",status="404"} 2.0' in text
    assert 'clickserve_request_seconds_count{arm="none",route="other"} 2.0' in text
    assert "wp-login" not in text


def test_a_failed_store_call_is_an_error_and_takes_time() -> None:
    metrics = Metrics()

    with pytest.raises(KeyError), metrics.store_call("fetch"):
        raise KeyError

    text = metrics.exposition("")[0].decode()
    assert 'clickserve_store_errors_total{op="fetch"} 1.0' in text
    assert 'clickserve_store_seconds_count{op="fetch"} 1.0' in text


def test_a_cancelled_store_call_takes_time_and_is_no_error() -> None:
    metrics = Metrics()

    with pytest.raises(asyncio.CancelledError), metrics.store_call("fetch"):
        raise asyncio.CancelledError

    text = metrics.exposition("")[0].decode()
    assert 'clickserve_store_errors_total{op="fetch"} 0.0' in text
    assert 'clickserve_store_seconds_count{op="fetch"} 1.0' in text


def test_a_log_line_is_one_json_object_with_what_was_given() -> None:
    record = logging.makeLogRecord({"name": "service.app", "levelname": "INFO", "msg": "model\nloaded", "arm": "one"})

    line = JsonFormatter().format(record)

    assert "\n" not in line
    told = json.loads(line)
    assert (told["event"], told["arm"], told["logger"], told["level"]) == (
        "model\nloaded",
        "one",
        "service.app",
        "info",
    )
    assert set(told) == {"time", "level", "logger", "event", "arm"}


@pytest.mark.parametrize("accept", ["text/plain;version=abc", "application/openmetrics-text;version=x", "\xff"])
async def test_an_odd_wish_for_a_format_still_gets_the_metrics(service, accept):
    answer = await service.client.get("/metrics", headers={"accept": accept.encode("latin-1")})

    assert answer.status_code == 200
    assert "clickserve_requests_total" in answer.text
