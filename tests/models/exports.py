"""Exported graphs for tests: each model's are made once a run, whichever of pytest's processes asks first."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from filelock import FileLock

from models.artifact import folder as artifact
from models.artifact.calibration import Calibration
from models.artifact.folder import Artifact
from models.artifact.manifest import ITEM, TORCHSCRIPT
from models.features.arrays import Arrays
from models.features.packing import PackedLayout
from models.features.schema import Schema
from models.layers.base import CTRModel
from tests.models.small import lively, raw_requests, with_history
from training import export

SCHEMA = with_history()


def exported(
    temp: pytest.TempPathFactory, form: str, options: Mapping[str, Any], schema: Schema = SCHEMA
) -> tuple[CTRModel, Artifact]:
    """A lively float32 model, in training mode as the loop leaves it, and its artifact; `form` begins with its name."""
    name, *_ = form.split()
    model = lively(name, schema, **options).float().train()
    # Under xdist every process has a folder of its own in the run's.
    run = temp.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else temp.getbasetemp()
    root = run / "exports" / form.replace(" ", "_")
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / "lock"):
        made = root / "made.json"
        if not made.exists():
            folder = export.export(
                name,
                options,
                model,
                schema,
                calibration=Calibration(slope=0.9, intercept=-0.1),
                metrics={"auc": 0.7},
                golden_requests=raw_requests(),
                data_hash="abc",
                out=root,
            )
            made.write_text(json.dumps(str(folder)))
    return model, artifact.read(Path(json.loads(made.read_text())))


Run = Callable[[Arrays], dict[str, np.ndarray]]
"""Packed arrays to a graph's outputs by name."""


def graph(written: Artifact, file: str) -> Run:
    """One graph of an artifact, fed as its manifest says."""
    described = written.manifest.graphs[file]
    names = [i.name for i in described.inputs]
    outputs = [o.name for o in described.outputs]
    if file == TORCHSCRIPT:
        module = torch.jit.load(written.path / file)
        return lambda packed: {"logit": module(*(torch.from_numpy(packed[name]) for name in names)).numpy()}
    session = onnxruntime.InferenceSession(written.path / file, providers=["CPUExecutionProvider"])
    return lambda packed: dict(zip(outputs, session.run(outputs, {name: packed[name] for name in names}), strict=True))


def packed_with_items(written: Artifact, arrays: Arrays) -> Arrays:
    """The encoder's arrays packed, and the item rows that item.onnx makes of them."""
    packed = PackedLayout(written.schema).pack(arrays)
    return packed | graph(written, ITEM)(packed)
