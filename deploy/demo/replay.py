"""Send a data set's held-out rows through a running service, in time order, and compare with the offline scores.

    python deploy/demo/replay.py --data DIR --url http://127.0.0.1:8000 \
        --offline mian=MIAN.parquet --offline stec=STEC.parquet [--out ANSWERS.parquet]

Each request is scored by `POST /predict`, then its impressions and clicks go back through `POST /events`, so the next
request of the same user sees them. The offline files are what `python -m training evaluate RUN --predictions` writes.
For each arm the AUC of the HTTP answers must equal the offline AUC on the same rows: exit code 1 where it does not.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl

from models.features.field import event_fields
from models.features.schema import Schema
from training.evaluation.metrics import auc

AUC_TOLERANCE = 1e-6
SWAPPED_PAIRS = 3
CONNECTIONS = 4
ATTEMPTS = 5


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """One arm's answers beside its offline scores on the same rows."""

    arm: str
    num_rows: int
    auc_http: float
    auc_offline: float
    num_pairs: int
    """Of a click and a row without one: what an AUC is the share of."""
    largest_difference: float
    """Of a single click probability."""

    @property
    def difference(self) -> float:
        return abs(self.auc_http - self.auc_offline)

    @property
    def holds(self) -> bool:
        """Equal to 1e-6; with few rows one pair weighs more, and float32 may swap two rows that score the same."""
        return self.difference <= max(AUC_TOLERANCE, SWAPPED_PAIRS / self.num_pairs)


def replay(data: Path, url: str) -> pl.DataFrame:
    """Every held-out row with the arm that answered it, its probability and the request's milliseconds.

    Columns: those of `raw/test.parquet`, and `arm`, `version`, `ctr`, `degraded`, `ms` (the same for all rows of a
    request). Raises httpx.HTTPStatusError on the first refusal.
    """
    rows = pl.read_parquet(data / "raw" / "test.parquet").with_row_index("row")
    schema = Schema.from_json((data / "schema.json").read_bytes())
    context = [f.name for f in schema.group("context") if f.kind != "time"]
    event_names = [f.name for f in event_fields(schema.fields) if f.name in rows.columns]
    requests = [group.to_dicts() for group in rows.partition_by("request", maintain_order=True)]
    answers = asyncio.run(_replay_all(requests, context, event_names, url))
    answered = pl.DataFrame(answers, schema_overrides={"row": pl.UInt32})
    return rows.join(answered, on="row", maintain_order="left")


async def _replay_all(
    requests: Sequence[list[dict[str, Any]]], context: Sequence[str], event_names: Sequence[str], url: str
) -> list[dict[str, Any]]:
    # A user's requests stay in order on one connection; users do not see each other, so connections run side by side.
    lanes: list[list[list[dict[str, Any]]]] = [[] for _ in range(CONNECTIONS)]
    for request in requests:
        lanes[hash(request[0]["user"]) % CONNECTIONS].append(request)
    done: list[dict[str, Any]] = []
    async with httpx.AsyncClient(base_url=url, timeout=10) as client:
        progress = asyncio.create_task(_tell_progress(done, sum(map(len, requests))))
        try:
            await asyncio.gather(*(_replay_lane(client, lane, context, event_names, done) for lane in lanes))
        finally:
            progress.cancel()
    return done


async def _replay_lane(
    client: httpx.AsyncClient,
    lane: Sequence[list[dict[str, Any]]],
    context: Sequence[str],
    event_names: Sequence[str],
    done: list[dict[str, Any]],
) -> None:
    for request in lane:
        body, events = _predict_body(request, context), _events_body(request, event_names)
        start = time.perf_counter()
        response = await client.post("/predict", json=body)
        milliseconds = (time.perf_counter() - start) * 1000
        answer = response.raise_for_status().json()
        served = {name: answer[name] for name in ("arm", "version")}
        served |= {"degraded": ",".join(answer["degraded"]), "ms": milliseconds}
        ctrs = answer["predictions"]["ctr"]
        done.extend({"row": row["row"], "ctr": ctr, **served} for row, ctr in zip(request, ctrs, strict=True))
        for chunk in _chunks(events, 1000):
            await _send_events(client, chunk)


