"""Every model has a recipe for every data set that it can read."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from models import zoo
from models.features.field import FieldSpec
from models.features.schema import Schema, SchemaSpec
from models.features.values import Columns
from tests.models.small import tensors
from training import recipes
from training.__main__ import main
from training.data.batches import Prepared
from training.data.prepare import DATASETS
from training.export import example
from training.fit import run_folder
from training.recipes.deviations import DEVIATIONS

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
    run = recipes.RECIPES[recipes.choose(model, dataset).name]()

    if model in WITH_HISTORY and CLICKS[0] not in fields:
        with pytest.raises(ValueError, match="the schema has no"):
            zoo.build(model, run.model_config, schema(fields))
    else:
        zoo.build(model, run.model_config, schema(fields))


@pytest.mark.parametrize(
    ("dataset", "steps"), [("criteo", 2000), ("avazu", 2000), ("ipinyou", 2000), ("frappe", 0), ("movielens-1m", 0)]
)
def test_dynint_is_evaluated_every_2000_steps_on_its_papers_data_and_by_epochs_on_smaller_ones(
    dataset: str, steps: int
) -> None:
    assert recipes.RECIPES[recipes.choose("dynint", dataset).name]().eval_every_steps == steps


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


@pytest.mark.parametrize(
    ("model", "dataset", "name", "reason"),
    [
        ("mian", "amazon", "mian_amazon", "made for mian on amazon"),
        ("stec", "frappe", "stec_frappe", "made for stec on frappe"),
        ("stec", "movielens-1m", "stec_movielens", "made for stec on movielens-1m"),
        ("stec", "avazu", "stec_paper", "avazu is a data set of stec's paper"),
        ("deepmr", "lastfm", "deepmr_lastfm", "made for deepmr on lastfm"),
        ("deepmr", "movielens-tag", "deepmr_paper", "movielens-tag is a data set of deepmr's paper"),
        ("dynint", "criteo", "dynint_dgp_paper", "criteo is a data set of dynint's paper"),
        ("dynint", "avazu", "dynint_dgp_paper", "avazu is a data set of dynint's paper"),
        ("feseq", "eleme", "feseq_paper", "eleme is a data set of feseq's paper"),
        ("finalmlp", "ipinyou", "finalmlp_neutral", "no recipe is made for finalmlp on ipinyou: neutral settings"),
        ("fm", "movielens-1m", "fm_neutral", "no recipe is made for fm on movielens-1m: neutral settings"),
        ("stec", "movielens", "stec_neutral", "no recipe is made for stec on movielens: neutral settings"),
        ("feseq", "paper", "feseq_neutral", "no recipe is made for feseq on paper: neutral settings"),
    ],
)
def test_a_data_set_takes_its_own_recipe_then_its_papers_and_never_anothers(
    model: str, dataset: str, name: str, reason: str
) -> None:
    assert recipes.choose(model, dataset) == recipes.Choice(name=name, reason=reason)


def test_every_known_data_set_may_have_recipes_and_every_papers_recipe_is_one_of_its_model() -> None:
    assert set(recipes.SUFFIXES) == set(DATASETS)
    for (model, dataset), name in recipes.PAPERS.items():
        assert recipes.recipe(name, model).model == model
        assert dataset in DATASETS


def test_help_lists_every_recipe_with_its_deviations_and_says_which_was_never_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])

    shown = capsys.readouterr().out.splitlines()
    for name, function in recipes.RECIPES.items():
        (line,) = [line for line in shown if line.startswith((f"  {name}:", f"  {name} ["))]
        stated = "not measured" not in " ".join((function.__doc__ or "").lower().split())
        assert ("[never measured here]" not in line) == stated
    after = shown.index(next(line for line in shown if line.startswith("  feseq_paper ")))
    assert "not as in the paper: a maximum interval of 4000 without a unit" in shown[after + 6]


def test_a_recipe_that_states_no_result_says_that_it_was_not_measured() -> None:
    for name, function in recipes.RECIPES.items():
        if recipes.is_measured(name):
            assert re.search(r"AUC.*0\.\d\d|0\.\d{4} \+- 0\.\d{4}", " ".join((function.__doc__ or "").split())), name


def test_training_begins_with_the_recipe_the_reason_its_values_and_its_deviations(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = Prepared.open(data)

    run_folder.begin(tmp_path / "neutral", prepared, "stec", None, ["lr=0.01"], resume=False)
    run_folder.begin(tmp_path / "paper", prepared, "feseq", "feseq_paper", ["model.heads=1"], resume=False)

    first, values, second, _, *deviations = capsys.readouterr().err.splitlines()
    assert first == ("recipe stec_neutral (no recipe is made for stec on tiny: neutral settings; never measured here)")
    assert {"lr=0.01", "batch_size=1024", "model.emb_dim=16", "model.l2_emb=1e-05"} <= set(values.split())
    assert second == "recipe feseq_paper (asked for; never measured here)"
    assert [line.removeprefix("not as in the paper: ") for line in deviations] == list(DEVIATIONS["feseq_paper"])
