"""What training hands to serving: one folder, written whole, read back and verified, or refused.

`<root>/<model>/<version>/` holds `manifest.json`, `schema.json`, `calibration.json`, `golden.json`, the exported graphs
and the weights. `<root>/<model>/current.json` names the version in use.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from models.calibration import Calibration
from models.encoding import Arrays, Encoder, EncodingError, Event, Request, concat
from models.schema import Schema, SchemaError

CURRENT = "current"
# float32 graphs on different runtimes add the same numbers in different orders (models.md section 1).
LOGIT_TOLERANCE = 1e-5


class ArtifactError(ValueError):
    """An artifact that is missing, damaged, or does not do what it says; the message names the file."""


class Tensor(BaseModel):
    """One input of the exported graphs; "U" counts requests, "C" candidates."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dtype: str
    dims: tuple[str | int, ...]


class Manifest(BaseModel):
    """What the artifact is, where it came from, and the sha256 of every other file in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str
    version: str
    created: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    schema_fingerprint: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    code_version: str
    data_hash: str
    files: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A few raw requests, the arrays they encode to (joined by `concat`), and the logits the trained model gave."""

    requests: tuple[Request, ...]
    arrays: Arrays
    logits: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One verified artifact folder."""

    path: Path
    manifest: Manifest
    schema: Schema
    calibration: Calibration
    golden: Golden


def write(
    root: Path,
    *,
    model: str,
    config: Mapping[str, Any],
    schema: Schema,
    calibration: Calibration,
    metrics: Mapping[str, Any],
    golden: Golden,
    inputs: Sequence[str],
    data_hash: str,
    files: Mapping[str, bytes],
) -> Path:
    """Write one new version and make it the current one; returns its folder.

    `inputs` names the schema's inputs that the exported graphs take; `files` are the graphs and weights by name.
    The folder is written under a temporary name, read back as the service would, and only then renamed: a reader
    never sees half an artifact. Raises ArtifactError when what was written does not read back.
    """
    contents = {
        **files,
        "schema.json": schema.to_json().encode(),
        "calibration.json": calibration.model_dump_json().encode(),
        "golden.json": _dump(golden),
    }
    folder = root / model
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".writing-{os.getpid()}"
    draft.mkdir()
    try:
        for name, content in contents.items():
            (draft / name).write_bytes(content)
        version = _next_version(folder)
        manifest = Manifest(
            model=model,
            version=version,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            config=dict(config),
            metrics=dict(metrics),
            schema_fingerprint=schema.fingerprint,
            inputs=tuple(Tensor(name=i.name, dtype=i.dtype, dims=i.dims) for i in schema.inputs if i.name in inputs),
            outputs=("logit", "prob"),
            code_version=_code_version(),
            data_hash=data_hash,
            files={name: _sha256(content) for name, content in sorted(contents.items())},
        )
        (draft / "manifest.json").write_text(manifest.model_dump_json(indent=2))
        read(draft)
        final = folder / version
        draft.rename(final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    make_current(root, model, version)
    return final


def read(path: Path) -> Artifact:
    """Read an artifact folder and verify all that can be verified without running the model.

    Every file has the manifest's sha256, the schema the manifest's fingerprint, and the golden requests encode to the
    stored arrays, bit for bit. Raises ArtifactError otherwise. The golden logits are for `check_scores`.
    """
    manifest = _read_manifest(path)
    contents = {}
    for name, expected in manifest.files.items():
        if Path(name).name != name or (path / name).is_symlink():
            raise ArtifactError(f"{path}/manifest.json: {name!r} is not a plain file of this folder")
        try:
            content = (path / name).read_bytes()
        except OSError as err:
            raise ArtifactError(f"{path / name}: named in the manifest but unreadable ({err.strerror})") from err
        found = _sha256(content)
        if found != expected:
            raise ArtifactError(
                f"{path / name}: sha256 {found[:12]} is not the manifest's {expected[:12]}; damaged file"
            )
        contents[name] = content
    try:
        schema = Schema.from_json(contents["schema.json"])
        calibration = Calibration.model_validate_json(contents["calibration.json"])
        golden = _load(contents["golden.json"])
    except KeyError as err:
        raise ArtifactError(f"{path}/manifest.json: does not list {err.args[0]}") from err
    except (SchemaError, ValueError, TypeError) as err:
        raise ArtifactError(f"{path}: {err}") from err
    if schema.fingerprint != manifest.schema_fingerprint:
        raise ArtifactError(
            f"{path}/schema.json: fingerprint {schema.fingerprint[:12]} does not match the model's"
            f" {manifest.schema_fingerprint[:12]}; export it again"
        )
    _check_arrays(path, golden, schema)
    return Artifact(path=path, manifest=manifest, schema=schema, calibration=calibration, golden=golden)


def check_scores(artifact: Artifact, logits: NDArray[Any]) -> None:
    """Compare a backend's logits of the golden arrays with the trained model's; ArtifactError where they differ."""
    expected = artifact.golden.logits
    if logits.shape != expected.shape:
        raise ArtifactError(f"{artifact.path}: {logits.shape} golden scores came, {expected.shape} were expected")
    off = np.abs(logits - expected) > LOGIT_TOLERANCE * (1 + np.abs(expected))
    off |= ~np.isfinite(logits)
    if off.any():
        row = int(np.flatnonzero(off)[0])
        raise ArtifactError(
            f"{artifact.path}: golden row {row} scores {logits[row]:.7g}, the trained model gave {expected[row]:.7g}"
            f" ({int(off.sum())} of {len(expected)} rows are off)"
        )


def resolve(root: Path, model: str, version: str = CURRENT) -> Path:
    """The folder of one version of a model; `current` follows current.json."""
    if version == CURRENT:
        pointer = root / model / "current.json"
        try:
            version = json.loads(pointer.read_text())["version"]
        except FileNotFoundError as err:
            raise ArtifactError(f"{pointer}: no such file; export a {model} to {root} first") from err
        except (ValueError, KeyError, TypeError) as err:
            raise ArtifactError(f'{pointer}: expected {{"version": "..."}}') from err
    path = root / model / str(version)
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such artifact folder")
    return path


def make_current(root: Path, model: str, version: str) -> None:
    """Name the version in use, in one atomic step."""
    pointer = root / model / "current.json"
    draft = pointer.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps({"version": version}))
    draft.replace(pointer)


def request_to_json(request: Request) -> dict[str, Any]:
    """A raw request as plain JSON values."""
    behaviours = [asdict(event) for event in request.behaviours]
    items = {
        name: column.tolist() if isinstance(column, np.ndarray) else list(column)
        for name, column in request.items.items()
    }
    return {
        "user": dict(request.user),
        "context": dict(request.context),
        "ts": request.ts,
        "behaviours": behaviours,
        "items": items,
        "num_items": request.num_items,
    }


def request_from_json(values: Mapping[str, Any]) -> Request:
    """The inverse of `request_to_json`; raises KeyError or TypeError where the shape is another."""
    behaviours = tuple(Event(**event) for event in values["behaviours"])
    return Request(**{**values, "behaviours": behaviours})


def _dump(golden: Golden) -> bytes:
    document = {
        "requests": [request_to_json(request) for request in golden.requests],
        "arrays": {name: array.tolist() for name, array in golden.arrays.items()},
        "logits": golden.logits.tolist(),
    }
    return json.dumps(document, allow_nan=False).encode()


def _load(content: bytes) -> Golden:
    document = json.loads(content)
    return Golden(
        requests=tuple(request_from_json(r) for r in document["requests"]),
        arrays={name: np.array(values) for name, values in document["arrays"].items()},
        logits=np.array(document["logits"], dtype=np.float64),
    )


def _check_arrays(path: Path, golden: Golden, schema: Schema) -> None:
    encoder = Encoder(schema)
    try:
        encoded = concat([encoder.encode(request) for request in golden.requests])
    except EncodingError as err:
        raise ArtifactError(f"{path}/golden.json: {err}") from err
    for wanted in schema.inputs:
        array = encoded[wanted.name]
        stored = golden.arrays.get(wanted.name)
        if stored is None or not np.array_equal(array, stored.astype(array.dtype)):
            raise ArtifactError(f"{path}/golden.json: {wanted.name} encodes to other values than were stored")
        golden.arrays[wanted.name] = array  # with its dtype, which JSON does not keep


def _read_manifest(path: Path) -> Manifest:
    file = path / "manifest.json"
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except OSError as err:
        raise ArtifactError(f"{file}: unreadable ({err.strerror})") from err
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise ArtifactError(f"{file}: at {where}: {first['msg']}") from err


def _next_version(folder: Path) -> str:
    today = datetime.now(UTC).strftime("%Y%m%d")
    numbers = [int(m[1]) for p in folder.iterdir() if (m := re.fullmatch(rf"{today}-(\d+)", p.name))]
    return f"{today}-{max(numbers, default=0) + 1}"


def _code_version() -> str:
    try:
        return importlib.metadata.version("clickserve")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
