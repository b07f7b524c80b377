"""A model's inputs and outputs as the Open Inference Protocol sends them: JSON, or bytes after the JSON; checked."""

# U requests, C candidates

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import GenericAlias
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from models.artifact.folder import Artifact
from models.features.arrays import Arrays
from models.features.column_encoding import NUMERIC_LIMIT
from models.features.field import input_name
from service.errors import shown
from service.http.problems import InvalidTensors, NotJSON

DATATYPES = {"int64": "INT64", "float32": "FP32", "bool": "BOOL"}
_NUMPY: dict[str, Any] = {datatype: np.dtype(dtype) for dtype, datatype in DATATYPES.items()}
OUTPUTS = ("logit", "prob")
_JSON: dict[str, Any] = {"INT64": int, "FP32": float, "BOOL": bool}
_BINARY: dict[str, np.dtype[Any]] = {"INT64": np.dtype("<i8"), "FP32": np.dtype("<f4"), "BOOL": np.dtype("u1")}

# Read when its datatype is known.
Data = Annotated[
    msgspec.Raw, Meta(extra_json_schema={"type": "array", "items": {"type": ["number", "boolean", "array"]}})
]


class SentTensor(Struct, frozen=True):
    """`data` is row by row, flat or nested; without it `binary_data_size` bytes of the body's tail are the tensor."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: Data = msgspec.field(default_factory=msgspec.Raw)


class RequestedOutput(Struct, frozen=True):
    name: str
    parameters: dict[str, Any] | None = None


class InferRequest(Struct, frozen=True):
    inputs: list[SentTensor]
    id: str | None = None
    parameters: dict[str, Any] | None = None
    outputs: list[RequestedOutput] | None = None


class InferTensor(Struct, frozen=True, omit_defaults=True):
    """`data` is row by row; without it `binary_data_size` bytes after the JSON are the tensor."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, int] | None = None
    data: list[float] | None = None


class InferAnswer(Struct, frozen=True, omit_defaults=True):
    model_name: str
    model_version: str
    outputs: list[InferTensor]
    id: str | None = None


class KnownTensor(Struct, frozen=True):
    """-1 stands for any number: U users where an input is theirs, C candidates elsewhere."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelTensors(Struct, frozen=True):
    name: str
    versions: list[str]
    platform: str
    inputs: list[KnownTensor]
    outputs: list[KnownTensor]


class InferError(Struct, frozen=True):
    error: str


SHAPES = (InferRequest, InferAnswer, ModelTensors, InferError)


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A request by its two halves: the JSON, and the bytes that follow it."""

    request: InferRequest
    tail: memoryview


_decoder = msgspec.json.Decoder(InferRequest)


