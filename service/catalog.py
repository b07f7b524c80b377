"""The models that serve: found, verified, warmed, one for each arm."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from models import artifact
from models.artifact import Artifact
from models.encoding import Arrays, Encoder
from service import backends
from service.backends import Backend, Kind, OnnxBackend
from service.experiment import Arm

log = logging.getLogger(__name__)

WARM_SIZES = (1, 2, 100, 1000)  # candidates: the first run of a new size allocates


@dataclass(frozen=True, kw_only=True)
class Model:
    """One artifact, ready to score; two arms may share it."""

    artifact: Artifact
    encoder: Encoder
    backend: Backend
    kind: Kind

    @cached_property
    def explaining(self) -> OnnxBackend:
        """What explains its scores: loaded by the first call, not before. Raises ArtifactError."""
        return backends.load_explaining(self.artifact)

    def describe(self) -> dict[str, Any]:
        manifest = self.artifact.manifest
        told = {"model", "version", "created", "metrics", "schema_fingerprint", "data_hash", "code_version"}
        return {**manifest.model_dump(include=told), "backend": self.kind}


class Catalog:
    """Every arm's model by the arm's name. Close it when no request is under way."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        self.models = models

    @classmethod
    def load(cls, root: Path, arms: Sequence[Arm]) -> Self:
        """Takes seconds. Raises ArtifactError if any arm's artifact is missing, damaged, or scores as it should not."""
        loaded: dict[tuple[Path, Kind], Model] = {}
        models = {}
        for arm in arms:
            started = time.perf_counter()
            path = artifact.resolve(root, arm.model, arm.version).resolve()
            if (path, arm.backend) not in loaded:
                loaded[path, arm.backend] = _load(path, arm.backend)
            models[arm.name] = model = loaded[path, arm.backend]
            took = round(time.perf_counter() - started, 3)
            version = model.artifact.manifest.version
            log.info("model loaded", extra={"arm": arm.name, "model": arm.model, "version": version, "seconds": took})
        return cls(models)

    def close(self) -> None:
        for model in {id(model): model for model in self.models.values()}.values():
            model.backend.close()


def _load(path: Path, kind: Kind) -> Model:
    verified = artifact.read(path)
    backend = backends.load(verified, kind)
    try:
        artifact.check_scores(verified, backend.run(verified.golden.arrays))
        encoder = Encoder(verified.schema)
        for size in WARM_SIZES:
            backend.run(_repeated(encoder.encode(verified.golden.requests[0]), size))
    except backends.BackendError as err:
        raise artifact.ArtifactError(f"{path}: its graph does not run on its own golden rows: {err}") from err
    return Model(artifact=verified, encoder=encoder, backend=backend, kind=kind)


def _repeated(arrays: Arrays, num_candidates: int) -> Arrays:
    """One request with its first candidate, that many times."""
    rows = np.zeros(num_candidates, dtype=np.int64)
    return {n: a[rows] if n.startswith("item.") or n == "user_index" else a for n, a in arrays.items()}
