"""The callbacks, in real `fit` calls."""

import contextlib
import json
import os
import re
import subprocess
import sys
import textwrap
import warnings
from functools import partial

import keras
import numpy as np
import pytest

import keras_sparse as ks

TENSORFLOW = keras.backend.backend() == "tensorflow"
X = np.random.default_rng(0).normal(size=(96, 12)).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, 96)


def dense_model(**compile_arguments):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((12,)), keras.layers.Dense(10, activation="relu", name="a"), keras.layers.Dense(3, name="b")]
    )
    arguments = {"optimizer": "adam", "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}
    model.compile(**(arguments | compile_arguments))
    return model


def fit(model, *callbacks, epochs=3, x=X, y=Y, **arguments):
    arguments = {"batch_size": 16, "verbose": 0, "shuffle": False} | arguments
    return model.fit(x, y, epochs=epochs, callbacks=list(callbacks), **arguments)


def kernels(model):
    return [w.numpy() for w in ks.selection.weights(model) if w.kernel]


def zeros(model):
    return [int((kernel == 0).sum()) for kernel in kernels(model)]


class ZerosAfterEachStep(keras.callbacks.Callback):
    """Records the zeros of every kernel after every step, and whether a zero ever came back to life."""

    def __init__(self):
        super().__init__()
        self.counts, self.revived, self.before = [], 0, None

    def on_train_batch_end(self, batch, logs=None):
        now = [kernel == 0 for kernel in kernels(self.model)]
        self.counts.append([int(z.sum()) for z in now])
        if self.before is not None:
            self.revived += sum(int((b & ~n).sum()) for b, n in zip(self.before, now, strict=True))
        self.before = now


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


# Input pipelines and epochs


# What Keras says about every generator and dataset of unknown length.
KERAS_SAYS = [
    pytest.mark.filterwarnings("ignore:Your input ran out of data"),
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed, but will be ignored"),
]


def with_keras_warnings(test):
    for mark in KERAS_SAYS:
        test = mark(test)
    return test


def batches(n=6):
    for start in range(0, 16 * n, 16):
        yield X[start : start + 16], Y[start : start + 16]


class Sequence(keras.utils.PyDataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return X[16 * index : 16 * index + 16], Y[16 * index : 16 * index + 16]


def endless():
    while True:
        yield from batches()


@with_keras_warnings
def test_generator_of_unknown_length():
    tf = pytest.importorskip("tensorflow")
    data = tf.data.Dataset.from_generator(
        batches, output_signature=(tf.TensorSpec((None, 12), tf.float32), tf.TensorSpec((None,), tf.int64))
    )
    model, record = dense_model(), ZerosAfterEachStep()
    model.fit(data, epochs=4, verbose=0, callbacks=[ks.callbacks.Pruning(0.9, frequency=1), record])
    assert zeros(model) == [108, 27]
    first = [counts[0] for counts in record.counts]
    # Fractions count from the second epoch on, when the length of an epoch is known: 18 of 24 steps to the end.
    assert first[:6] == [0] * 6
    assert first[11] < 108 and first[17] == 108


@with_keras_warnings
def test_one_epoch_of_unknown_length_prunes_at_its_end_and_warns():
    tf = pytest.importorskip("tensorflow")
    data = tf.data.Dataset.from_generator(
        batches, output_signature=(tf.TensorSpec((None, 12), tf.float32), tf.TensorSpec((None,), tf.int64))
    )
    model = dense_model()
    with pytest.warns(UserWarning, match="ended before the schedule did"):
        model.fit(data, epochs=1, verbose=0, callbacks=[ks.callbacks.Pruning(0.9)])
    assert zeros(model) == [108, 27]


@with_keras_warnings
@pytest.mark.parametrize("kind", ["tf.data", "generator", "sequence"])
def test_input_pipelines(kind):
    arguments = {}
    if kind == "tf.data":
        tf = pytest.importorskip("tensorflow")
        data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)
    elif kind == "generator":
        data, arguments = endless(), {"steps_per_epoch": 6}
    else:
        data = Sequence()
    model, record = dense_model(), ZerosAfterEachStep()
    model.fit(data, epochs=3, verbose=0, callbacks=[ks.callbacks.Pruning(0.9, begin=2, end=12), record], **arguments)
    assert [counts[0] for counts in record.counts][11:] == [108] * 7


def test_initial_epoch_shortens_the_fit():
    model, record = dense_model(), ZerosAfterEachStep()
    fit(model, ks.callbacks.Pruning(0.9, schedule="linear", end=0.5, frequency=1), record, epochs=5, initial_epoch=3)
    assert [counts[0] == 108 for counts in record.counts] == [False] * 5 + [True] * 7


def test_accumulation_counts_optimizer_steps():
    model = dense_model(optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=3))
    record = ZerosAfterEachStep()
    fit(model, ks.callbacks.Pruning(0.9, begin=1, end=4, frequency=1), record)
    # 18 batches are 6 steps; the fourth ends with batch 12.
    assert [counts[0] == 108 for counts in record.counts] == [False] * 11 + [True] * 7


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.second = keras.layers.Dense(10, activation="relu", name="a"), keras.layers.Dense(3, name="b")

    def call(self, x):
        return self.second(self.first(x))


