"""Export of a finished run: its artifact, with golden requests from the data it was trained on."""

from dataclasses import asdict
from pathlib import Path

from models import zoo
from models.artifact.errors import ArtifactError
from models.features.column_encoding import EncodingError
from training.data.batches import Prepared
from training.errors import UserError
from training.fit.run_folder import Trained


def export_run(trained: Trained, out: Path) -> Path:
    """Write the run's artifact under `out`, verified by reading it back; returns its folder.

    Raises UserError where the data are no longer those of the run, or the artifact cannot be written or verified.
    """
    # onnxruntime and the exporters load for seconds, and may not be installed.
    try:
        from training.export import ExportError, export
    except ModuleNotFoundError as err:
        raise UserError(f"export needs {err.name}: install the extra serve or gpu beside train") from err

    data = Prepared.open(trained.data)
    if data.schema.fingerprint != trained.schema.fingerprint:
        raise UserError(f"{data.path} is encoded by another schema than {trained.path} was trained with")
    try:
        return export(
            trained.run.model,
            asdict(zoo.configure(trained.run.model, trained.run.model_config)),
            trained.model,
            trained.schema,
            calibration=trained.calibration,
            metrics=trained.metrics,
            golden_requests=data.golden_requests(),
            data_hash=trained.data_hash,
            out=out,
        )
    except (ExportError, ArtifactError, EncodingError, OSError) as err:
        raise UserError(f"{trained.path} was not exported: {err}") from err
