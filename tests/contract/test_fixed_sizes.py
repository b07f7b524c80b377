"""A GPU's backends pad, bind and split: whatever a request's size, they score as the plain ones do, here on the CPU."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import example as case
from hypothesis import given, settings
from hypothesis import strategies as st

from models.artifact import folder as artifact
from models.artifact.errors import ArtifactError
from models.artifact.folder import Artifact
from models.artifact.manifest import BATCHED, ITEM, MODEL, TORCHSCRIPT
from models.features.arrays import Arrays
from models.features.field import Input
from models.features.packing import PackedLayout, slice_candidates
from service.runtime import backends
from service.runtime.backend import BackendError
from service.runtime.onnx_cpu import OnnxBackend
from service.runtime.onnx_cuda import OnnxCudaBackend
from service.runtime.static_shapes import ALIGNMENT, CaptureLock, Layout, parts
from service.runtime.torchscript import TorchScriptCudaBackend
from tests.service import tiny
from tests.trained_models import trained_and_exported
from training import export

Example = Callable[[int, int], Arrays]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use on this machine")


@pytest.fixture(scope="module")
def mian(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A model with inputs of every kind and rank."""
    _, written = trained_and_exported(tmp_path_factory, "mian")
    return written


@pytest.fixture(scope="module")
def inputs(mian: Artifact) -> tuple[Input, ...]:
    return mian.manifest.graphs[BATCHED].inputs


@pytest.fixture(scope="module")
def example(mian: Artifact) -> Example:
    """Packed tensors of so many requests and candidates, item rows included."""
    layout, fed = PackedLayout(mian.schema), [i.name for i in mian.manifest.graphs[ITEM].inputs]
    items = OnnxBackend(mian.path / ITEM, fed=fed, outputs=["items"])

    def packed(users: int, candidates: int) -> Arrays:
        arrays = layout.pack(export.example(mian.schema, users, candidates))
        return {**arrays, "items": items.run(arrays)}

    return packed


@pytest.fixture(scope="module")
def plain(mian: Artifact, inputs: tuple[Input, ...]) -> OnnxBackend:
    return OnnxBackend(mian.path / BATCHED, fed=[i.name for i in inputs])


@pytest.fixture(scope="module")
def bound_onnx(mian: Artifact, inputs: tuple[Input, ...]) -> OnnxCudaBackend:
    return OnnxCudaBackend(mian.path / BATCHED, inputs=inputs, device="cpu")


@pytest.fixture(scope="module")
def bound_torchscript(mian: Artifact, inputs: tuple[Input, ...]) -> TorchScriptCudaBackend:
    return TorchScriptCudaBackend(mian.path / TORCHSCRIPT, inputs=inputs, device="cpu")


sizes = given(users=st.sampled_from([1, 2, 5, 17, 40]), candidates=st.integers(1, 1100))


@settings(max_examples=40, deadline=None)
@sizes
@case(users=1, candidates=1)
@case(users=1, candidates=16)
@case(users=1, candidates=17)
@case(users=16, candidates=1024)
@case(users=17, candidates=1025)
@case(users=40, candidates=3000)
def test_onnx_at_fixed_sizes_scores_as_at_any(
    plain: OnnxBackend, bound_onnx: OnnxCudaBackend, users: int, candidates: int, example: Example
) -> None:
    arrays = example(users, candidates)

    assert np.allclose(bound_onnx.run(arrays), plain.run(arrays), rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@sizes
@case(users=1, candidates=1)
@case(users=17, candidates=1025)
def test_torchscript_at_fixed_sizes_scores_as_at_any(
    plain: OnnxBackend, bound_torchscript: TorchScriptCudaBackend, users: int, candidates: int, example: Example
) -> None:
    arrays = example(users, candidates)

    assert np.allclose(bound_torchscript.run(arrays), plain.run(arrays), rtol=1e-5, atol=1e-5)


def test_a_small_request_after_a_large_one_sees_nothing_of_it(
    plain: OnnxBackend, bound_onnx: OnnxCudaBackend, example: Example
) -> None:
    small = example(1, 3)
    for _ in range(bound_onnx.lanes):
        bound_onnx.run(example(4, 16))
        bound_onnx.run(example(1, 16))

    for _ in range(bound_onnx.lanes):
        assert np.allclose(bound_onnx.run(small), plain.run(small), rtol=1e-5, atol=1e-5)


def test_runs_under_way_together_do_not_touch_each_other(
    plain: OnnxBackend, bound_onnx: OnnxCudaBackend, example: Example
) -> None:
    requests = [example(1 + n % 3, 1 + 13 * n) for n in range(24)]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(bound_onnx.run, requests))

    for arrays, logits in zip(requests, answers, strict=True):
        assert np.allclose(logits, plain.run(arrays), rtol=1e-5, atol=1e-5)