class OwnStep(Subclassed):
    def train_step(self, data):
        return super().train_step((data[0][:, :8], data[1]))


UNBUILT = {
    "pruning": lambda: [ks.callbacks.Pruning(0.9, schedule="linear", end=0.5)],
    "taylor": lambda: [ks.callbacks.Pruning(0.9, criterion="taylor")],
    "rigl": lambda: [ks.callbacks.DynamicSparseTraining(0.9, "uniform", frequency=3)],
    "lottery": lambda: [ks.callbacks.LotteryTicket(2, 0.9, allocation="uniform")],
    "proximal": lambda: [ks.callbacks.ProximalL1(target_sparsity=0.9)],
    "two": lambda: [
        ks.callbacks.Pruning(0.9, criterion="movement", filters="b/"),
        ks.callbacks.DynamicSparseTraining(0.9, filters="a/", frequency=3),
    ],
}


def deferred():
    return keras.Sequential([keras.layers.Dense(10, activation="relu", name="a"), keras.layers.Dense(3, name="b")])


@pytest.mark.parametrize("name", UNBUILT)
@pytest.mark.parametrize(
    "make", [deferred, pytest.param(Subclassed, marks=pytest.mark.slow), pytest.param(OwnStep, marks=pytest.mark.slow)]
)
@pytest.mark.thorough(2)
def test_a_model_that_fit_builds_trains_as_one_that_was_built(name, make):
    if make is OwnStep and not TENSORFLOW:
        pytest.skip("The training step has other arguments")
    weights = []
    for built in (True, False):
        keras.utils.set_random_seed(1)
        model = make()
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        if built:
            model(X[:1, :8] if make is OwnStep else X[:1])
        callbacks = UNBUILT[name]()
        fit(model, *callbacks, epochs=4)
        assert all(callback.reached for callback in callbacks)
        weights.append(model.get_weights())
        assert isinstance(model.optimizer, keras.optimizers.Adam)
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_what_fit_cannot_build_is_an_error_of_its_first_step():
    class Broken(Subclassed):
        def call(self, x):
            raise ArithmeticError("no such layer")

    model = Broken()
    model.compile("adam", "mse")
    with pytest.raises((ArithmeticError, RuntimeError), match="no such layer"):
        fit(model, ks.callbacks.Pruning(0.5))


def test_unbuilt_model():
    wrong = keras.Sequential([keras.layers.Dense(3)])
    wrong.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(ValueError, match="matches no weight"):
        fit(wrong, ks.callbacks.Pruning(0.9, filters="nothing"))
    assert isinstance(wrong.optimizer, keras.optimizers.Adam)


# Keras's callbacks beside ours


def test_learning_rate_callbacks():
    model = dense_model()
    rates = []
    history = fit(
        model,
        ks.callbacks.Pruning(0.9),
        keras.callbacks.LearningRateScheduler(lambda epoch, lr: 0.1 * (epoch + 1)),
        keras.callbacks.LambdaCallback(on_epoch_end=lambda e, logs: rates.append(float(model.optimizer.learning_rate))),
    )
    assert history.history["learning_rate"] == pytest.approx([0.1, 0.2, 0.3])
    assert rates == pytest.approx([0.1, 0.2, 0.3])
    plateau = dense_model()
    reduce = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=0, min_delta=100.0)
    fit(plateau, ks.callbacks.Pruning(0.9), reduce, epochs=4)
    assert float(plateau.optimizer.learning_rate) < 0.001


