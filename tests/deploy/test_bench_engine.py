"""What the engine's figures set against each other: that the two forms are one model, and that only one repeats."""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from models import zoo
from training.export import example

BENCH = Path(__file__).parents[2] / "deploy" / "bench"


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield importlib.import_module("workload"), importlib.import_module("bare")


def test_the_row_form_scores_as_the_request_form_and_reads_the_user_for_every_candidate(modules):
    subject, _ = modules
    schema = subject.fit(subject.make_world())
    torch.manual_seed(1)
    model = zoo.build("mian", {}, schema).eval()
    rows = subject.RowForm(model).eval()
    given = {name: torch.from_numpy(array) for name, array in example(schema, 2, 7).items()}

    with torch.no_grad():
        torch.testing.assert_close(rows(given), model(given), rtol=1e-5, atol=1e-5)
        assert {len(part) for part in model.encode_user(given).values()} == {2}
        assert {len(part) for part in rows.encode_user(given).values()} == {7}


def test_the_subject_has_the_fields_that_the_issue_names(modules):
    subject, _ = modules
    schema = subject.fit(subject.make_world())

    assert [len(schema.group(group)) for group in ("user", "context", "item")] == [8, 6, 5]
    assert schema.history_length == 30 and vars(zoo.configure("mian", {}))["emb_dim"] == 16
    assert [f.name for f in schema.group("item") if f.kind == "multi"] == ["tags"]


def test_the_bare_run_is_fed_what_the_encoder_made(modules, tmp_path):
    subject, bare = modules
    world = subject.make_world()
    made = subject.inputs(world, subject.fit(world), 3, 5)

    bare.save(made, tmp_path / "inputs.npz")
    read = list(bare._requests(tmp_path / "inputs.npz"))

    for wanted, found in zip(made, read, strict=True):
        assert wanted.keys() == found.keys()
        assert all(np.array_equal(wanted[name], found[name]) for name in wanted)
    assert made[0]["hist_mask"].all() and len(made[0]["user_index"]) == 5
    assert not any((array == 1).all() for name, array in made[0].items() if name.startswith("item."))  # all known


def test_a_stop_of_the_machine_is_seen_and_counted(modules):
    clock = iter([0.0, 0.0005, 0.5, 0.503, 1.0, 2.0])
    still = importlib.import_module("still").watch(3, 1.5, clock=lambda: next(clock))

    assert (still.core, still.per_s, still.longest_ms) == (3, 2.0, pytest.approx(1000))
    assert still.share == pytest.approx((0.4995 + 0.003 + 0.497 + 1) / 2)


def test_every_core_is_watched_by_a_process_of_its_own(modules):
    cores = sorted(os.sched_getaffinity(0))

    watched = importlib.import_module("still").measured(cores, 0.1)

    assert [one.core for one in watched] == cores
    assert all(0 <= one.share <= 1 for one in watched)
