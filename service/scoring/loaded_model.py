"""One artifact loaded and verified: encoder, graph and batcher of a model version."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from models.artifact.folder import Artifact
from models.features.encoder import Encoder
from service.runtime import backends
from service.runtime.backend import Backend, Device, Kind
from service.runtime.batcher import Batcher
from service.runtime.onnx_cpu import OnnxBackend


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """One artifact, ready to score; two arms may share it."""

    artifact: Artifact
    encoder: Encoder
    backend: Backend
    kind: Kind
    device: Device
    batcher: Batcher

    @property
    def version(self) -> str:
        return self.artifact.manifest.version

    @cached_property
    def explaining(self) -> OnnxBackend:
        """What explains its scores: loaded by the first call, not before. Raises ArtifactError."""
        return backends.load_explaining(self.artifact)

    def describe(self) -> dict[str, Any]:
        manifest = self.artifact.manifest
        told = {"model", "version", "created", "metrics", "schema_fingerprint", "data_hash", "code_version"}
        return {**manifest.model_dump(include=told), "backend": self.kind, "device": self.device}
