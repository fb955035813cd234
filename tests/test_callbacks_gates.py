"""The callback that logs L0 norms and moves the penalty: against its formula, and on handwritten digits."""

import csv

import keras
import numpy as np
import pytest
from keras import layers

import keras_sparse as ks
from keras_sparse.layers import L0, gated_layers

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(64, 6)).astype("float32"), RNG.normal(size=(64, 1)).astype("float32")


def make(price=0.01, **arguments):
    keras.utils.set_random_seed(0)
    gated = [L0(layers.Dense(8, "relu"), price, seed=1), L0(layers.Dense(1), 2 * price, "unit", seed=2)]
    model = keras.Sequential([keras.Input((6,)), *gated])
    optimizer = arguments.pop("optimizer", None) or keras.optimizers.Adam(0.05)
    model.compile(optimizer, "mse", **arguments)
    return model


def penalties(model):
    return [float(ks.selection.as_array(layer.penalty)) for layer in gated_layers(model)]


class Recorder(keras.callbacks.Callback):
    """The penalties after each batch, by the optimizer's step."""

    def __init__(self, break_at=None):
        super().__init__()
        self.seen, self.break_at = {}, break_at

    def on_train_batch_end(self, batch, logs=None):
        self.seen[int(ks.selection.as_array(self.model.optimizer.iterations))] = penalties(self.model)

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.break_at:
            raise KeyboardInterrupt


def test_logs(tmp_path, capsys):
    model = make()
    csv_logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    callbacks = [ks.callbacks.L0Penalty(), csv_logger]
    history = model.fit(X, Y, batch_size=16, epochs=3, verbose=2, callbacks=callbacks).history
    first, second = gated_layers(model)
    assert history["expected_l0"][-1] == pytest.approx(first.expected_l0() + second.expected_l0())
    closed = (first.gates()[0] == 0).sum() + (second.gates()[0] == 0).sum()
    assert history["sparsity"][-1] == pytest.approx(closed / 56)
    assert ks.report(ks.bake(model)).totals["zeros"] >= closed
    assert penalties(model) == pytest.approx([0.01, 0.02])
    assert "expected_l0: " in capsys.readouterr().out
    with open(tmp_path / "log.csv") as file:
        assert [float(row["expected_l0"]) for row in csv.DictReader(file)] == pytest.approx(history["expected_l0"])


@pytest.mark.parametrize("order", [1, -1])
def test_sparsity_has_one_meaning_beside_masks(order):
    gated = L0(layers.Dense(8, "relu"), 0.01, seed=1)
    model = keras.Sequential([keras.Input((6,)), gated, layers.Dense(4), layers.Dense(1)])
    gated.log_alphas[0].assign(3 * RNG.normal(size=(6, 8)))
    model.compile("sgd", "mse", run_eagerly=keras.backend.backend() != "jax")
    callbacks = [ks.callbacks.Pruning(0.5, schedule="one_shot", filters="dense_1"), ks.callbacks.L0Penalty()][::order]
    history = model.fit(X, Y, verbose=0, callbacks=callbacks).history
    closed = (gated.gates()[0] == 0).sum()
    assert 0 < closed < 48
    assert history["sparsity"][-1] == pytest.approx((closed + 16) / (48 + 32))


@pytest.mark.parametrize("accumulate", [None, 2])
@pytest.mark.lengthy(1)
def test_penalty_follows_the_schedule(accumulate):
    model = make(optimizer=keras.optimizers.Adam(0.01, gradient_accumulation_steps=accumulate))
    callback = ks.callbacks.L0Penalty("cosine", begin=4, end=0.75, frequency=1)
    for start in (0, 16):  # A second fit starts anew.
        recorder = Recorder()
        epochs = 4 * (accumulate or 1)
        model.fit(X, Y, batch_size=16, epochs=epochs, verbose=0, callbacks=[callback, recorder])
        for step, values in recorder.seen.items():
            if step > start:
                progress = min(max((step - start - 4) / 8, 0), 1)
                expected = (1 - np.cos(np.pi * progress)) / 2
                assert values == pytest.approx([0.01 * expected, 0.02 * expected], abs=1e-8)


