"""The simulator's log obeys its stated law."""

import json

import numpy as np
import polars as pl
import pytest

from models.features.history import Event, history
from training.datasets import simulated
from training.errors import UserError
from training.simulator import simulate as law
from training.simulator.population import CATEGORIES, DAY_MS, DAYS, SLATE, Ads, Requests, Users
from training.simulator.simulate import simulate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("log")
    simulate(out, users=300, items=60, rows=40_000, seed=3)
    return out


@pytest.fixture(scope="module")
def impressions(folder):
    return pl.read_parquet(folder / "impressions.parquet")


def test_playing_everybody_at_once_equals_one_request_after_another():
    who, what, when, how = (np.random.default_rng(seed) for seed in range(4))
    users, ads = Users.draw(who, 7), Ads.draw(what, 40)
    requests = Requests.draw(when, 7, ads, 60)
    base = law._base(how, users, ads, requests)

    logits, clicks = law._play(base, ads, requests)

    past: dict[int, list[Event]] = {}
    for r in range(60):
        events = past.setdefault(int(requests.user[r]), [])
        before = [int(e.item[2:]) for e in history(events, before=float(requests.ms[r]), limit=10_000)][::-1]
        for s in range(SLATE):
            ad = int(requests.ads[r, s])
            z = base[r, s]
            z += law.TASTE * sum(law.FADE**j for j, old in enumerate(before) if ads.category[old] == ads.category[ad])
            z -= law.FATIGUE * (ad in before[: law.MEMORY])
            p = 1 / (1 + np.exp(-(z - law.POSITION * np.log(s + 1))))
            assert logits[r, s] == pytest.approx(z, abs=1e-12)
            assert clicks[r, s] == (requests.draws[r, s] < p)
            if clicks[r, s]:
                events.append(Event(item=f"ad{ad}", ts=float(requests.ms[r]), features={}))
    assert clicks.sum() > 50


def test_clicks_come_as_often_as_the_true_probabilities_say(impressions):
    by_truth = impressions.sort("true_ctr").with_columns(bin=pl.int_range(pl.len()) * 20 // pl.len())

    bins = by_truth.group_by("bin").agg(
        clicks=pl.col("click").cast(pl.Int64).sum(),
        expected=pl.col("true_ctr").sum(),
        variance=(pl.col("true_ctr") * (1 - pl.col("true_ctr"))).sum(),
    )

    assert ((bins["clicks"] - bins["expected"]).abs() < 4.5 * bins["variance"].sqrt()).all()


def test_the_click_rate_is_about_the_asked_one(impressions):
    assert impressions["click"].mean() == pytest.approx(law.CLICK_RATE, abs=0.01)


def test_a_better_position_gets_more_clicks_and_says_nothing_about_the_ad(impressions):
    by_position = impressions.group_by("position").agg(pl.col("true_ctr").mean()).sort("position")
    with_the_ad = np.corrcoef(impressions["position"], impressions["true_ctr_top"])[0, 1]

    assert (by_position["true_ctr"].diff().drop_nulls() < 0).all()
    assert abs(with_the_ad) < 4.5 / np.sqrt(impressions.height)


def test_truth_at_the_top_and_without_position_follow_from_the_law(impressions):
    truth = impressions["true_ctr"].to_numpy()
    z = np.log(truth / (1 - truth)) + law.POSITION * np.log(impressions["position"].to_numpy())
    per_position = 1 / (1 + np.exp(-(z[:, None] - law.POSITION * np.log(np.arange(1, SLATE + 1)))))

    np.testing.assert_allclose(impressions["true_ctr_top"], per_position[:, 0], rtol=1e-9)
    np.testing.assert_allclose(impressions["true_ctr_blind"], per_position.mean(axis=1), rtol=1e-9)


def test_slates_hold_different_ads_none_before_its_launch():
    what, when = (np.random.default_rng(seed) for seed in (1, 2))
    ads = Ads.draw(what, 40)

    requests = Requests.draw(when, 5, ads, 500)

    assert (ads.launch_ms > 0).any()
    assert all(len(set(slate)) == SLATE for slate in requests.ads.tolist())
    assert (ads.launch_ms[requests.ads] <= requests.ms[:, None]).all()


def test_nobody_makes_two_requests_at_one_time_even_when_crowded():
    ads = Ads.draw(np.random.default_rng(0), 40)

    requests = Requests.draw(np.random.default_rng(0), 1, ads, 3000)

    assert (np.diff(requests.ms) > 0).all()
    assert requests.ms.max() < DAYS * DAY_MS


def test_the_same_seed_gives_the_same_log_and_another_seed_another(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        simulate(tmp_path / name, users=10, items=40, rows=400, seed=seed)

    logs = [pl.read_parquet(tmp_path / name / "impressions.parquet") for name in "abc"]

    assert logs[0].equals(logs[1])
    assert not logs[0].equals(logs[2])


def test_simulation_json_tells_what_the_best_model_reaches(folder, impressions):
    about = json.loads((folder / "simulation.json").read_text())

    assert about["rows"] == impressions.height == 40_000
    assert 0.75 < about["auc_blind"] < about["auc"] < 0.95
    assert about["logloss"] < about["logloss_blind"] < 0.33  # what a constant 0.10 has


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"users": 0}, "--users: expected a whole number of at least 1, got 0"),
        ({"items": 31}, "--items: expected a whole number of at least 32, got 31"),
        ({"rows": 7}, "--rows: expected a whole number of at least 8, got 7"),
        ({"seed": -1}, "--seed: expected a whole number of at least 0, got -1"),
    ],
)
def test_options_that_make_no_log_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        simulate(tmp_path, **{"users": 10, "items": 40, "rows": 80, "seed": 1, **options})


