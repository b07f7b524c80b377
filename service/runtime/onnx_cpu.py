"""ONNX Runtime on one CPU core."""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from models.artifact.errors import ArtifactError
from models.features.arrays import Arrays
from service.runtime.backend import BackendError

# Candidates of a run that is rare. The arena keeps the largest run it ever saw: after one of 10,000 candidates 28 MB
# for MIAN and 36 MB for STEC stayed; given back after each such run 2 MB and none did, and runs below pay nothing.
LARGE_RUN = 2000


class OnnxBackend:
    """ONNX Runtime on one CPU core. The graph takes those of the `fed` arrays it names, and gives `outputs`.

    Fed with plain arrays: with bound buffers, filled anew for every run, MIAN's 100 candidates took 0.98 to 0.99 of the
    time, with bindings made anew 1.13 to 1.15, past the wrapper's own `run` 0.965 (400 turns each, one thread).
    """

    lanes = 1
    batch_wait_s = 0.0

    def __init__(self, graph: Path, *, fed: Sequence[str], outputs: Sequence[str] = ("logit",)) -> None:
        self._session = open_session(graph, session_options(), ["CPUExecutionProvider"])
        self._shrinking = onnxruntime.RunOptions()
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._inputs, self._outputs = names_of(self._session, graph, fed=fed, outputs=outputs)

    def run(self, arrays: Arrays) -> NDArray[np.float32]:
        return self.run_all(arrays)[0]

    def run_all(self, arrays: Arrays) -> list[NDArray[np.float32]]:
        """Every one of the `outputs`. Raises BackendError."""
        try:
            large = len(arrays["user_index"]) > LARGE_RUN
            feed = {name: arrays[name] for name in self._inputs}
            values = self._session.run(self._outputs, feed, self._shrinking if large else None)
        except Exception as err:  # as below
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
        raise ArtifactError(f"{graph}: takes {', '.join(sorted(unknown))}, which its schema does not describe")
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