def test_torchscript_at_fixed_sizes_is_run_by_several_threads_and_mixes_nothing_up(
    plain: OnnxBackend, bound_torchscript: TorchScriptCudaBackend, example: Example
) -> None:
    """A version that serves is loaded anew: recent requests are replayed on it beside those that come."""
    requests = [example(1 + n % 3, 1 + 13 * (n % 24)) for n in range(96)]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(bound_torchscript.run, requests))

    for arrays, logits in zip(requests, answers, strict=True):
        assert np.allclose(logits, plain.run(arrays), rtol=1e-5, atol=1e-5)


def test_a_model_is_loaded_beside_one_that_serves(
    mian: Artifact, inputs: tuple[Input, ...], plain: OnnxBackend, bound_onnx: OnnxCudaBackend, example: Example
) -> None:
    arrays = example(1, 100)
    wanted = plain.run(arrays)
    with ThreadPoolExecutor(3) as pool:
        loading = pool.submit(OnnxCudaBackend, mian.path / BATCHED, inputs=inputs, device="cpu")
        serving = [pool.submit(bound_onnx.run, arrays) for _ in range(200)]

        assert all(np.allclose(run.result(timeout=60), wanted, rtol=1e-5, atol=1e-5) for run in serving)
        assert np.allclose(loading.result(timeout=60).run(arrays), wanted, rtol=1e-5, atol=1e-5)


def test_what_is_alone_waits_for_the_runs_and_holds_up_the_next() -> None:
    lock, order = CaptureLock(), []
    entered, may_end = threading.Event(), threading.Event()

    def run() -> None:
        with lock.together():
            entered.set()
            may_end.wait(60)
            order.append("run")

    def capture() -> None:
        with lock.alone():
            order.append("capture")

    def next_run() -> None:
        with lock.together():
            order.append("next run")

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(run)
        entered.wait(60)
        captured = pool.submit(capture)
        while not lock._alone:
            assert not captured.done()
        after = pool.submit(next_run)
        may_end.set()
        for done in (first, captured, after):
            done.result(timeout=60)

    assert order == ["run", "capture", "next run"]


@pytest.mark.parametrize("wrong", ["a dtype", "a shape", "nothing"])
def test_arrays_that_do_not_fit_are_a_backend_error_and_the_next_run_is_well(
    plain: OnnxBackend,
    bound_onnx: OnnxCudaBackend,
    bound_torchscript: TorchScriptCudaBackend,
    wrong: str,
    example: Example,
) -> None:
    arrays = example(1, 5)
    items: Arrays = {
        "a dtype": arrays["items"].astype(np.int64),
        "a shape": arrays["items"][:, :2],
        "nothing": arrays["items"][:0],
    }

    for backend in (bound_onnx, bound_torchscript):
        for _ in range(backend.lanes + 1):
            with pytest.raises(BackendError, match="items"):
                backend.run({**arrays, "items": items[wrong]})
        assert np.allclose(backend.run(arrays), plain.run(arrays), rtol=1e-5, atol=1e-5)


def test_a_request_that_cannot_be_run_leaves_nothing_behind(
    plain: OnnxBackend, bound_onnx: OnnxCudaBackend, bound_torchscript: TorchScriptCudaBackend, example: Example
) -> None:
    small, bad = example(2, 3), example(2, 16)
    bad["user_index"][5] = 9  # there is no such user: what becomes of it in the next request's padding?

    for backend in (bound_onnx, bound_torchscript):
        for _ in range(backend.lanes):
            with pytest.raises(BackendError):
                backend.run(bad)
        for _ in range(backend.lanes):
            assert np.allclose(backend.run(small), plain.run(small), rtol=1e-5, atol=1e-5)


