"""The callbacks in real `fit` calls: schedules, optimizers, targets."""

import re

import keras
import numpy as np
import pytest
from callback_models import X, Y, ZerosAfterEachStep, dense_model, fit, kernels, zeros

import keras_sparse as ks


@pytest.mark.filterwarnings("ignore:.* has no weight left")  # at 0.999
@pytest.mark.parametrize("sparsity", [0.0, 0.31, 0.5, 0.9, 0.999])
def test_ends_at_exactly_the_rounded_count(sparsity):
    model = dense_model()
    history = fit(model, ks.callbacks.Pruning(sparsity))
    assert zeros(model) == [round(sparsity * 120), round(sparsity * 30)]
    assert history.history["sparsity"][-1] == pytest.approx(sum(zeros(model)) / 150)


def test_zeros_grow_along_the_schedule_and_never_come_back():
    model, record = dense_model(), ZerosAfterEachStep()
    fit(model, ks.callbacks.Pruning(0.9, schedule="linear", begin=2, end=12, frequency=5), record)
    first = [counts[0] for counts in record.counts]
    # Updates after steps 2, 7 and 12 of the 18, at 0, 1/2 and all of 0.9 x 120.
    assert first == [0] * 6 + [54] * 5 + [108] * 7
    assert record.revived == 0


def test_fractions_and_steps_mean_the_same_moments():
    runs = []
    for begin, end in ((3, 9), (3 / 18, 9 / 18), (3, 0.5)):
        record = ZerosAfterEachStep()
        fit(dense_model(), ks.callbacks.Pruning(0.8, begin=begin, end=end, frequency=2), record)
        runs.append(record.counts)
    assert runs[0] == runs[1] == runs[2]


def test_one_shot_fires_at_begin():
    record = ZerosAfterEachStep()
    fit(dense_model(), ks.callbacks.Pruning(0.5, schedule="one_shot"), record)
    assert record.counts == [[60, 15]] * 18


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps_per_execution": 7},
        {"jit_compile": True},
        {"jit_compile": False},
        pytest.param(
            {"run_eagerly": True}, marks=pytest.mark.skipif(keras.backend.backend() == "jax", reason="not on JAX")
        ),
    ],
    ids=str,
)
def test_compile_options(arguments):
    if keras.backend.backend() == "torch" and (arguments.get("jit_compile") or "steps_per_execution" in arguments):
        pytest.skip("Keras does not support it on torch, or compiles for minutes")
    model = dense_model(**arguments)
    fit(model, ks.callbacks.Pruning(0.9, frequency=2))
    assert zeros(model) == [108, 27]


OPTIMIZERS = {
    "sgd": lambda **kw: keras.optimizers.SGD(0.1, momentum=0.9, **kw),
    "nesterov": lambda **kw: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True, **kw),
    "adam": lambda **kw: keras.optimizers.Adam(0.01, **kw),
    "adamw": lambda **kw: keras.optimizers.AdamW(0.01, **kw),
    "rmsprop": lambda **kw: keras.optimizers.RMSprop(0.01, **kw),
    "lion": lambda **kw: keras.optimizers.Lion(0.01, **kw),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"loss_scale_factor": 1024.0},
        {"use_ema": True, "ema_momentum": 0.9},
        {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 4},
        {"clipnorm": 1.0, "weight_decay": 0.01},
    ],
    ids=str,
)
@pytest.mark.thorough(3)
def test_optimizers_and_their_options(name, arguments):
    if name not in ("sgd", "adam") and arguments:
        pytest.skip("the options are the base class's")
    model, record = dense_model(optimizer=OPTIMIZERS[name](**arguments)), ZerosAfterEachStep()
    optimizer = model.optimizer
    fit(model, ks.callbacks.Pruning(0.9, frequency=1), record, epochs=4)
    assert zeros(model) == [108, 27]
    assert record.revived == 0
    assert model.optimizer is optimizer
    if "use_ema" in arguments and keras.backend.backend() == "jax":
        return  # Keras 3.15 on JAX fails in any second fit with `use_ema`: weights and averages share a buffer.
    losses = fit(model, ks.callbacks.KeepSparsity(), epochs=10).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("arguments", [{}, {"loss_scale_factor": 4096.0}, {"gradient_accumulation_steps": 2}], ids=str)
