"""Patterns against a slow, obvious ranking."""

import numpy as np
import pytest

import keras_sparse as ks


def slow_mask(scores, count):
    """Sort by (score, index), NaN last, and drop the first `count`."""
    flat = scores.reshape(-1)
    order = sorted(range(flat.size), key=lambda i: (np.isnan(flat[i]), 0 if np.isnan(flat[i]) else flat[i], i))
    keep = np.ones(flat.size, bool)
    keep[order[:count]] = False
    return keep.reshape(scores.shape)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "nan", "infinite", "half"])
def test_unstructured_is_the_slow_ranking(seed, kind):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 9, size=rng.integers(1, 5)))
    scores = rng.normal(size=shape).astype("float32")
    if kind == "ties":
        scores = np.round(scores)
    elif kind == "equal":
        scores[:] = 0.5
    elif kind == "nan":
        scores[rng.random(shape) < 0.4] = np.nan
    elif kind == "infinite":
        scores[rng.random(shape) < 0.4] = -np.inf
        scores[rng.random(shape) < 0.2] = np.inf
    elif kind == "half":
        scores = scores.astype("float16")
    sparsity = float(rng.random())
    mask = ks.patterns.Unstructured().mask(scores, sparsity)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, slow_mask(scores, round(sparsity * scores.size)))


@pytest.mark.parametrize("seed", range(10))
def test_masks_are_nested_and_idempotent(seed):
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=(17, 5)), 1)
    pattern = ks.patterns.Unstructured()
    previous = np.ones(scores.shape, bool)
    for sparsity in np.linspace(0, 0.99, 12):
        mask = pattern.mask(scores, sparsity)
        assert not (mask & ~previous).any()
        again = pattern.mask(np.where(mask, scores, -np.inf), sparsity)
        np.testing.assert_array_equal(mask, again)
        previous = mask


def test_golden_mask_with_ties():
    # Of the four ones, the two of the lowest index go.
    scores = np.array([[1.0, 3.0, 1.0], [2.0, 1.0, 1.0]])
    expected = [[False, True, False], [True, True, True]]
    np.testing.assert_array_equal(ks.patterns.Unstructured().mask(scores, 2 / 6), expected)


def test_everything_can_be_dropped_and_nothing():
    scores = np.array([np.nan, 1.0, 2.0])
    assert ks.patterns.keep_highest(scores, 3).sum() == 0
    assert ks.patterns.keep_highest(scores, 0).sum() == 3
    np.testing.assert_array_equal(ks.patterns.keep_highest(scores, 2), [True, False, False])
