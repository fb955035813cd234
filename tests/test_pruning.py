"""One-shot pruning and plans, against NumPy and the real tfmot."""

import itertools
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest

import keras_sparse as ks


def make(*units, seed=0):
    keras.utils.set_random_seed(seed)
    dense = [keras.layers.Dense(int(n), name=f"d{i}") for i, n in enumerate(units[1:])]
    return keras.Sequential([keras.Input((int(units[0]),)), *dense])


def kernels(model):
    return [layer.kernel.numpy() for layer in model.layers]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.filterwarnings("ignore:.* has no weight left")
def test_keeps_the_largest_and_changes_no_survivor(seed, allocation):
    rng = np.random.default_rng(seed)
    model = make(*rng.integers(1, 40, 4), seed=seed)
    before, sparsity = kernels(model), float(rng.random())
    ks.prune(model, sparsity, allocation=allocation)
    after = kernels(model)
    groups = zip(before, after, strict=True)
    if allocation == "global":
        groups = [(np.concatenate([k.reshape(-1) for k in before]), np.concatenate([k.reshape(-1) for k in after]))]
    for b, a in groups:
        order = np.argsort(np.abs(b).reshape(-1), kind="stable")
        expected = b.reshape(-1).copy()
        expected[order[: round(sparsity * b.size)]] = 0
        np.testing.assert_array_equal(a.reshape(-1), expected)


def test_golden_mask():
    # A person can check this one: half of eight, the 1s tie and the later one stays.
    model = make(2, 4)
    model.layers[0].kernel.assign([[4.0, -1.0, 0.5, 3.0], [-2.0, 0.25, 1.0, -5.0]])
    ks.prune(model, 0.5)
    np.testing.assert_array_equal(kernels(model)[0], [[4.0, 0.0, 0.0, 3.0], [-2.0, 0.0, 0.0, -5.0]])
    ks.prune(model, 0.625)
    np.testing.assert_array_equal(kernels(model)[0], [[4.0, 0.0, 0.0, 3.0], [0.0, 0.0, 0.0, -5.0]])


def test_pruning_twice_is_pruning_once():
    model = make(9, 7)
    ks.prune(model, 0.6)
    first = kernels(model)[0]
    report = ks.prune(model, 0.6)
    np.testing.assert_array_equal(kernels(model)[0], first)
    assert report.notes == []


def test_a_sparser_model_is_kept_and_the_report_says_so():
    model = make(10, 10, 10)
    ks.prune(model, {"d0": 0.9})
    before = kernels(model)
    report = ks.prune(model, 0.5)
    np.testing.assert_array_equal(kernels(model)[0], before[0])
    assert (kernels(model)[1] == 0).sum() == 50
    assert len(report.notes) == 1 and "already 90.0% sparse, more than the 50.0% asked for: kept" in report.notes[0]
    assert "already 90.0%" in str(report)
    ks.prune(model, 0.95)
    assert "already" in ks.prune(model, 0.3, allocation="global").notes[0]


def test_first_matching_key_wins():
    model = make(10, 10, 10)
    report = ks.prune(model, {"d1": 0.2, "d": 0.7})
    assert [(k == 0).sum() for k in kernels(model)] == [70, 20]
    other = make(10, 10, 10)
    report = ks.prune(other, {"d0": 0.7})
    assert report.rows[2]["status"] == "skipped"
    assert report.rows[2]["reason"] == "no key of `target_sparsity` matches"


def test_nan_weights_are_kept():
    model = make(4, 4)
    value = np.arange(1.0, 17).reshape(4, 4)
    value[0] = np.nan
    model.layers[0].kernel.assign(value)
    ks.prune(model, 0.75)
    assert np.isnan(kernels(model)[0][0]).all() and (kernels(model)[0][1:] == 0).all()


def test_frozen_kernels_are_pruned_in_one_shot():
    model = make(10, 10)
    model.trainable = False
    ks.prune(model, 0.5)
    assert (kernels(model)[0] == 0).sum() == 50


