"""The door of the service: serve | load-behaviours | load-features."""

import argparse
import asyncio
import math
import sys
from collections.abc import Callable
from pathlib import Path

import uvloop

from models.artifact.errors import ArtifactError
from service import settings
from service.errors import LoadError
from service.experiments import assignment
from service.experiments.assignment import ExperimentError
from service.observability import json_log, multiprocess
from service.process import supervisor
from service.process.supervisor import Host, WorkerError
from service.settings import Settings, SettingsError
from service.store import redis_store
from service.store.feature_store import StoreUnavailable
from service.worker import WorkerInfo

WORKER = (sys.executable, "-m", "service", "serve", "--as-worker")
LOADING_TIMEOUT_S = 30.0  # a load waits for a busy store; a request does not


def main(argv: list[str] | None = None) -> int:
    """0 when all went well, 2 with one sentence on stderr when what the user gave cannot be used."""
    arguments = _parser().parse_args(argv)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(arguments))
    except (SettingsError, ExperimentError, ArtifactError, LoadError, StoreUnavailable, WorkerError) as err:
        if vars(arguments).get("as_worker"):
            print(err)  # to the supervisor, which repeats what one of its workers said
        else:
            print(f"error: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


async def _run(arguments: argparse.Namespace) -> None:
    if arguments.command == "serve" and arguments.as_worker:
        await supervisor.work(serve_here, setup=lambda worker: json_log.setup(worker=worker.slot))
        return
    if arguments.command == "serve":
        json_log.setup()
        host = Host(command=WORKER, reload=lambda: _serve_settings(arguments), ended=multiprocess.leave)
        await supervisor.serve(_serve_settings(arguments), host, serve_here)
        return
    from service.ingest import bulk_load  # and polars, which a service needs not

    loaded = settings.load(arguments.config)
    store = redis_store.opened(loaded, write_timeout_s=LOADING_TIMEOUT_S)
    try:
        if arguments.command == "load-behaviours":
            new = await bulk_load.load_behaviours(
                arguments.file,
                store,
                store_name=f"{loaded.redis_url} {loaded.redis_prefix}",
                resume=arguments.resume,
                max_per_s=arguments.max_per_second,
            )
            print(f"{new} new clicks")
        else:
            print(f"{await bulk_load.load_features(arguments.kind, arguments.file, store)} {arguments.kind}")
    finally:
        await store.aclose()


async def serve_here(settings: Settings, worker: WorkerInfo, listening: Callable[[], None] | None = None) -> None:
    """The app in this process. Its modules are only loaded here: a supervisor needs none of them."""
    from service.app import create_app
    from service.process import server

    app = create_app(settings, worker)
    await server.serve(
        app,
        opened=app.router.lifespan_context(app),
        protocol=app.state.connection,
        lifecycle=app.state.api,
        settings=settings,
        worker=worker,
        listening=listening,
    )


def _serve_settings(arguments: argparse.Namespace) -> Settings:
    """With the experiment written out: a worker that is replaced serves what the others do, whatever the file says.

    Raises SettingsError or ExperimentError.
    """
    flags = {"host": arguments.host, "port": arguments.port, "workers": arguments.workers}
    loaded = settings.load(arguments.config, **flags)
    experiment = assignment.from_setting(loaded.experiment).model_dump(mode="json", by_alias=True)
    return loaded.model_copy(update={"experiment": experiment})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m service", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="answer requests over HTTP")
    serve.add_argument("--host")
    serve.add_argument("--port", type=int)
    serve.add_argument("--workers", type=int, help="processes, one a core; 0, the default, is as many as there are")
    serve.add_argument("--as-worker", action="store_true", help=argparse.SUPPRESS)  # one of those, told all on stdin
    behaviours = commands.add_parser("load-behaviours", help="past clicks from Parquet: columns user, item, ts")
    behaviours.add_argument("--resume", action="store_true", help="go on with a load of this file that was interrupted")
    behaviours.add_argument(
        "--max-per-second", type=_rate, metavar="N", help="clicks a second, to leave more of the store to others"
    )
    features = commands.add_parser("load-features", help="users' or items' raw features from Parquet")
    features.add_argument("kind", choices=("users", "items"))
    for command in (behaviours, features):
        command.add_argument("file", type=Path)
    for command in (serve, behaviours, features):
        text = "settings as YAML; CLICKSERVE_* variables win over it, options over both"
        command.add_argument("--config", type=Path, help=text)
    return parser


def _rate(text: str) -> float:
    rate = float(text)
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return rate


if __name__ == "__main__":
    sys.exit(main())
