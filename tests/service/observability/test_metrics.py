"""What is counted, under the names of the contract, and once."""

import json
import logging

import numpy as np
import pytest
from prometheus_client import Histogram
from prometheus_client.parser import text_string_to_metric_families

from service.observability.json_log import JsonFormatter
from service.observability.metrics import STAGES, Metrics
from tests.service.conftest import Running

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
    "clickserve_unknown_values": {"field"},
    "clickserve_predicted_ctr": {"arm"},
    "clickserve_impressions": {"arm"},
    "clickserve_clicks": {"arm"},
    "clickserve_model_info": {"arm", "model", "version"},
    "clickserve_control_version": set(),
}


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


async def test_a_request_is_recorded_once_in_every_place(service: Running) -> None:
    await service.predict(user={"id": "u1"}, context={"moon": 1}, candidates=[{"id": "a1"}, {"id": "?"}, {"id": "!"}])

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
        assert await service.metric(f'clickserve_stage_seconds_count{{stage="{stage}"}}') == 1, stage


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


def test_many_probabilities_at_once_are_counted_as_one_by_one() -> None:
    ctr = np.concatenate([np.random.default_rng(0).beta(1, 20, 500), [0.001, 0.0010001, 1.0, 1e-16]])
    metrics = Metrics()
    arm = metrics.arm("one")
    one_by_one = Histogram("reference", "", buckets=arm.predicted_ctr._upper_bounds, registry=None)

    arm.scored(ctr)
    for value in ctr:
        one_by_one.observe(value)

    told, wanted = [
        {s.name + s.labels.get("le", ""): round(s.value, 9) for s in h._child_samples()}
        for h in (arm.predicted_ctr, one_by_one)
    ]
    assert told == wanted


def test_a_failed_store_call_is_an_error_and_takes_time() -> None:
    metrics = Metrics()

    with pytest.raises(KeyError), metrics.store_call("fetch"):
        raise KeyError

    text = metrics.exposition("")[0].decode()
    assert 'clickserve_store_errors_total{op="fetch"} 1.0' in text
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
