import json
from dataclasses import asdict, fields

import pytest

from models import zoo
from tests.models.small import with_history

SCHEMA = with_history()


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_model_is_built_by_name_and_knows_its_config(name):
    config, module = zoo.MODELS[name]

    model = zoo.build(name, {}, SCHEMA)

    assert type(model) is module
    assert model.config == config()


@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_config_survives_json(name):
    options = {"l2_emb": 0.5, "hidden": (7, 3)}
    known = {option.name for option in fields(zoo.MODELS[name][0])}
    config = zoo.configure(name, {option: value for option, value in options.items() if option in known})

    assert zoo.configure(name, json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("main", {}, rf"unknown model 'main'; did you mean mian\? \(there are {', '.join(zoo.MODELS)}\)"),
        ("transformer", {}, rf"unknown model 'transformer' \(there are {', '.join(zoo.MODELS)}\)"),
        (
            "lr",
            {"l2_emd": 0.1},
            r"unknown option of lr 'l2_emd'; did you mean l2_emb\? \(there are use_history, l2_emb\)",
        ),
        ("mian", {"emb_dim": 0}, "mian: option emb_dim: expected a whole number, at least 1 and below 1e.09, got 0"),
        (
            "mian",
            {"emb_dim": 16.0},
            "mian: option emb_dim: expected a whole number, at least 1 and below 1e.09, got 16.0",
        ),
        ("mian", {"emb_dim": True}, "expected a whole number, at least 1 and below 1e.09, got True"),
        ("mian", {"dropout": 1.0}, "option dropout: expected a number, at least 0 and below 1, got 1.0"),
        ("mian", {"dropout": float("nan")}, "option dropout: expected a number, at least 0 and below 1, got nan"),
        ("mian", {"l2_dense": -1}, "option l2_dense: expected a number, at least 0, got -1"),
        ("mian", {"transformer": "post"}, "option transformer: expected one of pre_ln, post_ln, none, got 'post'"),
        ("mian", {"ibim": "yes"}, "option ibim: expected true or false, got 'yes'"),
        (
            "mian",
            {"hidden": 32},
            "option hidden: expected a list, each a whole number, at least 1 and below 1e.09, got 32",
        ),
        (
            "mian",
            {"hidden": [32, 0]},
            r"option hidden: expected a list, each a whole number, at least 1 and below 1e.09, got \(32, 0\)",
        ),
        (
            "mian",
            {"gim_width": 0},
            "option gim_width: expected a whole number, at least 1 and below 1e.09, or nothing, got 0",
        ),
        ("stec", {"pairs": 3}, "stec: option pairs: expected one of upper, upper_diag, all, got 3"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(name, options, message):
    with pytest.raises(ValueError, match=message):
        zoo.build(name, options, SCHEMA)


def test_a_whole_number_does_for_a_number_and_a_list_for_a_tuple():
    config = zoo.configure("mian", {"dropout": 0, "hidden": [4], "gim_width": None})

    assert config == zoo.MODELS["mian"][0](dropout=0.0, hidden=(4,))  # type: ignore[call-arg]  # mian's own options
