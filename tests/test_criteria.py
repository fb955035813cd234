"""Criteria against NumPy."""

import numpy as np
import pytest

import keras_sparse as ks


def test_magnitude():
    weight = np.array([[-2.0, 0.0], [np.nan, 1.0]], "float32")
    np.testing.assert_array_equal(ks.criteria.Magnitude().scores(weight), np.abs(weight))


def test_random_depends_on_seed_and_weight_alone():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 40, 30)).astype("float32")
    scores = ks.criteria.Random(seed=3).scores(a)
    np.testing.assert_array_equal(scores, ks.criteria.Random(seed=3).scores(a.copy()))
    assert (scores != ks.criteria.Random(seed=4).scores(a)).any()
    assert (scores != ks.criteria.Random(seed=3).scores(b)).any()
    # Uniform: mean 1/2 within 4 standard errors.
    assert abs(scores.mean() - 0.5) < 4 * (1 / 12) ** 0.5 / scores.size**0.5


def test_golden_random_mask():
    # Written down once: the same on every backend, machine and run.
    weight = np.arange(8, dtype="float32")
    mask = ks.patterns.Unstructured().mask(ks.criteria.Random(seed=0).scores(weight), 0.5)
    assert mask.tolist() == GOLDEN


@pytest.mark.parametrize("seed", [-1, 1.5, "0", True])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match="integer of at least 0"):
        ks.criteria.Random(seed)


GOLDEN = [True, True, True, True, False, False, False, False]
