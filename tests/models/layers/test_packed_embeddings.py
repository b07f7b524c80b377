"""Packed tensors are read as the arrays of their fields: any kinds of fields, groups of any size, any history."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.features.field import FieldSpec
from models.features.packing import PackedLayout
from models.features.schema import Schema, SchemaSpec
from models.layers.base import history_age, history_mask
from models.layers.embeddings import FieldEmbeddings
from training.export import example

WORDS = [f"w{n}" for n in range(7)]
LISTS = [WORDS[:n] for n in (1, 3, 0, 2, 1, 1, 2)]
NUMBERS = [float(n) for n in range(7)]


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    """User, context and item fields of any kinds in any order, and sequences of some of those that may have one."""
    specs: list[FieldSpec] = []
    columns: dict[str, Any] = {}
    for group, kinds in (
        ("user", ["categorical", "numeric", "multi"]),
        ("context", ["categorical", "numeric", "multi", "time"]),
        ("item", ["categorical", "numeric", "multi"]),
    ):
        for n, kind in enumerate(draw(st.lists(st.sampled_from(kinds), min_size=group == "item", max_size=3))):
            name = f"{group}_{n}"
            part = draw(st.sampled_from(["hour", "month"])) if kind == "time" else None
            specs.append(FieldSpec.model_validate({"name": name, "kind": kind, "group": group, "part": part}))
            columns[name] = {"numeric": NUMBERS, "multi": LISTS}.get(kind, WORDS)
    sources = [s.name for s in specs if s.kind == "time" or (s.group == "item" and s.kind != "numeric")]
    repeated = draw(st.lists(st.sampled_from(sources), max_size=3)) if sources else []
    specs += [FieldSpec(name=f"past_{n}", kind="sequence", group="behaviour", of=of) for n, of in enumerate(repeated)]
    length = draw(st.integers(1, 4)) if repeated else 0
    return SchemaSpec(history_length=length, fields=tuple(specs)).fit(columns)


def both_ways(schema: Schema, users: int, candidates: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    arrays = example(schema, users, candidates)
    by_field, packed = (
        {name: torch.from_numpy(a) for name, a in form.items()} for form in (arrays, PackedLayout(schema).pack(arrays))
    )
    return by_field, packed


@settings(max_examples=60)
@given(schema=schemas(), users=st.integers(1, 3), candidates=st.integers(1, 4), data=st.data())
def test_packed_tensors_give_the_vectors_that_the_fields_arrays_give(schema, users, candidates, data):
    with_tables = [f for f in schema.fields if f.kind != "sequence" and data.draw(st.booleans())]
    by_field, packed = both_ways(schema, users, candidates)

    for fields in (None, with_tables):
        embeddings = FieldEmbeddings(schema, 3, init=nn.init.normal_, fields=fields)
        reads = {"request": embeddings.num_request, "item": embeddings.num_item, "history": embeddings.num_sequences}
        reads["pooled_history"] = embeddings.num_sequences
        for read, num_fields in reads.items():
            if num_fields:
                found, expected = getattr(embeddings, read)(packed), getattr(embeddings, read)(by_field)
                assert found.shape[-2:] == (num_fields, 3)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_mask_and_ages_have_one_name_for_a_model():
    schema = SchemaSpec(
        history_length=3,
        fields=(
            FieldSpec(name="ad", kind="categorical", group="item"),
            FieldSpec(name="ad", kind="sequence", group="behaviour", of="ad"),
        ),
    ).fit({"ad": WORDS})
    by_field, packed = both_ways(schema, 4, 2)

    assert torch.equal(history_mask(packed), history_mask(by_field))
    assert torch.equal(history_age(packed), history_age(by_field))
    assert history_age(packed).any()


@pytest.mark.parametrize("read", ["request", "history"])
def test_a_group_without_fields_is_refused_by_name(read):
    schema = SchemaSpec(fields=(FieldSpec(name="ad", kind="categorical", group="item"),)).fit({"ad": WORDS})
    _, packed = both_ways(schema, 1, 2)

    with pytest.raises(ValueError, match=f"the schema has no {read} field to read"):
        getattr(FieldEmbeddings(schema, 3, init=nn.init.normal_), read)(packed)


def test_without_item_fields_every_candidate_has_no_vector():
    schema = SchemaSpec(fields=(FieldSpec(name="user", kind="categorical", group="user"),)).fit({"user": WORDS})
    by_field, _ = both_ways(schema, 2, 5)

    assert FieldEmbeddings(schema, 3, init=nn.init.normal_).item(by_field).shape == (5, 0, 3)
    assert np.array_equal(by_field["user_index"].shape, (5,))
