"""Proximal steps: the operators against NumPy, and training against the solution of the lasso."""

import contextlib

import keras
import numpy as np
import pytest

import keras_sparse as ks


def numpy_of(x):
    return keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(x))


def test_soft_threshold_is_numpys():
    value = np.array([-3.0, -0.5, -0.0, 0.2, 0.5, 7.0, np.nan], "float32")
    result = numpy_of(ks.optimizers.soft_threshold(value, 0.5))
    expected = np.sign(value) * np.maximum(np.abs(value) - 0.5, 0)
    np.testing.assert_allclose(result, expected)
    assert not np.signbit(result[result == 0]).any()


@pytest.mark.parametrize("pattern", ["channel", "block_2x3", "unstructured"])
@pytest.mark.parametrize("each", [False, True])
def test_group_soft_threshold_is_numpys(pattern, each):
    rng = np.random.default_rng(0)
    value = rng.normal(size=(6, 8)).astype("float32")
    threshold = rng.uniform(0.2, 0.6, size=value.shape).astype("float32") if each else 0.5
    groups = ks.patterns.get(pattern).groups(value.shape)
    result = numpy_of(ks.optimizers.group_soft_threshold(value, threshold, groups))
    expected = np.zeros_like(value)
    for group in np.unique(groups):
        at = groups == group
        limit = (threshold[at].mean() if each else threshold) * np.sqrt(at.sum())
        norm = np.sqrt((value[at] ** 2).sum())
        expected[at] = value[at] * (1 - limit / norm) if norm > limit else 0
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    zero = numpy_of(ks.optimizers.group_soft_threshold(np.zeros((6, 8), "float32"), threshold, groups))
    assert not zero.any() and not np.signbit(zero).any()


def lasso_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 20))
    truth = np.zeros(20)
    truth[:6] = [2, -1.5, 1, 0.6, -0.4, 0.2]
    return x, x @ truth + 0.1 * rng.normal(size=200)


def least_squares(y, prediction):
    return keras.ops.mean(keras.ops.square(y - prediction), -1) / 2  # per sample


def fit_lasso(optimizer, steps, *callbacks, **compile_arguments):
    """The weights after so many steps, each on all data."""
    x, y = (np.concatenate([a.astype("float32")] * steps) for a in lasso_data())
    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(optimizer, least_squares, **compile_arguments)
    model.fit(x, y[:, None], batch_size=200, verbose=0, shuffle=False, callbacks=list(callbacks))
    return numpy_of(model.layers[0].kernel)[:, 0]


def decaying(rate, steps):
    return keras.optimizers.schedules.CosineDecay(rate, steps)


STEPS = 400
LASSO = {
    "SGD": lambda n: keras.optimizers.SGD(0.3),
    "SGD, momentum": lambda n: keras.optimizers.SGD(0.05, momentum=0.8),
    "SGD, Nesterov": lambda n: keras.optimizers.SGD(0.05, momentum=0.8, nesterov=True),
    "Adam": lambda n: keras.optimizers.Adam(decaying(0.05, n)),
    "Adam, amsgrad": lambda n: keras.optimizers.Adam(decaying(0.05, n), amsgrad=True),
    "AdamW": lambda n: keras.optimizers.AdamW(decaying(0.05, n), weight_decay=0.0),
    "Nadam": lambda n: keras.optimizers.Nadam(decaying(0.05, n)),
    "Adamax": lambda n: keras.optimizers.Adamax(decaying(0.1, n)),
    "RMSprop": lambda n: keras.optimizers.RMSprop(decaying(0.05, n)),
    "SGD, momentum, decaying": lambda n: keras.optimizers.SGD(decaying(0.1, n), momentum=0.9),
    "SGD, Nesterov, decaying": lambda n: keras.optimizers.SGD(decaying(0.1, n), momentum=0.9, nesterov=True),
    "RMSprop, centered": lambda n: keras.optimizers.RMSprop(decaying(0.05, n), centered=True),
    "RMSprop, momentum": lambda n: keras.optimizers.RMSprop(decaying(0.05, n), momentum=0.5),
    "Adagrad": lambda n: keras.optimizers.Adagrad(0.5),
    "Adadelta": lambda n: keras.optimizers.Adadelta(decaying(30.0, n)),
}


@pytest.mark.parametrize("name", LASSO)
@pytest.mark.thorough(3)
def test_training_ends_at_the_solution_of_the_lasso(name):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = lasso_data()
    solution = linear_model.Lasso(0.15, fit_intercept=False, tol=1e-8, max_iter=100_000).fit(x, y).coef_
    assert 3 < np.count_nonzero(solution) < 8
    weights = fit_lasso(LASSO[name](STEPS), STEPS, ks.callbacks.ProximalL1(0.15))
    np.testing.assert_allclose(weights, solution, atol=1e-3)
    np.testing.assert_array_equal(weights != 0, solution != 0)


def slow_steps(weights, x, y, rates, strength, groups=None):
    """Proximal gradient descent in NumPy."""
    for rate in rates:
        weights = weights - rate * x.T @ (x @ weights - y) / len(x)
        if groups is None:
            weights = np.sign(weights) * np.maximum(np.abs(weights) - rate * strength, 0)
            continue
        for group in np.unique(groups):
            at = groups == group
            limit, norm = rate * strength * np.sqrt(at.sum()), np.linalg.norm(weights[at])
            weights[at] *= max(0, 1 - limit / norm) if norm else 0
    return weights


