"""The Open Inference Protocol, version 2: each arm's model for clients that encode by themselves and speak in tensors.

What is scored here belongs to no user of the experiment: it is no exposure, and is in no arm's predicted CTR.
"""

import importlib.metadata
import time
from collections.abc import Awaitable, Callable
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
from fastapi import Request, Response
from numpy.typing import NDArray
from starlette.types import Receive, Scope

from service.deadline import Deadline
from service.errors import Refusal
from service.http import openapi, tensors
from service.http.middleware import CancelOnDisconnect
from service.http.problems import NoSuchModel
from service.http.tensors import DATATYPES, OUTPUTS, Contract, KnownTensor, ModelTensors
from service.registry.registry import ModelRegistry
from service.runtime.scheduler import Scheduler
from service.scoring.loaded_model import LoadedModel
from service.scoring.tensor_scoring import score_tensors
from service.settings import Settings

EXTENSIONS = ["binary_tensor_data"]
HEADER_LENGTH = "Inference-Header-Content-Length"
PLATFORMS = {"onnx": "onnx_onnxv1", "torchscript": "pytorch_torchscript"}


class OpenInference:
    """A model's name is its arm's. `models` and `scheduler` raise NotOpen while the service is not open."""

    def __init__(
        self,
        settings: Settings,
        *,
        models: Callable[[], ModelRegistry],
        scheduler: Callable[[], Scheduler],
        body: Callable[[Scope, Receive], Awaitable[bytes]],
        ready: Callable[[], Awaitable[Response]],
    ) -> None:
        self._settings = settings
        self._models = models
        self._scheduler = scheduler
        self._body = body
        self._ready = ready
        self._contracts: WeakKeyDictionary[LoadedModel, Contract] = WeakKeyDictionary()

    def add_routes(self, add: Callable[..., None]) -> None:
        add("/v2", self.server, **openapi.V2_SERVER)
        add("/v2/health/live", self.live, **openapi.V2_HEALTH)
        add("/v2/health/ready", self.ready, **openapi.V2_HEALTH)
        for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            add(path, self.model, **openapi.placed(openapi.V2_MODEL, path))
            add(f"{path}/ready", self.model_ready, **openapi.placed(openapi.V2_MODEL_READY, path))
            add(f"{path}/infer", self.infer, methods=["POST"], **openapi.placed(openapi.V2_INFER, path))

    async def server(self) -> Response:
        version = importlib.metadata.version("clickserve")
        return _json({"name": "clickserve", "version": version, "extensions": EXTENSIONS})

    async def live(self) -> Response:
        return _json({"live": True})

    async def ready(self) -> Response:
        status = (await self._ready()).status_code
        return _json({"ready": status == 200}, status=status)

    async def model(self, request: Request) -> Response:
        name, model = self._model(request)
        inputs = [
            KnownTensor(t.name, DATATYPES[t.dtype], tuple(d if isinstance(d, int) else -1 for d in t.dims))
            for t in model.artifact.manifest.inputs
        ]
        outputs = [KnownTensor(output, "FP32", (-1,)) for output in OUTPUTS]
        versions = [model.artifact.manifest.version]
        return _json(ModelTensors(name, versions, PLATFORMS[model.kind], inputs, outputs))

    async def model_ready(self, request: Request) -> Response:
        name, _ = self._model(request)
        return _json({"name": name, "ready": True})  # an arm's model is in the catalog when it is verified and warm

    async def infer(self, request: Request) -> Response:
        deadline = Deadline.after(self._settings.timeout_ms, since=time.monotonic())
        body = await self._body(request.scope, request.receive)
        name, model = self._model(request)  # from here to its line nothing is awaited in which it could be swapped
        try:
            sent = tensors.decode(body, request.headers.get(HEADER_LENGTH))
            tensors.check_outputs(sent.request)
            if model not in self._contracts:
                self._contracts[model] = Contract(model.artifact)
            arrays = self._contracts[model].arrays(sent, max_candidates=self._settings.max_candidates)
            with CancelOnDisconnect(request.receive):
                logits = await score_tensors(model, arrays, deadline, self._scheduler())
        except Refusal as refusal:
            refusal.arm = name
            raise
        request.state.arm = name
        outputs: dict[str, NDArray[Any]] = {"logit": logits, "prob": model.artifact.calibration(logits)}
        content, header = tensors.encode(sent.request, outputs, model=name, version=model.artifact.manifest.version)
        if header is None:
            return Response(content, media_type="application/json")
        return Response(content, media_type="application/octet-stream", headers={HEADER_LENGTH: str(header)})

    def _model(self, request: Request) -> tuple[str, LoadedModel]:
        """Raises NoSuchModel for a model that no arm serves, or in another version than asked for."""
        name, version = request.path_params["model"], request.path_params.get("version")
        models = self._models().models
        if name not in models:
            raise NoSuchModel(f"no arm is called {name:.64}; there are {', '.join(models)}")
        serving = models[name].artifact.manifest.version
        if version is not None and version != serving:
            raise NoSuchModel(f"{name} serves version {serving}, not {version:.64}")
        return name, models[name]


def _json(answer: Any, *, status: int = 200) -> Response:
    return Response(msgspec.json.encode(answer), status_code=status, media_type="application/json")
