"""What training hands to serving: one folder, written whole, read back and verified, or refused.

`<root>/<model>/<version>/` holds `manifest.json`, `schema.json`, `calibration.json`, `golden.json`, the exported graphs
and the weights; `explain.onnx` where the model explains itself. `<root>/<model>/current.json` names the version in use.
"""

import hashlib
import importlib.metadata
import json
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from models.artifact.calibration import Calibration
from models.artifact.errors import ArtifactError
from models.artifact.explanation import Explanation
from models.artifact.golden import golden_from_json, golden_to_json
from models.artifact.manifest import EXPLAINING, ITEM, MODEL, Graph, Manifest
from models.features.arrays import Arrays, concat
from models.features.encoder import Encoder
from models.features.field import Input
from models.features.packing import PackedLayout
from models.features.request import Request
from models.features.schema import Schema

CURRENT = "current"
_PARTS = ("schema.json", "calibration.json", "golden.json")
# float32 graphs on different runtimes add the same numbers in different orders (models.md section 1).
LOGIT_TOLERANCE = 1e-5


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
    encoder: Encoder


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
    graphs: Mapping[str, Graph],
    data_hash: str,
    files: Mapping[str, bytes],
    explain: Sequence[Explanation] = (),
) -> Path:
    """Write one new version and make it the current one; returns its folder.

    `inputs` names the schema's inputs that the model reads; `files` are the graphs and weights by name, `graphs` what
    each graph takes and gives; `explain` is what explain.onnx gives, if it is among them.
    The folder is written under a temporary name, read back as the service would, and only then renamed: a reader
    never sees half an artifact. Raises ArtifactError when what was written does not read back.
    """
    contents = {
        **files,
        "schema.json": schema.to_json().encode(),
        "calibration.json": calibration.model_dump_json().encode(),
        "golden.json": golden_to_json(golden.requests, golden.arrays, golden.logits),
    }
    folder = root / model
    folder.mkdir(parents=True, exist_ok=True)
    # Not by process id: in another container another export has the same one, or a killed one had it.
    draft = folder / f".writing-{secrets.token_hex(4)}"
    draft.mkdir()
    try:
        for name, content in contents.items():
            (draft / name).write_bytes(content)
        final = None
        while final is None:
            manifest = Manifest(
                model=model,
                version=_next_version(folder),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                config=dict(config),
                metrics=dict(metrics),
                schema_fingerprint=schema.fingerprint,
                inputs=tuple(i for i in schema.inputs if i.name in inputs),
                graphs=dict(graphs),
                explain=tuple(explain),
                code_version=_code_version(),
                data_hash=data_hash,
                files={name: _sha256(content) for name, content in sorted(contents.items())},
            )
            (draft / "manifest.json").write_text(manifest.model_dump_json(indent=2))
            read(draft)
            final = _rename(draft, folder / manifest.version)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    make_current(root, model, final.name)
    return final


def read(path: Path, *, known: Sequence[Artifact] = ()) -> Artifact:
    """Read an artifact folder and verify all that can be verified without running the model.

    Every file has the manifest's sha256, the schema the manifest's fingerprint, and the golden requests encode to the
    stored arrays, bit for bit. Raises ArtifactError otherwise. The golden logits are for `check_scores`.
    Where a `known` artifact has the very same schema file, its schema and encoder are taken: making them anew takes
    seconds where a vocabulary has a million values.
    """
    manifest = _read_manifest(path)
    contents = {name: _read_file(path, name, expected) for name, expected in manifest.files.items()}
    for name in (*_PARTS, MODEL, ITEM, *manifest.graphs, *([EXPLAINING] if manifest.explain else [])):
        if name not in contents:
            raise ArtifactError(f"{path}/manifest.json: does not list {name}")
    like = next((a for a in known if a.manifest.files["schema.json"] == manifest.files["schema.json"]), None)
    try:
        schema = Schema.from_json(contents["schema.json"]) if like is None else like.schema
        calibration = Calibration.model_validate_json(contents["calibration.json"])
    except ValueError as err:
        raise ArtifactError(f"{path}: {err}") from err
    # A file that is the canonical text has the fingerprint for its hash; writing a million values anew takes long.
    is_canonical = manifest.files["schema.json"] == manifest.schema_fingerprint
    if not is_canonical and schema.fingerprint != manifest.schema_fingerprint:
        raise ArtifactError(
            f"{path}/schema.json: fingerprint {schema.fingerprint[:12]} does not match the model's"
            f" {manifest.schema_fingerprint[:12]}; export it again"
        )
    for listed in manifest.inputs:
        if listed not in schema.inputs:
            raise ArtifactError(f"{path}/manifest.json: the schema makes no input {listed!r}")
    _check_graphs(path / "manifest.json", manifest, schema)
    golden = _load(path / "golden.json", contents["golden.json"])
    encoder = Encoder(schema) if like is None else like.encoder
    _check_golden(path / "golden.json", golden, encoder)
    return Artifact(
        path=path, manifest=manifest, schema=schema, calibration=calibration, golden=golden, encoder=encoder
    )