def test_random_criterion_is_another_mask_of_the_same_size():
    a, b, c = make(10, 10), make(10, 10), make(10, 10)
    ks.prune(a, 0.5, criterion=ks.criteria.Random(seed=1))
    ks.prune(b, 0.5, criterion=ks.criteria.Random(seed=1))
    ks.prune(c, 0.5)
    np.testing.assert_array_equal(kernels(a)[0], kernels(b)[0])
    assert (kernels(a)[0] == 0).sum() == 50
    assert (kernels(a)[0] != kernels(c)[0]).any()


class LogMagnitude(ks.criteria.Criterion):
    def scores(self, weight):
        with np.errstate(divide="ignore"):
            return np.log(np.abs(weight))


def test_a_criterion_of_ones_own_even_with_infinite_scores():
    a, b = make(10, 10), make(10, 10)
    for model in (a, b):
        model.layers[0].kernel.assign(np.where(np.eye(10) > 0, 0, model.layers[0].kernel.numpy()))
    ks.prune(a, 0.5, criterion=LogMagnitude())
    ks.prune(b, 0.5)
    np.testing.assert_array_equal(kernels(a)[0], kernels(b)[0])

    class Wrong(ks.criteria.Criterion):
        def scores(self, weight):
            return weight.sum()

    with pytest.raises(ValueError, match="scores of the weight's shape"):
        ks.prune(a, 0.7, criterion=Wrong())


@pytest.mark.parametrize("policy", ["float16", "bfloat16", "float64"])
def test_weights_of_other_precisions(policy):
    if policy == "float64" and keras.backend.backend() == "jax":
        pytest.skip("JAX has no float64 unless it is asked for")
    model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(10, dtype=policy)])
    ks.prune(model, 0.7)
    assert (ks.selection.weights(model)[0].numpy() == 0).sum() == 70


def test_quantized_kernels_are_skipped_with_the_reason():
    model = make(8, 8, 8)
    model.layers[0].quantize("int8")
    report = ks.prune(model, 0.5)
    assert any(row["status"] == "skipped" and "int8" in row["reason"] for row in report.rows)
    assert [(w.numpy() == 0).sum() for w in ks.selection.select(model, frozen=True).chosen] == [32]


def erk_densities(shapes, kept):
    """The rule itself, slowly: the scale at which min(1, scale * sum / product) keeps `kept` weights, by bisection."""
    sizes = np.array([np.prod(shape) for shape in shapes], float)
    raw = np.array([sum(shape) for shape in shapes]) / sizes
    low, high = 0.0, 1 / raw.min()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (np.minimum(1, middle * raw) * sizes).sum() < kept else (low, middle)
    return np.minimum(1, high * raw)


@pytest.mark.parametrize("seed", range(40))
def test_erk_counts(seed):
    rng = np.random.default_rng(seed)
    shapes = [tuple(int(n) for n in rng.integers(1, 40, rng.integers(2, 5))) for _ in range(rng.integers(1, 7))]
    sizes, sparsity = [int(np.prod(shape)) for shape in shapes], float(rng.random()) ** 0.3
    counts = ks.pruning.erk_counts(shapes, sizes, sparsity)
    assert sum(counts) == round(sparsity * sum(sizes))
    densities = erk_densities(shapes, sum(sizes) - sum(counts))
    for count, size, density in zip(counts, sizes, densities, strict=True):
        assert abs(size - count - density * size) < 1 + 1e-6 * size
        assert 0 <= count <= size


def test_erk_of_lenet_5():
    # By hand: sums over products times sizes are 17, 32, 520, 204 and 94, so eps = 3074 live / 867; all below 1.
    shapes = [(5, 5, 1, 6), (5, 5, 6, 16), (400, 120), (120, 84), (84, 10)]
    counts = ks.pruning.erk_counts(shapes, [150, 2400, 48000, 10080, 840], 0.95)
    assert counts == [90, 2286, 46156, 9357, 507]
    assert ks.pruning.erk_counts([(2, 3)], [6], 0.0) == [0]