def test_frequency_and_steps_per_execution():
    if BACKEND == "torch":
        pytest.skip("Keras has no steps_per_execution there")
    model = make(steps_per_execution=2)
    recorder = Recorder()
    callback = ks.callbacks.L0Penalty("linear", end=12, frequency=4)
    model.fit(X, Y, batch_size=16, epochs=4, verbose=0, callbacks=[callback, recorder])
    assert [recorder.seen[step][0] for step in (2, 4, 6, 8, 12, 16)] == pytest.approx(
        [0, 0.01 / 3, 0.01 / 3, 0.02 / 3, 0.01, 0.01]
    )


@pytest.mark.parametrize("arguments", [{"schedule": "linear"}, {"target_sparsity": 0.5}], ids=str)
@pytest.mark.parametrize("accumulate", [None, 2])
@pytest.mark.thorough(1)
@pytest.mark.lengthy(0)
def test_resumed_is_uninterrupted(tmp_path, arguments, accumulate):
    def fit(folder, break_at=None):
        model = make(optimizer=keras.optimizers.Adam(0.3, gradient_accumulation_steps=accumulate))
        recorder = Recorder(break_at)
        callbacks = [
            keras.callbacks.BackupAndRestore(tmp_path / folder),
            ks.callbacks.L0Penalty(**arguments, end=0.8, frequency=1),
            recorder,
        ]
        model.fit(X, Y, batch_size=8, epochs=6, shuffle=False, verbose=0, callbacks=callbacks)
        return recorder.seen, model.get_weights()

    whole, weights = fit("whole")
    assert len({first for first, _ in whole.values()}) > 12
    with pytest.raises(KeyboardInterrupt):
        fit("broken", break_at=3)
    resumed, ended = fit("broken")
    assert min(resumed) >= 24 // (accumulate or 1)
    assert resumed == {step: values for step, values in whole.items() if step in resumed}
    for expected, found in zip(weights, ended, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_dataset_of_unknown_length():
    def batches():
        for _ in range(4):
            for i in range(4):
                yield X[16 * i : 16 * i + 16], Y[16 * i : 16 * i + 16]

    model = make()
    recorder = Recorder()
    callbacks = [ks.callbacks.L0Penalty("linear"), recorder]
    model.fit(batches(), steps_per_epoch=4, epochs=4, verbose=0, shuffle=False, callbacks=callbacks)
    assert [recorder.seen[step][0] for step in (4, 8, 16)] == pytest.approx([0.005, 0.01, 0.01])


def on_digits(epochs, *gates):
    """Train two layers with these arguments of `L0` to 0.7; return the sparsity, the baked model and its accuracy."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    keras.utils.set_random_seed(0)
    kinds = [layers.Dense(32, "relu"), layers.Dense(10)]
    gated = [L0(layer, **arguments) for layer, arguments in zip(kinds, gates, strict=True)]
    model = keras.Sequential([keras.Input((64,)), *gated])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    callback = ks.callbacks.L0Penalty(target_sparsity=0.7)
    history = model.fit(x, y, batch_size=32, epochs=epochs, verbose=0, callbacks=[callback]).history
    baked = ks.bake(model)
    return history["sparsity"][-1], baked, baked.evaluate(x, y, verbose=0)[1]


@pytest.mark.parametrize("granularity, price", [("weight", 1e-4), ("weight", 1e-2), ("unit", 1e-4)])
@pytest.mark.thorough(1)
@pytest.mark.lengthy(0)
def test_target_is_met_on_digits(granularity, price):
    gates = {"penalty": price, "granularity": granularity}
    sparsity, baked, accuracy = on_digits(20, gates, gates)
    assert sparsity == pytest.approx(0.7, abs=0.05)
    assert accuracy > (0.9 if granularity == "weight" else 0.75)
    assert ks.report(baked).totals["sparsity"] >= sparsity - 1e-9


@pytest.mark.parametrize("price, least", [(1e-2, 0.6), (1e-4, 0.85)])
@pytest.mark.thorough(1)
@pytest.mark.lengthy(0)
def test_a_short_fit_does_not_overshoot(price, least):
    sparsity, _, accuracy = on_digits(7, {"penalty": price, "seed": 1}, {"penalty": price, "seed": 2})  # 399 steps
    assert sparsity == pytest.approx(0.7, abs=0.05)  # without waiting 0.9 and more, of the first price
    assert accuracy > least


@pytest.mark.parametrize("assigned, expected", [(0.0, 0.01e-4), (1e6, 0.01e4), (0.05, 0.05)])
def test_penalties_that_others_have_assigned(assigned, expected):
    """A schedule that was broken off leaves 0: the controller goes on with the nearest price that it knows."""
    model = make(run_eagerly=BACKEND != "jax")
    for layer in gated_layers(model):
        layer.penalty.assign(assigned)
    callback = ks.callbacks.L0Penalty(target_sparsity=0.9, end=1000)
    model.fit(X, Y, verbose=0, batch_size=64, callbacks=[callback])
    first, second = penalties(model)
    assert expected / 2 - 1e-9 <= first <= 2 * expected + 1e-9
    assert second == pytest.approx(2 * first)


def test_training_that_diverges_ends_as_keras_ends_it():
    model = make(run_eagerly=BACKEND != "jax")
    callbacks = [ks.callbacks.L0Penalty(target_sparsity=0.5, frequency=1), keras.callbacks.TerminateOnNaN()]
    history = model.fit(X * np.float32("nan"), Y, verbose=0, batch_size=16, callbacks=callbacks).history
    assert np.isnan(history["loss"]).all()
    assert np.isfinite(penalties(model)).all()


def test_one_controller_in_a_fit():
    model = make()
    callbacks = [ks.callbacks.L0Penalty(target_sparsity=0.5), ks.callbacks.L0Penalty("linear")]
    with pytest.raises(ValueError, match="One `fit` takes one `L0Penalty`. Received: two"):
        model.fit(X, Y, verbose=0, callbacks=callbacks)
    assert ks.optimizers.find(model) is None
    assert penalties(model) == pytest.approx([0.01, 0.02])


def test_bad_arguments():
    with pytest.raises(ValueError, match="Give `schedule` or `target_sparsity`, not both"):
        ks.callbacks.L0Penalty("linear", 0.5)
    for value in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match=r"`target_sparsity` must be in \(0, 1\). Received"):
            ks.callbacks.L0Penalty(target_sparsity=value)
    with pytest.raises(TypeError, match="`target_sparsity` must be a number"):
        ks.callbacks.L0Penalty(target_sparsity="most")
    with pytest.raises(ValueError, match="`end` must be after `begin`"):
        ks.callbacks.L0Penalty("linear", begin=0.5, end=0.5)
    with pytest.raises(ValueError, match="Unknown schedule"):
        ks.callbacks.L0Penalty("steep")
    with pytest.raises(ValueError, match="multiplies the penalties"):
        make(price=0.0).fit(X, Y, verbose=0, callbacks=[ks.callbacks.L0Penalty(target_sparsity=0.5)])
    plain = keras.Sequential([keras.Input((6,)), layers.Dense(1)])
    plain.compile("sgd", "mse")
    with pytest.raises(ValueError, match="`L0Penalty` needs a model with `ks.layers.L0`; `ks.add_l0"):
        plain.fit(X, Y, verbose=0, callbacks=[ks.callbacks.L0Penalty()])


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute")
@pytest.mark.lengthy(0)
def test_in_a_distribution_strategy(two_replicas):
    with two_replicas.scope():
        model = make()
    recorder = Recorder()
    callback = ks.callbacks.L0Penalty("linear", end=8, frequency=1)
    history = model.fit(X, Y, batch_size=16, epochs=3, verbose=0, callbacks=[callback, recorder]).history
    assert [recorder.seen[step][0] for step in (4, 8, 12)] == pytest.approx([0.005, 0.01, 0.01])
    assert 0 < history["expected_l0"][-1] < 56
