"""Patterns against a slow, obvious ranking."""

import itertools
import time

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
    mask = pattern.mask(scores, sparsity, [0])
    np.testing.assert_array_equal(mask, kept[ids])
    np.testing.assert_array_equal(pattern.mask(np.where(mask, scores, -np.inf), sparsity, [0]), mask)
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
    mask = pattern.mask(scores, pattern.sparsity, [0])
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
        mask = pattern.mask(np.where(previous, scores, -np.inf), sparsity, [0])
        assert (~mask).sum() == round(sparsity * scores.size)
        assert not (mask & ~previous).any()
        np.testing.assert_array_equal(pattern.mask(np.where(mask, scores, -np.inf), sparsity, [0]), mask)
        previous = mask
    assert (previous.reshape(-1, 4).sum(axis=1) == 2).all()
    np.testing.assert_array_equal(previous, pattern.mask(scores, 0.5, [0]))
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


def random_layer(rng):
    """A layer of random size whose matrix view is at least 16 x 32, built."""
    inputs, outputs, size = (int(rng.integers(low, 48)) for low in (32, 16, 1))
    size = 1 + size % 3
    layer, shape = {
        "dense": lambda: (keras.layers.Dense(outputs), (None, inputs)),
        "conv": lambda: (keras.layers.Conv2D(outputs, size), (None, 9, 9, inputs)),
        "transposed": lambda: (keras.layers.Conv2DTranspose(outputs, size), (None, 9, 9, inputs)),
        "depthwise": lambda: (keras.layers.DepthwiseConv2D((6, 7), depth_multiplier=2), (None, 9, 9, outputs)),
        "recurrent": lambda: (keras.layers.SimpleRNN(inputs), (None, 5, inputs)),
    }[rng.choice(["dense", "conv", "transposed", "depthwise", "recurrent"])]()
    return keras.Sequential([keras.Input(shape[1:]), layer])


def random_pattern(rng):
    """A pattern, and a sparsity that leaves enough groups of both kinds to tell it from another."""
    kind = rng.choice(["unstructured", "channel", "block", "nm"])
    if kind == "nm":
        n, m = sorted(int(k) for k in rng.choice(np.arange(1, 17), 2, replace=False))
        return f"{n}:{m}", None
    rows, cols = int(rng.integers(1, 4)), int(rng.integers(2, 9))
    return f"block_{rows}x{cols}" if kind == "block" else str(kind), float(rng.uniform(0.25, 0.9))


@pytest.mark.parametrize("seed", range(60))
def test_what_prune_made_is_recognized(seed):
    rng = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    model, (pattern, sparsity) = random_layer(rng), random_pattern(rng)
    if pattern == "channel" and isinstance(model.layers[0], keras.layers.DepthwiseConv2D):
        with pytest.raises(ValueError, match="nothing to prune in whole channels: .* the input 'keras_tensor'"):
            ks.prune(model, sparsity, pattern=pattern, filters="kernel")
        return
    report = ks.prune(model, sparsity, pattern=pattern, filters="kernel")
    names = {row["pattern"] for row in report.rows if row["status"] == "pruned"}
    assert names == {pattern}


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_nm_on_its_way_is_unstructured(pattern):
    pattern = ks.patterns.get(pattern)
    scores = np.random.default_rng(0).random((30, 64))
    assert [
        ks.patterns.recognize(pattern.mask(scores, share * pattern.sparsity, [0])) for share in (0.3, 0.6, 0.95)
    ] == ["unstructured"] * 3
    # A mask with a few zeros more, as quantisation makes them, keeps to it.
    further = pattern.mask(scores, pattern.sparsity, [0]) & (np.random.default_rng(1).random(scores.shape) > 0.02)
    assert ks.patterns.recognize(further) == f"{pattern.n}:{pattern.m}"


@pytest.mark.parametrize("seed", range(200))
def test_chance_is_no_pattern(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(2, 40, 2))
    # From one zero to one weight; a row of zeros is a dead unit, whoever made it.
    zeros = int(min(1 + rng.integers(3) if seed % 2 else rng.integers(1, np.prod(shape)), np.prod(shape) - 1))
    kept = np.ones(shape, bool)
    kept.reshape(-1)[rng.permutation(kept.size)[:zeros]] = False
    dead = ~kept.any(axis=1)
    expected = "channel" if zeros == dead.sum() * shape[1] else "unstructured"
    assert ks.patterns.recognize(kept) == expected


@pytest.mark.parametrize("position", [(0, 0), (-1, -1), (11, 0), (0, -1), (4, 16)])
def test_a_single_zero_is_no_block(position):
    kept = np.ones((12, 32), bool)
    kept[position] = False
    assert ks.patterns.recognize(kept) == "unstructured"


@pytest.mark.parametrize("pattern", ["block_1x4", "block_4x4", "block_1x16", "channel"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_stray_zeros_do_not_hide_a_pattern(pattern, sparsity):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(64, 256)) * ks.patterns.get(pattern).mask(rng.random((64, 256)), sparsity, [0])
    quantised = np.round(kernel / (np.abs(kernel).max(axis=1, keepdims=True) + 1e-9) * 127)
    assert 5 < np.sum((quantised == 0) & (kernel != 0)) < 200
    assert ks.patterns.recognize(quantised != 0) == pattern
    # More of them than quantisation makes are no longer that pattern.
    assert ks.patterns.recognize((kernel != 0) & (rng.random(kernel.shape) > 0.1)) == "unstructured"


SCORES = np.random.default_rng(0).random((16, 36))


def rows_and_columns():
    kept = np.ones((16, 36), bool)
    kept[[2, 3, 9]], kept[:, [5, 17, 29]] = False, False
    return kept


@pytest.mark.parametrize(
    ("kept", "name"),
    [
        (np.ones((3, 4)), ""),
        (np.zeros((3, 4)), ""),
        (np.ones((0, 4)), ""),
        # Dead units, and dead inputs from the layer before.
        (rows_and_columns(), "channel"),
        (rows_and_columns() | rows_and_columns().any(axis=1, keepdims=True), "channel"),
        (rows_and_columns() | rows_and_columns().any(axis=0, keepdims=True), "block_16x1"),
        # 2:4 in the units that are left.
        (ks.patterns.NM(2, 4).mask(SCORES, 0.5, [0]) & rows_and_columns()[:, :1], "2:4"),
        # Several names are true; the one that says most is given.
        (ks.patterns.NM(1, 2).mask(SCORES, 0.5, [0]), "1:2"),
        (ks.patterns.NM(2, 4).mask(SCORES[:, :3], 0.5, [0]), "2:3"),
        (ks.patterns.Block(2, 40).mask(SCORES, 0.5, [0]), "channel"),
        # Too small to tell from chance.
        (ks.patterns.NM(2, 4).mask(SCORES[:2, :4], 0.5, [0]), "unstructured"),
    ],
)
def test_recognizes_by_hand(kept, name):
    assert ks.patterns.recognize(kept) == name


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block_1x4", "channel"])
def test_recognition_takes_linear_time(pattern):
    pattern = ks.patterns.get(pattern)
    kept = pattern.mask(np.random.default_rng(0).random((2000, 2000), "float32"), 0.5, [0])
    start = time.process_time()
    ks.patterns.recognize(kept)
    # 4 million weights: 0.02 s here; what compares each with each takes hours.
    assert time.process_time() - start < 60


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
    ours = ks.patterns.Channel().mask(np.abs(weight) ** ord, 0.4)
    np.testing.assert_array_equal(ours.any(axis=(0, 1, 2)), theirs)


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