def test_loading_keeps_the_position_and_the_truth_from_the_model(folder):
    log = simulated.load(folder)

    fields = {f.name for f in log.spec.fields}
    assert not fields & {"position", *log.truth}
    assert set(log.rows.collect()["category"].unique()) <= set(CATEGORIES)


def test_a_folder_without_a_log_is_told_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=r"impressions.parquet: no such file; `python -m training simulate"):
        simulated.load(tmp_path)


def test_a_file_of_other_columns_is_refused(tmp_path):
    simulate(tmp_path, users=10, items=40, rows=80, seed=1)
    (tmp_path / "users.parquet").write_bytes((tmp_path / "impressions.parquet").read_bytes())

    with pytest.raises(UserError, match=r"users.parquet: expected the columns id, gender, age, country, interest"):
        simulated.load(tmp_path)


def test_a_damaged_file_is_refused(tmp_path):
    simulate(tmp_path, users=10, items=40, rows=80, seed=1)
    (tmp_path / "ads.parquet").write_bytes(b"PAR1 but no more")

    with pytest.raises(UserError, match=r"ads.parquet: not a Parquet file that can be read"):
        simulated.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("impressions", {"click": pl.col("click") * 2}, "expected a finite ts and a click of 0 or 1"),
        ("impressions", {"click": pl.col("click").cast(pl.String)}, "column click: expected Int8"),
        ("impressions", {"ts": pl.col("ts") * float("nan")}, "expected a finite ts and a click of 0 or 1"),
        ("impressions", {"ts": pl.lit(None, pl.Float64)}, "column ts: expected Float64 in every row"),
        ("impressions", {"ad": pl.lit("ad99")}, "holds ad ad99, which is not in ads.parquet"),
        ("ads", {"id": pl.lit("ad1")}, "ads.parquet: holds ad ad1 more than once"),
        ("ads", {"price": pl.col("price").cast(pl.String)}, "column price: expected Float64"),
    ],
)
def test_a_log_with_other_values_is_refused(tmp_path, file, change, message):
    simulate(tmp_path, users=10, items=40, rows=80, seed=1)
    table = pl.read_parquet(tmp_path / f"{file}.parquet").with_columns(**change)
    table.write_parquet(tmp_path / f"{file}.parquet")

    with pytest.raises(UserError, match=message):
        simulated.load(tmp_path)


def test_a_log_without_rows_is_refused(tmp_path):
    simulate(tmp_path, users=10, items=40, rows=80, seed=1)
    pl.read_parquet(tmp_path / "impressions.parquet").clear().write_parquet(tmp_path / "impressions.parquet")

    with pytest.raises(UserError, match="impressions.parquet: expected rows, the file holds none"):
        simulated.load(tmp_path)


def test_a_simulation_takes_the_place_of_an_earlier_one_and_of_nothing_else(tmp_path):
    simulate(tmp_path, users=10, items=40, rows=80, seed=1)
    simulate(tmp_path, users=12, items=40, rows=80, seed=2)
    assert json.loads((tmp_path / "simulation.json").read_text())["users"] == 12
    (tmp_path / "notes.txt").write_text("mine")
    before = (tmp_path / "impressions.parquet").read_bytes()

    with pytest.raises(UserError, match=r"expected a new or an empty folder or an earlier log, found notes.txt there"):
        simulate(tmp_path, users=10, items=40, rows=80, seed=1)

    assert (tmp_path / "impressions.parquet").read_bytes() == before


def test_a_log_that_was_not_written_to_its_end_is_refused(tmp_path, monkeypatch):
    simulate(tmp_path, users=10, items=40, rows=80, seed=1)

    def killed(frame, file):
        if file.name == "ads.parquet":
            raise KeyboardInterrupt
        frame.write_parquet(file)

    monkeypatch.setattr("training.simulator.simulate.write_parquet", killed)
    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path, users=12, items=40, rows=80, seed=2)

    with pytest.raises(UserError, match=r"expected a whole log, simulation.json is missing"):
        simulated.load(tmp_path)
