import json
from dataclasses import replace

import pytest

from models import zoo
from training import recipes
from training.config import Run, assignments, difference, override
from training.errors import UserError


def run(**changes):
    return Run(**{"model": "stec", "batch_size": 64, "lr": 0.01, "max_epochs": 3, "patience": 2, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"lr": 0.0}, "lr must be above 0 and at most 1e.30, got 0.0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"monitor": "accuracy"}, "monitor must be auc or logloss, got 'accuracy'"),
        ({"optimizer": "sgd"}, "optimizer must be adam or ftrl, got 'sgd'"),
        ({"ema_decay": 1.0}, "ema_decay must be at least 0 and below 1, got 1.0"),
        ({"table_l1": -1.0}, "table_l1 must be at least 0, got -1.0"),
        ({"plateau_factor": 1.5}, "plateau_factor must be above 0 and at most 1, got 1.5"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused_when_it_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)


def test_settings_are_read_as_the_type_of_their_field():
    changed = override(
        run(), ["lr=1e-3", "batch_size=128", "monitor=logloss", "model.hidden=[40, 20]", "model.ffn=false"]
    )

    assert (changed.lr, changed.batch_size, changed.monitor) == (0.001, 128, "logloss")
    assert changed.model_config == {"hidden": (40, 20), "ffn": False}


def test_settings_that_fit_only_each_other_come_in_any_order():
    one, other = "model.heads=7", "model.emb_dim=21"

    assert override(run(), [one, other]) == override(run(), [other, one])
    with pytest.raises(UserError, match="--set lr=0.1 model.heads=7: .*7 do not divide"):
        override(run(), ["lr=0.1", one])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("learning_rate", "wants key=value, got 'learning_rate'"),
        ("batchsize=3", "--set batchsize: no such setting; did you mean batch_size?"),
        ("model.emb_dims=3", "did you mean model.emb_dim?"),
        ("model=lr", "no such setting"),
        ("batch_size=many", "--set batch_size: expected int, got 'many'"),
        ("batch_size=2.5", "--set batch_size: expected int, got '2.5'"),
        ("seed=9223372036854775808", "seed must be at least 0 and below 2"),
        ("batch_size=1", "batch_size must be at least 2, got 1"),
        ("monitor=accuracy", "expected Literal"),
        ("model.dropout=1.5", "option dropout: expected a number, at least 0 and below 1, got 1.5"),
        ("model.heads=7", "7 do not divide"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_sentence(assignment, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[").replace("?", r"\?")) as refused:
        override(run(), [assignment])

    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_a_run_that_survives_json(name):
    recipe = recipes.RECIPES[name]()

    read_back = Run.from_json(json.loads(json.dumps(recipe.to_json())))

    assert difference(recipe, read_back) is None
    assert recipes.recipe(name, recipe.model) == recipe
    override(recipe, ["seed=1"])


def test_the_difference_of_two_runs_is_named():
    assert difference(run(), run()) is None
    assert difference(run(), run(lr=0.1)) == "lr was 0.01, now 0.1"
    assert difference(run(), run(model_config={"ffn": False})) == "model.ffn was the default, now False"


def test_the_settings_of_a_run_are_listed_as_they_are_set():
    changed = run(lr=0.25, plateau_monitor="logloss", model_config={"hidden": (40, 20), "ffn": False})

    listed = assignments(changed)

    assert {"lr=0.25", "model.hidden=[40,20]", "model.ffn=false"} <= set(listed)
    assert override(run(), listed) == replace(changed, model_config=override(run(), listed).model_config)
    assert zoo.configure("stec", override(run(), listed).model_config) == zoo.configure("stec", changed.model_config)


def test_a_recipe_of_another_model_is_refused():
    with pytest.raises(UserError, match="no such recipe for lr; there are lr_movielens, lr_frappe"):
        recipes.recipe("stec_frappe", "lr")
