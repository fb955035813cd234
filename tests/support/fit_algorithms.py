"""Models, and every algorithm that makes them sparse in a fit."""

from typing import NamedTuple

import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse.layers import L0, gated_layers

BACKEND = keras.backend.backend()
X = np.random.default_rng(0).normal(size=(48, 12)).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, 48)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
# Compiling takes longer than these fits.
QUICK = {"jit_compile": False} if BACKEND == "tensorflow" else {}
EAGER = {"run_eagerly": True} if BACKEND == "tensorflow" else {}
SIZES = 120, 30


def dense_model(optimizer=None, gated=False, **arguments):
    keras.utils.set_random_seed(1)
    parts = [keras.layers.Dense(10, activation="relu", name="a"), keras.layers.Dense(3, name="b")]
    if gated:
        parts = [L0(layer, 0.01, seed=1) for layer in parts]
    model = keras.Sequential([keras.Input((12,)), *parts])
    model.compile(optimizer or keras.optimizers.Adam(0.01), LOSS, **(arguments or QUICK))
    return model


def fit(model, *callbacks, epochs=4, **arguments):
    arguments = {"batch_size": 16, "verbose": 0, "shuffle": False} | arguments
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **arguments).history


def kernels(model):
    return [w.numpy() for w in ks.selection.weights(model) if w.kernel]


def zeros(model):
    return [int((kernel == 0).sum()) for kernel in kernels(model)]


def rounded(sparsity):
    return [round(sparsity * size) for size in SIZES]


class Masked(keras.callbacks.Callback):
    """Counts steps, and the weights that were not zero after a step although their mask says so."""

    def __init__(self, interrupt_at=None):
        super().__init__()
        self.steps, self.alive, self.interrupt_at = 0, 0, interrupt_at

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        for variable, mask in ks.optimizers.find(self.model).masks:
            value, mask = ks.selection.as_array(variable), ks.selection.as_array(mask)
            self.alive += np.count_nonzero(value[~mask])
        if self.steps == self.interrupt_at:
            raise KeyboardInterrupt


class Algorithm(NamedTuple):
    """A way to make a model sparse in a fit.

    Attributes:
        make: The callback for a sparsity.
        met: Whether a model is as sparse as that.
        rises: Whether the sparsity after the first epoch is below the target.
        prepare: What is done to a model before a fit, or `None`.
        gated: Whether the model has gates.
    """

    make: object
    met: object
    rises: bool = False
    prepare: object = None
    gated: bool = False


def each_kernel(model, sparsity):
    return zeros(model) == rounded(sparsity)


def at_full_price(model, sparsity):
    return [float(ks.selection.as_array(layer.penalty)) for layer in gated_layers(model)] == pytest.approx([0.01] * 2)


ALGORITHMS = {
    "pruning": Algorithm(lambda s: ks.callbacks.Pruning(s, schedule="linear", frequency=1), each_kernel, rises=True),
    "dynamic": Algorithm(lambda s: ks.callbacks.DynamicSparseTraining(s, "uniform", frequency=2, end=6), each_kernel),
    "lottery": Algorithm(lambda s: ks.callbacks.LotteryTicket(2, s, allocation="uniform"), each_kernel, rises=True),
    "proximal": Algorithm(
        lambda s: ks.callbacks.ProximalL1(target_sparsity=s, frequency=1),
        lambda model, s: sum(zeros(model)) == round(s * 150),
        rises=True,
    ),
    "gates": Algorithm(lambda s: ks.callbacks.L0Penalty("linear", frequency=1), at_full_price, gated=True),
    "keep": Algorithm(lambda s: ks.callbacks.KeepSparsity(), each_kernel, prepare=ks.prune),
}


def has_class(optimizer, kind):
    """Whether an optimizer is of the very class that `kind()` makes: on torch, Keras makes subclasses of its own."""
    return type(optimizer) is type(kind())


def is_plain(model, kind=keras.optimizers.Adam):
    return has_class(model.optimizer, kind) and "sparse_state" not in vars(model.optimizer)


def train(model, algorithm, sparsity, callback=None, kind=keras.optimizers.Adam, **arguments):
    """Fit, and check what every fit promises."""
    if algorithm.prepare is not None:
        algorithm.prepare(model, sparsity)
    optimizer, watch, prices = model.optimizer, Masked(), []

    class Prices(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            prices.extend(float(ks.selection.as_array(layer.penalty)) for layer in gated_layers(model))

    history = fit(model, callback or algorithm.make(sparsity), watch, Prices(), **arguments)
    assert algorithm.met(model, sparsity), (zeros(model), history["sparsity"])
    assert watch.steps and not watch.alive
    assert model.optimizer is optimizer and is_plain(model, kind)
    if algorithm.gated:
        assert prices[:2] == [0, 0]
    else:
        assert history["sparsity"][-1] == pytest.approx(sparsity, abs=0.01)
        assert (history["sparsity"][0] < sparsity - 0.01) == (algorithm.rises and len(history["sparsity"]) > 1)
    return history
