"""What a control document says, and which of two counts."""

import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import Refusal
from service.experiments.assignment import LOOK_BACK_S, Experiment, ExperimentError, parse
from service.registry import control
from service.store.control_store import ControlDocument, PastShares

MODELS = {"one": ["v1"], "two": ["v1"], "dark": ["v1"]}


def experiment(**changes: object) -> Experiment:
    arms = [{"name": name, "model": "tiny", "share": 50} for name in ("one", "two")]
    shadow = [{"name": "dark", "model": "tiny", "share": 10}]
    return parse({"experiment": "test", "salt": "s", "arms": arms, "shadow": shadow, **changes}, source="test")


def first_document(version: int = 1) -> ControlDocument:
    return control.begin(experiment(), MODELS, version=version)


def set_shares(**changes: object) -> control.Edit:
    given: dict[str, object] = {"shares": {}, "shadow": {}, "kill": [], "unkill": [], **changes}
    return control.set_shares(experiment(), **given)  # type: ignore[arg-type] # a test's shorthand


def changed(document: ControlDocument, *edits: control.Edit) -> ControlDocument:
    for edit in edits:
        document = control.change(document, edit, changed_by="alice") or document
    return document


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        (
            {"arms": [{"name": name, "model": "tiny", "share": share} for name, share in (("one", 1), ("two", 99))]},
            True,
        ),
        ({"overrides": {"u1": "one"}}, True),
        ({"shadow": [{"name": "dark", "model": "tiny", "share": 50}]}, True),
        ({"killed": ["one"]}, True),
        ({"salt": "t"}, False),
        ({"experiment": "other"}, False),
        ({"arms": [{"name": "one", "model": "tiny", "share": 100}]}, False),
        ({"arms": [{"name": n, "model": m, "share": 50} for n, m in (("one", "tiny"), ("two", "other"))]}, False),
        ({"arms": [{"name": n, "model": "tiny", "share": 50, "version": "v7"} for n in ("one", "two")]}, False),
        ({"shadow": []}, False),
    ],
)
def test_a_document_is_for_the_same_arms_whatever_their_shares(changes: dict[str, object], same: bool) -> None:
    assert (control.fingerprint(experiment(**changes)) == control.fingerprint(experiment())) == same


def test_what_runs_an_arm_is_each_hosts_own() -> None:
    arms = [
        {"name": "one", "model": "tiny", "share": 50, "backend": "torchscript", "device": "cuda"},
        {"name": "two", "model": "tiny", "share": 50},
    ]

    assert control.fingerprint(experiment(arms=arms)) == control.fingerprint(experiment())


def test_an_experiment_runs_as_its_document_says() -> None:
    document = changed(
        first_document(),
        set_shares(shares={"one": 60, "two": 40}),
        set_shares(kill=["dark", "two"], shadow={"dark": 3}),
    )

    now, past = control.running(document, experiment())

    assert [(arm.name, arm.share) for arm in now.served] == [("one", 60), ("two", 40), ("dark", 3)]
    assert now.killed == ("dark", "two")
    assert [[arm.share for arm in before.arms] for _, before in past] == [[50, 50], [60, 40]]
    assert [until for until, _ in past] == [past_shares.until for past_shares in document.past]


def test_the_past_is_of_one_day_and_only_of_shares_and_kills() -> None:
    old = PastShares(until=time.time() - LOOK_BACK_S - 1, shares={"one": 1, "two": 99}, killed=[])
    document = msgspec.structs.replace(first_document(), past=[old])

    after_load = changed(document, control.set_version("one", "v2"))
    after_kill = changed(document, set_shares(kill=["one"]))

    assert after_load.past == []
    assert [past.shares for past in after_kill.past] == [{"one": 50, "two": 50}]


def test_a_document_without_a_version_of_every_arm_is_refused() -> None:
    document = first_document()
    broken = msgspec.structs.replace(document, state=msgspec.structs.replace(document.state, models={"one": ["v1"]}))

    with pytest.raises(ExperimentError, match="models has no version of two, dark"):
        control.running(broken, experiment())


def versions(document: ControlDocument) -> list[str]:
    return document.state.models["one"]


def test_a_load_keeps_the_versions_before_and_a_rollback_gives_up_the_one_that_served() -> None:
    loaded = changed(first_document(), control.set_version("one", "v2"), control.set_version("one", "v3"))
    back = changed(loaded, control.roll_back("one", "v2"))
    forward = changed(back, control.set_version("one", "v3"))
    again = changed(forward, control.set_version("one", "v1"))

    assert versions(loaded) == ["v3", "v2", "v1"]
    assert versions(back) == ["v2", "v1"]
    assert versions(forward) == ["v3", "v2", "v1"]
    assert versions(again) == ["v1", "v3", "v2"]
    assert len(versions(changed(first_document(), *(control.set_version("one", f"w{n}") for n in range(50))))) == 11


@pytest.mark.parametrize("version", ["v3", "v1", "none"])
def test_a_rollback_to_another_version_than_the_one_before_is_refused(version: str) -> None:
    loaded = changed(first_document(), control.set_version("one", "v2"), control.set_version("one", "v3"))

    with pytest.raises(Refusal, match=f"the version before is not {version} but v2 by now"):
        changed(loaded, control.roll_back("one", version))


def test_a_change_of_nothing_is_none() -> None:
    document = first_document()

    assert control.change(document, set_shares(shares={"one": 50}), changed_by="alice") is None
    assert control.change(document, set_shares(unkill=["two"]), changed_by="alice") is None
    assert control.change(document, control.set_version("one", "v1"), changed_by="alice") is None


def test_of_two_documents_one_at_least_supersedes_the_other_unless_they_are_the_same() -> None:
    first = first_document()
    later = changed(first, set_shares(kill=["two"]))
    other_first = first_document()

    assert control.supersedes(later, first)
    assert not control.supersedes(first, later)
    assert not control.supersedes(first, first)
    assert control.supersedes(other_first, first)  # the store's counts, whichever it is


def test_a_store_that_lost_its_latest_version_does_not_take_back_what_was_decided_but_a_later_decision_counts() -> None:
    first = first_document()
    killed = changed(first, set_shares(kill=["two"]))
    begun_anew = msgspec.structs.replace(first_document(), changed_at=killed.changed_at + 1)

    assert not control.supersedes(first, killed)
    assert control.supersedes(begun_anew, killed)


@given(ahead=st.floats(-1e6, 1e6))
def test_later_versions_are_never_earlier_however_far_a_clock_is_ahead(ahead: float) -> None:
    document = msgspec.structs.replace(first_document(), changed_at=time.time() + ahead)

    after = changed(document, set_shares(kill=["two"]))

    assert after.changed_at >= document.changed_at
    assert control.supersedes(after, document)
    assert not control.supersedes(document, after)


def test_a_decision_is_renumbered_only_where_it_must_be() -> None:
    document = first_document(version=5)

    assert control.renumbered(document, above=4) is document
    above = control.renumbered(document, above=7)
    assert (above.version, above.state) == (8, document.state)
    assert above.revision != document.revision
