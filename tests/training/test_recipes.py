"""Every model has a recipe for every data set that it can read."""

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from models import zoo
from models.features.field import FieldSpec
from models.features.schema import Schema, SchemaSpec
from models.features.values import Columns
from tests.models.small import tensors
from training import recipes
from training.export import example

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


@pytest.mark.parametrize(("name", "learns"), [("mian_amazon", True), ("mian_paper", False)])
def test_where_half_of_the_rows_are_clicked_mian_learns_from_its_amazon_recipe_and_not_from_the_papers(
    name: str, learns: bool
) -> None:
    run, fields = recipes.RECIPES[name](), schema(READS["amazon"])
    torch.manual_seed(2026)
    model = zoo.build("mian", run.model_config, fields)
    inputs = tensors(example(fields, 8, 64))
    clicked_C = (inputs["item.movie"] == fields.field("movie").num_ids - 1).float()
    weight_C = torch.where(clicked_C == 1, 0.5 / clicked_C.mean(), 0.5 / (1 - clicked_C.mean()))
    optimizer = torch.optim.Adam(model.parameters(), lr=run.lr)

    for _ in range(50):
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(model(inputs), clicked_C, weight=weight_C)
        (loss + model.penalty()).backward()
        optimizer.step()

    if learns:
        assert loss < 0.65
    else:
        assert loss.item() == pytest.approx(math.log(2), abs=1e-4)