def test_csv_logger_and_tensorboard(tmp_path):
    model = dense_model()
    callbacks = [ks.callbacks.Pruning(0.5), keras.callbacks.CSVLogger(tmp_path / "log.csv")]
    if TENSORFLOW:
        callbacks.append(keras.callbacks.TensorBoard(tmp_path / "board"))
    fit(model, *callbacks)
    assert "sparsity" in (tmp_path / "log.csv").read_text().splitlines()[0]
    if TENSORFLOW:
        assert any((tmp_path / "board").rglob("events*"))


def test_progress_bar_shows_the_sparsity(capsys):
    fit(dense_model(), ks.callbacks.Pruning(0.5), verbose=2)
    assert "sparsity: 0.5000" in capsys.readouterr().out


@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_with_restored_weights_ends_at_the_mask(first):
    model = dense_model()
    stop = keras.callbacks.EarlyStopping("loss", mode="max", patience=1, restore_best_weights=True)
    pruning = ks.callbacks.Pruning(0.9, begin=0, end=9, frequency=1)
    with pytest.warns(UserWarning, match="pruned weights were not zero"):
        fit(model, *([stop, pruning] if first else [pruning, stop]), epochs=8)
    assert zeros(model) == [108, 27]
    assert isinstance(model.optimizer, keras.optimizers.Adam)


def test_a_fit_that_is_stopped_early_says_what_it_reached():
    model = dense_model()
    stop = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", True))
    with pytest.warns(UserWarning, match="stopped before the target sparsity.* are at [34]"):
        fit(model, ks.callbacks.Pruning(0.9), stop, epochs=8)
    assert 0 < zeros(model)[0] < 108


def test_a_schedule_that_ends_after_the_fit_is_not_cut_short_but_said():
    model = dense_model()
    with pytest.warns(
        UserWarning, match="ended at step 18 of a schedule that ends at step 100.* at 40.0%.*over='fits'"
    ):
        fit(model, ks.callbacks.Pruning(0.9, begin=0, end=100))
    assert zeros(model) == [48, 12]


def test_a_schedule_over_several_fits():
    whole, parts = dense_model(), dense_model()
    fit(whole, ks.callbacks.Pruning(0.9, begin=2, end=30, frequency=4), epochs=6)
    callback, seen = ks.callbacks.Pruning(0.9, begin=2, end=30, frequency=4, over="fits"), []
    for _ in range(6):
        seen += fit(parts, callback, epochs=1).history["sparsity"]
    assert seen == sorted(seen) and len(set(seen)) >= 5
    assert zeros(parts) == zeros(whole) == [108, 27]
    with pytest.raises(ValueError, match="counts steps.* give `begin` and `end` as ints"):
        ks.callbacks.Pruning(0.9, over="fits")
    with pytest.raises(ValueError, match="`over` must be 'fit' or 'fits'"):
        ks.callbacks.Pruning(0.9, over="loop")


