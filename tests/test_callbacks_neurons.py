"""The callback that logs neuron sparsity."""

import csv

import keras
import numpy as np
import pytest
from keras import layers

import keras_sparse as ks

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(64, 6)).astype("float32"), RNG.normal(size=(64, 1)).astype("float32")
NAMES = ["neuron_sparsity", "dead_neurons"]


def make(**arguments):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(12, "relu"), layers.BatchNormalization(), layers.Dense(1)]
    )
    model.layers[0].bias.assign([-100.0] + [0.0] * 11)
    model.compile(keras.optimizers.Adam(0.05), "mse", **arguments)
    return model


class Oracle(keras.callbacks.Callback):
    """A forward pass in NumPy after each epoch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        kernel, bias = self.model.layers[0].get_weights()
        active = X @ kernel + bias > 0
        self.seen.append([1 - active.mean(), (~active.any(axis=0)).mean()])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"accumulate": True},
        pytest.param({"jit_compile": True}, marks=pytest.mark.slow),
        pytest.param({"run_eagerly": True}, marks=pytest.mark.slow),
        pytest.param({"steps_per_execution": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda arguments: next(iter(arguments), "plain"),
)
@pytest.mark.thorough(1)
@pytest.mark.lengthy(0)
def test_logs_are_those_of_the_epoch_and_training_is_the_same(arguments, tmp_path):
    if BACKEND == "torch" and ("jit_compile" in arguments or "steps_per_execution" in arguments):
        pytest.skip("Keras compiles torch models for minutes, and has no steps_per_execution there")
    arguments = dict(arguments)
    accumulate = arguments.pop("accumulate", False)

    def fit(*callbacks):
        model = make(**arguments)
        if accumulate:
            model.compile(keras.optimizers.Adam(0.05, gradient_accumulation_steps=2, use_ema=True), "mse")
        history = model.fit(
            X, Y, batch_size=16, epochs=3, verbose=0, callbacks=list(callbacks), validation_data=(X, Y)
        ).history
        return model, history

    oracle = Oracle()
    callback = ks.callbacks.NeuronSparsity(X, batch_size=48)
    model, history = fit(callback, oracle, keras.callbacks.CSVLogger(tmp_path / "log.csv"))
    np.testing.assert_allclose(np.transpose([history[name] for name in NAMES]), oracle.seen, atol=1e-6)
    assert history["dead_neurons"][0] >= 1 / 12
    assert callback.report.totals["samples"] == 64
    with open(tmp_path / "log.csv") as file:
        assert [float(row["neuron_sparsity"]) for row in csv.DictReader(file)] == pytest.approx(
            history["neuron_sparsity"]
        )
    plain, _ = fit()
    for ours, other in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, other)


def test_with_pruning_and_in_a_second_fit(capsys):
    model = make()
    callbacks = [ks.callbacks.NeuronSparsity(X), ks.callbacks.Pruning(0.9, end=0.5)]
    model.fit(X, Y, epochs=2, verbose=2, callbacks=callbacks)
    assert "neuron_sparsity: 0." in capsys.readouterr().out
    history = model.fit(X, Y, epochs=2, verbose=0, callbacks=callbacks).history
    assert len(history["neuron_sparsity"]) == len(history["sparsity"]) == 2


def test_held_back_until_the_target_sparsity():
    waiting = ks.callbacks.AtTargetSparsity(ks.callbacks.NeuronSparsity(X))
    pruning = ks.callbacks.Pruning(0.5, schedule="one_shot", begin=0.4, end=0.5)
    make().fit(X, Y, epochs=4, verbose=0, callbacks=[pruning, waiting])
    assert waiting.callback.report.totals["samples"] == 64


def test_model_that_fit_builds():
    model = keras.Sequential([layers.Dense(5, "relu"), layers.Dense(1)])
    model.compile("sgd", "mse")
    history = model.fit(X, Y, verbose=0, callbacks=[ks.callbacks.NeuronSparsity(X)]).history
    assert 0 < history["neuron_sparsity"][0] < 1


def test_model_without_hidden_activations_logs_nothing():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(1)])
    model.compile("sgd", "mse")
    callback = ks.callbacks.NeuronSparsity(X)
    assert set(model.fit(X, Y, verbose=0, callbacks=[callback]).history) == {"loss"}
    assert len(callback.report.rows) == 1


def test_bad_arguments():
    with pytest.raises(TypeError, match="an iterator is used up after the first.*type generator"):
        ks.callbacks.NeuronSparsity(x for x in [X])
    with pytest.raises(ValueError, match="same number of samples"):
        ks.callbacks.NeuronSparsity((X, Y[:3]))
    with pytest.raises(ValueError, match="`batch_size` must be a whole number"):
        ks.callbacks.NeuronSparsity(X, batch_size=0)
    model = make()
    with pytest.raises(ValueError, match=r"inputs of shape \(None, 6\).*\(32, 5\)"):
        model.fit(X, Y, verbose=0, callbacks=[ks.callbacks.NeuronSparsity(X[:, :5])])
    model.fit(X, Y, verbose=0)
    assert np.isfinite(model.get_weights()[0]).all()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute")
@pytest.mark.lengthy(0)
def test_in_a_distribution_strategy(two_replicas):
    with two_replicas.scope():
        model = make(jit_compile=False)
        oracle = Oracle()
        history = model.fit(X, Y, epochs=2, verbose=0, callbacks=[ks.callbacks.NeuronSparsity(X), oracle]).history
    np.testing.assert_allclose(np.transpose([history[name] for name in NAMES]), oracle.seen, atol=1e-6)
    history = model.fit(X, Y, epochs=1, verbose=0, callbacks=[ks.callbacks.NeuronSparsity(X)]).history
    assert 0 < history["neuron_sparsity"][0] < 1