@pytest.mark.parametrize("pattern", [None, "channel"])
def test_erk_in_one_shot_and_gradually(pattern):
    once, gradual = make(30, 20, 10, 5), make(30, 20, 10, 5)
    shapes, sizes = [(30, 20), (20, 10), (10, 5)], [600, 200, 50] if pattern is None else [20, 10, 5]
    counts = ks.pruning.erk_counts(shapes, sizes, 0.8)
    if pattern is not None:
        counts = [count * size for count, size in zip(counts, (30, 20, 10), strict=True)]
    ks.prune(once, 0.8, pattern=pattern, allocation="erk")
    assert [int((k == 0).sum()) for k in kernels(once)] == counts
    gradual.compile(ks.optimizers.SparseOptimizer("sgd"), "mse")
    for sparsity in (0.3, 0.5, 0.8):
        ks.update_masks(gradual, sparsity, pattern=pattern, allocation="erk")
    for a, b in zip(kernels(once), kernels(gradual), strict=True):
        np.testing.assert_array_equal(a, b)
    plan = ks.pruning.Plan(make(30, 20, 10, 5), 0.8, pattern=pattern, allocation="erk")
    masks, fewer = plan.present_masks(), [0, 0, 0]
    for fraction in (0.2, 0.6, 1.0):
        masks = plan.masks(masks, fraction)
        now = [int((~mask).sum()) for mask in masks]
        assert all(a <= b for a, b in zip(fewer, now, strict=True))
        assert plan.reached(masks) == (fraction == 1.0)
        fewer = now
    assert fewer == counts


def layers_of_random_size(rng):
    """A built model of three kernels that no block or group need divide."""
    a, b, c, size = (int(n) for n in rng.integers((1, 1, 1, 1), (12, 14, 9, 4)))
    conv = keras.layers.Conv2D if rng.random() < 0.5 else keras.layers.Conv2DTranspose
    return keras.Sequential(
        [
            keras.Input((5, 5, a)),
            conv(b, size),
            keras.layers.DepthwiseConv2D(2, depth_multiplier=2),
            keras.layers.Dense(c),
        ]
    )


def random_weights(rng, kind, shape):
    value = rng.normal(size=shape)
    return {"normal": value, "ties": np.round(value) + 3.5, "equal": np.full(shape, 0.5)}[kind]


