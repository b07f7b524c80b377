"""Published figures: what the file holds, and which of them may stand beside a run."""

import csv
from collections import Counter

import pytest

from models import zoo
from training import recipes
from training.comparison import published
from training.config import override

CONTRACT = {"frappe", "movielens-tag", "movielens-1m", "lastfm", "criteo", "avazu", "amazon", "eleme", "ipinyou"}
NOT_TO_BE_HAD = {"alipay", "bundle"}
PAPERS = {"STEC": 88, "DynInt": 87, "DeepMR": 36, "MIAN": 36, "FESeq": 74}
"""{paper: rows of its tables, each counted once}"""
OTHER_MODELS = {
    *("afm", "afn+", "aoanet", "dcn-mix", "deepcrossing", "deepim", "destine", "difm", "dnn", "dualmlp", "edcn"),
    *("fibinet", "final", "interhat", "ipnn", "jointctr", "masknet", "nfm", "onn", "pnn", "sasrec", "tisasrec"),
    *(f"{model} without its network" for model in ("deepfm", "dcn", "pnn", "xdeepfm", "autoint", "dcnv2")),
    "mean of dynint da, dgp and dwp",
}


def of(source, dataset, model):
    return [f for f in published.read() if (f.source, f.dataset, f.model) == (source, dataset, model)]


def test_every_row_is_of_a_known_data_set_and_model_and_holds_what_it_says():
    for row in published.read():
        assert row.dataset in CONTRACT | NOT_TO_BE_HAD
        assert (row.dataset in NOT_TO_BE_HAD) == (row.prepare == "")
        assert row.model in zoo.MODELS.keys() | OTHER_MODELS
        assert 0.5 < row.auc < 1
        assert row.logloss is None or 0.005 < row.logloss < 0.6
        assert row.prepare != "reads" or row.test_rows
        if row.recipe:
            override(recipes.recipe(row.recipe, row.model), [f"model.{setting}" for setting in row.settings])


def test_no_row_stands_twice_and_one_split_has_one_description():
    rows = published.read()

    keys = [(r.source, r.table, r.dataset, r.split, r.model, r.recipe, r.settings) for r in rows]
    assert len(set(keys)) == len(keys)
    about = {(r.source, r.dataset, r.split.partition(":")[0]): (r.split, r.test_rows, r.prepare) for r in rows}
    assert set(about.values()) == {(r.split, r.test_rows, r.prepare) for r in rows}


def test_every_row_of_the_papers_tables_is_there():
    assert Counter(row.source.removesuffix("'s paper") for row in published.read() if "paper" in row.source) == PAPERS


def test_a_row_stands_beside_a_run_of_its_form_on_its_rows_and_beside_no_other():
    for figures in published.read():
        if figures.model not in zoo.MODELS:
            continue
        recipe = recipes.recipe(figures.recipe or f"{figures.model}_neutral", figures.model)
        run = override(recipe, [f"model.{setting}" for setting in figures.settings])
        test_rows = figures.test_rows or 1

        shown = published.comparable(figures.dataset, test_rows, [run])

        assert (figures in shown) == (figures.prepare == "reads"), figures
        assert published.comparable(figures.dataset, test_rows + 1, [run]) == []
        for other in shown:
            assert (other.model, other.recipe, other.settings) == (figures.model, figures.recipe, figures.settings)


@pytest.mark.parametrize(
    ("recipe", "settings", "has_figures"),
    [
        ("stec_paper", "", True),
        ("stec_paper", "model.emb_dim=20 model.blocks=3 model.hidden=[400] lr=1e-2", True),  # sizes are searched
        ("stec_paper", "model.bilinear_form=merged", False),
        ("stec_frappe", "", False),
        ("stec_bl", "", True),
        ("stec_bl", "model.fusion=add", False),
        ("deepmr_paper", "", False),  # on a split of its paper's
    ],
)
def test_a_papers_figure_stands_beside_its_form_alone_whatever_the_sizes(recipe, settings, has_figures):
    run = override(recipes.RECIPES[recipe](), settings.split())

    assert bool(published.comparable("frappe", 28_860, [run])) == has_figures


def test_ablations_that_differ_in_numbers_are_told_apart(monkeypatch):
    monkeypatch.setattr(published.Figures, "is_of", lambda figures, dataset, _: figures.dataset == dataset)
    paper = recipes.RECIPES["feseq_paper"]()

    depths = ([f"model.interact_layers_in={n}", f"model.interact_layers_item={n}"] for n in (0, 2))
    shown = [published.comparable("eleme", 0, [override(paper, depth)]) for depth in depths]

    assert [[(f.table, f.auc) for f in found] for found in shown] == [[("4", 0.5882)], [("3", 0.6127)]]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("auc=high", "line 2, auc: Input should be a valid number"),
        ("test_rows=many", "line 2, test_rows: "),
        ("prepare=maybe", "line 2, prepare: Input should be 'reads', 'draws' or ''"),
        ("", "line 2: expected 12 columns, got another number"),
    ],
)
def test_a_row_that_is_damaged_is_named_by_its_line(broken, message, tmp_path, monkeypatch):
    header, row, *_ = published.CSV.read_text().splitlines()
    names, cells = header.split(","), next(csv.reader([row]))
    if broken:
        name, _, value = broken.partition("=")
        cells[names.index(name)] = value
    else:
        cells.append("one more")
    with (tmp_path / "published.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names, cells])
    monkeypatch.setattr(published, "CSV", tmp_path / "published.csv")

    with pytest.raises(ValueError, match=message):
        published.read.__wrapped__()