@pytest.mark.slow
def test_statistics_and_steps_of_broken_off_fits_go_on_in_a_schedule_over_several_fits():
    whole, parts = dense_model(), dense_model()
    make = partial(ks.callbacks.Pruning, 0.9, "taylor", begin=2, end=20, frequency=4)
    fit(whole, make(), x=X[:16], y=Y[:16], epochs=24)
    callback = make(over="fits")
    for steps, broken in ((3, False), (3, False), (5, True), (13, False)):
        others = [interrupt_at(steps)] if broken else []
        with contextlib.suppress(KeyboardInterrupt):
            fit(parts, callback, *others, x=X[:16], y=Y[:16], epochs=9 if broken else steps)
    for a, b in zip(whole.get_weights(), parts.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_at_target_sparsity(tmp_path):
    model = dense_model()
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", "loss", mode="max", save_best_only=True)
    stop = keras.callbacks.EarlyStopping("loss", mode="max", patience=0)
    fit(
        model,
        ks.callbacks.AtTargetSparsity(checkpoint),
        ks.callbacks.Pruning(0.9, begin=0, end=15),
        ks.callbacks.AtTargetSparsity(stop),
        epochs=8,
    )
    best = keras.saving.load_model(tmp_path / "best.keras")
    assert zeros(best) == [108, 27]
    assert zeros(model) == [108, 27]


def test_at_target_sparsity_needs_a_pruning():
    with pytest.raises(ValueError, match="waits for a `ks.callbacks.Pruning`"):
        fit(dense_model(), ks.callbacks.AtTargetSparsity(keras.callbacks.EarlyStopping("loss")))
    with pytest.raises(TypeError, match="must be a Keras callback"):
        ks.callbacks.AtTargetSparsity("early_stopping")


def test_evaluate_and_predict_leave_the_model_as_it_was():
    model = dense_model()
    optimizer, weights = model.optimizer, model.get_weights()
    callback = ks.callbacks.Pruning(0.9)
    model.evaluate(X, Y, verbose=0, callbacks=[callback])
    model.predict(X, verbose=0, callbacks=[callback])
    assert model.optimizer is optimizer
    assert all((a == b).all() for a, b in zip(weights, model.get_weights(), strict=True))
    fit(model, callback, validation_data=(X, Y))
    assert zeros(model) == [108, 27]
    assert model.optimizer is optimizer


def interrupt_at(step):
    class Interrupt(keras.callbacks.Callback):
        seen = 0

        def on_train_batch_end(self, batch, logs=None):
            self.seen += 1
            if self.seen == step:
                raise KeyboardInterrupt

    return Interrupt()


@pytest.mark.parametrize("same", [True, False])
def test_interrupted_fit_started_again(same):
    model, callback = dense_model(), ks.callbacks.Pruning(0.9, schedule="linear", begin=0, end=12)
    record = ZerosAfterEachStep()
    with pytest.raises(KeyboardInterrupt):
        fit(model, callback, interrupt_at(8))
    assert type(model.optimizer) is type(keras.optimizers.Adam())
    assert "sparse_state" not in vars(model.optimizer)
    before = sum(zeros(model))
    again = callback if same else ks.callbacks.Pruning(0.9, schedule="linear", begin=0, end=12)
    fit(model, again, record)
    # The clock begins anew; the zeros that are there stay.
    assert [counts[0] == 108 for counts in record.counts] == [False] * 11 + [True] * 7
    assert before > 0
    assert record.revived == 0
    assert not isinstance(model.optimizer, ks.optimizers.SparseOptimizer)


# Saving


def test_saved_model_is_plain(tmp_path):
    model = dense_model()
    fit(model, ks.callbacks.Pruning(0.9))
    model.save(tmp_path / "model.keras")
    program = """
    import sys
    sys.modules["keras_sparse"] = None
    import keras, numpy as np
    model = keras.saving.load_model(sys.argv[1])
    print(type(model.optimizer).__name__, [int((layer.kernel.numpy() == 0).sum()) for layer in model.layers])
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "model.keras")], capture_output=True, text=True
    )
    assert run.stdout.strip() == "Adam [108, 27]", run.stderr


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_checkpoint_from_the_middle_of_fit_goes_on(tmp_path, policy):
    def run(*callbacks, model=None, **arguments):
        model = model or dense_model(optimizer=keras.optimizers.Adam(0.01))
        fit(model, ks.callbacks.Pruning(0.9, schedule="linear", frequency=1), *callbacks, epochs=4, **arguments)
        return model

    keras.config.set_dtype_policy(policy)
    try:
        whole = run(keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"))
        loaded = keras.saving.load_model(tmp_path / "2.keras")
        assert ks.optimizers.find(loaded) is None
        resumed = run(model=loaded, initial_epoch=2)
        resumed.save(tmp_path / "end.keras")
        config = keras.saving.load_model(tmp_path / "end.keras").get_compile_config()
    finally:
        keras.config.set_dtype_policy("float32")
    for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(a == 0, b == 0)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert "keras_sparse" not in json.dumps(config)


RESUME = """
import os, signal, sys
import keras, numpy as np
import keras_sparse as ks
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
    tf.config.experimental.enable_op_determinism()
keras.utils.set_random_seed(0)
folder, order, kill = sys.argv[1], sys.argv[2], int(sys.argv[3])
x = np.random.default_rng(0).normal(size=(96, 12)).astype("float32")
y = np.random.default_rng(1).integers(0, 3, 96)
model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(10, activation="relu"), keras.layers.Dense(3)])
model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))

class Kill(keras.callbacks.Callback):
    steps = 0
    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if self.steps == kill:
            os.kill(os.getpid(), signal.SIGKILL)

