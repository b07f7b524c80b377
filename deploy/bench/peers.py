"""Peers of the service: the same graph behind plain FastAPI, behind a bare ASGI app, and in a loop without HTTP.

    python deploy/bench/peers.py fastapi GRAPH.onnx --port PORT
    python deploy/bench/peers.py asgi GRAPH.onnx --port PORT
    python deploy/bench/peers.py loop GRAPH.onnx INPUTS.npz

The two servers do less than the service: the client hands them encoded tensors, as JSON by name, and there is no store,
no feature, no encoding, no experiment, no metric and no deadline. Both run under uvicorn with httptools and uvloop, one
process each on a socket with SO_REUSEPORT, so that several can share a port. The loop reads numbers of seconds from
stdin, runs the graph for as long, and answers `RUNS SECONDS`.
"""

import argparse
import itertools
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvicorn
from fastapi import FastAPI
from numpy.typing import NDArray

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

LISTENING = "listening"  # printed by each process once it answers
RUNS_PER_CLOCK_READ = 16
DTYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(bool)": np.bool_}

Message = dict[str, Any]
ASGIApp = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


class Graph:
    """One ONNX Runtime session, one thread, as the service has it."""

    def __init__(self, file: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
        self.dtypes = {i.name: DTYPES[i.type] for i in self.session.get_inputs()}

    def run(self, tensors: Mapping[str, Sequence[Any]]) -> list[float]:
        """Click probabilities of nested lists by input name."""
        feed: dict[str, NDArray[Any]] = {
            name: np.array(tensors[name], dtype=dtype) for name, dtype in self.dtypes.items()
        }
        logits: NDArray[np.float32] = self.session.run(["logit"], feed)[0]
        probabilities: list[float] = (1 / (1 + np.exp(-logits))).tolist()
        return probabilities


def fastapi_app(graph: Graph) -> FastAPI:
    """As its documentation shows it: an async endpoint with annotated types."""
    app = FastAPI()

    @app.post("/predict")
    async def predict(tensors: dict[str, list[Any]]) -> dict[str, list[float]]:
        return {"ctr": graph.run(tensors)}

    return app


def asgi_app(graph: Graph) -> ASGIApp:
    """The least that an ASGI server can be asked to do."""
    decoder = msgspec.json.Decoder(dict[str, list[Any]])
    encoder = msgspec.json.Encoder()

    async def app(
        scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        assert scope["type"] == "http"
        message = await receive()
        body: bytes = message["body"]
        while message["more_body"]:
            message = await receive()
            body += message["body"]
        answer = encoder.encode({"ctr": graph.run(decoder.decode(body))})
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    return app


def body(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """A request's encoded tensors as the peers take them."""
    return msgspec.json.encode({name: array.tolist() for name, array in tensors.items()})


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(LISTENING, flush=True)


def serve(app: Any, port: int) -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", port))
        listener.set_inheritable(True)
        config = uvicorn.Config(
            app, http="httptools", loop="uvloop", lifespan="off", log_level="warning", access_log=False
        )
        _Server(config).run(sockets=[listener])


def run_loop(graph: Graph, requests: Sequence[Mapping[str, NDArray[Any]]]) -> None:
    feeds = itertools.cycle([{name: request[name] for name in graph.dtypes} for request in requests])
    run = graph.session.run
    for _ in range(100):
        run(["logit"], next(feeds))
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, runs, started = float(line), 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds:
            for _ in range(RUNS_PER_CLOCK_READ):
                run(["logit"], next(feeds))
            runs += RUNS_PER_CLOCK_READ
        print(runs, elapsed, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["fastapi", "asgi", "loop"])
    parser.add_argument("graph", type=Path)
    parser.add_argument("inputs", type=Path, nargs="?")
    parser.add_argument("--port", type=int)
    options = parser.parse_args(arguments)
    graph = Graph(options.graph)
    if options.peer == "loop":
        from inputs import read_inputs

        run_loop(graph, read_inputs(options.inputs))
    else:
        serve((fastapi_app if options.peer == "fastapi" else asgi_app)(graph), options.port)


if __name__ == "__main__":
    main()
