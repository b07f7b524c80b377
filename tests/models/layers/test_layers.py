from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models.features.field import OOV, PAD, FieldSpec
from models.features.schema import SchemaSpec
from models.layers.attention import SelfAttention, masked_softmax, merge_heads, split_heads
from models.layers.embeddings import FieldEmbeddings
from models.layers.initialisation import l2, tiny_normal
from models.layers.mlp import MLP
from tests.models.small import tensors, with_history
from training.export import example

SCHEMA = with_history()


@pytest.fixture
def fields() -> FieldEmbeddings:
    torch.manual_seed(0)
    return FieldEmbeddings(SCHEMA, 3, init=nn.init.normal_).double()


def test_a_categorical_value_is_its_row_and_a_number_scales_its_direction(fields):
    inputs = tensors(example(SCHEMA, 4, 2))

    user_id, age, *_ = fields.request(inputs).unbind(dim=1)

    table, direction = fields.get_parameter("tables.user_user_id.weight"), fields.get_parameter("directions.user_age")
    for u in range(4):
        assert torch.equal(user_id[u], table[inputs["user.user_id"][u]])
        assert torch.equal(age[u], inputs["user.age"][u] * direction)


def test_a_multi_valued_field_is_the_mean_of_the_values_there_are(fields):
    inputs = tensors(example(SCHEMA, 1, 3))
    inputs["item.genres"] = torch.tensor([[2, 4, PAD], [OOV, PAD, PAD], [PAD, PAD, PAD]])

    genres = fields.item(inputs)[:, 1]

    table = fields.get_parameter("tables.item_genres.weight")
    assert torch.allclose(genres[0], (table[2] + table[4]) / 2)
    assert torch.equal(genres[1], table[OOV])
    assert not genres[2].any()


def test_a_sequence_shares_the_table_of_the_field_it_is_of(fields):
    inputs = tensors(example(SCHEMA, 1, 4))
    inputs["hist.movie"], inputs["hist.genres"] = inputs["item.movie"][None], inputs["item.genres"][None]
    inputs["hist_mask"] = torch.ones(1, 4, dtype=torch.bool)

    clicks_TSD = fields.history(inputs)[0]

    assert torch.equal(clicks_TSD, fields.item(inputs)[:, :2])


def test_pad_is_zero_and_stays_so_and_oov_learns(fields):
    inputs = tensors(example(SCHEMA, 1, 2))
    inputs["item.movie"] = torch.tensor([PAD, OOV])

    movie = fields.item(inputs)[:, 0]
    (movie - 1.0).square().sum().backward()

    assert not movie[PAD].any()
    gradient = fields.get_parameter("tables.item_movie.weight").grad
    assert gradient is not None
    assert not gradient[PAD].any()
    assert gradient[OOV].all()


@pytest.mark.parametrize(("beyond", "taken"), [(-5, PAD), (10**6, -1)])
def test_an_id_outside_the_table_reads_its_nearest_row(fields, beyond, taken):
    inputs = tensors(example(SCHEMA, 1, 2))
    inputs["item.movie"][:] = beyond

    movie = fields.item(inputs)[:, 0]

    assert torch.equal(movie[0], fields.get_parameter("tables.item_movie.weight")[taken])


def test_what_stands_in_the_padding_of_a_history_is_not_read(fields):
    inputs = tensors(example(SCHEMA, 2, 2))
    inputs["hist_mask"] = torch.tensor([[False, False, True, True], [False, False, False, False]])
    inputs["hist.movie"][:] = 3

    movies = fields.history(inputs)[:, :, 0]
    pooled = fields.pooled_history(inputs)[:, 0]

    row = fields.get_parameter("tables.item_movie.weight")[3]
    assert not movies[~inputs["hist_mask"]].any()
    assert torch.allclose(pooled[0], row)
    assert not pooled[1].any()


