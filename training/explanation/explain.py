"""What a trained model attended to on prepared rows, named as in the service: by request, on average, and drawn."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.artifact.explanation import LOGIT, Explanation, worded
from models.features.field import FIRST, OOV, PAD, Group, input_name
from models.features.schema import Schema
from models.layers.base import explain as explain_model
from training.data.batches import Batch, Prepared, Rows
from training.errors import UserError
from training.explanation import heatmaps
from training.fit.run_folder import Trained
from training.progress import bar

MAX_CANDIDATES = 20  # of one request, as in the service
AVERAGED_ROWS = 2000  # spread over the part
BATCH = 200

ExplanationJson = dict[str, Any]
"""One explanation with its meaning, its axes with labels, and its values: models/artifact/explanation.py."""


def explain(
    trained: Trained, data: Prepared, part: str, out: Path, *, rows: Sequence[int] | None, num_requests: int
) -> list[Path]:
    """Writes explain.json and the heat maps of every explanation; returns the files.

    Explained are the requests of `rows`, each with those of its rows that are named, or else `num_requests` spread over
    the part. Averages are over rows spread over the part, too. Raises UserError where there is nothing to explain.
    """
    if data.schema.fingerprint != trained.schema.fingerprint:
        raise UserError(f"{data.path} is encoded by another schema than {trained.path} was trained with")
    if not trained.model.explanations():
        raise UserError(f"{trained.path}: a model {trained.run.model} of this form shows nothing of itself")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: expected a folder, or a new one, found a file")
    source = data.rows(part)
    requests = [_request(trained, source, part, chosen) for chosen in _chosen(source, rows, num_requests)]
    averaged = np.unique(np.linspace(0, len(source) - 1, min(AVERAGED_ROWS, len(source))).astype(np.int64))
    mean = _mean(trained, source, averaged)

    out.mkdir(parents=True, exist_ok=True)
    document = {
        "model": trained.run.model,
        "run": str(trained.path),
        "part": part,
        "requests": requests,
        "mean": {"rows": len(averaged), "explanations": mean},
    }
    files = [out / "explain.json"]
    files[0].write_text(json.dumps(document, default=_listed, allow_nan=False))
    titled = {f"mean-{name}": (f"mean of {len(averaged):,} {part} rows", shown) for name, shown in mean.items()}
    for request in requests:
        where = f"{part} request {request['request_id']}"
        titled |= {f"{request['request_id']}-{n}": (where, shown) for n, shown in request["explanations"].items()}
    for name, (where, shown) in titled.items():
        if shown["axes"]:
            files.append(out / f"{name}.png")
            heatmaps.draw(shown, f"{trained.run.model}: {name.partition('-')[2]}, {where}", files[-1])
    return files


def _chosen(source: Rows, rows: Sequence[int] | None, num_requests: int) -> Iterator[NDArray[np.int64]]:
    """The rows of each request to be explained."""
    request = np.asarray(source.request)
    if rows is None:
        ids = np.unique(request)
        for request_id in np.unique(np.linspace(0, len(ids) - 1, min(num_requests, len(ids))).astype(np.int64)):
            yield np.flatnonzero(request == ids[request_id])[:MAX_CANDIDATES]
        return
    for row in rows:
        if row >= len(source):
            raise UserError(f"option --rows: expected rows below {len(source)}, got {row}")
    named = np.unique(np.array(rows, dtype=np.int64))
    for request_id in dict.fromkeys(request[list(rows)].tolist()):
        yield named[request[named] == request_id]


def _request(trained: Trained, source: Rows, part: str, rows: NDArray[np.int64]) -> ExplanationJson:
    """One request, in the service's shape; beside each prediction its row, and whether it was clicked."""
    batch = source.take(rows)
    logits, shown = _shown(trained, batch)
    request_id = f"{part}{int(source.request[rows[0]])}"
    items = _ids(trained.schema, "item", batch, len(rows))
    present = batch.inputs["hist_mask"][0].numpy() if "hist_mask" in batch.inputs else np.zeros(0, dtype=bool)
    clicks = _ids(trained.schema, "behaviour", batch, len(present))
    labels: dict[str, Any] = {
        "request": request_id,
        "candidates": items,
        "behaviours": [click for click, is_click in zip(clicks, present, strict=True) if is_click],
    }
    columns = zip(items, trained.calibration(logits).tolist(), rows.tolist(), batch.label_B.tolist(), strict=True)
    return {
        "request_id": request_id,
        "model": trained.run.model,
        "predictions": [{"id": i, "ctr": ctr, "row": row, "clicked": clicked == 1} for i, ctr, row, clicked in columns],
        "explanations": {e.name: worded(e, shown[e.name], **labels) for e in (LOGIT, *trained.model.explanations())},
    }


