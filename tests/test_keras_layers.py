"""Layers around other layers, cells and constraints: exact zeros, reports, channels that leave or why they stay."""

import keras
import numpy as np
import pytest
from keras import constraints, layers

import keras_sparse as ks

RNG = np.random.default_rng(0)


@keras.saving.register_keras_serializable("keras_layers")
class Cell(layers.Layer):
    """A recurrent cell of one's own."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = self.state_size = units

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], self.units), name="kernel")
        self.recurrent_kernel = self.add_weight(shape=(self.units, self.units), name="recurrent_kernel")
        self.bias = self.add_weight(shape=(self.units,), name="bias")

    def call(self, x, states):
        x = keras.ops.matmul(x, self.kernel) + keras.ops.matmul(states[0], self.recurrent_kernel)
        state = keras.ops.tanh(x + self.bias)
        return state, [state]

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable("keras_layers")
class Twice(layers.Wrapper):
    """A wrapper of one's own."""

    def call(self, x):
        return self.layer(x) * 2

    def compute_output_shape(self, shape):
        return self.layer.compute_output_shape(shape)


def lora():
    layer = layers.Dense(8)
    layer.build((None, 6, 8))
    layer.enable_lora(2)
    return layer


# The layer, its kernels, and why its channels stay, if they do.
CASES = {
    "custom cell": (lambda: layers.RNN(Cell(8)), 2, "has a cell of the class Cell"),
    "stacked cells": (
        lambda: layers.RNN([layers.LSTMCell(8), layers.GRUCell(6), Cell(5)]),
        6,
        "has a cell of the class StackedRNN",
    ),
    "wrapper in TimeDistributed": (lambda: layers.TimeDistributed(Twice(layers.Dense(8))), 1, "repeats twice"),
    "SpectralNormalization": (lambda: layers.SpectralNormalization(layers.Dense(8)), 1, "spectral_normalization"),
    "wrapper": (lambda: Twice(layers.Dense(8)), 1, None),
    "Keras's cell": (lambda: layers.RNN(layers.GRUCell(8)), 2, None),
    "TimeDistributed": (lambda: layers.TimeDistributed(layers.Dense(8)), 1, None),
    "Bidirectional custom cell": (lambda: layers.Bidirectional(layers.RNN(Cell(8))), 4, "runs layers that are not kno"),
    "SpectralNormalization of Conv1D": (lambda: layers.SpectralNormalization(layers.Conv1D(8, 3)), 1, "spectral_norma"),
    "LoRA": (lora, 0, "has LoRA: merge it first"),
    "MaxNorm": (lambda: layers.Dense(8, kernel_constraint=constraints.MaxNorm(0.8)), 1, None),
    "NonNeg": (lambda: layers.Dense(8, kernel_constraint=constraints.NonNeg()), 1, None),
    "UnitNorm": (lambda: layers.Dense(8, kernel_constraint=constraints.UnitNorm()), 1, None),
    "MinMaxNorm": (lambda: layers.Dense(8, kernel_constraint=constraints.MinMaxNorm(0.5, 0.9)), 1, None),
}


def network(layer):
    model = keras.Sequential([keras.Input((6, 8)), layer, layers.Flatten(), layers.Dense(3, name="head")])
    for weight in model.weights:
        if weight.path.endswith("bias"):
            weight.assign(0.3 * RNG.normal(size=weight.shape))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def data(count=32):
    return RNG.normal(size=(count, 6, 8)).astype("float32"), RNG.normal(size=(count, 3)).astype("float32")


class Zeros(keras.callbacks.Callback):
    """The zeros of each kernel after each step: none may come back to life."""

    def on_train_batch_end(self, batch, logs=None):
        now = [ks.selection.as_array(w.variable) == 0 for w in ks.selection.select(self.model).chosen]
        for before, after in zip(getattr(self, "found", now), now, strict=True):
            assert not (before & ~after).any()
        self.found = now


