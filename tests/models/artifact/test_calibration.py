import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.artifact.calibration import Calibration

finite = st.floats(-1e6, 1e6)


def test_the_identity_is_the_plain_sigmoid():
    assert Calibration()(np.array([0.0, np.log(3)])) == pytest.approx([0.5, 0.75])


@given(st.lists(finite, min_size=1), st.floats(0.01, 10), st.floats(-5, 5))
def test_probabilities_stay_inside_0_and_1_and_keep_the_order(logits, slope, intercept):
    calibrate = Calibration(slope=slope, intercept=intercept)

    probabilities = calibrate(np.sort(np.array(logits, dtype=np.float32)))

    assert ((probabilities > 0) & (probabilities < 1)).all()
    assert (np.diff(probabilities) >= 0).all()


@pytest.mark.parametrize("values", [{"slope": 0}, {"slope": -1}, {"slope": float("nan")}, {"intercept": float("inf")}])
def test_a_map_that_is_not_increasing_is_refused(values):
    with pytest.raises(ValidationError):
        Calibration(**values)
