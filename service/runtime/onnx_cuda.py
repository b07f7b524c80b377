"""ONNX Runtime on a GPU: buffers bound beforehand, one graph replayed for each size, two sessions to a GPU."""

import logging
import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from models.artifact.errors import ArtifactError
from models.features.arrays import Arrays
from models.features.field import Input
from service.runtime.backend import BackendError, Device
from service.runtime.onnx_cpu import names_of, open_session, session_options
from service.runtime.static_shapes import USERS, Buckets, Layout

log = logging.getLogger(__name__)

# A session has one stream, on which its runs wait for each other: with two, one copies while the other computes.
LANES = 2
BATCH_WAIT_S = 0.001  # a run costs its launches, whatever its size; other servers advise 0.5 to 2 ms

CUDA = {
    "device_id": "0",  # of those that CUDA_VISIBLE_DEVICES leaves this process
    # Its products keep 10 bits of each factor: up to 1e-3 off, and an artifact's scores are held to 1e-5. Most time
    # goes into launches, not products, so there is little to win. The same holds of float16.
    "use_tf32": "0",
    "arena_extend_strategy": "kSameAsRequested",  # sizes are few: there is nothing to grow for
}


class OnnxCudaBackend:
    """A graph that takes those of `inputs` it names. On `device` cpu it is the same, but for graphs and streams."""

    lanes = LANES
    joins = True
    batch_wait_s = BATCH_WAIT_S

    def __init__(
        self,
        graph: Path,
        *,
        inputs: Sequence[Input],
        device: Device = "cuda",
    ) -> None:
        if device == "cuda":
            _require_provider(graph)
        self._idle: queue.SimpleQueue[Buckets] = queue.SimpleQueue()
        for _ in range(self.lanes):
            self._idle.put(_lane(graph, inputs, device))

    def run(self, arrays: Arrays) -> NDArray[np.float32]:
        lane = self._idle.get()  # the one that has been idle the longest
        try:
            return lane.run(arrays)
        except BackendError:
            raise
        except Exception as err:  # onnxruntime's exceptions have no common base but this
            raise BackendError(f"ONNX Runtime: {err}") from err
        finally:
            self._idle.put(lane)

    def close(self) -> None:
        """When no run is under way."""
        while not self._idle.empty():
            self._idle.get()


def _lane(graph: Path, inputs: Sequence[Input], device: Device) -> Buckets:
    sessions = {num: _session(graph, device, num) for num in USERS}
    taken, _ = names_of(sessions[USERS[0]], graph, fed=[i.name for i in inputs], outputs=["logit"])

    def bind(layout: Layout) -> _Bound:
        return _Bound(sessions[layout.users], device, layout)

    try:
        return Buckets([i for i in inputs if i.name in taken], bind)
    except Exception as err:  # onnxruntime's exceptions have no common base but this
        raise ArtifactError(f"{graph}: does not run on {device}: {' '.join(str(err).split())[:300]}") from err


def _session(graph: Path, device: Device, users: int) -> Any:
    """One for each number of users: with that fixed, all shapes of a CUDA graph are static."""
    options = session_options()
    options.add_free_dimension_override_by_name("U", users)
    if device == "cpu":
        return open_session(graph, options, ["CPUExecutionProvider"])
    try:
        session = open_session(graph, options, [("CUDAExecutionProvider", {**CUDA, "enable_cuda_graph": "1"})])
    except ArtifactError as err:  # some step of it runs on the host; without a captured graph it may
        log.warning("no CUDA graph", extra={"graph": str(graph), "users": users, "cause": str(err)})
        session = open_session(graph, options, [("CUDAExecutionProvider", CUDA)])
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise ArtifactError(f"{graph}: device cuda: ONNX Runtime found no GPU that it can use, or not CUDA's libraries")
    return session


def _require_provider(graph: Path) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise ArtifactError(
            f"{graph}: device cuda needs onnxruntime-gpu, and this is the CPU's onnxruntime; uninstall it and install"
            " the extra `gpu` instead of `serve`"
        )
    onnxruntime.preload_dlls()  # of CUDA, where they came as Python packages


class _Bound:
    """One size's buffers: a replayed graph reads and writes where it did when it was captured."""

    def __init__(self, session: Any, device: Device, layout: Layout) -> None:
        self.host = np.zeros(layout.num_bytes, dtype=np.uint8)
        create = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        self._sent = create([layout.num_bytes], np.uint8, device, 0)
        self._logit = create([layout.candidates], np.float32, device, 0)
        self._session, self._binding = session, session.io_binding()
        for slot in layout.slots:
            address = self._sent.data_ptr() + slot.offset
            self._binding.bind_input(slot.name, device, 0, slot.dtype.type, slot.shape, address)
        self._binding.bind_ortvalue_output("logit", self._logit)
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(layout.candidates))  # each size's own captured graph

    def run(self) -> NDArray[np.float32]:
        self._sent.update_inplace(self.host)  # one copy, ended when it returns
        self._session.run_with_iobinding(self._binding, self._options)
        logits: NDArray[np.float32] = self._logit.numpy()
        return logits