def _mean(trained: Trained, source: Rows, rows: NDArray[np.int64]) -> dict[str, ExplanationJson]:
    """Each explanation averaged over candidates or requests, a place of the history over those that fill it."""
    explanations = trained.model.explanations()
    sums = {e.name: np.zeros(()) for e in explanations}
    counts = {e.name: np.zeros(()) for e in explanations}
    with bar("explaining", len(rows)) as advance:
        for first in range(0, len(rows), BATCH):
            batch = source.take(rows[first : first + BATCH])
            _, shown = _shown(trained, batch)
            for e in explanations:
                values = shown[e.name].astype(np.float64)
                weight = np.broadcast_to(_present(e, batch), values.shape)
                over = _averaged(e)
                sums[e.name] = sums[e.name] + (values * weight).sum(axis=over)
                counts[e.name] = counts[e.name] + weight.sum(axis=over)
            advance(len(batch.label_B))
    length = trained.schema.history_length
    places = [f"{length - n} back" for n in range(length)]
    averages = {}
    for e in explanations:
        over = _averaged(e)
        kept = e.model_copy(update={"axes": tuple(axis for n, axis in enumerate(e.axes) if n not in over)})
        values = sums[e.name] / np.maximum(counts[e.name], 1)
        if any(axis.along in ("behaviour", "event") for axis in kept.axes):
            kept = kept.model_copy(update={"meaning": f"{e.meaning} Each place is the mean of the rows that fill it."})
        averages[e.name] = worded(kept, values, request="mean", candidates=[], behaviours=places)
    return averages


def _averaged(explanation: Explanation) -> tuple[int, ...]:
    """The axes of rows, and of places of the history that would each be a map of its own."""
    maps = len(explanation.axes) - 2
    along = {n: axis.along for n, axis in enumerate(explanation.axes) if axis.along is not None}
    return tuple(n for n, kind in along.items() if kind in ("request", "candidate") or n < maps)


def _present(explanation: Explanation, batch: Batch) -> NDArray[np.float64]:
    """1 where a tensor holds something, broadcast over its axes: 0 where a place of the history has no click."""
    weight = np.ones((1,) * len(explanation.axes))
    for position, axis in enumerate(explanation.axes):
        if axis.along not in ("behaviour", "event"):
            continue
        mask = batch.inputs["hist_mask"].numpy()
        if explanation.axes[0].along == "candidate":
            mask = mask[batch.inputs["user_index"].numpy()]
        if axis.along == "event":
            mask = np.concatenate([mask, np.ones((len(mask), 1), dtype=bool)], axis=1)
        shape = [1] * len(explanation.axes)
        shape[0], shape[position] = mask.shape
        weight = weight * mask.reshape(shape)
    return weight


@torch.inference_mode()
def _shown(trained: Trained, batch: Batch) -> tuple[NDArray[np.float32], Mapping[str, NDArray[Any]]]:
    logits, shown = explain_model(trained.model, batch.inputs)
    return logits.numpy(), {name: values.numpy() for name, values in (shown | {LOGIT.name: logits}).items()}


def _ids(schema: Schema, group: Group, batch: Batch, count: int) -> list[str]:
    """The raw ids of the candidates, or of each place of the history; numbers where the schema names no item id."""
    for field in schema.group(group):
        if schema.item_key is not None and schema.item_key == (field.of or field.name):
            vocabulary = schema.field(schema.item_key).vocabulary or ()
            names = {PAD: "missing", OOV: "unknown", **dict(enumerate(vocabulary, start=FIRST))}
            ids = batch.inputs[input_name(field)].numpy()
            return [names[n] for n in (ids if group == "item" else ids[0]).tolist()]
    return [str(n + 1) for n in range(count)]


def _listed(values: object) -> Any:
    assert isinstance(values, np.ndarray)
    return values.tolist()