def decode(body: bytes, header_length: str | None) -> Sent:
    """`header_length` is how many bytes are JSON, where not all are. Raises InvalidTensors."""
    length = len(body)
    if header_length is not None:
        if not header_length.isascii() or not header_length.isdecimal() or int(header_length[:12]) > length:
            raise refused(f"Inference-Header-Content-Length: expected 0 to {length}, got {shown(header_length)}")
        length = int(header_length[:12])
    try:
        request = _decoder.decode(memoryview(body)[:length])
    except msgspec.ValidationError as err:
        raise refused(f"the request: {err}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise NotJSON(f"the body is not JSON: {err}") from None
    return Sent(request=request, tail=memoryview(body)[length:])


def refused(detail: str) -> InvalidTensors:
    return InvalidTensors(detail)


class Contract:
    """What one artifact's model takes as tensors. A graph never sees an id that its tables do not have."""

    def __init__(self, artifact: Artifact) -> None:
        schema = artifact.schema
        self.inputs = artifact.manifest.inputs
        self._num_ids = {input_name(f): schema.field(f.of or f.name).num_ids for f in schema.fields}
        # What the encoder makes and this graph does not read: runs may be joined with such as have it.
        self._unread = [i for i in schema.inputs if i not in self.inputs]

    def arrays(self, sent: Sent, *, max_candidates: int) -> Arrays:
        """The request's arrays, as the encoder makes them. Raises InvalidTensors with the first thing that is wrong."""
        by_name = {tensor.name: tensor for tensor in sent.request.inputs}
        names = [i.name for i in self.inputs]
        if len(by_name) < len(sent.request.inputs):
            raise refused("inputs: each must be there once, some are there twice")
        if by_name.keys() != set(names):
            absent = [name for name in names if name not in by_name]
            unknown = [shown(name) for name in by_name if name not in names]
            raise refused(
                f"inputs: expected {', '.join(names)}; missing: {_listed(absent)}, unknown: {_listed(unknown)}"
            )
        users, candidates = self._sizes(by_name, max_candidates)
        raw = _binaries(sent)
        arrays = {}
        for spec in self.inputs:
            shape = spec.shape(users=users, candidates=candidates)
            array = arrays[spec.name] = _values(by_name[spec.name], shape, raw.get(spec.name))
            self._check_values(spec.name, array, users)
        for unread in self._unread:
            arrays[unread.name] = np.zeros(unread.shape(users=users, candidates=candidates), dtype=unread.dtype)
        return arrays

    def _sizes(self, by_name: Mapping[str, SentTensor], limit: int) -> tuple[int, int]:
        """U and C, which all tensors must agree on."""
        sizes: dict[str | int, int] = {}
        for spec in self.inputs:
            sent = by_name[spec.name]
            datatype = DATATYPES[spec.dtype]
            if sent.datatype != datatype:
                raise refused(f"input {spec.name}: expected datatype {datatype}, got {shown(sent.datatype)}")
            if sent.shape:
                sizes.setdefault(spec.dims[0], sent.shape[0])
            expected = spec.shape(users=sizes.get("U", -1), candidates=sizes.get("C", -1))
            if tuple(sent.shape) != expected:
                raise refused(f"input {spec.name}: expected shape {list(expected)}, got {sent.shape[:8]}")
        users, candidates = sizes.get("U", 1), sizes.get("C", 1)
        for size, what in ((candidates, "candidates"), (users, "users")):
            if not 1 <= size <= limit:
                raise refused(f"expected 1 to {limit} {what}, got {size}")
        return users, candidates

    def _check_values(self, name: str, array: NDArray[Any], num_users: int) -> None:
        if array.dtype == np.float32:
            # The encoder's own limit; beyond it sums might overflow. This way round, NaN is refused too.
            if not (np.abs(array) <= NUMERIC_LIMIT).all():
                raise refused(f"input {name}: expected numbers from -{NUMERIC_LIMIT:g} to {NUMERIC_LIMIT:g}")
        elif array.dtype == np.int64:
            limit = num_users if name == "user_index" else self._num_ids.get(name, np.iinfo(np.int64).max)
            low, high = int(array.min()), int(array.max())
            if low < 0 or high >= limit:
                raise refused(f"input {name}: expected 0 to {limit - 1}, got {low if low < 0 else high}")


def _binaries(sent: Sent) -> dict[str, memoryview]:
    """Each binary input's bytes: they follow each other in the order of the inputs."""
    raw, start = {}, 0
    for tensor in sent.request.inputs:
        size = (tensor.parameters or {}).get("binary_data_size")
        if size is None:
            continue
        if type(size) is not int or size < 0 or bytes(tensor.data):
            raise refused(f"input {tensor.name}: expected data, or binary_data_size as a number of bytes")
        raw[tensor.name] = sent.tail[start : start + size]
        start += size
    if start != len(sent.tail):
        raise refused(f"the body: {start} bytes of tensors are announced after the JSON, {len(sent.tail)} came")
    return raw


def _values(sent: SentTensor, shape: tuple[int, ...], raw: memoryview | None) -> NDArray[Any]:
    if raw is not None:
        dtype = _BINARY[sent.datatype]
        if len(raw) != math.prod(shape) * dtype.itemsize:
            raise refused(f"input {sent.name}: expected {math.prod(shape) * dtype.itemsize} bytes, got {len(raw)}")
        array = np.frombuffer(raw, dtype=dtype).reshape(shape)
        if sent.datatype == "BOOL" and (array > 1).any():
            raise refused(f"input {sent.name}: expected bytes of 0 and 1")
        values: NDArray[Any] = array.astype(_NUMPY[sent.datatype])
        return values
    if not bytes(sent.data):
        raise refused(f"input {sent.name}: expected data, or binary_data_size and the bytes; it has neither")
    return _from_json(sent, shape)


def _from_json(sent: SentTensor, shape: tuple[int, ...]) -> NDArray[Any]:
    reason = ""
    for depth in dict.fromkeys((1, len(shape))):
        try:
            values = _list_decoder(sent.datatype, depth).decode(sent.data)
            with np.errstate(over="ignore"):  # infinite, and refused as that
                array = np.array(values, dtype=_NUMPY[sent.datatype])
        except (msgspec.MsgspecError, ValueError, OverflowError) as err:
            reason = reason or str(err)
            continue
        if array.size == math.prod(shape) and (depth == 1 or array.shape == shape):
            return array.reshape(shape)
        reason = f"{array.size} values came"
    raise refused(f"input {sent.name}: expected {math.prod(shape)} values of {sent.datatype}, flat or nested: {reason}")


@cache
def _list_decoder(datatype: str, depth: int) -> msgspec.json.Decoder[Any]:
    form = _JSON[datatype]
    for _ in range(depth):
        form = GenericAlias(list, form)
    return msgspec.json.Decoder(form)


def encode(
    request: InferRequest, outputs: Mapping[str, NDArray[Any]], *, model: str, version: str
) -> tuple[bytes, int | None]:
    """The answer's body with the outputs asked for, all by default, and how much of it is JSON where not all is."""
    every = bool((request.parameters or {}).get("binary_data_output", False))
    tensors, tail = [], []
    for output in request.outputs or [RequestedOutput(name) for name in outputs]:
        array = outputs[output.name].astype("<f4")
        if (output.parameters or {}).get("binary_data", every):
            tail.append(array.tobytes())
            sent: dict[str, Any] = {"parameters": {"binary_data_size": array.nbytes}}
        else:
            sent = {"data": array.tolist()}
        tensors.append(InferTensor(output.name, "FP32", array.shape, **sent))
    content = msgspec.json.encode(InferAnswer(model, version, tensors, request.id))
    return b"".join((content, *tail)), len(content) if tail else None


def check_outputs(request: InferRequest) -> None:
    """Raises InvalidTensors where the model has no such output, or one is named twice: a body could hold 100,000."""
    for output in request.outputs or ():
        if output.name not in OUTPUTS:
            raise refused(f"outputs: expected {' or '.join(OUTPUTS)}, got {shown(output.name)}")
    if len(request.outputs or ()) > len({output.name for output in request.outputs or ()}):
        raise refused("outputs: each may be there once, some are there twice")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) or "none"
