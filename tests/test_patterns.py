"""Patterns against a slow, obvious ranking."""

import itertools

import keras
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


@pytest.mark.parametrize("seed", range(20))
def test_nm_is_the_best_of_all_choices(seed):
    rng = np.random.default_rng(seed)
    n, m = sorted(int(k) for k in rng.choice(np.arange(1, 6), 2, replace=False))
    scores = rng.random((int(rng.integers(1, 5)), int(rng.integers(1, 14))))
    pattern = ks.patterns.NM(n, m)
    mask = pattern.mask(scores, pattern.sparsity)
    for row, kept in zip(scores, mask, strict=True):
        for start in range(0, len(row), m):
            group, mine = row[start : start + m], kept[start : start + m]
            choices = itertools.combinations(range(len(group)), min(n, len(group)))
            best = max(choices, key=lambda choice: group[list(choice)].sum())
            assert np.flatnonzero(mine).tolist() == sorted(best)


@pytest.mark.parametrize("seed", range(10))
def test_nm_is_refined_along_the_way(seed):
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=(5, 12)), 1)  # with ties and negative scores
    scores[rng.random(scores.shape) < 0.1] = np.nan
    pattern, previous = ks.patterns.NM(2, 4), np.ones(scores.shape, bool)
    for sparsity in np.linspace(0, 0.5, 9):
        mask = pattern.mask(np.where(previous, scores, -np.inf), sparsity)
        assert (~mask).sum() == round(sparsity * scores.size)
        assert not (mask & ~previous).any()
        np.testing.assert_array_equal(pattern.mask(np.where(mask, scores, -np.inf), sparsity), mask)
        previous = mask
    assert (previous.reshape(-1, 4).sum(axis=1) == 2).all()
    np.testing.assert_array_equal(previous, pattern.mask(scores, 0.5))
    assert ks.patterns.recognize(previous) == "2:4"


def test_nm_in_training_and_in_one_shot():
    model = keras.Sequential([keras.Input((4, 4, 8)), keras.layers.Conv2D(6, 3), keras.layers.Flatten()])
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(size=(16, 4, 4, 8)).astype("float32")
    model.fit(x, np.ones((16, 24)), epochs=4, verbose=0, callbacks=[ks.callbacks.Pruning(pattern="2:4")])
    once = keras.Sequential([keras.Input((10,)), keras.layers.Dense(6)])
    ks.prune(once, None, pattern="2:4", allocation="global")  # 10 inputs: the last group has two and keeps both
    for kernel, groups in ((model.layers[0].kernel, 18 * 6), (once.layers[0].kernel, 2 * 6)):
        matrix = ks.patterns.to_matrix(ks.selection.as_array(kernel)) != 0
        assert (matrix[:, : groups // 6 * 4].reshape(-1, 4).sum(axis=1) == 2).all()
        assert matrix[:, groups // 6 * 4 :].all()
        assert ks.patterns.recognize(matrix) == "2:4"


@pytest.mark.parametrize("name", ["block_1x4", "block_3x2", "channel", "unstructured", "1:4"])
def test_recognizes_what_a_pattern_masked(name):
    pattern = ks.patterns.get(name)
    mask = pattern.mask(np.random.default_rng(0).random((12, 32)), pattern.sparsity or 0.6)
    assert ks.patterns.recognize(mask) == name
    assert ks.patterns.recognize(np.ones((3, 4))) == ks.patterns.recognize(np.zeros((3, 4))) == ""


def test_what_is_masked_counts_as_zero_in_a_group():
    scores = np.array([[5.0, -np.inf, 1.0, 1.0], [-np.inf, -np.inf, -9.0, -9.0]])
    # Means: 2.5, 1; -inf (gone already), -9.
    np.testing.assert_array_equal(ks.patterns.Block(1, 2).pool(scores), [[2.5, 1.0], [-np.inf, -9.0]])
    np.testing.assert_array_equal(ks.patterns.Channel().pool(scores), [1.75, -4.5])


@pytest.mark.parametrize("ord", [1, 2])
def test_channels_equal_torch(ord):
    torch = pytest.importorskip("torch")
    prune = pytest.importorskip("torch.nn.utils.prune")
    weight = np.random.default_rng(0).normal(size=(3, 3, 8, 10)).astype("float32")
    module = torch.nn.Conv2d(8, 10, 3)
    module.weight.data = torch.tensor(np.ascontiguousarray(weight.transpose(3, 2, 0, 1)))
    prune.ln_structured(module, "weight", amount=4, n=ord, dim=0)
    theirs = module.weight_mask.numpy().astype(bool).any(axis=(1, 2, 3))
    ours = ks.patterns.Channel().mask(ks.patterns.to_matrix(np.abs(weight) ** ord), 0.4)
    np.testing.assert_array_equal(ours.any(axis=1), theirs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ks.patterns.NM(4, 4), "`n` must be below `m`"),
        (lambda: ks.patterns.NM(0, 4), "`n` must be a whole number"),
        (lambda: ks.patterns.get("4:2"), "`n` must be below `m`"),
        (lambda: ks.callbacks.Pruning(0.3, pattern="2:4"), "is a sparsity of 0.5 in each weight"),
        (lambda: ks.callbacks.Pruning(pattern="2:4", allocation="erk"), "with allocation='uniform'"),
        (lambda: ks.callbacks.Pruning({"a": (0.7, "2:4")}), "is a sparsity of 0.5 in each weight"),
        (lambda: ks.patterns.NM(2, 4).mask(np.ones((2, 4)), 0.6), "leave the sparsity out"),
    ],
)
def test_nm_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
