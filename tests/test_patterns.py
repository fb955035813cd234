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


@pytest.mark.parametrize(
    ("shape", "output_axes"),
    [
        ((5, 7), (-1,)),
        ((3, 3, 4, 6), (-1,)),
        ((3, 3, 6, 4), (-2,)),
        ((3, 3, 4, 2), (2, 3)),
        ((4, 2, 3), (1, 2)),
        ((9,), (0,)),
    ],
)
def test_matrix_view(shape, output_axes):
    kernel = np.random.default_rng(0).normal(size=shape)
    matrix = ks.patterns.to_matrix(kernel, output_axes)
    axes = sorted(axis % len(shape) for axis in output_axes)
    others = [axis for axis in range(len(shape)) if axis not in axes]
    for row, output in enumerate(np.ndindex(*(shape[axis] for axis in axes))):
        for column, inputs in enumerate(np.ndindex(*(shape[axis] for axis in others))):
            index = dict(zip([*axes, *others], [*output, *inputs], strict=True))
            assert matrix[row, column] == kernel[tuple(index[axis] for axis in range(len(shape)))]
    np.testing.assert_array_equal(ks.patterns.from_matrix(matrix, shape, output_axes), kernel)


def slow_blocks(rows, cols, shape):
    """Which block each element of a matrix is in: the blocks in order, those over the edge smaller."""
    across = -(-shape[1] // cols)
    return np.array([[(i // rows) * across + j // cols for j in range(shape[1])] for i in range(shape[0])])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["block", "channel"])
def test_blocks_and_channels_are_the_slow_ranking_of_means(seed, kind):
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, 13, size=2))
    rows, cols = (int(n) for n in rng.integers(1, 6, size=2))
    pattern = ks.patterns.Block(rows, cols) if kind == "block" else ks.patterns.Channel()
    ids = slow_blocks(rows, cols, shape) if kind == "block" else slow_blocks(1, shape[1], shape)
    scores = rng.random(shape).astype("float32")
    means = np.array([scores[ids == group].mean() for group in range(ids.max() + 1)])
    sparsity = float(rng.random())
    kept = slow_mask(means, round(sparsity * means.size))
    mask = pattern.mask(scores, sparsity)
    np.testing.assert_array_equal(mask, kept[ids])
    np.testing.assert_array_equal(pattern.mask(np.where(mask, scores, -np.inf), sparsity), mask)
    np.testing.assert_array_equal(pattern.groups(shape[::-1]), ids.T)


def test_strings_that_say_a_size():
    assert ks.patterns.get("block_2x8").get_config() == {"rows": 2, "cols": 8}
    assert ks.patterns.get("block").get_config() == {"rows": 1, "cols": 4}
    with pytest.raises(ValueError, match="`cols` must be a whole number"):
        ks.patterns.get("block_1x0")
    with pytest.raises(ValueError, match="Unknown pattern"):
        ks.patterns.get("block_1by4")