def test_training_is_the_plain_optimizers_where_nothing_is_masked(arguments):
    plain = dense_model(optimizer=keras.optimizers.Adam(0.01, **arguments))
    ours = dense_model(optimizer=keras.optimizers.Adam(0.01, **arguments))
    fit(plain)
    fit(ours, ks.callbacks.Pruning(0.0))
    for a, b in zip(plain.get_weights(), ours.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_masked_training_is_numpy_sgd_with_the_mask():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(3, use_bias=False)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    target = np.random.default_rng(2).normal(size=(96, 3)).astype("float32")
    ks.prune(model, 0.5)
    weight = kernels(model)[0].astype("float64")
    mask = weight != 0
    fit(model, ks.callbacks.KeepSparsity(), y=target, epochs=2)
    for start in list(range(0, 96, 16)) * 2:
        x, y = X[start : start + 16].astype("float64"), target[start : start + 16]
        weight = np.where(mask, weight - 0.1 * 2 * x.T @ (x @ weight - y) / y.size, 0)
    np.testing.assert_allclose(kernels(model)[0], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model, record = dense_model(), ZerosAfterEachStep()
    finally:
        keras.config.set_dtype_policy("float32")
    optimizer = model.optimizer
    fit(model, ks.callbacks.Pruning(0.9), record)
    assert zeros(model) == [108, 27]
    assert record.revived == 0
    assert model.optimizer is optimizer
    assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
    if policy == "mixed_float16":
        assert isinstance(optimizer.inner_optimizer, keras.optimizers.Adam)


def test_skipped_fp16_steps_do_not_move_the_clock():
    model = dense_model(optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(), initial_scale=1e38))
    # Infinite gradients in the first steps: the loss scale halves, the step is skipped, the schedule waits.
    with pytest.warns(UserWarning, match="ended before the schedule did"):
        fit(model, ks.callbacks.Pruning(0.9, begin=0, end=18), epochs=3, x=X * 100)
    assert zeros(model) == [108, 27]


def test_swap_ema_weights():
    model, record = dense_model(optimizer=keras.optimizers.Adam(0.01, use_ema=True)), ZerosAfterEachStep()
    fit(model, keras.callbacks.SwapEMAWeights(), ks.callbacks.Pruning(0.9), record, validation_data=(X, Y))
    assert zeros(model) == [108, 27]
    swapped = dense_model(optimizer=keras.optimizers.Adam(0.01, use_ema=True))
    fit(swapped, ks.callbacks.Pruning(0.9), keras.callbacks.SwapEMAWeights(swap_on_epoch=True))
    assert zeros(swapped) == [108, 27]


# Which weights, and how much of each


def test_global_allocation():
    model = dense_model()
    fit(model, ks.callbacks.Pruning(0.8, allocation="global"))
    assert sum(zeros(model)) == 120


@pytest.mark.lengthy(0)
def test_dict_of_sparsities_and_filters():
    model = dense_model()
    fit(model, ks.callbacks.Pruning({"b/": 0.2, ".*": (0.5, "unstructured")}))
    assert zeros(model) == [60, 6]
    for filters in ("a/", re.compile("a/"), ["a/"], lambda variable: "a/" in variable.path):
        other = dense_model()
        fit(other, ks.callbacks.Pruning(0.5, filters=filters))
        assert zeros(other) == [60, 0]
        assert ks.report(other).rows[2]["reason"] == "not matched by `filters`"


def test_two_of_ours_at_once():
    model = dense_model()
    optimizer = model.optimizer
    history = fit(model, ks.callbacks.Pruning(0.5, filters="a/"), ks.callbacks.Pruning(0.8, filters="b/", frequency=3))
    assert zeros(model) == [60, 24]
    assert history.history["sparsity"][-1] == pytest.approx(84 / 150)
    assert model.optimizer is optimizer


@pytest.mark.parametrize("compiled", [False, True])
def test_each_has_updates_of_its_own(compiled):
    optimizer = keras.optimizers.Adam()
    model = dense_model(optimizer=ks.optimizers.SparseOptimizer(optimizer) if compiled else optimizer)
    for sparsity in (0.5, 0.6):
        record = ZerosAfterEachStep()
        static = ks.callbacks.DynamicSparseTraining(sparsity, filters="b/", grow="static")
        fit(model, static, ks.callbacks.Pruning(sparsity, filters="a/", schedule="one_shot", frequency=10), record)
        assert record.counts == [[round(120 * sparsity), round(30 * sparsity)]] * 18


def test_the_same_callback_serves_two_fits():
    model, callback = dense_model(), ks.callbacks.Pruning(0.5)
    fit(model, callback)
    fit(model, callback)
    assert zeros(model) == [60, 15]
    other = dense_model()
    fit(other, callback)
    assert zeros(other) == [60, 15]


def test_second_fit_goes_on_from_the_first():
    model = dense_model()
    fit(model, ks.callbacks.Pruning(0.5))
    before = [kernel == 0 for kernel in kernels(model)]
    record = ZerosAfterEachStep()
    fit(model, ks.callbacks.Pruning(0.9), record)
    assert min(counts[0] for counts in record.counts) == 60
    assert zeros(model) == [108, 27]
    assert all(((kernel == 0) | ~b).all() for kernel, b in zip(kernels(model), before, strict=True))


def test_a_target_below_what_the_model_has_is_kept():
    model = dense_model()
    ks.prune(model, 0.9)
    fit(model, ks.callbacks.Pruning(0.5))
    assert zeros(model) == [108, 27]


def test_zero_initialised_weights_are_not_taken_for_pruned():
    model = dense_model()
    model.layers[0].kernel.assign(np.zeros((12, 10)))
    model.layers[0].kernel_initializer = keras.initializers.Zeros()
    model.layers[0].bias.assign(np.full(10, 0.1))
    fit(model, ks.callbacks.Pruning(0.5), epochs=6)
    assert zeros(model)[0] == 60


def test_keep_sparsity():
    model, record = dense_model(), ZerosAfterEachStep()
    ks.prune(model, {"a/": 0.7})
    fit(model, ks.callbacks.KeepSparsity(), record)
    assert record.counts == [[84, 0]] * 18


def test_keep_sparsity_of_a_dense_model_warns():
    with pytest.warns(UserWarning, match="no zeros to keep"):
        fit(dense_model(), ks.callbacks.KeepSparsity(), epochs=1)


def test_frozen_layers_are_left_alone():
    model = dense_model()
    model.layers[0].trainable = False
    model.compile("adam", "mse")
    fit(model, ks.callbacks.Pruning(0.5), y=np.ones((96, 3)))
    assert zeros(model) == [15, 0]  # Trainable weights come first.
    assert "not trainable" in ks.report(model).rows[-2]["reason"]