ours = [eval(sys.argv[4]), Kill()]
backup = [keras.callbacks.BackupAndRestore(os.path.join(folder, "backup"), save_freq="epoch")]
callbacks = backup + ours if order == "backup first" else ours + backup
model.fit(x, y, epochs=4, batch_size=16, shuffle=False, verbose=0, callbacks=callbacks)
np.savez(os.path.join(folder, "end.npz"), *model.get_weights())
"""


RESUMED = [
    "ks.callbacks.Pruning(0.9, frequency=2)",
    "ks.callbacks.DynamicSparseTraining(0.9, 'uniform', frequency=2)",
    "ks.callbacks.DynamicSparseTraining(0.9, 'uniform', grow='random', frequency=2)",
    "ks.callbacks.LotteryTicket(2, 0.9, rewind_to=3, allocation='uniform')",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("callback", "order"),
    list(zip(RESUMED, ["backup first", "backup last", "backup last", "backup first"], strict=True)),
)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, order, callback):
    def run(folder, kill):
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", RESUME, str(folder), order, str(kill), callback]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ).returncode

    assert run(tmp_path / "whole", 0) == 0
    assert run(tmp_path / "cut", 15) == -9
    assert run(tmp_path / "cut", 0) == 0
    whole, cut = np.load(tmp_path / "whole/end.npz"), np.load(tmp_path / "cut/end.npz")
    assert (whole["arr_0"] == 0).sum() >= 108
    for name in whole.files:
        np.testing.assert_array_equal(whole[name], cut[name])


@pytest.mark.parametrize("arguments", [{}, {"use_ema": True}, {"policy": "mixed_float16"}], ids=str)
@pytest.mark.thorough(1)
def test_mirrored_strategy(arguments, two_replicas):
    arguments, strategy = dict(arguments), two_replicas
    keras.config.set_dtype_policy(arguments.pop("policy", "float32"))
    try:
        with strategy.scope():
            model = dense_model(optimizer=keras.optimizers.Adam(0.01, **arguments), jit_compile=False)
    finally:
        keras.config.set_dtype_policy("float32")
    record = ZerosAfterEachStep()
    fit(model, ks.callbacks.Pruning(0.9), record)
    assert zeros(model) == [108, 27]
    assert record.revived == 0
    for layer in model.layers:
        replicas = strategy.experimental_local_results(layer.kernel.value)
        assert len(replicas) == 2
        np.testing.assert_array_equal(replicas[0].numpy(), replicas[1].numpy())


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "`target_sparsity` is missing"),
        ({"target_sparsity": 1.0}, ValueError, "at least 0 and below 1"),
        ({"target_sparsity": 90}, ValueError, r"Did you mean 0\.9"),
        ({"target_sparsity": -0.1}, ValueError, "at least 0 and below 1"),
        ({"target_sparsity": float("nan")}, ValueError, "at least 0 and below 1"),
        ({"target_sparsity": "0.9"}, TypeError, "Received: '0.9' of type str"),
        ({"target_sparsity": True}, TypeError, "of type bool"),
        ({"target_sparsity": {}}, ValueError, "at least one key"),
        ({"target_sparsity": {"a": 2.0}}, ValueError, "below 1"),
        ({"target_sparsity": {"a": (0.5,)}}, ValueError, "a pair"),
        ({"target_sparsity": {"a": 0.5}, "allocation": "global"}, ValueError, "says itself"),
        ({"target_sparsity": 0.5, "allocation": "globl"}, ValueError, "allocation"),
        ({"target_sparsity": 0.5, "criterion": "magnitud"}, ValueError, "Did you mean 'magnitude'"),
        ({"target_sparsity": 0.5, "pattern": "unstructurd"}, ValueError, "Did you mean 'unstructured'"),
        ({"target_sparsity": 0.5, "schedule": "polynomal"}, ValueError, "Did you mean 'polynomial'"),
        ({"target_sparsity": 0.5, "schedule": 3}, TypeError, "A schedule is a string"),
        ({"target_sparsity": 0.5, "schedule": ks.schedules.Linear}, TypeError, "Create an instance"),
        ({"target_sparsity": 0.5, "begin": 0.5, "end": 0.5}, ValueError, "`end` must be after `begin`"),
        ({"target_sparsity": 0.5, "begin": 5, "end": 3}, ValueError, "`end` must be after `begin`"),
        ({"target_sparsity": 0.5, "begin": -1}, ValueError, "negative"),
        ({"target_sparsity": 0.5, "end": 1.5}, ValueError, "fraction of the fit"),
        ({"target_sparsity": 0.5, "begin": "0"}, TypeError, "`begin` is a float"),
        ({"target_sparsity": 0.5, "frequency": 0}, ValueError, "`frequency` must be a whole number"),
        ({"target_sparsity": 0.5, "frequency": 1.5}, ValueError, "`frequency` must be a whole number"),
        ({"target_sparsity": 0.5, "filters": 3}, TypeError, "`filters` must be a regex.*Received: filters=3"),
        ({"target_sparsity": 0.5, "filters": ["a/", None]}, TypeError, "`filters` must be a regex"),
        ({"target_sparsity": 0.5, "verbose": "x"}, ValueError, "`verbose` must be 0, 1 or 2. Received: verbose='x'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ks.callbacks.Pruning(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"begin": 18, "end": 30}, "can never fire: it begins at step 18, and this fit has 18"),
        ({"begin": 12, "end": 0.5}, "in this fit of 18 steps they come to 12 and 9"),
        ({"filters": "nothing"}, "matches no weight"),
        ({"filters": ["a/", "nothing"]}, "'nothing' matches no weight"),
        ({"filters": "bias"}, "Biases and normalization weights are never pruned"),
        ({"filters": lambda variable: False}, "nothing to prune"),
        ({"target_sparsity": {"nothing": 0.5}}, "matches no weight"),
        ({"filters": "("}, "regular expression"),
        ({"criterion": "taylor", "schedule": "one_shot"}, "no training step has been taken"),
    ],
)
def test_errors_before_training_starts(arguments, message):
    model, record = dense_model(), ZerosAfterEachStep()
    before = model.get_weights()
    optimizer = model.optimizer
    with pytest.raises(ValueError, match=message):
        fit(model, ks.callbacks.Pruning(**({"target_sparsity": 0.5} | arguments)), record)
    assert record.counts == []
    assert all((a == b).all() for a, b in zip(before, model.get_weights(), strict=True))
    assert model.optimizer is optimizer
    assert "get_compile_config" not in vars(model)


def test_a_fit_that_fails_at_its_start_leaves_nothing_to_the_next():
    model = dense_model()
    optimizer = model.optimizer
    with pytest.raises(ValueError, match="matches no weight"):
        fit(model, ks.callbacks.Pruning(0.5), ks.callbacks.Pruning(0.5, filters="nothing"))
    assert model.optimizer is optimizer
    with pytest.raises(ValueError, match="can never fire"):
        fit(model, ks.callbacks.Pruning(0.5, filters="a/"), ks.callbacks.Pruning(0.5, begin=18, end=20, filters="b/"))
    assert model.optimizer is optimizer

    class Broken(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit(model, Broken(), ks.callbacks.Pruning(0.5))
    fit(model, ks.callbacks.Pruning(0.5))
    assert model.optimizer is optimizer
    assert zeros(model) == [60, 15]


def test_evaluating_with_a_callback_in_the_middle_of_fit_keeps_the_masks():
    model, record = dense_model(), ZerosAfterEachStep()
    evaluate = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: model.evaluate(X, Y, verbose=0, callbacks=[ks.callbacks.KeepSparsity()])
    )
    fit(model, ks.callbacks.Pruning(0.5, begin=0, end=5), evaluate, record)
    assert zeros(model) == [60, 15]
    assert record.revived == 0
    assert not isinstance(model.optimizer, ks.optimizers.SparseOptimizer)


def test_uncompiled_model():
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="call `model.compile"):
        ks.callbacks.Pruning(0.5).set_model(model)


class TwoOptimizers(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3)

    def call(self, x):
        return self.dense(x)

    def compile(self, first, second):
        super().compile(loss="mse")
        self.first, self.second = first, second


def test_model_with_several_optimizers():
    model = TwoOptimizers()
    model(X)
    model.compile(keras.optimizers.SGD(), keras.optimizers.Adam())
    with pytest.raises(ValueError, match=r"further optimizers: \['first', 'second'\]"):
        model.fit(X, X[:, :3], verbose=0, callbacks=[ks.callbacks.Pruning(0.5)])


def test_verbose_tells_each_update(capsys):
    fit(dense_model(), ks.callbacks.Pruning(0.5, begin=0, end=4, frequency=2, verbose=1), epochs=1)
    out = capsys.readouterr().out
    assert "Step 4: sparsity 0.5000" in out and "Step 2:" in out


def test_no_warning_in_an_ordinary_fit():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="__array__ implementation")  # Keras 3.15 with NumPy 2
        model = dense_model()
        fit(model, ks.callbacks.Pruning(0.5), validation_data=(X, Y))
    assert zeros(model) == [60, 15]
