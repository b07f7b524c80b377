"""The sides of engine.py: services and peers that answer the same requests, each with its bodies and right answers."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import peers
import workload
from checkouts import ROOT, Export
from numpy.typing import NDArray
from processes import Loop, Server, loop, peer, service
from senders import Burst, Sender

from service.store import local_server

TOLERANCE = 1e-5  # of a probability
COLUMNS, LIST, COPY = "Clickserve, columns", "Clickserve, list", "Clickserve's copy, columns"
OLD_COLUMNS, OLD_LIST = "baseline, columns", "baseline, list"
FASTAPI, ASGI, LOOP = "FastAPI", "bare ASGI", "loop of session.run"
THIS_GRAPH, OLD_GRAPH = "this graph", "the baseline's graph"


class WrongAnswerError(RuntimeError):
    """A side does not answer what the model says offline."""


class Side(Protocol):
    @property
    def name(self) -> str: ...

    def check(self) -> None:
        """Compare its answers with what the model says offline. Raises WrongAnswerError."""

    def burst(self, *, candidates: int, concurrency: int, seconds: float) -> Burst: ...

    def num_degraded(self) -> float:
        """Answers so far that went without something."""


@dataclass(frozen=True, kw_only=True)
class HTTPSide:
    name: str
    server: Server
    sender: Sender
    bodies: Mapping[int, Path]  # by number of candidates: one body a line
    probabilities: Mapping[int, NDArray[np.float64]]  # [R, N], a row for each body
    read: Callable[[dict[str, Any]], Sequence[float]]  # the probabilities in an answer
    is_service: bool = False

    def check(self) -> None:
        for num, file in self.bodies.items():
            for line, (body, expected) in enumerate(
                zip(file.read_bytes().splitlines(), self.probabilities[num], strict=True), start=1
            ):
                found = np.array(self.read(self._post(body)))
                same_shape = found.shape == expected.shape
                if not same_shape or not (off := np.abs(found - expected).max()) <= TOLERANCE:
                    difference = f"up to {off:.3g} off" if same_shape else f"shape {found.shape}"
                    raise WrongAnswerError(
                        f"{self.name}, body {line} of {file.name}: expected {len(expected)} probabilities as the model "
                        f"has them offline, to {TOLERANCE:g}; got {difference}"
                    )

    def _post(self, body: bytes) -> dict[str, Any]:
        connection = HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        try:
            connection.request("POST", "/predict", body, {"content-type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        answer: dict[str, Any] = json.loads(content) if response.status == 200 else {}
        if response.status != 200 or answer.get("degraded"):
            raise WrongAnswerError(f"{self.name}: {response.status}: {content[-300:].decode(errors='replace')}")
        return answer

    def burst(self, *, candidates: int, concurrency: int, seconds: float) -> Burst:
        return self.sender.burst(self.server, self.bodies[candidates], connections=concurrency, seconds=seconds)

    def num_degraded(self) -> float:
        return self.server.num_degraded() if self.is_service else 0.0


@dataclass(frozen=True, kw_only=True)
class LoopSide:
    """One core's worth of the graph, whatever the concurrency. Its graph is one that a peer has been checked with."""

    name: str
    loops: Mapping[int, Loop]

    def check(self) -> None:
        pass

    def burst(self, *, candidates: int, concurrency: int, seconds: float) -> Burst:  # noqa: ARG002 - it has none
        return Burst(per_s=self.loops[candidates].runs_per_s(seconds))

    def num_degraded(self) -> float:
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Checkout:
    """A checkout as a side: its folder, its export, and a store that its own code has filled."""

    tree: Path
    export: Export
    store: local_server.RedisServer


