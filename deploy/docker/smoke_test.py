"""Prove a running compose project: answers from every arm, a store outage that no client notices, metrics, dashboard.

    docker compose up -d --build
    python deploy/docker/smoke_test.py [--service URL] [--prometheus URL] [--compose "docker compose"]

Sends traffic for about a minute and stops Redis in the middle of it (and starts it again). Then every metric that the
service has must be in Prometheus, and every query of the Grafana dashboard must give numbers: exit code 1 otherwise.
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx

from service.observability.metrics import Metrics

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "clickserve.json"
# A rate needs two scrapes, five seconds apart, between which the counter grew.
PHASE_S = 20
PAUSE_S = 0.05
RECOVERY_S = 30
START_S = 60  # of containers that were made a moment ago


class Check:
    """Prints one line for each thing checked, and remembers what failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def __call__(self, name: str, holds: bool, shown: object = "") -> None:
        print(f"  {'ok  ' if holds else 'FAIL'}  {name:<72} {shown}", flush=True)
        if not holds:
            self.failed.append(name)


class Traffic:
    """Requests of many users, their impressions and clicks, and now and then something that must be refused."""

    def __init__(self, service: httpx.Client) -> None:
        self._service = service
        self._numbers = count()
        self._run = f"check-{time.time():.0f}"

    def send(self, seconds: float) -> tuple[Counter[str], Counter[str]]:
        """How often which status was answered by which route, and what was degraded or drawn of the answers."""
        statuses: Counter[str] = Counter()
        answers: Counter[str] = Counter()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            number = next(self._numbers)
            predicted = self.predict(number)
            statuses[f"/predict {predicted.status_code}"] += 1
            if predicted.status_code == httpx.codes.OK:
                answer = predicted.json()
                answers.update([answer["arm"], *answer["degraded"]])
            statuses[f"/events {self._events(number).status_code}"] += 1
            if number % 10 == 0:
                statuses[f"not JSON {self._service.post('/predict', content=b'{').status_code}"] += 1
            time.sleep(PAUSE_S)
        return statuses, answers

    def predict(self, number: int) -> httpx.Response:
        body = {
            "request_id": f"{self._run}-{number}",
            "user": {"id": f"u{number % 500}"},
            "context": {"device": "toaster" if number % 5 == 0 else "mobile"},
            "candidates": [{"id": f"ad{(number + slot) % 500}"} for slot in range(8)],
        }
        return self._service.post("/predict", json=body)

    def _events(self, number: int) -> httpx.Response:
        event = {"ts": time.time(), "user": f"u{number % 500}", "item": f"ad{number % 500}"}
        types = ("impression", "click") if number % 4 == 0 else ("impression",)
        events = [{**event, "type": kind, "event_id": f"{self._run}-{number}-{kind}"} for kind in types]
        return self._service.post("/events", json=events)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--service", default="http://127.0.0.1:8000", metavar="URL")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL")
    parser.add_argument("--compose", default="docker compose", metavar="COMMAND", help="what stops and starts redis")
    options = parser.parse_args()

    check = Check()
    with (
        httpx.Client(base_url=options.service, timeout=10) as service,
        httpx.Client(base_url=options.prometheus, timeout=10) as prometheus,
    ):
        try:
            wait_until_up(service, "/readyz")
            wait_until_up(prometheus, "/-/ready")
            check_answers(check, service, options.compose)
            time.sleep(6)  # one more scrape
            check_metrics(check, prometheus)
            check_dashboard(check, prometheus)
        except httpx.TransportError as err:
            sys.exit(f"error: no answer from {options.service} or {options.prometheus}: {err}")
    print(f"\n{len(check.failed)} failed" if check.failed else "\nall is well")
    return 1 if check.failed else 0


def wait_until_up(client: httpx.Client, path: str) -> None:
    """Ends the check where nobody answers well in time: of what is not up, nothing else is worth checking."""
    until = time.monotonic() + START_S
    while True:
        try:
            answer = client.get(path)
            if answer.is_success:
                return
            reason = f"status {answer.status_code}"
        except httpx.TransportError as err:  # also one that the engine's proxy took and dropped
            reason = str(err)
        if time.monotonic() > until:
            sys.exit(f"error: {client.base_url}{path} is not up after {START_S} s: {reason}")
        time.sleep(1)  # between two questions


def check_answers(check: Check, service: httpx.Client, compose: str) -> None:
    traffic = Traffic(service)
    arms = {arm["name"] for arm in service.get("/experiments").json()[0]["arms"]}

    print("\nThe store answers")
    statuses, answers = traffic.send(PHASE_S)
    check("every request is answered, what is not JSON refused", *_only(statuses, "/predict 200", "/events 202"))
    check("every arm answers", arms <= set(answers), dict(answers))

    print("\nThe store is stopped")
    with _stopped(compose, "redis"):
        statuses, answers = traffic.send(PHASE_S)
        state = service.get("/readyz").json()["status"]
    check(
        "every request is answered, no event taken that would be lost", *_only(statuses, "/predict 200", "/events 503")
    )
    check(
        "every answer says what it lacks", answers["behaviours_unavailable"] == statuses["/predict 200"], dict(answers)
    )
    check("readiness tells", state == "degraded", state)

    print("\nThe store is back")
    started = time.monotonic()
    while (complete := not traffic.predict(0).json()["degraded"]) is False and time.monotonic() - started < RECOVERY_S:
        time.sleep(PAUSE_S)
    check("answers are whole again without a restart", complete, f"after {time.monotonic() - started:.1f} s")


def check_metrics(check: Check, prometheus: httpx.Client) -> None:
    print("\nMetrics in Prometheus (series)")
    suffixes = {"counter": "_total", "histogram": "_count"}
    for family in Metrics().registry.collect():
        if family.name.startswith("clickserve_"):
            name = family.name + suffixes.get(family.type, "")
            series = _query(prometheus, name)
            check(name, bool(series), len(series))


def check_dashboard(check: Check, prometheus: httpx.Client) -> None:
    print("\nQueries of the dashboard (values)")
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            series = _query(prometheus, target["expr"].replace("$__rate_interval", "1m"))
            values = {"/".join(s["metric"].values()): float(s["value"][1]) for s in series}
            holds = bool(values) and all(map(math.isfinite, values.values()))  # 0 is a number: nobody may be waiting
            shown = ", ".join(f"{labels} {value:.3g}" for labels, value in sorted(values.items()))
            check(f"{panel['title']} ({target['refId']})", holds, shown)


def _only(statuses: Counter[str], *expected: str) -> tuple[bool, str]:
    return set(statuses) == {*expected, "not JSON 400"}, ", ".join(f"{s}: {n}" for s, n in sorted(statuses.items()))


@contextmanager
def _stopped(compose: str, name: str) -> Iterator[None]:
    def tell(verb: str) -> None:
        subprocess.run([*shlex.split(compose), verb, name], cwd=ROOT, check=True, capture_output=True)

    tell("stop")
    try:
        yield
    finally:
        tell("start")


def _query(prometheus: httpx.Client, expression: str) -> list[dict[str, Any]]:
    answer = prometheus.get("/api/v1/query", params={"query": expression}).json()
    if answer["status"] != "success":
        sys.exit(f"error: Prometheus refuses {expression}: {answer['error']}")
    series: list[dict[str, Any]] = answer["data"]["result"]
    return series


if __name__ == "__main__":
    sys.exit(main())
