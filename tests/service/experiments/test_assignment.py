"""The draw is fair, sticky and moves no more users than it must."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.experiments.assignment import Experiment, ExperimentError, parse, read

USERS = [f"user-{number}" for number in range(200_000)]


def experiment(*, salt: str = "2026-11", overrides: dict[str, str] | None = None, **shares: float) -> Experiment:
    arms = [{"name": name, "model": name, "share": share} for name, share in shares.items()]
    content = {"experiment": "test", "salt": salt, "arms": arms, "overrides": overrides or {}}
    return parse(content, source="test")


def drawn(ab: Experiment, users: list[str]) -> list[str]:
    return [ab.assign(user).name for user in users]


@pytest.fixture(scope="module")
def at_50_50() -> list[str]:
    return drawn(experiment(mian=50, stec=50), USERS)


def test_many_users_split_by_the_shares_and_a_change_moves_only_the_difference(at_50_50: list[str]):
    at_60_40 = drawn(experiment(mian=60, stec=40), USERS)

    moves = Counter(zip(at_50_50, at_60_40, strict=True))
    assert at_50_50.count("mian") / len(USERS) == pytest.approx(0.5, abs=0.004)
    assert at_60_40.count("mian") / len(USERS) == pytest.approx(0.6, abs=0.004)
    assert moves["stec", "mian"] / len(USERS) == pytest.approx(0.1, abs=0.004)
    assert moves["mian", "stec"] == 0


def test_a_new_arm_takes_its_share_from_all_and_moves_nobody_between_the_others(at_50_50: list[str]):
    users = USERS

    with_third = drawn(experiment(mian=40, stec=40, deepfm=20), users)

    moves = Counter(zip(at_50_50, with_third, strict=False))
    assert moves["mian", "stec"] == moves["stec", "mian"] == 0
    assert moves["mian", "deepfm"] / len(users) == pytest.approx(0.1, abs=0.003)
    assert moves["stec", "deepfm"] / len(users) == pytest.approx(0.1, abs=0.003)


def test_experiments_with_different_salts_draw_independently(at_50_50: list[str]):
    users = USERS

    other = drawn(experiment(mian=50, stec=50, salt="2026-12"), users)

    agree = sum(a == b for a, b in zip(at_50_50, other, strict=False)) / len(users)
    assert agree == pytest.approx(0.5, abs=0.005)


def test_every_process_draws_alike(at_50_50: list[str]):
    script = (
        "from service.experiments.assignment import parse\n"
        "arms = [{'name': n, 'model': n, 'share': 50} for n in ('mian', 'stec')]\n"
        "ab = parse({'experiment': 'test', 'salt': '2026-11', 'arms': arms}, source='test')\n"
        "print(' '.join(ab.assign(f'user-{n}').name for n in range(2000)))"
    )

    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[3])},
            capture_output=True,
            text=True,
            check=True,
        )

        assert done.stdout.split() == at_50_50[:2000]


def test_the_draw_never_changes():
    """Golden: if this fails, every user of every running experiment changes sides. Do not rewrite it."""
    ab = experiment(mian=50, stec=30, deepfm=20)

    arms = drawn(ab, ["u1", "u2", "u3", "u42", "", "日本", "a" * 300, "0", "1", "2"])

    assert arms == ["mian", "mian", "stec", "stec", "stec", "stec", "mian", "mian", "stec", "deepfm"]


@given(user=st.text())
def test_the_order_of_the_arms_does_not_matter(user: str):
    one_way, other_way = experiment(mian=50, stec=30, deepfm=20), experiment(deepfm=20, mian=50, stec=30)

    assert one_way.assign(user).name == other_way.assign(user).name


def test_the_propensity_of_an_arm_is_its_part_of_the_shares_that_are_not_killed():
    ab = experiment(mian=60, stec=20, deepfm=20)

    without = ab.with_shares(shares={}, shadow={}, killed=["deepfm"])

    assert [ab.propensity(arm) for arm in ab.arms] == [0.6, 0.2, 0.2]
    assert [without.propensity(arm) for arm in without.arms] == [0.75, 0.25, 0]


def with_shadows(**percent: float) -> Experiment:
    shadow = [{"name": name, "model": name, "share": share} for name, share in percent.items()]
    arms = [{"name": "mian", "model": "mian", "share": 100}]
    return parse({"experiment": "test", "salt": "s", "arms": arms, "shadow": shadow}, source="test")


def test_a_shadow_arm_scores_its_percentage_of_the_requests_independently_of_the_others():
    ab = with_shadows(a=10, b=50, never=0, always=100)

    sampled = [frozenset(arm.name for arm in ab.shadows(f"r-{n}")) for n in range(100_000)]

    found = {name: sum(name in names for names in sampled) / len(sampled) for name in ("a", "b", "never", "always")}
    assert found == {"a": pytest.approx(0.1, abs=0.003), "b": pytest.approx(0.5, abs=0.005), "never": 0, "always": 1}
    assert sum({"a", "b"} <= names for names in sampled) / len(sampled) == pytest.approx(0.05, abs=0.003)


def test_a_request_has_the_same_shadows_in_every_process_and_a_raised_share_keeps_those_it_had():
    requests = [f"r-{n}" for n in range(10_000)]

    few, again, more = ([r for r in requests if with_shadows(a=share).shadows(r)] for share in (10, 10, 20))

    assert few == again
    assert set(few) < set(more)


def test_shadow_arms_take_no_part_in_the_draw():
    alone, shadowed = experiment(mian=100), with_shadows(a=100)

    assert [arm.name for arm in shadowed.served] == ["mian", "a"]
    assert drawn(alone, USERS[:100]) == drawn(shadowed, USERS[:100]) == ["mian"] * 100


def test_a_killed_arm_gives_its_users_to_the_others_and_nobody_else_moves():
    ab = experiment(mian=50, stec=30, deepfm=20)

    without = ab.with_shares(shares={}, shadow={}, killed=["stec"])

    moves = Counter(zip(drawn(ab, USERS[:20_000]), drawn(without, USERS[:20_000]), strict=True))
    assert {pair for pair in moves if pair[0] != pair[1]} == {("stec", "mian"), ("stec", "deepfm")}
    assert ("stec", "stec") not in moves


def test_an_arm_that_comes_back_from_a_kill_has_the_users_it_had():
    ab = experiment(mian=50, stec=50)

    back = ab.with_shares(shares={}, shadow={}, killed=["stec"]).with_shares(shares={}, shadow={}, killed=[])

    assert drawn(back, USERS[:1000]) == drawn(ab, USERS[:1000])


def test_a_killed_shadow_arm_scores_nothing():
    ab = with_shadows(a=100).with_shares(shares={}, shadow={}, killed=["a"])

    assert not any(ab.shadows(f"r-{n}") for n in range(100))


@pytest.mark.parametrize("thirds", [(33.333333, 33.333333, 33.333334), (100 / 3, 100 / 3, 100 / 3)])
def test_thirds_are_a_whole(thirds: tuple[float, float, float]):
    a, b, c = thirds

    ab = experiment(a=a, b=b, c=c)

    assert ab.propensity(ab.arm("a")) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("shares", "shadow", "killed", "says"),
    [
        ({"none": 1}, {}, None, "arms has no none; there are mian"),
        ({}, {"mian": 1}, None, "shadow has no mian; there are a"),
        ({"mian": 0}, {}, None, r"sum to 100, got 0 \(mian 0\)"),
        ({"mian": 60}, {}, None, r"sum to 100, got 60 \(mian 60\)"),
        ({"mian": -1}, {}, None, "greater than or equal to 0"),
        ({"mian": 1e308}, {}, None, "less than or equal to 100"),
        ({}, {"a": 101}, None, "less than or equal to 100"),
        ({}, {}, ["mian"], "at least one arm with a share above 0 must not be killed"),
        ({}, {}, ["none"], "killed names arm none; there are mian, a"),
    ],
)
def test_shares_that_no_file_could_have_are_refused(
    shares: dict[str, float], shadow: dict[str, float], killed: list[str] | None, says: str
):
    with pytest.raises(ExperimentError, match=says):
        with_shadows(a=10).with_shares(shares=shares, shadow=shadow, killed=killed)


def test_an_arm_without_a_share_serves_overrides_only():
    ab = experiment(mian=100, stec=0, overrides={"qa-user-1": "stec"})

    assert set(drawn(ab, USERS[:1000])) == {"mian"}
    assert ab.assign("qa-user-1").name == "stec"
    assert ab.propensity(ab.arm("stec")) == 0


def test_a_file_is_read_as_the_contract_writes_it(tmp_path: Path):
    file = tmp_path / "experiment.yaml"
    file.write_text("""\