PATTERNS = [None, "channel", "block_1x4", "block_3x2", "block_5x16", "2:4", "1:3", "5:7"]
CRITERIA = ["magnitude", "random", "gradient", "taylor", "movement"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_counts_nesting_and_idempotence(pattern, seed):
    rng = np.random.default_rng([seed, PATTERNS.index(pattern)])
    model = layers_of_random_size(rng)
    for weight in ks.selection.weights(model):
        if weight.kernel:
            kind = ["normal", "ties", "equal", "normal", "normal"][seed]
            weight.variable.assign(random_weights(rng, kind, weight.variable.shape))
    for criterion in CRITERIA:
        check_along_the_schedule(model, pattern, criterion, rng, nan=0.3 if seed == 3 else 0.0)


def check_along_the_schedule(model, pattern, criterion, rng, nan):
    shape = ks.patterns.get(pattern)
    target = shape.sparsity or float(rng.uniform(0.1, 0.95))
    allocations = ["uniform", "global"] if shape.sparsity else ["uniform", "global", "erk"]
    plan = ks.pruning.Plan(model, target, criterion, pattern, str(rng.choice(allocations)), filters="kernel")
    masks = plan.present_masks()
    pools = [goal.pool(np.zeros(mask.shape)).shape for goal, mask in zip(plan.goals, masks, strict=True)]
    groups = [shape.groups(goal.weight.variable.shape, goal.weight.output_axes) for goal in plan.goals]
    for fraction in (0.0, 0.21, 0.5, 0.83, 1.0):
        statistics = None
        if plan.criterion.statistic is not None:  # They change all the time, and may become NaN.
            statistics = [rng.normal(size=mask.shape) for mask in masks]
            for statistic in statistics:
                statistic[rng.random(statistic.shape) < nan] = np.nan
        new = plan.masks(masks, fraction, statistics)
        assert all(not (now & ~before).any() for now, before in zip(new, masks, strict=True))
        for again, now in zip(plan.masks(new, fraction, statistics), new, strict=True):
            np.testing.assert_array_equal(again, now)
        masks = new
        # A group leaves as a whole or not at all, and as many leave as `count` says.
        left = []
        for mask, group in zip(masks, groups, strict=True):
            kept, size = np.bincount(group[mask], minlength=group.max() + 1), np.bincount(group.reshape(-1))
            assert ((kept == 0) | (kept == size)).all()
            left.append(int((kept == 0).sum()))
        if pattern == "channel":  # counted by groups, in which several units of a kernel may be bound together
            continue
        if plan.allocation.shared:
            assert sum(left) == shape.count(fraction * target, pools)
        else:
            goals = zip(plan.goals, pools, strict=True)
            assert left == [shape.count(fraction * goal.sparsity, [pool]) for goal, pool in goals]
        if not shape.sparsity:
            total = sum(int(group.max()) + 1 for group in groups)
            assert abs(sum(left) - fraction * target * total) <= len(left) / 2
    assert plan.reached(masks)
    if shape.sparsity:
        for goal, mask in zip(plan.goals, masks, strict=True):
            for row in ks.patterns.to_matrix(mask, goal.weight.output_axes):
                parts = [row[start : start + shape.m] for start in range(0, len(row), shape.m)]
                assert [int(part.sum()) for part in parts] == [min(shape.n, len(part)) for part in parts]


class Halved(ks.patterns.Pattern):
    def pool(self, scores):
        return scores

    def expand(self, groups, shape):
        return groups / 2


BAD = [
    ((1.0,), {}, ValueError, "at least 0 and below 1.*Received: 1.0"),
    ((50,), {}, ValueError, "Did you mean 0.5"),
    ((-0.5,), {}, ValueError, "at least 0"),
    ((float("nan"),), {}, ValueError, "Received: nan"),
    ((None,), {}, TypeError, "of type NoneType"),
    ((0.5,), {"allocation": "even"}, ValueError, r"one of \['dynamic', 'erk', 'global', 'isomorphic', 'uniform'\]"),
    ((0.5,), {"criterion": "size"}, ValueError, "Unknown criterion"),
    ((0.5,), {"pattern": "random"}, ValueError, "Unknown pattern"),
    (({"nothing": 0.5},), {}, ValueError, "'nothing' matches no weight"),
    (({"d0": 0.5, "nothing": 0.5},), {}, ValueError, "'nothing' matches no weight"),
    (({3: 0.5},), {}, TypeError, "as a string"),
    ((0.5,), {"criterion": "snip"}, ValueError, "pass `data=.x, y.`"),
    ((0.5,), {"data": (np.ones((4, 5)), np.ones((4, 5)))}, ValueError, "`Magnitude` looks at no data"),
    ((0.5,), {"criterion": "taylor", "data": (np.ones(3),)}, ValueError, "a tuple of 1"),
    ((0.5,), {"criterion": "taylor", "data": "mnist"}, TypeError, "Received: 'mnist'"),
    ((0.5,), {"criterion": "taylor", "data": (np.ones((4, 5)), np.ones((4, 5)))}, ValueError, "has no optimizer"),
    ((0.5,), {"criterion": "taylor", "data": np.ones((4, 5))}, ValueError, r"must be \(x, y\).*Received: ndarray"),
    ((0.5,), {"criterion": "taylor", "data": [np.ones((4, 5))] * 2}, ValueError, r"must be \(x, y\).*Received: list"),
    (({"d0": 0.5},), {"allocation": "erk"}, ValueError, r"Received: allocation=ERK\(live_paths=False\)"),
    ((0.5,), {"pattern": Halved()}, ValueError, r"`Halved.expand` must return booleans .* \(5, 5\) for .*d0/kernel"),
    ((0.9,), {"allocation": ks.pruning.Global(floor=0.2)}, ValueError, "Lower one of them"),
    ((0.9,), {"allocation": ks.pruning.Global(floor=4)}, ValueError, "keeps 4 of 25"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD, ids=[row[3] for row in BAD])
def test_bad_arguments_change_nothing(args, kwargs, error, message):
    model = make(5, 5)
    before = kernels(model)[0]
    with pytest.raises(error, match=message):
        ks.prune(model, *args, **kwargs)
    np.testing.assert_array_equal(kernels(model)[0], before)


@pytest.mark.parametrize("sparsity", [1.5, 1, -0.1, "0.5"])
def test_erk_counts_checks_the_sparsity(sparsity):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        ks.pruning.erk_counts([(3, 4)], [12], sparsity)


@pytest.mark.parametrize("floor", [0.1, 0.02, 7, 10**6])
@pytest.mark.parametrize("pattern", [None, "block_1x4"])
def test_global_with_a_floor(floor, pattern):
    model = make(40, 30, 20, 10, seed=3)
    for layer, scale in zip(model.layers, (1.0, 1e-3, 1e3), strict=True):
        layer.kernel.assign(layer.kernel * scale)
    goals = ks.pruning.Plan(model, 0.0, pattern=pattern).goals
    scores = [goal.pool(np.abs(goal.weight.numpy())).reshape(-1) for goal in goals]
    least = [min(s.size, floor if floor >= 1 else int(np.ceil(floor * s.size))) for s in scores]
    allocation = ks.pruning.Global(floor)
    if sum(least) > sum(s.size for s in scores) - round(0.8 * sum(s.size for s in scores)):
        with pytest.raises(ValueError, match="Lower one of them"):
            ks.prune(model, 0.8, pattern=pattern, allocation=allocation)
        return
    # One by one, the smallest that is not protected.
    kept = [np.ones(s.size, bool) for s in scores]
    order = sorted((score, i, j) for i, s in enumerate(scores) for j, score in enumerate(s))
    count = round(0.8 * len(order))
    for _, i, j in order:
        if count and kept[i].sum() > least[i]:
            kept[i][j] = False
            count -= 1
    ks.prune(model, 0.8, pattern=pattern, allocation=allocation)
    for goal, expected in zip(goals, kept, strict=True):
        np.testing.assert_array_equal(goal.pool(np.abs(goal.weight.numpy())).reshape(-1) != 0, expected)
    before = kernels(model)
    ks.prune(model, 0.8, pattern=pattern, allocation=allocation)
    np.testing.assert_array_equal(np.concatenate(kernels(model), None), np.concatenate(before, None))


def test_a_floor_holds_along_the_schedule():
    model = make(20, 10, 5)
    model.layers[1].kernel.assign(model.layers[1].kernel * 1e-3)
    plan = ks.pruning.Plan(model, 0.9, allocation=ks.pruning.Global(4))
    masks = plan.present_masks()
    for fraction in (0.25, 0.5, 0.75, 1.0):
        new = plan.masks(masks, fraction)
        assert all(not np.any(n & ~old) for n, old in zip(new, masks, strict=True))
        assert sum(np.sum(~mask) for mask in new) == round(fraction * 0.9 * 250)
        assert new[1].sum() >= 4
        masks = new
    assert masks[1].sum() == 4
    assert plan.reached(masks)


@pytest.mark.parametrize("floor", ["0.1", None, True])
def test_a_floor_is_a_number(floor):
    with pytest.raises(TypeError, match="must be a number"):
        ks.pruning.Global(floor)


@pytest.mark.parametrize("floor", [-1, 1.0, float("nan")])
def test_a_floor_is_a_share_or_a_count(floor):
    with pytest.raises(ValueError, match="a share in"):
        ks.pruning.Global(floor)


DATA = np.random.default_rng(5)
X = DATA.normal(size=(70, 6)).astype("float32")
Y = DATA.normal(size=(70, 4)).astype("float32")


def data_forms():
    batches = [(X[at : at + 32], Y[at : at + 32]) for at in (0, 32, 64)]

    class Sequence(keras.utils.PyDataset):
        def __len__(self):
            return len(batches)

        def __getitem__(self, index):
            return batches[index]

    return {
        "arrays": (X, Y),
        "weighted": (X, Y, np.ones(70)),
        "generator": (batch for batch in batches),
        "sequence": Sequence(),
    }


def linear(optimizer="adam", **arguments):
    model = make(6, 4, seed=2)
    model.compile(optimizer, "mse", **arguments)
    return model


def scores_in_numpy(criterion, kernel):
    """From the gradients of the mean squared error of x @ kernel + 0, batch by batch."""
    steps = []
    for at in (0, 32, 64):
        x, y = X[at : at + 32].astype("float64"), Y[at : at + 32].astype("float64")
        steps.append(2 / y.size * x.T @ (x @ kernel - y))
    return {
        "snip": np.abs(kernel * np.sum(steps, axis=0)),
        "movement": -kernel * np.sum(steps, axis=0),
        "taylor": np.mean([np.abs(kernel * g) for g in steps], axis=0),
        "gradient": np.mean(np.abs(steps), axis=0),
    }[criterion]


@pytest.mark.parametrize("form", ["arrays", "weighted", "generator", "sequence"])
@pytest.mark.parametrize("criterion", ["snip", "movement", "taylor", "gradient"])
def test_gradients_on_data_equal_numpy(criterion, form):
    model = linear()
    before = kernels(model)[0]
    scores = scores_in_numpy(criterion, before.astype("float64"))
    ks.prune(model, 0.75, criterion=criterion, data=data_forms()[form])
    expected = np.where(scores >= np.sort(scores, None)[18], before, 0)
    np.testing.assert_array_equal(kernels(model)[0], expected)


def recurrent_with_state():
    return [
        keras.layers.Reshape((2, 3)),
        keras.layers.GRU(5, name="gru"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.5, seed=1),
        keras.layers.Dense(4, name="head"),
    ]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.thorough(1)
def test_gradients_on_data_leave_everything_else(fails):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), *recurrent_with_state()])
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(X, Y, epochs=2, verbose=0)
    optimizer, history = model.optimizer, model.history
    before = [ks.selection.as_array(v) for v in [*model.variables, *optimizer.variables]]
    data = (X, Y[:, :3]) if fails else (X, Y)
    if fails:
        with pytest.raises(Exception, match=r"shape|dimension|size"):
            ks.prune(model, 0.5, criterion="snip", filters="head", data=data)
    else:
        ks.prune(model, 0.5, criterion="snip", filters="head", data=data)
    assert model.optimizer is optimizer
    assert model.history is history
    pruned = id(model.get_layer("head").kernel)
    for variable, value in zip([*model.variables, *optimizer.variables], before, strict=True):
        if fails or id(variable) != pruned:
            np.testing.assert_array_equal(ks.selection.as_array(variable), value, err_msg=variable.path)
    assert fails or ks.report(model).totals["zeros"] == 10
    model.fit(X, Y, verbose=0)


