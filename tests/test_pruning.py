"""One-shot pruning and plans, against NumPy."""

import keras
import numpy as np
import pytest
from pruned_models import kernels, make

import keras_sparse as ks


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
    ks.prune(once, 0.8, pattern=pattern, allocation="erk", filters="kernel")  # the head as well
    assert [int((k == 0).sum()) for k in kernels(once)] == counts
    gradual.compile(ks.optimizers.SparseOptimizer("sgd"), "mse")
    for sparsity in (0.3, 0.5, 0.8):
        ks.update_masks(gradual, sparsity, pattern=pattern, allocation="erk", filters="kernel")
    for a, b in zip(kernels(once), kernels(gradual), strict=True):
        if pattern is None:
            np.testing.assert_array_equal(a, b)
        else:  # a channel that has lost readers is worth less, so that others may leave
            assert (a == 0).sum() == (b == 0).sum()
    plan = ks.pruning.Plan(make(30, 20, 10, 5), 0.8, pattern=pattern, allocation="erk", filters="kernel")
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
    ((0.5,), {"criterion": "taylor", "data": (np.ones(3),)}, ValueError, "ndarray without targets"),
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


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_report_says_whose_the_statistics_of_batch_normalization_are(count):
    layers = [keras.layers.BatchNormalization() for _ in range(count)]
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5), *layers, keras.layers.Dense(3)])
    notes = ks.prune(model, 0.5).notes
    assert len(notes) == min(count, 1)
    if count:
        assert f"of {count} batch normalization{'s' * (count - 1)} are still" in notes[0] and "reestimate" in notes[0]
    assert not ks.prune(model, 0.6, data=np.ones((8, 6), "float32") * np.arange(8)[:, None], repair=True).notes
