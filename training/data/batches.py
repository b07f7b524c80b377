"""The prepared rows of a data set, memory-mapped, as batches of tensors."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.artifact.golden import request_from_json
from models.features.arrays import Arrays
from models.features.encoder import Encoder
from models.features.request import Request
from models.features.schema import Schema
from models.features.values import SchemaError
from training.errors import UserError

PARTS = ("train", "valid", "test")
SHUFFLE = 1  # names the generator of the row order among those drawn from one seed


class Batch(NamedTuple):
    """B rows as a model takes them (each request among them once), and whether each was clicked (0.0 or 1.0).

    Where rows have weights, theirs, which average 1 over the whole part.
    """

    inputs: dict[str, Tensor]
    label_B: Tensor  # noqa: N815  # B rows, as in every model
    weight_B: Tensor | None = None  # noqa: N815


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One part of a prepared data set: encoded rows, and where each row's history stands among the events.

    Rows of one `request` differ only in their candidate. As in serving, their user is computed once: on MovieLens-1M,
    where a page of ratings shares its second, that halves the work of a model with a history.
    """

    inputs: Arrays
    label: NDArray[np.float32]
    group: NDArray[np.int64]
    request: NDArray[np.int64]
    events: Arrays
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    ts: NDArray[np.float64]
    encoder: Encoder
    weight: NDArray[np.float32] | None = None
    mean_weight: float = 1.0
    negative_rate: float = 1.0
    """The share of the rows without a click that were kept: each of these stands for 1 / negative_rate."""

    @property
    def represented(self) -> NDArray[np.float64] | None:
        """How many rows of the whole traffic each row stands for; None where each stands for itself."""
        if self.weight is None and self.negative_rate == 1:
            return None
        weight = np.ones(len(self)) if self.weight is None else self.weight.astype(np.float64)
        return np.where(self.label > 0.5, weight, weight / self.negative_rate)

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: NDArray[np.int64]) -> Batch:
        """The batch of these rows, histories gathered."""
        _, firsts, user_index = np.unique(self.request[rows], return_index=True, return_inverse=True)
        users = rows[firsts]
        arrays = {name: a[rows if name.startswith("item.") else users] for name, a in self.inputs.items()}
        if self.events:
            arrays |= self.encoder.window(self.events, self.start[users], self.end[users], self.ts[users])
        inputs = {name: _tensor(array) for name, array in arrays.items()}
        inputs["user_index"] = torch.from_numpy(user_index)
        weight = None if self.weight is None else torch.from_numpy(self.weight[rows] / np.float32(self.mean_weight))
        return Batch(inputs, torch.from_numpy(self.label[rows]), weight)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The folder that `python -m training prepare` wrote."""

    path: Path
    name: str
    data_hash: str
    schema: Schema
    negative_rate: float = 1.0

    @classmethod
    def open(cls, path: Path) -> "Prepared":
        """Raises UserError where `path` is no prepared data set."""
        try:
            schema = Schema.from_json((path / "schema.json").read_bytes())
            about = json.loads((path / "dataset.json").read_bytes())
            return cls(
                path=path,
                name=about["name"],
                data_hash=about["data_hash"],
                schema=schema,
                negative_rate=float(about.get("negative_rate", 1.0)),
            )
        except OSError as err:
            raise UserError(
                f"{path} is no prepared data set ({Path(err.filename).name}: {err.strerror});"
                " make one with: python -m training prepare"
            ) from err
        except (SchemaError, ValueError, KeyError, TypeError) as err:
            raise UserError(f"{path}: damaged data set, prepare it again ({err})") from err

    def rows(self, part: str) -> Rows:
        """One of `train`, `valid` and `test`; nothing is read before it is used.

        Raises UserError where the folder is damaged, or no longer the one that was opened.
        """
        if _about(self.path).get("data_hash") != self.data_hash:
            raise UserError(f"{self.path} was prepared anew, with other rows or options, while it was in use")
        folder = self.path / part
        names = [i.name for i in self.schema.inputs if not i.name.startswith("hist") and i.name != "user_index"]
        inputs = {name: _map(folder / f"{name}.npy") for name in names}
        sequences = [i.name for i in self.schema.inputs if i.name.startswith("hist.")]
        stored = ("ts", *sequences) if sequences else ()
        events = {name: _map(self.path / "events" / f"{name}.npy") for name in stored}
        label, group, request = (_map(folder / f"{name}.npy") for name in ("label", "group", "request"))
        windows = {name: _map(folder / f"{name}.npy") for name in ("start", "end", "ts")} if sequences else {}
        weight = _map(folder / "weight.npy") if (folder / "weight.npy").exists() else None
        if weight is not None:
            _check_weight(folder, weight)
        columns = {**inputs, "label": label, "group": group, "request": request, **windows}
        lengths = {name: len(array) for name, array in columns.items()}
        if len(set(lengths.values())) != 1:
            raise UserError(f"{folder}: damaged data set, its arrays have different lengths: {lengths}")
        return Rows(
            inputs=inputs,
            label=label,
            group=group,
            request=request,
            events=events,
            start=windows.get("start", np.empty(0, np.int64)),
            end=windows.get("end", np.empty(0, np.int64)),
            ts=windows.get("ts", np.empty(0, np.float64)),
            encoder=Encoder(self.schema),
            weight=weight,
            mean_weight=1.0 if weight is None else float(np.mean(weight, dtype=np.float64)),
            negative_rate=self.negative_rate,
        )

    def truth(self, part: str, name: str = "true_ctr") -> NDArray[np.float64] | None:
        """The click probabilities the labels were drawn from, where the data set is simulated.

        `true_ctr_blind` is the best that a model can know which is not told the ad's position.
        """
        file = self.path / part / f"{name}.npy"
        return _map(file) if file.exists() else None

    def golden_requests(self) -> list[Request]:
        """The raw requests that an artifact carries."""
        file = self.path / "golden.json"
        try:
            requests = [request_from_json(values) for values in json.loads(file.read_bytes())]
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise UserError(f"{file}: missing or damaged, prepare the data set again ({err!r})") from err
        if not requests:
            raise UserError(f"{file}: damaged, prepare the data set again (it holds no requests)")
        return requests


def num_batches(num_rows: int, batch_size: int) -> int:
    """Batches of one pass; the last one may be smaller than `batch_size`, but only as small as the others."""
    return -(-num_rows // batch_size)


def shuffled(rows: Rows, batch_size: int, *, seed: int, epoch: int, skip: int = 0) -> Iterator[Batch]:
    """Every row once, in an order that only `seed` and `epoch` decide; `skip` leaves out the first batches of it.

    Rows of one request stay together. Batches differ by at most one row, so that no tiny last batch disturbs batch
    normalisation.
    """
    lots = np.random.default_rng((seed, SHUFFLE, epoch)).random(int(rows.request.max()) + 1)
    order = np.argsort(lots[rows.request], kind="stable")
    bounds = np.linspace(0, len(rows), num_batches(len(rows), batch_size) + 1).astype(np.int64)
    for first, last in zip(bounds[skip:-1], bounds[skip + 1 :], strict=True):
        yield rows.take(order[first:last])


def in_order(rows: Rows, batch_size: int) -> Iterator[Batch]:
    """Every row once, in the order of the files."""
    for first in range(0, len(rows), batch_size):
        yield rows.take(np.arange(first, min(first + batch_size, len(rows))))


def _about(path: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads((path / "dataset.json").read_bytes())
    except (OSError, ValueError) as err:
        raise UserError(f"{path / 'dataset.json'}: missing or damaged, prepare the data set again ({err})") from err
    return about


def _check_weight(folder: Path, weight: NDArray[np.float32]) -> None:
    if not weight.sum(dtype=np.float64) > 0:
        raise UserError(f"{folder}: expected rows of weight above 0, got none")


def _map(file: Path) -> NDArray[Any]:
    try:
        # A plain view: indexing a np.memmap object costs several times the gather itself.
        return np.asarray(np.load(file, mmap_mode="r"))
    except (OSError, ValueError, EOFError) as err:
        raise UserError(f"{file}: missing or damaged, prepare the data set again ({err})") from err


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array.astype(np.int64) if array.dtype == np.int32 else array)