def test_a_field_may_be_named_like_a_part_of_a_module():
    names = ("type", "keys", "weight", "training")
    specs = tuple(FieldSpec(name=name, kind="categorical", group="item") for name in names)
    schema = SchemaSpec(fields=specs).fit({name: ["a"] for name in names})

    assert len(FieldEmbeddings(schema, 2, init=tiny_normal).tables) == 4


def test_the_penalty_counts_rows_that_no_batch_has_seen(fields):
    squares = sum(p.square().sum().item() for p in fields.parameters())

    assert fields.penalty(0.2).item() == pytest.approx(0.1 * squares)


@given(scores=st.lists(st.floats(-50, 50), min_size=1, max_size=6), data=st.data())
def test_masked_softmax_is_the_softmax_of_what_is_there_and_zero_elsewhere(scores, data):
    mask = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))

    weights = masked_softmax(torch.tensor(scores, dtype=torch.float64), torch.tensor(mask)).numpy()

    there = np.exp(np.array(scores) - max(scores)) * mask
    np.testing.assert_allclose(weights, there / there.sum() if any(mask) else 0 * there, atol=1e-12)
    assert weights.sum() == pytest.approx(1.0 if any(mask) else 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_row_without_anything_gives_zeros_and_a_finite_gradient(dtype):
    scores = torch.zeros(2, 3, dtype=dtype, requires_grad=True)

    weights = masked_softmax(scores, torch.tensor([[False] * 3, [True] * 3]))
    weights.square().sum().backward()

    assert not weights[0].any()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


def test_self_attention_is_the_formula_written_as_loops():
    torch.manual_seed(0)
    attention: Any = SelfAttention(6, 3, dropout=0.5).double().eval()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    mask = torch.tensor([[False, True, True, True], [True, True, True, True]])

    out = attention(x, mask)

    for n in range(2):
        for t in range(4):
            heads = []
            for h in range(3):
                part = slice(2 * h, 2 * h + 2)
                query = attention.query(x[n, t])[part]
                there = [s for s in range(4) if mask[n, s]]
                scores = torch.stack([query @ attention.key(x[n, s])[part] / 2**0.5 for s in there])
                weights = scores.softmax(0)
                heads.append(sum(w * attention.value(x[n, s])[part] for w, s in zip(weights, there, strict=True)))
            assert torch.allclose(out[n, t], attention.out(torch.cat(heads)))


def test_self_attention_to_nothing_gives_zeros():
    attention = SelfAttention(6, 3, dropout=0.0)

    out = attention(torch.randn(1, 4, 6), torch.zeros(1, 4, dtype=torch.bool))

    assert not out.any()


def test_heads_are_contiguous_slices_and_merge_back():
    x = torch.arange(2 * 3 * 4).reshape(2, 3, 4)

    heads = split_heads(x, 2)

    assert torch.equal(heads[0, 1, 2], x[0, 2, 2:])
    assert torch.equal(merge_heads(heads), x)


def test_an_mlp_without_hidden_layers_is_linear():
    mlp = MLP(3, (), dropout=0.5)
    x = torch.randn(5, 3)

    assert torch.allclose(mlp(x), x @ mlp.first.weight[0] + mlp.first.bias)


def test_an_mlp_normalises_and_drops_only_in_training_and_where_asked():
    def kinds(**options):
        return [type(m).__name__ for m in MLP(3, (4, 5), dropout=0.1, **options).rest]

    assert kinds() == ["ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    assert kinds(batch_norm=True) == ["BatchNorm1d", "ReLU", "Dropout", "Linear"] * 2


def test_a_penalty_of_weight_0_reads_no_table_and_gives_it_no_gradient():
    table = torch.nn.Parameter(torch.full((3, 2), float("nan")))

    assert l2(0.0, [table]) == 0
    assert not l2(0.0, [table]).requires_grad
    assert l2(0.5, [torch.tensor([1.0, 2.0])]) == 2.5
