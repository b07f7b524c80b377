"""LoadedModel loader: reads an artifact, verifies it against its golden rows, measures its latency."""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from models.artifact import folder as artifact
from models.artifact.errors import ArtifactError
from models.artifact.folder import Artifact
from service.experiments.assignment import Arm
from service.runtime import backends
from service.runtime.backend import BackendError
from service.runtime.batcher import Batcher, Runner
from service.runtime.latency_model import Cost
from service.scoring.loaded_model import LoadedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelLoader:
    """How an artifact becomes a model. Its runs go through the `runner`, each of at most `max_candidates`.

    The store keeps `keep_behaviours` clicks of a user: a model that reads more would be served another history than it
    was trained on.
    """

    root: Path
    runner: Runner
    max_candidates: int
    keep_behaviours: int

    def load(self, arm: Arm, version: str, *, loaded: Iterable[LoadedModel] = ()) -> LoadedModel:
        """That version of the arm's model, verified: hashes, schema, golden rows, finite scores. Takes seconds.

        Every load reads all of the folder. If one of the `loaded` models was made of the same files, it is that
        model; if one has the same schema, its lookup tables are shared. A schema may differ from the serving one in
        everything: whether requests bring what it reads cannot be known here. Raises ArtifactError.
        """
        started = time.perf_counter()
        path = artifact.resolve(self.root, arm.model, version).resolve()
        loaded = list(loaded)
        verified = artifact.read(path, known=[model.artifact for model in loaded])
        manifest = verified.manifest
        if (manifest.model, manifest.version) != (arm.model, path.name):
            found = f"holds {manifest.model} {manifest.version}, not {arm.model} {path.name}"
            raise ArtifactError(f"{path}/manifest.json: {found}; export it again")
        length = verified.schema.history_length
        if length > self.keep_behaviours:
            reads = f"it reads the last {length} clicks of a user and the store keeps {self.keep_behaviours}"
            raise ArtifactError(f"{path}: {reads}; set keep_behaviours to at least {length}")
        for model in loaded:
            same = model.artifact.path == path and model.artifact.manifest == manifest
            if same and (model.kind, model.device) == (arm.backend, arm.device):
                return model
        model = self._make_model(verified, arm)
        took = round(time.perf_counter() - started, 3)
        details = {"arm": arm.name, "model": arm.model, "version": manifest.version, "seconds": took}
        log.info("model loaded", extra=details)
        return model

    def _make_model(self, verified: Artifact, arm: Arm) -> LoadedModel:
        backend = backends.load(verified, arm.backend, arm.device)
        try:
            artifact.check_scores(verified, backend.run(verified.golden.arrays))
            request = verified.encoder.encode(verified.golden.requests[0])
            cost = Cost.measured(backend, request, max_candidates=self.max_candidates)  # at every size: it warms too
        except BackendError as err:
            backend.close()
            details = f"its graph does not run on its own golden rows: {err}"
            raise ArtifactError(f"{verified.path}: {details}") from err
        except BaseException:
            backend.close()
            raise
        return LoadedModel(
            artifact=verified,
            encoder=verified.encoder,
            backend=backend,
            kind=arm.backend,
            device=arm.device,
            batcher=Batcher(backend, cost, self.runner),
        )