@pytest.mark.parametrize("name", CASES)
@pytest.mark.lengthy(4)
def test_pruning_keeps_exact_zeros_and_channels_leave_or_it_is_said_why(name):
    make, count, reason = CASES[name]
    model = network(make())
    x, y = data()
    watch = [] if name == "NonNeg" else [Zeros()]  # a constraint makes zeros of its own, which may grow again
    history = model.fit(x, y, 8, 4, verbose=0, callbacks=[ks.callbacks.Pruning(0.5, end=0.5), *watch])
    chosen = ks.selection.select(model).chosen
    assert len(chosen) == count + 1
    for weight in chosen:
        assert (weight.numpy() == 0).sum() >= round(weight.size / 2)
        assert name == "NonNeg" or (weight.numpy() == 0).sum() == round(weight.size / 2)
    zeros = sum((weight.numpy() == 0).sum() for weight in chosen)
    assert zeros / sum(weight.size for weight in chosen) == pytest.approx(history.history["sparsity"][-1])
    rows = [(row["path"], row["zeros"]) for row in ks.report(model).rows]
    assert all((weight.path, (weight.numpy() == 0).sum()) in rows for weight in chosen)
    if name == "LoRA":
        kernel = next(w for w in ks.selection.select(model) if w.kernel and not w.trainable)
        assert "frozen by LoRA" in kernel.skipped
    constraint = getattr(model.layers[0], "kernel_constraint", None)
    if constraint is not None:  # holds of what is left, but for steps that momentum takes before the mask
        kernel = model.layers[0].kernel
        np.testing.assert_allclose(ks.selection.as_array(constraint(kernel)), ks.selection.as_array(kernel), rtol=1e-3)
    before = model.predict(x, verbose=0)  # inference changes no zero
    ks.prune(model, 0.75)
    assert ks.report(model).totals["sparsity"] > 0.7 - 0.35 * (name == "LoRA")
    check_shrink(network(make()), x, reason)
    assert np.isfinite(before).all()


def check_shrink(model, x, reason):
    ks.prune(model, 0.5, pattern="channel", filters="kernel")  # what it returns, too
    small = ks.shrink(model, verbose=0)
    np.testing.assert_allclose(small.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5)
    assert (small.count_params() < model.count_params()) == (reason is None)
    reasons = " ".join(str(row["reason"]) for row in ks.channel_groups(model).rows)
    assert reason is None or reason in reasons


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch modules are layers there")
def test_weights_of_a_torch_module_are_chosen_by_a_filter():
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.ReLU(), torch.nn.Linear(12, 8), torch.nn.LayerNorm(8))
    wrapper = layers.TorchModuleWrapper(module, output_shape=(None, 6, 8))
    model = network(wrapper)
    x, y = data()
    model(x)
    assert [w.path for w in ks.selection.select(model).chosen] == ["sequential/head/kernel"]
    rows = [row for row in ks.report(model).rows if row["reason"] and "Keras does not see" in row["reason"]]
    assert [row["shape"] for row in rows] == [[12, 8], [8, 12]]
    pruning = ks.callbacks.Pruning(0.75, pattern="block_1x4", filters=[wrapper, "head"])
    model.fit(x, y, 8, 2, verbose=0, callbacks=[pruning])
    for layer in (module[0], module[2]):
        value = layer.weight.detach().numpy()
        blocks = value.reshape(len(value), -1, 4)  # a block is one output, the first axis in torch, by four inputs
        assert (blocks == 0).all(axis=2).mean() == (value == 0).mean() == 0.75
    with pytest.raises(ValueError, match="no row in the table of kinds says how they lie"):
        ks.prune(model, 0.5, pattern="channel", filters=wrapper)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a SavedModel is a layer there")
def test_weights_of_a_saved_model_are_chosen_by_a_filter(tmp_path):
    inner = keras.Sequential([keras.Input((6, 8)), layers.Dense(8, name="inner")])
    inner.export(tmp_path / "saved", verbose=False)
    layer = layers.TFSMLayer(str(tmp_path / "saved"), call_endpoint="serve")
    model = network(layer)
    x, y = data()
    assert [w.path for w in ks.selection.select(model).chosen] == ["sequential_1/head/kernel"]
    model.fit(x, y, 8, 2, verbose=0, callbacks=[ks.callbacks.Pruning(0.75, filters="inner_kernel")])
    kernel, bias = (ks.selection.as_array(weight) for weight in layer.weights)
    assert (kernel == 0).mean() == 0.75
    np.testing.assert_allclose(ks.selection.as_array(layer(x)), x @ kernel + bias, atol=1e-5)
