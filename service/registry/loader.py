"""Model loader: reads an artifact, verifies it against its golden rows, measures its latency."""

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
from service.runtime.latency_model import LatencyModel
from service.runtime.scheduler import ServedModel
from service.scoring.loaded_model import LoadedModel
from service.scoring.model_inputs import ModelInputBuilder

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelLoader:
    """How an artifact becomes a model, whose runs are of at most `max_candidates`.

    Of each model `item_rows` candidates and as many clicks are kept encoded, candidates for `fresh_s` seconds.

    The store keeps `keep_behaviours` clicks of a user: a model that reads more would be served another history than it
    was trained on.
    """

    root: Path
    max_candidates: int
    keep_behaviours: int
    item_rows: int
    fresh_s: float

    def load(self, arm: Arm, version: str, *, loaded: Iterable[LoadedModel] = ()) -> LoadedModel:
        """That version of the arm's model, verified: hashes, schema, golden rows, finite scores. Takes seconds.

        Every load reads the whole folder. If one of the `loaded` models was made of the very same files, it is that
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
        backend, item_graph = backends.load(verified, arm.backend, arm.device), backends.load_item_graph(verified)
        try:
            layout, golden = verified.encoder.layout, verified.golden
            artifact.check_scores(verified, backends.score(backend, item_graph, layout.pack(golden.arrays)))
            request = layout.pack(verified.encoder.encode(golden.requests[0]))
            request["items"] = item_graph.run(request)
            latency = LatencyModel.measured(backend, request, max_candidates=self.max_candidates)
        except BackendError as err:
            backend.close()
            item_graph.close()
            raise ArtifactError(f"{verified.path}: its graph does not run on its own golden rows: {err}") from err
        except BaseException:
            backend.close()
            item_graph.close()
            raise
        return LoadedModel(
            artifact=verified,
            kind=arm.backend,
            device=arm.device,
            served=ServedModel(backend=backend, latency=latency),
            item_graph=item_graph,
            inputs=ModelInputBuilder(verified, item_graph.run, item_rows=self.item_rows, fresh_s=self.fresh_s),
        )
