"""The engine benchmark: its workload, its sides, its turns and its verdicts."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import checkouts
import engine
import httpx
import interleaved
import msgspec
import numpy as np
import peers
import processes
import pytest
import safetensors.torch
import senders
import sides
import torch
import workload
from inputs import Tensors, read_inputs, save_inputs

from models import zoo
from models.features.encoder import Encoder
from service.http import schemas
from tests.deploy import small_export

JSON = {"content-type": "application/json"}
BENCH = Path(__file__).parents[2] / "deploy" / "bench"


@pytest.fixture(scope="module")
def world() -> workload.World:
    return workload.make_world(num_users=40, num_items=300)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> checkouts.Export:
    return small_export.write(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def bodies(export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("bodies") / "bodies.jsonl"
    file.write_bytes(b"\n".join(map(peers.body, export.inputs(7))))
    return file


@pytest.fixture(scope="module")
def server(export, tmp_path_factory: pytest.TempPathFactory) -> Iterator[processes.Server]:
    folder = tmp_path_factory.mktemp("server")
    with processes.peer("asgi", export.graph, folder, cores=[0], workers=1) as started:
        yield started


# --- workload ---


def test_the_workload_has_eight_user_six_context_and_five_item_fields(world):
    schema = workload.fit(world)

    assert [len(schema.group(group)) for group in ("user", "context", "item")] == [8, 6, 5]
    assert schema.history_length == 30 and vars(zoo.configure("mian", {}))["emb_dim"] == 16
    assert [f.name for f in schema.group("item") if f.kind == "multi"] == ["tags"]


def test_every_field_matters_to_the_models_logits(world):
    schema = workload.fit(world)
    requests = [Encoder(schema).encode(request) for request in workload.requests(world, 8, 50)]
    model, _ = workload.build("mian", schema, requests)
    logits = np.stack([workload.logits(model, arrays) for arrays in requests])

    assert logits.std() >= engine.MIN_SPREAD
    for name in requests[0].keys() - {"user_index", "hist_age"}:  # MIAN reads no ages
        without = [workload.logits(model, {**a, name: np.zeros_like(a[name])}) for a in requests]
        assert np.abs(np.stack(without) - logits).max() > 1000 * sides.TOLERANCE, name


def test_requests_are_the_same_every_time_and_know_all_clicks(world):
    one, again = workload.requests(world, 5, 20), workload.requests(world, 5, 20)

    assert [workload.body(r, columnar=True) for r in one] == [workload.body(r, columnar=True) for r in again]
    assert all(len(r.behaviours) == workload.HISTORY and r.behaviours[-1].ts < r.ts for r in one)
    assert all(len(set(r.items["item_id"])) == 20 for r in one)


@pytest.mark.parametrize("columnar", [True, False])
def test_bodies_are_requests_that_the_service_takes(world, columnar):
    request = workload.requests(world, 1, 20)[0]

    body = msgspec.json.decode(workload.body(request, columnar=columnar), type=schemas.PredictRequest)

    ids = body.candidates["id"] if isinstance(body.candidates, dict) else [c.id for c in body.candidates]
    assert ids == request.items["item_id"]
    assert body.user is not None
    assert (body.ts, body.user.id, body.context) == (request.ts, request.user["user_id"], request.context)


def test_another_exports_weights_are_used_where_they_fit(world, tmp_path):
    schema = workload.fit(world)
    sample = [Encoder(schema).encode(request) for request in workload.requests(world, 1, 50)]
    one, _ = workload.build("lr", schema, sample, seed=1)
    safetensors.torch.save_file(one.state_dict(), tmp_path / "lr.safetensors")

    same, has_weights = workload.build("lr", schema, sample, seed=2, weights=tmp_path / "lr.safetensors")
    other, has_others = workload.build("fm", schema, sample, seed=2, weights=tmp_path / "lr.safetensors")

    assert has_weights and not has_others
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert len(list(other.parameters())) != len(list(one.parameters()))


def test_an_older_checkouts_modules_are_imported_by_todays_names(tmp_path):
    modules = {"encoding", "schema", "values", "calibration", "artifact", "blocks"}
    for name in modules:
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "models" / f"{name}.py").write_text(f"HOME = {name!r}\n")
    (tmp_path / "models" / "__init__.py").touch()
    script = "import older_layout\n" + "".join(
        f"from {name} import HOME; assert 'models.' + HOME == {older!r}\n"
        for name, older in __import__("older_layout").MOVED.items()
    )

    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{BENCH}"}, check=True)


# --- peers and sides ---


def test_inputs_are_read_as_they_were_saved(tmp_path):
    requests: list[Tensors] = [{"a": np.arange(n), "b": np.ones((n, 2), np.float32)} for n in (1, 2, 12)]

    save_inputs(requests, tmp_path / "inputs.npz")

    for expected, found in zip(requests, read_inputs(tmp_path / "inputs.npz"), strict=True):
        assert expected.keys() == found.keys()
        assert all(np.array_equal(expected[n], found[n]) and expected[n].dtype == found[n].dtype for n in expected)


@pytest.mark.parametrize("app", [peers.fastapi_app, peers.asgi_app])
async def test_a_peer_answers_encoded_tensors_as_the_model_does_offline(export, app):
    transport = httpx.ASGITransport(app=app(peers.Graph(export.graph)))
    async with httpx.AsyncClient(transport=transport, base_url="http://peer") as client:
        for tensors, expected in zip(export.inputs(7), export.probabilities(7), strict=True):
            answer = await client.post("/predict", content=peers.body(tensors), headers=JSON)

            np.testing.assert_allclose(answer.json()["ctr"], expected, atol=1e-6)


def test_a_side_whose_answers_are_not_the_models_is_refused(export, bodies, server):
    def side(probabilities: np.ndarray) -> sides.HTTPSide:
        return sides.HTTPSide(
            name="peer",
            server=server,
            sender=senders.PoolSender(),
            bodies={7: bodies},
            probabilities={7: probabilities},
            read=lambda answer: answer["ctr"],
        )

    right = export.probabilities(7)
    wrong = right.copy()
    wrong[1, 3] += 2 * sides.TOLERANCE

    side(right).check()
    with pytest.raises(
        sides.WrongAnswerError, match=r"body 2 of bodies.jsonl: expected 7 probabilities .* got up to 2e-05 off"
    ):
        side(wrong).check()
    with pytest.raises(sides.WrongAnswerError, match=r"got shape \(7,\)"):
        side(right[:, :5]).check()


@pytest.mark.parametrize("kind", ["pool", "wrk"])
def test_a_sender_counts_answers_and_refuses_a_server_that_fails(bodies, server, tmp_path, kind):
    if kind == "wrk" and shutil.which("wrk") is None:
        pytest.skip("wrk is not installed")
    (tmp_path / "bad.jsonl").write_text("{}")
    with senders.PoolSender() if kind == "pool" else senders.WrkSender("wrk") as sender:
        burst = sender.burst(server, bodies, connections=2, seconds=1)

        assert burst.per_s > 10 and 0 < (burst.p50_ms or 0) < 1000
        with pytest.raises(senders.SenderError, match="failed"):
            sender.burst(server, tmp_path / "bad.jsonl", connections=1, seconds=1)


def test_the_loop_runs_the_graph_without_http(export):
    with processes.loop(export.graph, export.inputs_file(7), cores=[0]) as loop:
        assert loop.runs_per_s(0.05) > 100


# --- checkouts ---


def test_a_checkout_is_gone_after_its_block():
    if not (checkouts.ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    with checkouts.checkout("HEAD") as tree:
        assert (tree / "models").is_dir()
        assert checkouts.commit_of(tree) == checkouts.commit_of(checkouts.ROOT).rstrip("+")

    assert not tree.exists()
    with pytest.raises(checkouts.CheckoutError, match="git worktree add: "), checkouts.checkout("no-such-commit"):
        pass


# --- turns and verdicts ---


def test_every_side_has_its_turn_in_every_round_and_the_first_round_does_not_count():
    calls: list[str] = []

    def run(name: str) -> int:
        calls.append(name)
        return len(calls)

    rounds = interleaved.run_rounds(["a", "b", "c"], run, 4, draw=random.Random(1))

    assert [list(found) for found in rounds] == [["a", "b", "c"]] * 4
    assert Counter(calls) == {"a": 5, "b": 5, "c": 5}
    assert min(min(found.values()) for found in rounds) == 4
    assert len({tuple(calls[n : n + 3]) for n in range(0, 15, 3)}) > 1  # the order differs


def test_a_ratio_is_taken_within_rounds():
    found = interleaved.ratio([2.0, 40.0, 9.0], [1.0, 10.0, 3.0])

    assert (found.median, found.low, found.high) == (3.0, 2.5, 3.5)
    assert interleaved.ratio([3.0], [2.0]) == interleaved.Ratio(median=1.5, low=1.5, high=1.5)


def cell(concurrency: int, **by_side: tuple[float, float]) -> engine.Cell:
    names = {"columns": sides.COLUMNS, "copy": sides.COPY, "old": sides.OLD_COLUMNS, "asgi": "bare ASGI, this graph"}
    burst = {names[k]: senders.Burst(per_s=per_s, p50_ms=ms) for k, (per_s, ms) in by_side.items()}
    return engine.Cell(workers=1, candidates=100, concurrency=concurrency, rounds=[burst])


def test_the_target_table_has_what_was_measured_and_whether_it_is_enough():
    cells = [
        cell(8, columns=(300, 3), copy=(290, 3), old=(100, 9), asgi=(400, 2)),
        cell(1, columns=(200, 1.4), copy=(200, 1.5), asgi=(250, 1.0)),
    ]

    rows = [line.split(" | ") for line in engine.target_table(cells).splitlines()[2:]]

    assert rows == [
        ["| the baseline", "100, 8", ">= 2.2x", "3.00 (3.00 to 3.00) met", "", "1.03 (1.03 to 1.03) |"],
        ["| bare ASGI, this graph", "100, 8", ">= 0.8x", "0.75 (0.75 to 0.75) **missed**", "", "1.03 (1.03 to 1.03) |"],
        [
            "| bare ASGI, this graph",
            "100, 1",
            "latency <= 1.5x",
            "1.40 (1.40 to 1.40) met",
            "",
            "0.93 (0.93 to 0.93) |",
        ],
    ]


@pytest.mark.skipif(
    "CLICKSERVE_BENCH" not in os.environ,
    reason="starts services and their peers one after the other, for most of a minute; CLICKSERVE_BENCH=1 runs it",
)
def test_a_smoke_run_measures_the_service_against_its_peers(world, tmp_path):
    """With logistic regression, which is exported in a moment."""
    workload.export_workload(tmp_path, model="lr", sizes=[7], world=world)
    plan = engine.Plan(workers=(1,), candidates=(7,), concurrency=(2,), rounds=1, seconds=0.2)

    with senders.PoolSender() as sender:
        export = checkouts.Export(folder=tmp_path)
        (found,) = engine.measure(plan, export, None, world=world, folder=tmp_path, sender=sender)

    assert found.sides == [
        *(sides.COLUMNS, sides.LIST, sides.COPY),
        *(f"{name}, {sides.THIS_GRAPH}" for name in (sides.FASTAPI, sides.ASGI, sides.LOOP)),
    ]
    assert all(found.per_s(side)[0] > 10 for side in found.sides)
    assert len(engine.cell_table(found).splitlines()) == 4 + len(found.sides)
    assert json.dumps(asdict(found))
