"""The row form that the request form is set against: one model, encoded once for every candidate."""

import pytest
import torch
import workload
from row_form import RowForm, markdown
from senders import Burst

from models.features.packing import PackedLayout
from training.export import example


@pytest.mark.parametrize("packed", [False, True])
def test_the_row_form_scores_as_the_request_form_and_encodes_the_request_for_every_candidate(monkeypatch, packed):
    schema = workload.fit(workload.make_world(num_users=40, num_items=300))
    model, _ = workload.build("mian", schema, [example(schema, 1, 50)])
    arrays = example(schema, 2, 7)
    inputs = {n: torch.from_numpy(a) for n, a in (PackedLayout(schema).pack(arrays) if packed else arrays).items()}
    encode, encoded = model.encode_user, []

    def recording(inputs):
        encoded.append(encode(inputs))
        return encoded[-1]

    monkeypatch.setattr(model, "encode_user", recording)

    with torch.no_grad():
        rows, request = RowForm(model)(inputs), model(inputs)

    torch.testing.assert_close(rows, request, rtol=1e-4, atol=1e-4)
    assert [{len(part) for part in state.values()} for state in encoded] == [{7}, {2}]


def test_the_only_request_of_a_serving_graph_is_encoded_for_every_candidate():
    schema = workload.fit(workload.make_world(num_users=40, num_items=300))
    model, _ = workload.build("mian", schema, [example(schema, 1, 50)])
    inputs = {n: torch.from_numpy(a) for n, a in PackedLayout(schema).pack(example(schema, 1, 5)).items()}
    rows = RowForm(model)

    with torch.no_grad():
        items = model.encode_items(inputs)
        alone = rows.score(rows.encode_user(inputs), items, None)

        torch.testing.assert_close(alone, model(inputs), rtol=1e-4, atol=1e-4)


def test_the_table_has_candidates_a_second_and_their_ratio():
    rounds = [{"request form": Burst(per_s=300.0), "row form": Burst(per_s=20.0)}]

    assert markdown({100: rounds}).splitlines()[2] == "| 100 | 2,000 | 30,000 | 15.00 (15.00 to 15.00) | >= 10 |"