@dataclass(frozen=True, kw_only=True)
class SideStarter:
    """Starts the sides on some cores; bodies are written once."""

    folder: Path
    sender: Sender
    world: workload.World
    candidates: Sequence[int]
    this: Checkout
    baseline: Checkout | None
    bodies: dict[str, dict[int, Path]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for num in self.candidates:
            requests = workload.requests(self.world, workload.NUM_REQUESTS, num)
            for form in ("columns", "list"):
                lines = (workload.body(request, columnar=form == "columns") for request in requests)
                self._write(form, num, lines)
            for graph, checkout in self._graphs():
                self._write(graph, num, (peers.body(tensors) for tensors in checkout.export.inputs(num)))

    def _write(self, kind: str, num: int, lines: Iterable[bytes]) -> None:
        file = self.folder / f"{kind.replace(' ', '-')}-{num}.jsonl"
        file.write_bytes(b"\n".join(lines))
        self.bodies.setdefault(kind, {})[num] = file

    def _graphs(self) -> Iterator[tuple[str, Checkout]]:
        yield THIS_GRAPH, self.this
        if self.baseline is not None:
            yield OLD_GRAPH, self.baseline

    @contextmanager
    def start(self, *, workers: int, cores: Sequence[int]) -> Iterator[list[Side]]:
        """All of them; the loops only with one worker, as they are of one process."""
        with ExitStack() as stack:
            sides: list[Side] = []
            served = self._service(stack, self.this, workers, cores)
            sides += [self._service_side(COLUMNS, served, self.this), self._service_side(LIST, served, self.this)]
            copy = self._service(stack, self.this, workers, cores)
            sides.append(self._service_side(COPY, copy, self.this))
            if self.baseline is not None:
                older = self._service(stack, self.baseline, workers, cores)
                sides.append(self._service_side(OLD_COLUMNS, older, self.baseline))
                sides.append(self._service_side(OLD_LIST, older, self.baseline))
            for graph, checkout in self._graphs():
                for name, kind in PEERS:
                    server = stack.enter_context(
                        peer(kind, checkout.export.graph, self.folder, cores=cores, workers=workers)
                    )
                    sides.append(
                        HTTPSide(
                            name=f"{name}, {graph}",
                            server=server,
                            sender=self.sender,
                            bodies=self.bodies[graph],
                            probabilities=self._probabilities(checkout),
                            read=_peer_probabilities,
                        )
                    )
                if workers == 1:
                    export = checkout.export
                    loops = {
                        num: stack.enter_context(loop(export.graph, export.inputs_file(num), cores=cores))
                        for num in self.candidates
                    }
                    sides.append(LoopSide(name=f"{LOOP}, {graph}", loops=loops))
            yield sides

    def _service(self, stack: ExitStack, checkout: Checkout, workers: int, cores: Sequence[int]) -> Server:
        return stack.enter_context(
            service(
                checkout.export.facts["model"],
                checkout.export.artifacts,
                self.folder,
                checkout.store.url,
                cores=cores,
                workers=workers,
                checkout=checkout.tree,
                CLICKSERVE_STORE_TIMEOUT_MS="1000",
                CLICKSERVE_MAX_QUEUED_CANDIDATES="100000",  # 32 connections of 1000 wait in the older commit's queue
            )
        )

    def _service_side(self, name: str, server: Server, checkout: Checkout) -> HTTPSide:
        columnar = name.endswith("columns")
        bodies = self.bodies["columns" if columnar else "list"]
        return service_side(name, server, self.sender, bodies, self._probabilities(checkout), columnar=columnar)

    def _probabilities(self, checkout: Checkout) -> dict[int, NDArray[np.float64]]:
        return {num: checkout.export.probabilities(num) for num in self.candidates}


def service_side(
    name: str,
    server: Server,
    sender: Sender,
    bodies: Mapping[int, Path],
    probabilities: Mapping[int, NDArray[np.float64]],
    *,
    columnar: bool,
) -> HTTPSide:
    return HTTPSide(
        name=name,
        server=server,
        sender=sender,
        bodies=bodies,
        probabilities=probabilities,
        read=_column_probabilities if columnar else _list_probabilities,
        is_service=True,
    )


PEERS: tuple[tuple[str, Literal["fastapi", "asgi"]], ...] = ((FASTAPI, "fastapi"), (ASGI, "asgi"))


def _peer_probabilities(answer: dict[str, Any]) -> Sequence[float]:
    found: list[float] = answer["ctr"]
    return found


def _column_probabilities(answer: dict[str, Any]) -> Sequence[float]:
    found: list[float] = answer["predictions"]["ctr"]
    return found


def _list_probabilities(answer: dict[str, Any]) -> Sequence[float]:
    return [prediction["ctr"] for prediction in answer["predictions"]]


def filled_store(stack: ExitStack, world: workload.World, folder: Path, tree: Path = ROOT) -> local_server.RedisServer:
    """A running server that the checkout's own code has filled."""
    server = stack.enter_context(local_server.start())
    workload.load_store(world, folder, server.url, checkout=tree)
    return server


def bind(pids: Sequence[int], cores: Sequence[int]) -> None:
    for pid in pids:
        os.sched_setaffinity(pid, cores)