@pytest.mark.parametrize("jit", [False] if keras.backend.backend() == "torch" else [False, True])
@pytest.mark.parametrize("schedule", [False, True])
def test_each_step_takes_the_learning_rate_of_that_step(jit, schedule):
    # With a rate that falls steeply, the rate of the step before or after would show.
    rates = keras.optimizers.schedules.ExponentialDecay(0.4, 1, 0.5) if schedule else 0.2
    keras.utils.set_random_seed(3)
    start = fit_lasso(keras.optimizers.SGD(0.0), 1)
    keras.utils.set_random_seed(3)
    weights = fit_lasso(keras.optimizers.SGD(rates), 5, ks.callbacks.ProximalL1(0.5), jit_compile=jit)
    x, y = lasso_data()
    expected = slow_steps(start, x, y, [0.4 * 0.5**step if schedule else 0.2 for step in range(5)], 0.5)
    np.testing.assert_allclose(weights, expected, atol=1e-5)


@pytest.mark.lengthy(0)
def test_groups_against_numpy():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(100, 8))
    truth = rng.normal(size=(8, 6)) * (np.arange(6) < 3)
    y = x @ truth + 0.05 * rng.normal(size=(100, 6))
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(6, use_bias=False, kernel_initializer="zeros")])
    model.compile(keras.optimizers.SGD(0.2), lambda y, p: keras.ops.sum(keras.ops.square(y - p), -1) / 2)
    callback = ks.callbacks.ProximalL1(0.1, group="channel", filters="kernel")  # what it returns
    model.fit(x, y, batch_size=100, epochs=100, verbose=0, callbacks=[callback])
    groups = np.tile(np.arange(6), (8, 1))
    expected = slow_steps(np.zeros((8, 6)), x, y, [0.2] * 100, 0.1, groups)
    np.testing.assert_allclose(numpy_of(model.layers[0].kernel), expected, atol=1e-4)
    assert ks.report(model).rows[0]["dead_units"] == 3


def test_accumulation_shrinks_once_in_a_real_step():
    x, y = (a.astype("float32") for a in lasso_data())
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(keras.optimizers.SGD(0.2, gradient_accumulation_steps=2), least_squares)
    model.fit(
        x, y[:, None], batch_size=100, epochs=1, verbose=0, shuffle=False, callbacks=[ks.callbacks.ProximalL1(0.5)]
    )
    keras.utils.set_random_seed(0)
    again = fit_lasso(keras.optimizers.SGD(0.2), 1, ks.callbacks.ProximalL1(0.5))
    np.testing.assert_allclose(numpy_of(model.layers[0].kernel)[:, 0], again, atol=1e-5)


@pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="LossScaleOptimizer.apply leaks tracers when called eagerly"
)
def test_skipped_fp16_steps_do_not_shrink():
    inner = ks.optimizers.SparseOptimizer(keras.optimizers.SGD(0.1))
    optimizer = keras.optimizers.LossScaleOptimizer(inner)
    variable = keras.Variable(np.ones(3, "float32"))
    optimizer.build([variable])
    inner.sparse_parts.proximal.add([variable])
    inner.sparse_parts.proximal.strength = 1.0
    optimizer.apply([keras.ops.convert_to_tensor(np.full(3, np.inf, "float32"))])
    np.testing.assert_array_equal(numpy_of(variable), 1)
    optimizer.apply([keras.ops.zeros(3)])
    np.testing.assert_allclose(numpy_of(variable), 0.9)


def test_optimizers_without_a_known_step_say_so():
    with pytest.warns(UserWarning, match="proximal step of Lion is not known"):
        fit_lasso(keras.optimizers.Lion(0.01), 2, ks.callbacks.ProximalL1(0.1))
    assert not ks.optimizers.knows_step(keras.optimizers.Muon())
    fit_lasso(keras.optimizers.SGD(0.01), 1, ks.callbacks.ProximalL1(0.1))  # warnings are errors


def test_averages_keep_the_zeros_of_the_last_step():
    weights = fit_lasso(keras.optimizers.SGD(0.3, use_ema=True, ema_momentum=0.9), 60, ks.callbacks.ProximalL1(0.15))
    plain = fit_lasso(keras.optimizers.SGD(0.3), 60, ks.callbacks.ProximalL1(0.15))
    np.testing.assert_array_equal(weights == 0, plain == 0)
    assert (weights == 0).sum() > 10


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("group", [None, "block_1x4"])
@pytest.mark.thorough(1)
def test_mirrored_strategy_takes_the_same_steps(two_replicas, optimizer, group):
    results = []
    for scope in (two_replicas.scope(), contextlib.nullcontext()):
        keras.utils.set_random_seed(5)
        with scope:
            results.append(fit_lasso(LASSO[optimizer](10), 10, ks.callbacks.ProximalL1(0.3, group=group)))
    np.testing.assert_allclose(*results, atol=1e-5)
    assert (results[0] == 0).any()
