"""Graph latencies, overload and row form: what is measured of small models, and what the reports say."""

from typing import Any

import checkouts
import graph_latency
import numpy as np
import overload
import pytest

from tests.deploy import small_export


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> checkouts.Export:
    return small_export.write(tmp_path_factory.mktemp("export"))


def test_every_graph_of_a_model_is_run_in_turns_with_the_older_one(export):
    exports = {graph_latency.BEFORE: export, graph_latency.COMPOSED: export}

    found = graph_latency.measure("small", exports, 7, repeats=5)

    assert [(one.form, one.num_inputs, one.num_nodes) for one in found] == [
        ("before", 2, 4),  # request_ids and item_ids; a gather of item rows, and the three nodes of the scores
        ("composed", 2, 4),
        ("item rows fed", 2, 3),  # request_ids and items
    ]
    assert found[0].ratio is None and all(one.ratio and one.ratio.median > 0 for one in found[1:])
    assert len(graph_latency.markdown(found).splitlines()) == 2 + len(found)


def test_a_graph_that_computes_something_else_is_not_timed(export, tmp_path):
    for file in export.folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "logits-7.npy").unlink()
    np.save(tmp_path / "logits-7.npy", export.logits(7) + 0.01)

    with pytest.raises(
        graph_latency.WrongLogitsError, match=r"small, composed, 7 candidates: logits are up to 0.01 off"
    ):
        graph_latency.measure("small", {"composed": checkouts.Export(folder=tmp_path)}, 7, repeats=1)


def run(label: str, **figures: Any) -> dict[str, Any]:
    zero = {"requests": 100, "p99_ms": 5.0, "goodput_per_s": 100.0, "refused_p99_ms": 1.0, "errors": 0, "degraded": 0}
    return {"label": label, **zero, "invalid_reason": None, **figures}


def found(knee: float) -> dict[str, Any]:
    runs = [
        run("80% of the knee", p99_ms=8.25),
        run("100% of the knee", goodput_per_s=200.0),
        run("150% of the knee", goodput_per_s=190.0, refused_p99_ms=1.5, errors=2, invalid_reason="late"),
        run("6 swaps of one: steady", p99_ms=5.0),
        run("6 swaps of one: during (5.4 s)", p99_ms=5.5),
    ]
    return {"knee_per_s": knee, "runs": runs, "text": f"table of {knee:g}"}


def test_the_overload_report_compares_the_knees_of_each_round_and_shows_every_bound():
    rounds = [
        {overload.THIS: found(300), overload.OLD: found(100)},
        {overload.OLD: found(100), overload.THIS: found(250)},
    ]
    memory = {"rss_mb": [(float(n), 300.0 + n) for n in range(9)], "rss_mb_after_loads": [308.0, 320.0, 321.0]}

    text = overload.report(rounds, {"runs": [run("240/s", p99_ms=7.5)], "text": "long table", **memory})

    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in text.splitlines() if line.startswith("|")}
    assert rows["| knee, requests/s"] == ["300, 250", "100, 100 |"]
    assert rows["| p99 at 80 %, ms (asked: at most 10)"][0] == "8.25, 8.25"
    assert rows["| goodput at 150 %, of its peak (asked: at least 90 %)"][0] == "95.0%, 95.0%"
    assert rows["| p99 during swaps over steady (asked: at most 1.2)"][0] == "1.10, 1.10"
    assert rows["| errors"][0] == "2, 2" and rows["| runs in which the generator was the limit"][0] == "1, 1"
    assert "Knee over the baseline's, by round: 3.00, 2.50" in text
    assert "p99 **7.50 ms** (asked: at most 10)" in text and "308, 320 after 4 loads, 321 after 24" in text
    assert text.count("table of") == 4 and text.endswith("long table\n")
