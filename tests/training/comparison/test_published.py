import pytest

from models import zoo
from training import recipes
from training.comparison.published import PUBLISHED, SOURCES, figures

CONTRACT = {"frappe", "movielens-tag", "movielens-1m", "lastfm", "criteo", "avazu", "amazon", "eleme", "ipinyou"}


def test_every_data_set_is_one_of_the_contract_and_every_name_a_model_or_an_ablation_of_one():
    assert set(PUBLISHED) <= CONTRACT
    for rows in PUBLISHED.values():
        for name in rows:
            assert name.partition("-")[0] in {*zoo.MODELS, "feseq"}


def test_figures_are_what_they_are_called():
    for rows in PUBLISHED.values():
        for found in rows.values():
            for one in found:
                assert 0.5 < one.auc < 1
                assert one.logloss is None or 0.005 < one.logloss < 0.6
                assert one.source in SOURCES


def test_frappe_shows_what_was_published_and_what_was_run_on_the_very_rows():
    shown = {f.source.title.split()[0]: (f.auc, f.logloss) for f in figures("frappe", "deepfm")}

    assert shown == {
        "FuxiCTR": (0.9850, 0.1510),
        "BARS": (0.9842, 0.1482),
        "STEC's": (0.9842, 0.1482),
        "DeepMR's": (0.9713, 0.1922),
    }
    assert next((f.auc, f.logloss) for f in figures("frappe", "dcnv2")) == (0.9844, 0.1577)


def test_a_papers_recipe_stands_beside_its_models_figures_and_our_own_form_beside_none():
    assert "deepmr_paper" in recipes.RECIPES
    assert figures("frappe", "deepmr_paper") == figures("frappe", "deepmr")
    for kind in ("pin", "da", "dgp", "dwp"):
        recipe = "pin_paper" if kind == "pin" else f"dynint_{kind}_paper"
        assert recipe in recipes.RECIPES
        assert figures("criteo", recipe) == figures("criteo", f"dynint-{kind}") != []
    assert figures("frappe", "deepmr_prod") == []
    assert figures("movielens-1m", "mian") == []


@pytest.mark.parametrize(
    ("name", "test_rows", "verdict"),
    [
        ("stec", 28_860, "comparable: the same split (x1)"),
        ("stec", 500, "not comparable: its test part has 28,860 rows, this one 500"),
        ("deepmr", 28_860, "not comparable: an 8:1:1 split of its own, two drawn negatives"),
    ],
)
def test_a_verdict_says_whether_figures_may_stand_beside_ours(name, test_rows, verdict):
    (found,) = figures("frappe", name)

    assert found.source.verdict(test_rows).startswith(verdict)


def test_an_ablation_without_a_published_log_loss_has_none():
    assert [(f.auc, f.logloss) for f in figures("avazu", "stec-lo")] == [(0.7583, None)]