def test_snip_before_training_and_zeros_stay():
    model = linear(jit_compile=False)
    ks.prune(model, 0.5, criterion="snip", allocation="global", data=(X, Y))
    pruned = kernels(model)[0] == 0
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[ks.callbacks.KeepSparsity()])
    np.testing.assert_array_equal(kernels(model)[0] == 0, pruned)


def test_frozen_kernels_have_no_gradients():
    model = make(6, 5, 4)
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    report = ks.prune(model, 0.5, criterion="snip", data=(X, Y))
    assert report.totals["zeros"] == 10
    assert "not trainable" in str(report)


@pytest.mark.parametrize(
    "data", [(X[:0], Y[:0]), (batch for batch in []), iter([])], ids=["arrays", "generator", "iterator"]
)
def test_data_without_samples(data):
    with pytest.raises(ValueError, match="at least one"):
        ks.prune(linear(), 0.5, criterion="snip", data=data)


def test_no_finite_gradient_is_an_error():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4, dtype="mixed_float16")])
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=1e30), "mse")
    with pytest.raises(ValueError, match="no finite gradient"):
        ks.prune(model, 0.5, criterion="snip", data=(X, Y))


def test_masks_are_the_same_on_every_backend():
    # The weights come from NumPy, so the digest is the same wherever this runs.
    import zlib

    rng = np.random.default_rng(0)
    model = make(33, 17, 5)
    for layer in model.layers:
        layer.kernel.assign(np.round(rng.normal(size=layer.kernel.shape), 2))
    masks = b""
    for allocation in ("uniform", "global"):
        for criterion in ("magnitude", "random"):
            plan = ks.pruning.Plan(model, 0.73, criterion, allocation=allocation)
            masks += b"".join(np.packbits(mask).tobytes() for mask in plan.masks(plan.present_masks()))
    assert zlib.crc32(masks) == DIGEST