def check_scores(artifact: Artifact, logits: NDArray[Any]) -> None:
    """Compare a backend's logits of the golden arrays with the trained model's; ArtifactError where they differ."""
    expected = artifact.golden.logits
    if logits.shape != expected.shape:
        raise ArtifactError(f"{artifact.path}: {logits.shape} golden scores came, {expected.shape} were expected")
    off = ~(np.abs(logits - expected) <= LOGIT_TOLERANCE * (1 + np.abs(expected)))  # this way round, NaN is off too
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
        except OSError as err:
            raise ArtifactError(f"{pointer}: unreadable ({err.strerror})") from err
        except (ValueError, KeyError, TypeError) as err:
            raise ArtifactError(f'{pointer}: expected {{"version": "..."}}') from err
    path = root / model / str(version)
    try:
        # No path that leads elsewhere, and no draft, whose name begins with a dot.
        if re.fullmatch(r"\w[\w.-]{0,63}", str(version), re.ASCII) and path.is_dir():
            return path
    except OSError as err:
        raise ArtifactError(f"{path}: unreadable ({err.strerror})") from err
    raise ArtifactError(f"{root / model / str(version)[:64]}: no such artifact folder")


def make_current(root: Path, model: str, version: str) -> None:
    """Name the version in use, in one atomic step."""
    draft = root / model / f"current.{secrets.token_hex(4)}.tmp"
    draft.write_text(json.dumps({"version": version}))
    draft.replace(root / model / "current.json")


def _load(file: Path, content: bytes) -> Golden:
    try:
        requests, arrays, logits = golden_from_json(content)
        return Golden(requests=requests, arrays=arrays, logits=logits)
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ArtifactError(f"{file}: expected requests, arrays and logits ({err!r})") from err


def _check_golden(file: Path, golden: Golden, encoder: Encoder) -> None:
    if not golden.requests:
        raise ArtifactError(f"{file}: expected requests, it holds none")
    try:
        encoded = concat([encoder.encode(request) for request in golden.requests])
    except (ValueError, TypeError, AttributeError) as err:  # whatever a request of another shape runs into
        raise ArtifactError(f"{file}: {err}") from err
    for name, array in encoded.items():
        if name not in golden.arrays:
            raise ArtifactError(f"{file}: holds no {name}, which the encoder makes now; export it again")
        stored = golden.arrays[name]
        if stored.dtype.kind not in "biuf" or not np.array_equal(array, stored):
            raise ArtifactError(f"{file}: {name} encodes to other values than were stored; export it again")
        golden.arrays[name] = array  # with its dtype, which JSON does not keep
    if golden.logits.shape != encoded["user_index"].shape or not np.isfinite(golden.logits).all():
        raise ArtifactError(f"{file}: expected a finite logit for each of {len(encoded['user_index'])} candidates")


def _read_manifest(path: Path) -> Manifest:
    file = path / "manifest.json"
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except OSError as err:
        raise ArtifactError(f"{file}: unreadable ({err.strerror})") from err
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"])) or "top level"
        raise ArtifactError(f"{file}: at {where}: {first['msg']}") from err


def _check_graphs(file: Path, manifest: Manifest, schema: Schema) -> None:
    """The graphs take what this schema's values are packed to, and item rows as item.onnx makes them."""
    for name in (MODEL, ITEM):
        if name not in manifest.graphs:
            raise ArtifactError(f"{file}: at graphs: does not describe {name}")
    made = manifest.graphs[ITEM].outputs
    width = made[0].dims[-1] if made and made[0].dims else None
    if not isinstance(width, int) or made != (Input(name="items", dtype="float32", dims=("C", width)),):
        raise ArtifactError(f"{file}: at graphs.{ITEM}: expected one output, items [C, W] of float32, got {made}")
    layout = PackedLayout(schema)
    for name, graph in manifest.graphs.items():
        known = {i.name: i for i in (*layout.inputs([i.name for i in graph.inputs]), *made)}
        for listed in graph.inputs:
            expected = known.get(listed.name)
            if expected is not None and name == MODEL and expected.dims[0] == "U":
                expected = replace(expected, dims=(1, *expected.dims[1:]))
            if listed != expected:
                raise ArtifactError(
                    f"{file}: at graphs.{name}: takes {listed}, the schema makes {expected}; export it again"
                )
        # Whoever sends tensors sends those of `inputs`, and the others are zeros: no mask would be no history.
        sources = {"history_ids": "hist_mask", "history_mask": "hist_mask", "history_age": "hist_age"}
        for packed, source in sources.items():
            if packed in {i.name for i in graph.inputs} and source not in {i.name for i in manifest.inputs}:
                raise ArtifactError(f"{file}: at inputs: graphs.{name} takes {packed}, and {source} is not listed")


def _read_file(path: Path, name: str, sha256: str) -> bytes:
    """Its content, where that is read here; a graph's is only hashed, piece by piece, as it may be large."""
    if Path(name).name != name or (path / name).is_symlink():
        raise ArtifactError(f"{path}/manifest.json: {name!r} is not a plain file of this folder")
    try:
        with (path / name).open("rb") as file:
            content = file.read() if name in _PARTS else b""
            found = _sha256(content) if content else hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as err:
        why = err.strerror if isinstance(err, OSError) else err  # the path stands before it
        raise ArtifactError(f"{path / name}: named in the manifest but unreadable ({why}); export it again") from err
    if found != sha256:
        raise ArtifactError(
            f"{path / name}: sha256 {found[:12]} is not the manifest's {sha256[:12]}; damaged file, export it again"
        )
    return content


def _rename(draft: Path, final: Path) -> Path | None:
    """`final`, or None where another export took that name meanwhile."""
    try:
        return draft.rename(final)
    except OSError:
        if not final.exists():
            raise
        return None


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
