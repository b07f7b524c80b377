"""Every model has a recipe for every data set that it can read."""

import pytest

from models import zoo
from models.features.field import FieldSpec
from models.features.schema import Schema, SchemaSpec
from models.features.values import Columns
from training import recipes

ITEM = [FieldSpec(name=name, kind="categorical", group="item") for name in ("movie", "genre", "site")]
WORDS = [FieldSpec(name=f"c{n}", kind="categorical", group="item") for n in range(6)]
USER = [FieldSpec(name="user_id", kind="categorical", group="user")]
CONTEXT = [FieldSpec(name="hour", kind="time", part="hour", group="context")]
CLOCK = [FieldSpec(name=part, kind="time", part=part, group="context") for part in ("weekday", "month")]
CLICKS = [FieldSpec(name=name, kind="sequence", group="behaviour", of=name) for name in ("movie", "genre")]
COLUMNS: Columns = {f.name: ["a", "b", "c"] for f in (*ITEM, *WORDS, *USER)}
WITH_HISTORY = {"mian", "feseq", "din", "dien", "dmr", "bst"}
READS: dict[str, list[FieldSpec]] = {
    "movielens-1m": [*USER, *CONTEXT, *ITEM, *CLICKS],
    "simulated": [*USER, *CONTEXT, *ITEM, *CLICKS],
    "eleme": [*USER, *CONTEXT, *ITEM, *CLICKS],
    "amazon": [*USER, *CLOCK, *ITEM[:2], *CLICKS],
    "frappe": [*USER, *CONTEXT, *ITEM],
    "criteo": WORDS,
    "avazu": [*CONTEXT, *WORDS],
}


def schema(fields: list[FieldSpec]) -> Schema:
    length = 3 if any(f.kind == "sequence" for f in fields) else 0
    return SchemaSpec(history_length=length, fields=tuple(fields)).fit(COLUMNS)


@pytest.mark.parametrize("model", zoo.MODELS)
@pytest.mark.parametrize("dataset", READS)
def test_a_data_sets_recipe_fits_what_it_holds(model: str, dataset: str) -> None:
    fields = READS[dataset]
    run = recipes.RECIPES[recipes.default(model, dataset)]()

    if model in WITH_HISTORY and CLICKS[0] not in fields:
        with pytest.raises(ValueError, match="the schema has no"):
            zoo.build(model, run.model_config, schema(fields))
    else:
        zoo.build(model, run.model_config, schema(fields))


def test_a_data_sets_own_recipe_comes_before_its_familys() -> None:
    assert recipes.default("mian", "amazon") == "mian_amazon"
    assert recipes.default("din", "amazon") == "din_movielens"
    assert recipes.default("finalmlp", "avazu") == "finalmlp_avazu"
    assert recipes.default("finalmlp", "ipinyou") == "finalmlp_frappe"
