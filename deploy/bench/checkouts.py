"""Checkouts of the project, this one or an older commit's, and the workload exported by each one's own code."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from inputs import read_inputs
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
WORKLOAD = Path(__file__).with_name("workload.py")


class CheckoutError(RuntimeError):
    """A commit that cannot be checked out, or code that does not export the workload."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """A folder as workload.py writes it."""

    folder: Path

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    @property
    def graph(self) -> Path:
        return self.folder / "graph.onnx"

    @property
    def weights(self) -> Path:
        return self.folder / "weights.safetensors"

    @cached_property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.folder / "facts.json").read_text())
        return facts

    def inputs_file(self, num_candidates: int) -> Path:
        return self.folder / f"inputs-{num_candidates}.npz"

    def inputs(self, num_candidates: int) -> list[dict[str, NDArray[Any]]]:
        return read_inputs(self.inputs_file(num_candidates))

    @property
    def artifact(self) -> Path:
        """The folder of the one version."""
        (graph,) = self.artifacts.glob("*/*/model.onnx")
        return graph.parent

    @property
    def versions(self) -> list[str]:
        return sorted(path.parent.name for path in self.artifacts.glob("*/*/model.onnx"))

    def logits(self, num_candidates: int) -> NDArray[np.float32]:
        """[R, N], by the model itself, offline."""
        logits: NDArray[np.float32] = np.load(self.folder / f"logits-{num_candidates}.npy")
        return logits

    def probabilities(self, num_candidates: int) -> NDArray[np.float64]:
        """[R, N], by the model itself, offline."""
        return sigmoid(self.logits(num_candidates))


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    probabilities: NDArray[np.float64] = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return probabilities


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A temporary checkout of that commit. Raises CheckoutError."""
    with TemporaryDirectory(prefix="clickserve-baseline-") as folder:
        tree = Path(folder) / "tree"
        # A benchmark that is terminated still removes its checkout and stops its processes.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        _git("worktree", "add", "--detach", str(tree), revision)
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))
            signal.signal(signal.SIGTERM, before)


def commit_of(tree: Path) -> str:
    """Its short hash, with a plus sign where files differ from it; a question mark where that is not known."""
    try:
        commit = _git("rev-parse", "--short", "HEAD", tree=tree)
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no", tree=tree) else "")
    except CheckoutError:
        return "?"


def export_workload(
    tree: Path,
    work: Path,
    *,
    model: str = "mian",
    sizes: Sequence[int],
    weights: Path | None = None,
    versions: int = 1,
) -> Export:
    """Export by the checkout's own code, or reuse what the same code exported into `work` before.

    `weights` are those of another export, to be used where they fit. Raises CheckoutError.
    """
    sources = sorted((*tree.glob("models/**/*.py"), *tree.glob("training/**/*.py")))
    parts = [path.read_bytes() for path in (*sources, WORKLOAD)]
    parts += [b"" if weights is None else weights.read_bytes(), repr((model, sorted(sizes), versions)).encode()]
    folder = work / hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]
    if not (folder / "facts.json").exists():  # it is written last
        options = [
            "--out",
            str(folder),
            "--model",
            model,
            "--versions",
            str(versions),
            "--sizes",
            ",".join(map(str, sizes)),
        ]
        options += [] if weights is None else ["--weights", str(weights)]
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        if subprocess.run([sys.executable, str(WORKLOAD), *options], cwd=tree, env=environment, check=False).returncode:
            raise CheckoutError(f"{tree}: the workload could not be exported; the reason stands above")
    return Export(folder=folder)


def _git(*command: str, tree: Path = ROOT) -> str:
    try:
        done = subprocess.run(["git", "-C", str(tree), *command], capture_output=True, text=True, check=False)
    except OSError as err:
        raise CheckoutError(f"git: {err.strerror}") from None
    if done.returncode:
        raise CheckoutError(f"git {' '.join(command[:2])}: {' '.join(done.stderr.split())[:300]}")
    return done.stdout.strip()