DIGEST = 2449592791

TFMOT = """
import sys
import numpy as np
import tensorflow as tf
from tensorflow_model_optimization.python.core.sparsity.keras import pruning_impl, pruning_schedule
data = np.load(sys.argv[1])
out = {}
for name in data.files:
    _, pattern, sparsity = name.split("_")
    rows, cols = map(int, pattern.split("x")) if "x" in pattern else (1, 1)
    weight = tf.constant(data[name])
    pruning = pruning_impl.Pruning(
        training_step_fn=lambda: 0, pruning_vars=[],
        pruning_schedule=pruning_schedule.ConstantSparsity(float(sparsity), 0),
        # It divides the kernel [inputs, outputs] into blocks.
        block_size=[cols, rows], block_pooling_type="AVG", sparsity_m_by_n=(2, 4) if pattern == "2:4" else None)
    out[name] = pruning._maybe_update_block_mask(weight)[1].numpy() > 0
np.savez(sys.argv[2], **out)
"""

# Shapes of kernels for which tfmot means the same: its blocks over the edge are shifted by half of what is missing, it
# has none in convolutions, and its groups of 2:4 end with the input channels.
TFMOT_SHAPES = {
    "1x1": [(20, 30), (7, 11), (64, 3), (3, 3, 5, 8), (1, 1, 16, 24), (5, 5, 1, 6)],
    "1x4": [(20, 30), (64, 3), (16, 7)],
    "2x8": [(32, 30), (128, 4)],
    "2:4": [(20, 30), (7, 11), (18, 5), (3, 3, 8, 6), (1, 1, 16, 24)],
}


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tfmot is TensorFlow's")
def test_masks_equal_the_real_tfmots(tmp_path):
    rng = np.random.default_rng(0)
    # Distinct magnitudes: tfmot keeps every weight that ties with its threshold. No halves: it rounds what is kept,
    # and at least one.
    weights = {}
    for pattern, shapes in TFMOT_SHAPES.items():
        for i, shape in enumerate(shapes):
            for sparsity in (0.5,) if pattern == "2:4" else (0.1, 0.51, 0.9, 0.97):
                ranks = rng.permutation(np.prod(shape)).reshape(shape)
                weights[f"{i}_{pattern}_{sparsity}"] = (ranks - ranks.size / 2 + 0.25).astype("float32")
    np.savez(tmp_path / "in.npz", **weights)
    command = [sys.executable, "-c", textwrap.dedent(TFMOT), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    masks = np.load(tmp_path / "out.npz")
    for name, weight in weights.items():
        _, pattern, sparsity = name.split("_")
        layer = keras.layers.Dense(weight.shape[-1])
        if weight.ndim == 4:
            layer = keras.layers.Conv2D(weight.shape[-1], weight.shape[:2])
        model = keras.Sequential([keras.Input((*[9] * (weight.ndim - 2), weight.shape[-2])), layer])
        layer.kernel.assign(weight)
        ks.prune(model, float(sparsity), pattern=f"block_{pattern}" if "x" in pattern else pattern)
        np.testing.assert_array_equal(layer.kernel.numpy() != 0, masks[name], err_msg=f"{name} {weight.shape}")


@pytest.mark.parametrize("seed", range(8))
def test_two_of_four_are_the_best_of_all_choices_in_every_kernel(seed):
    rng = np.random.default_rng(seed)
    inputs, outputs, size = (int(n) for n in rng.integers((1, 1, 1), (11, 9, 4)))
    layer = [
        keras.layers.Dense(outputs),
        keras.layers.Conv2D(outputs, size),
        keras.layers.Conv2DTranspose(outputs, size),
    ]
    layer = layer[seed % 3]
    model = keras.Sequential([keras.Input((*[9] * (0 if seed % 3 == 0 else 2), inputs)), layer])
    before = layer.kernel.numpy()
    ks.prune(model, None, pattern="2:4")
    # Outputs first, then positions, input channels last, each row by itself.
    view = {2: (1, 0), 4: (2, 0, 1, 3) if seed % 3 == 2 else (3, 0, 1, 2)}[before.ndim]
    for old, new in zip(*(k.transpose(view).reshape(outputs, -1) for k in (before, layer.kernel.numpy())), strict=True):
        for start in range(0, len(old), 4):
            group = old[start : start + 4]
            choices = itertools.combinations(range(len(group)), min(2, len(group)))
            best = max(choices, key=lambda choice: np.abs(group[list(choice)]).sum())
            expected = np.zeros_like(group)
            expected[list(best)] = group[list(best)]
            np.testing.assert_array_equal(new[start : start + 4], expected)


@pytest.mark.parametrize("pattern", ["channel", "block_2x3"])
def test_patterns_see_the_matrix_that_the_runtime_multiplies(pattern):
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3),
            keras.layers.Conv2DTranspose(6, 2),
            keras.layers.Flatten(),
            keras.layers.Dense(8),
        ]
    )
    before = [layer.kernel.numpy() for layer in model.layers if layer.name != "flatten"]
    ks.prune(model, 0.5, pattern=pattern)
    views = [(3, 0, 1, 2), (2, 0, 1, 3), (1, 0)]
    for layer, old, view in zip([model.layers[0], model.layers[1], model.layers[3]], before, views, strict=True):
        matrix = old.transpose(view).reshape(old.shape[view[0]], -1)
        mask = ks.patterns.get(pattern).mask(np.abs(matrix), 0.5, output_axes=[0])
        own = ks.patterns.get(pattern).mask(np.abs(old), 0.5, output_axes=[view[0]])
        np.testing.assert_array_equal(own.transpose(view).reshape(matrix.shape), mask)
        now = layer.kernel.numpy().transpose(view).reshape(matrix.shape)
        np.testing.assert_array_equal(now, np.where(mask, matrix, 0))
        if pattern == "channel":
            assert (now == 0).all(axis=1).sum() == len(matrix) // 2


def test_keys_of_a_target_may_be_callables():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8), keras.layers.Dense(8)])
    kernel = model.layers[1].kernel
    ks.prune(model, {lambda variable: variable is kernel: (0.5, "2:4")})
    assert [int(np.sum(w == 0)) for w in model.get_weights()[::2]] == [0, 32]
    with pytest.raises(ValueError, match="is true for no weight"):
        ks.prune(model, {lambda variable: False: 0.5})