experiment: mian-vs-stec
salt: 2026-11
unit: user
arms:
  - {name: mian, model: mian, version: current, share: 50, backend: onnx}
  - {name: stec, model: stec, version: 20261121, share: 50, backend: torchscript}
shadow: []
overrides: {qa-user-1: stec, 7: mian}
""")

    ab = read(file)

    assert (ab.name, ab.salt, ab.unit) == ("mian-vs-stec", "2026-11", "user")
    assert [(arm.name, arm.version, arm.backend) for arm in ab.arms] == [
        ("mian", "current", "onnx"),
        ("stec", "20261121", "torchscript"),
    ]
    assert ab.assign("qa-user-1").name == "stec"
    assert ab.assign("7").name == "mian"


def test_names_and_versions_are_what_the_file_says_whatever_yaml_takes_them_for(tmp_path: Path):
    names = ("on", "1.10", "20261128_1", "007", "0x1F", "1e3", "null")
    arms = "".join(f"  - {{name: {name}, model: {name}, version: {name}, share: 0}}\n" for name in names)
    file = tmp_path / "experiment.yaml"
    file.write_text(f"experiment: 1_0\nsalt: 2026-11-28\narms:\n{arms}  - {{name: mian, model: mian, share: 1e2}}\n")

    ab = read(file)

    assert [(arm.name, arm.model, arm.version) for arm in ab.arms[:-1]] == [(name,) * 3 for name in names]
    assert (ab.name, ab.salt, ab.arms[-1].share) == ("1_0", "2026-11-28", 100)


ARM = {"name": "mian", "model": "mian", "share": 100}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"arms": []}, "arms: "),
        ({"arms": [{**ARM, "share": -1}]}, "arms.0.share: .*greater than or equal to 0"),
        ({"arms": [{**ARM, "share": float("nan")}]}, "arms.0.share: .*finite"),
        ({"arms": [{**ARM, "share": 0}]}, r"sum to 100, got 0 \(mian 0\)"),
        ({"arms": [{**ARM, "share": 60}, {**ARM, "name": "stec", "share": 50}]}, r"got 110 \(mian 60, stec 50\)"),
        ({"killed": ["mian"]}, "at least one arm with a share above 0 must not be killed"),
        ({"arms": [ARM, ARM]}, "arm names must differ, got mian, mian"),
        ({"arms": [{**ARM, "backend": "tensorflow"}]}, "arms.0.backend: .*'onnx' or 'torchscript'"),
        ({"arms": [{**ARM, "model": "../etc"}]}, "arms.0.model: "),
        ({"arms": [{**ARM, "colour": "red"}]}, "arms.0.colour: "),
        ({"overrides": {"u1": "stec"}}, "override of u1 names arm stec; there are mian"),
        ({"shadow": [ARM]}, "arm names must differ, got mian, mian"),
        ({"shadow": [{**ARM, "name": "new", "share": 101}]}, "shadow.0.share: .*less than or equal to 100"),
        ({"arms": [{**ARM, "device": "tpu"}]}, "arms.0.device: .*'cpu' or 'cuda'"),
        ({"unit": "request"}, "unit: "),
        ({"salt": ""}, "salt: "),
        ({"extra": 1}, "extra: "),
    ],
)
def test_a_wrong_file_is_refused_with_its_place_and_reason(change: dict[str, object], says: str):
    with pytest.raises(ExperimentError, match=f"ab.yaml: at .*{says}"):
        parse({"experiment": "test", "salt": "s", "arms": [ARM], **change}, source="ab.yaml")


@pytest.mark.parametrize("text", ["arms: [", "- 1", "", "experiment: a\x00"])
def test_a_file_that_is_no_experiment_is_refused_by_name(tmp_path: Path, text: str):
    file = tmp_path / "ab.yaml"
    file.write_text(text)

    with pytest.raises(ExperimentError, match="ab.yaml: "):
        read(file)


def test_an_absent_file_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ExperimentError, match="none.yaml: not a readable YAML file"):
        read(tmp_path / "none.yaml")
