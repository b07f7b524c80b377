"""Loaded model: one artifact, verified and ready to score; its graphs, its inputs with their caches, its latency."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from models.artifact.calibration import Calibration
from models.artifact.folder import Artifact
from service.runtime import backends
from service.runtime.backend import Device, Kind
from service.runtime.onnx_cpu import OnnxBackend
from service.runtime.scheduler import ServedModel
from service.scoring.model_inputs import ModelInputBuilder


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """Two arms may share it."""

    artifact: Artifact
    kind: Kind
    device: Device
    served: ServedModel
    item_graph: OnnxBackend
    inputs: ModelInputBuilder

    @property
    def version(self) -> str:
        return self.artifact.manifest.version

    @property
    def name(self) -> str:
        return self.artifact.manifest.model

    @property
    def calibration(self) -> Calibration:
        return self.artifact.calibration

    @cached_property
    def explaining(self) -> OnnxBackend:
        """What explains its scores: loaded by the first call, not before. Raises ArtifactError."""
        return backends.load_explaining(self.artifact)

    def describe(self) -> dict[str, Any]:
        manifest = self.artifact.manifest
        fields = {"model", "version", "created", "metrics", "schema_fingerprint", "data_hash", "code_version"}
        return {**manifest.model_dump(include=fields), "backend": self.kind, "device": self.device}

    def close(self) -> None:
        """When none of its requests is under way."""
        self.served.backend.close()
        self.item_graph.close()


class Models(Protocol):
    """The models that serve, by arm."""

    def get(self, arm: str) -> LoadedModel: ...

    def previous(self, arm: str) -> LoadedModel | None:
        """What the arm served before, still loaded."""