def test_no_candidates_are_no_logits(bound_onnx: OnnxCudaBackend, example: Example) -> None:
    arrays = example(1, 2)
    none = slice_candidates(arrays, slice(0, 0))

    assert bound_onnx.run(none).shape == (0,)


@given(
    user_index=st.lists(st.integers(0, 8), min_size=1, max_size=40),
    users=st.integers(1, 10),
    candidates=st.integers(1, 50),
)
def test_the_parts_of_a_request_are_all_of_it_and_none_is_too_large(
    user_index: list[int], users: int, candidates: int
) -> None:
    inputs = [Input(name=n, dtype="int64", dims=(d,)) for n, d in (("request_a", "U"), ("item_b", "C"))]
    index = np.array(user_index)
    arrays = {"request_a": np.arange(100, 109), "item_b": np.arange(len(index)), "user_index": index}
    found = np.full(len(index), -1)

    for rows, part in parts(arrays, inputs, users=users, candidates=candidates):
        assert len(part["request_a"]) <= users
        assert 0 < len(part["item_b"]) <= candidates
        found[rows] = part["request_a"][part["user_index"]] * 1000 + part["item_b"]

    assert found.tolist() == [(100 + user) * 1000 + row for row, user in enumerate(user_index)]


def test_inputs_lie_beside_each_other_and_aligned(inputs: tuple[Input, ...]) -> None:
    layout = Layout(inputs, 4, 16)
    buffer = np.zeros(layout.num_bytes, dtype=np.uint8)
    views = layout.views(buffer)

    for number, view in enumerate(views.values(), start=1):
        view.view(np.uint8)[...] = number

    assert all((view.view(np.uint8) == number).all() for number, view in enumerate(views.values(), start=1))
    assert all(slot.offset % ALIGNMENT == 0 for slot in layout.slots)
    assert [view.shape[0] for view in views.values()] == [4 if i.dims[0] == "U" else 16 for i in inputs]


def test_no_graph_decides_anything_as_no_cuda_graph_can(mian: Artifact) -> None:
    for name in (MODEL, BATCHED):
        operators = {node.op_type for node in onnx.load(mian.path / name).graph.node}
        assert operators & {"If", "Loop", "Scan"} == set()


@pytest.fixture(scope="module")
def both_kinds(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    files = {**tiny.graphs(1), BATCHED: tiny.graphs(1)[MODEL], TORCHSCRIPT: b"not looked at"}
    return artifact.read(tiny.write(tmp_path_factory.mktemp("artifacts"), files=files))


def test_a_missing_gpu_is_told_in_one_sentence(both_kinds: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArtifactError, match=r"model\.ts: device cuda: torch .* (is the CPU's build|sees no GPU)"):
        backends.load(both_kinds, "torchscript", "cuda")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ArtifactError, match=r"model\.batched\.onnx: device cuda needs onnxruntime-gpu"):
        backends.load(both_kinds, "onnx", "cuda")


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider':UserWarning")
def test_a_wheel_that_finds_no_gpu_is_no_gpu(both_kinds: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU on this machine")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])

    with pytest.raises(ArtifactError, match="found no GPU that it can use"):
        backends.load(both_kinds, "onnx", "cuda")


@needs_gpu
@pytest.mark.parametrize("kind", [OnnxCudaBackend, TorchScriptCudaBackend])
def test_a_gpu_scores_as_the_cpu(
    mian: Artifact,
    inputs: tuple[Input, ...],
    plain: OnnxBackend,
    kind: type[OnnxCudaBackend | TorchScriptCudaBackend],
    example: Example,
) -> None:
    backend = kind(mian.path / (BATCHED if kind is OnnxCudaBackend else TORCHSCRIPT), inputs=inputs)

    for users, candidates in ((1, 1), (1, 100), (1, 1000), (5, 300), (20, 1100)):
        arrays = example(users, candidates)
        assert np.allclose(backend.run(arrays), plain.run(arrays), rtol=1e-5, atol=1e-5)