async def _send_events(client: httpx.AsyncClient, events: list[dict[str, Any]]) -> None:
    # As the service asks of every client: after a 503 the same call again, which event ids make safe.
    for _ in range(ATTEMPTS):
        response = await client.post("/events", json=events)
        if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
            break
        await asyncio.sleep(float(response.headers["Retry-After"]))
    response.raise_for_status()
    rejected = response.json()["rejected"]
    if rejected:  # or the next requests would be scored without them
        sys.exit(f"error: {len(rejected)} events were rejected, the first because of {rejected[0]['reason']}")


def _predict_body(request: Sequence[Mapping[str, Any]], context: Sequence[str]) -> dict[str, Any]:
    first = request[0]
    return {
        "request_id": str(first["request"]),
        "ts": first["ts"],
        "user": {"id": first["user"]},
        "context": {name: first[name] for name in context if first[name] is not None},
        "candidates": {"id": [row["item"] for row in request]},
    }


def _events_body(request: Sequence[Mapping[str, Any]], event_names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "event_id": f"{row['row']}-{kind}",
            "type": kind,
            "ts": row["ts"],
            "user": row["user"],
            "item": row["item"],
            "request_id": str(row["request"]),
            "features": {name: row[name] for name in event_names if row[name] is not None},
        }
        for row in request
        for kind in (("impression", "click") if row["label"] == 1 else ("impression",))
    ]


def _chunks(events: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(events), size):
        yield events[start : start + size]


async def _tell_progress(done: list[dict[str, Any]], total: int) -> None:
    start = time.monotonic()
    while True:
        await asyncio.sleep(5)
        took = time.monotonic() - start
        left = took * (total - len(done)) / max(len(done), 1)
        print(f"  replayed {len(done):,} of {total:,} rows, about {left:.0f} s left", file=sys.stderr, flush=True)


def compare(answered: pl.DataFrame, offline: Mapping[str, Path]) -> list[Agreement]:
    """For each arm: its HTTP answers beside its offline scores, on the rows it answered with all that is known."""
    complete = answered.filter(pl.col("degraded") == "")
    agreements = []
    for arm, file in offline.items():
        scored = complete.filter(pl.col("arm") == arm).join(
            pl.read_parquet(file).select(pl.col("row").cast(pl.UInt32), pl.col("ctr").alias("offline")),
            on="row",
            maintain_order="left",
        )
        label, http, expected = (scored[name].to_numpy() for name in ("label", "ctr", "offline"))
        agreements.append(
            Agreement(
                arm=arm,
                num_rows=len(scored),
                auc_http=auc(label, http),
                auc_offline=auc(label, expected),
                num_pairs=int(label.sum() * (1 - label).sum()),
                largest_difference=float(np.abs(http - expected).max()),
            )
        )
    return agreements


def table(answered: pl.DataFrame, agreements: Sequence[Agreement]) -> str:
    """The comparison as lines of text, with the latency the client saw."""
    titles = ("arm", "rows", "AUC over HTTP", "AUC offline", "difference", "largest |dp|", "p50 ms", "p99 ms")
    lines = ["{:<6}{:>9}{:>15}{:>13}{:>12}{:>14}{:>8}{:>8}".format(*titles)]
    for a in agreements:
        ms = answered.filter(pl.col("arm") == a.arm).unique("request")["ms"].to_numpy()
        p50, p99 = np.percentile(ms, [50, 99])
        lines.append(
            f"{a.arm:<6}{a.num_rows:>9,}{a.auc_http:>15.7f}{a.auc_offline:>13.7f}{a.difference:>12.1e}"
            f"{a.largest_difference:>14.1e}{p50:>8.2f}{p99:>8.2f}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder written by `python -m training prepare`")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--offline", action="append", required=True, metavar="ARM=FILE", help="offline predictions")
    parser.add_argument("--out", type=Path, help="write every row's answer here (Parquet)")
    options = parser.parse_args()

    answered = replay(options.data, options.url)
    if options.out is not None:
        answered.write_parquet(options.out)
    agreements = compare(answered, {arm: Path(file) for arm, _, file in (o.partition("=") for o in options.offline)})
    print(table(answered, agreements))
    degraded = answered.filter(pl.col("degraded") != "").height
    print(f"{answered.height:,} rows in {answered['request'].n_unique():,} requests, {degraded:,} rows degraded")
    return 0 if degraded == 0 and all(a.holds for a in agreements) else 1


if __name__ == "__main__":
    sys.exit(main())
