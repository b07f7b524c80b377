"""ONNX Runtime on one CPU core."""

import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifact.errors import ArtifactError
from models.features.arrays import Arrays
from service.runtime.backend import BackendError, Logits

# From 1.31 on it reports its use to its makers, on Linux too, and asks only once: when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

# Candidates of a run that is rare. The arena keeps the largest run it ever saw; given back after each such run it does
# not, and runs below pay nothing (docs/LOG.md).
LARGE_RUN = 2000


class OnnxBackend:
    """One graph on one core. It takes those of the `fed` arrays it names, and gives `outputs`; the first is [C, ...].

    Fed with plain arrays: bound buffers bring 1 to 2 % at best (docs/LOG.md).
    """

    lanes = 1
    joins = False
    batch_wait_s = 0.0

    def __init__(self, graph: Path, *, fed: Sequence[str], outputs: Sequence[str] = ("logit",)) -> None:
        self._session = open_session(graph, session_options(), ["CPUExecutionProvider"])
        self._shrinking = onnxruntime.RunOptions()
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._inputs, self._outputs = names_of(self._session, graph, fed=fed, outputs=outputs)

    def run(self, arrays: Arrays) -> Logits:
        """The first output. Raises BackendError."""
        try:
            large = len(arrays[self._inputs[-1]]) > LARGE_RUN
            feed = {name: arrays[name] for name in self._inputs}
            values: Logits = self._session.run(self._outputs, feed, self._shrinking if large else None)[0]
        except Exception as err:  # onnxruntime's exceptions have no common base but this
            raise BackendError(f"ONNX Runtime: {err}") from err
        return values

    def run_all(self, arrays: Arrays) -> list[NDArray[np.float32]]:
        """Every one of the `outputs`, as float32. Raises BackendError."""
        try:
            values = self._session.run(self._outputs, {name: arrays[name] for name in self._inputs})
        except Exception as err:  # as above
            raise BackendError(f"ONNX Runtime: {err}") from err
        return [np.asarray(value, dtype=np.float32) for value in values]

    def close(self) -> None:
        del self._session


def session_options() -> Any:
    """One thread, no spinning, no files but the graph's own."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A graph may name other files to read its weights from, and its author could name any: none lies in here.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/dev/null")
    return options


def open_session(graph: Path, options: Any, providers: Sequence[Any]) -> Any:
    """Raises ArtifactError."""
    _refuse_two_runtimes()
    try:
        # It would otherwise try again with other options, and say so on stdout.
        return onnxruntime.InferenceSession(graph.read_bytes(), options, providers=list(providers), enable_fallback=0)
    except Exception as err:  # onnxruntime's exceptions have no common base but this
        raise ArtifactError(f"{graph}: ONNX Runtime cannot load it: {' '.join(str(err).split())[:300]}") from err


def names_of(session: Any, graph: Path, *, fed: Sequence[str], outputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """What it takes, and `outputs`. Raises ArtifactError where it takes more than it is fed, or does not give those."""
    inputs = [i.name for i in session.get_inputs()]
    if unknown := set(inputs) - set(fed):
        raise ArtifactError(f"{graph}: takes {', '.join(sorted(unknown))}, which its manifest does not name")
    if absent := set(outputs) - {o.name for o in session.get_outputs()}:
        raise ArtifactError(f"{graph}: has no output called {', '.join(sorted(absent))}")
    return inputs, list(outputs)


def _refuse_two_runtimes() -> None:
    """The two packages install the same files: with both, which of them runs is an accident."""
    present = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(present) > 1:
        raise ArtifactError("onnxruntime and onnxruntime-gpu are both installed; uninstall both, then install one")


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
