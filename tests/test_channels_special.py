"""Channels beside what the table of kinds does not say by itself: tied embeddings, scales of one's own, functions."""

import channel_graphs
import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_sparse as ks

RNG = np.random.default_rng(0)


@keras.saving.register_keras_serializable("channels_special")
class LayerScale(layers.Layer):
    """A factor for each channel that no table knows: x * gamma."""

    def build(self, shape):
        self.gamma = self.add_weight(shape=(shape[-1],), initializer="random_normal", name="gamma")

    def call(self, x):
        return x * self.gamma


def images():
    return keras.Input((6, 6, 3))


def block(x, middle):
    y = layers.Conv2D(8, 3, padding="same", activation="relu", name="a")(x)
    return layers.Conv2D(4, 1, name="b")(middle(y))


def unknown_scale():
    x = images()
    return keras.Model(x, block(x, LayerScale(name="scale"))), 0, "scale"


def known_scale():
    x = images()
    return keras.Model(x, block(x, channel_graphs.Scale())), 4, None


def convnext():
    x = images()
    stem = layers.Conv2D(6, 1, name="stem")(x)
    y = layers.Dense(8, "gelu", name="a")(layers.DepthwiseConv2D(3, padding="same")(stem))
    y = layers.Add()([stem, channel_graphs.Scale()(layers.Dense(6, name="project")(y))])
    return keras.Model(x, layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(y))), 4, None


def lambdas():
    x = images()
    twice = layers.Lambda(lambda z: 2 * z)
    return keras.Model(x, block(x, lambda y: layers.Lambda(ops.gelu)(twice(y)))), 4, None


def counting_lambda():
    """A function with numbers of channels in it."""
    x, function = images(), lambda y: ops.concatenate([y[..., 4:], ops.tanh(y[..., :4])], axis=-1)
    return keras.Model(x, block(x, layers.Lambda(function, name="swap"))), 0, "swap computes something else with fewer"


def mixing_lambda():
    x = images()
    return keras.Model(x, block(x, layers.Lambda(lambda y: ops.softmax(y, axis=-1), name="mix"))), 0, "mix"


def reversible():
    x = keras.Input((5,), dtype="int32")
    table = layers.ReversibleEmbedding(11, 6)
    y = layers.Dense(6)(layers.Dense(8, "relu", name="a")(table(x)))
    return keras.Model(x, table(y, reverse=True)), 4, None


def masked(*body):
    """Token numbers of which 0 is no token: Keras passes a mask to all layers that take one."""
    x = keras.Input((5,), dtype="int32")
    y = layers.Dense(8, "relu", name="a")(layers.Embedding(11, 6, mask_zero=True)(x))
    for layer in body:
        y = layer(y)
    return keras.Model(x, layers.Dense(3)(y)), 4, None


def masked_average():
    return masked(layers.GlobalAveragePooling1D())


def masked_recurrent():
    return masked(layers.Bidirectional(layers.LSTM(4, return_sequences=True)), layers.GRU(4))


def masked_steps():
    return masked(layers.TimeDistributed(layers.Dense(4)), layers.SimpleRNN(4))


def masked_attention():
    attend = layers.MultiHeadAttention(2, 4)
    return masked(lambda y: attend(y, y), layers.GlobalAveragePooling1D())


def masked_numbers():
    x = keras.Input((5, 6))
    y = layers.Dense(8, "relu", name="a")(layers.Masking()(x))
    return keras.Model(x, layers.Dense(3)(layers.GRU(4)(y))), 4, None


def scaled_along_another_axis():
    x = keras.Input((8, 6))
    y = layers.Permute((2, 1))(layers.Dense(8, name="a")(x))
    return keras.Model(x, layers.Dense(3)(layers.Flatten()(layers.RMSNormalization(axis=1)(y)))), 0, "last axis"


def scaled_along_two_axes():
    x = keras.Input((8, 6))
    y = layers.RMSNormalization(axis=(1, 2))(layers.Dense(8, name="a")(x))
    return keras.Model(x, layers.Dense(3)(layers.Flatten()(y))), 0, "several axes"


def zeros_beside():
    return keras.Model(x := images(), block(x, lambda y: layers.Concatenate()([y, ops.zeros_like(y)]))), 4, None


def ones_beside():
    return keras.Model(x := images(), block(x, lambda y: layers.Concatenate()([y, ops.ones_like(y)]))), 4, None


def nothing_times(y):
    return 0 * y


def zeros_of_a_function():
    function = layers.Lambda(nothing_times, name="function")
    model = keras.Model(x := images(), block(x, lambda y: layers.Concatenate()([y, function(y)])))
    return model, 0, "function computes something else"


def one_of_a_function():
    function = layers.Lambda(lambda y: 0 * y[..., :1])
    return keras.Model(x := images(), block(x, lambda y: layers.Concatenate()([y, function(y)]))), 4, None


KINDS = [unknown_scale, known_scale, convnext, lambdas, counting_lambda, mixing_lambda, reversible]
KINDS += [scaled_along_two_axes, masked_average, masked_recurrent, masked_steps, masked_attention, masked_numbers]
KINDS += [zeros_beside, ones_beside, zeros_of_a_function, one_of_a_function]
if keras.backend.backend() != "torch":  # where Keras 3.15 runs it, see `ks.graph.keeping`
    KINDS.append(scaled_along_another_axis)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_what_can_leave_leaves_and_the_rest_is_named(make):
    keras.utils.set_random_seed(0)
    model, left, reason = make()
    channel_graphs.randomise(model, RNG)
    if model.input.dtype == "int32":
        x = RNG.integers(0, 11, (4, 5))
        x[0, 2:] = 0
    else:
        x = RNG.normal(size=(4, *model.input.shape[1:])).astype("float32")
        x[0, 2:] = 0
    layer = model.get_layer("a")
    for v in layer.weights:
        v.assign(np.where(np.arange(8) % 2, ks.graph.as_array(v), 0))
    rows = ks.channel_groups(model).rows
    small = ks.shrink(model, verbose=0)
    assert channel_graphs.difference(model, small, x) < 1e-5
    width = getattr(small.get_layer("a"), "filters", None) or small.get_layer("a").units
    assert width == (4 if left else 8)
    if reason:
        assert any(reason in row["reason"] for row in rows if "a" in row["layers"]), rows


def even_only(x):
    return ops.tanh(x) if x.shape[-1] % 2 == 0 else 2 * ops.tanh(x)


@pytest.mark.parametrize("dead", [3, 4])
def test_a_function_is_asked_about_the_channels_that_leave(dead):
    keras.utils.set_random_seed(0)
    x = keras.Input((5,))
    y = layers.Lambda(even_only, name="function")(layers.Dense(8, name="a")(x))
    model = keras.Model(x, layers.Dense(3)(y))
    for v in model.get_layer("a").weights:
        v.assign(np.where(np.arange(8) < dead, 0, ks.graph.as_array(v)))
    small, report = ks.shrink(model, verbose=0, return_report=True)
    assert small.get_layer("a").units == (4 if dead == 4 else 8)
    row = next(row for row in report.rows if row["channels"] == 8)
    assert ("function computes something else" in row["reason"]) == (dead == 3)
    assert channel_graphs.difference(model, small, RNG.normal(size=(4, 5)).astype("float32")) < 1e-5


@pytest.mark.parametrize(("value", "constant", "left"), [(0.0, 0.0, 4), (0.0, 1.0, 8), (-1.0, 0.0, 8), (2.0, 2.0, 8)])
def test_masking_sees_channels_that_are_constant(value, constant, left):
    keras.utils.set_random_seed(0)
    x = keras.Input((5, 3))
    y = layers.Masking(value, name="masking")(layers.Dense(8, "relu", name="a")(x))
    model = keras.Model(x, layers.Dense(4)(y))
    channel_graphs.randomise(model, RNG)
    kernel, bias = model.get_layer("a").weights
    kernel.assign(np.where(np.arange(8) % 2, np.abs(kernel), 0))
    bias.assign(np.where(np.arange(8) % 2, -0.1, constant))  # a step of zeros makes zeros of the others
    small = ks.shrink(model, verbose=0)
    assert small.get_layer("a").units == left
    steps = RNG.normal(size=(4, 5, 3)).astype("float32") * (np.arange(5)[:, None] % 2)
    assert channel_graphs.difference(model, small, steps) < 1e-5


@keras.saving.register_keras_serializable("channels_special")
def magnitude(x):
    return ops.where(x > 0, x, -x)


@keras.saving.register_keras_serializable("channels_special")
def leaky(x):
    return ops.maximum(x, 0.1 * x)


def chosen_by_value(x):
    return ops.where(x > 0.5, x, layers.Dense(8)(x))


@pytest.mark.parametrize("function", [layers.Lambda(magnitude), layers.Lambda(leaky), chosen_by_value])
def test_functions_that_look_at_signs_are_not_taken_for_moves(function):
    keras.utils.set_random_seed(0)
    x = keras.Input((5, 4))
    y = function(layers.Dense(8, name="a")(x))
    model = keras.Model(x, layers.Dense(3)(y))
    channel_graphs.randomise(model, RNG)
    a = model.get_layer("a")
    a.kernel.assign(np.where(np.arange(8) % 2, ks.graph.as_array(a.kernel), 0))
    a.bias.assign(np.linspace(-2, 1, 8))  # constants, most of them negative
    small = ks.shrink(model, verbose=0)
    assert small.get_layer("a").units == (8 if function is chosen_by_value else 4)
    x = RNG.normal(size=(2, 5, 4)).astype("float32")
    assert channel_graphs.difference(model, small, x) < 1e-5


def test_layers_that_keep_their_channels_say_why():
    keras.utils.set_random_seed(0)
    x = keras.Input((6,))
    scaled = layers.Normalization(name="scaled")
    scaled.adapt(RNG.normal(1, 2, (9, 8)))
    whole = layers.Dense(8, name="whole")
    model = keras.Model(x, layers.Dense(3)(whole(scaled(layers.Dense(8)(x)))))
    whole.quantize("int8")
    reasons = " ".join(row["reason"] for row in ks.channel_groups(model).rows)
    assert "scaled (Normalization) shifts each channel by a mean of its own" in reasons
    assert "whole is quantized: remove channels first, then quantize" in reasons


STAYING = {
    "a normalization of steps": lambda x: layers.TimeDistributed(layers.LayerNormalization())(x),
    "a model of steps": lambda x: layers.TimeDistributed(keras.Sequential([keras.Input((8,)), layers.Dense(3)]))(x),
    "steps of steps": lambda x: layers.TimeDistributed(layers.TimeDistributed(layers.LayerNormalization()))(x),
    "states both ways": lambda x: layers.Bidirectional(layers.GRU(8))(x, initial_state=[x[:, 0], x[:, 1]]),
    "stacked cells": lambda x: layers.RNN([layers.GRUCell(4), layers.GRUCell(3)])(x),
    "stacked cells both ways": lambda x: layers.Bidirectional(layers.RNN([layers.GRUCell(4), layers.GRUCell(3)]))(x),
    "a wrapped layer": lambda x: layers.SpectralNormalization(layers.Dense(4))(x),
}


@pytest.mark.parametrize("name", STAYING)
def test_what_goes_into_a_layer_that_keeps_its_channels_stays(name):
    keras.utils.set_random_seed(0)
    shape = (3, 5, 4) if name == "steps of steps" else (5, 4)
    x = keras.Input(shape)
    y = STAYING[name](layers.Dense(8, "relu", name="a")(x))
    model = keras.Model(x, layers.Dense(3)(layers.Flatten()(y)))
    channel_graphs.randomise(model, RNG)
    for v in model.get_layer("a").weights:
        v.assign(np.where(np.arange(8) % 2, ks.graph.as_array(v), 0))
    rows = [row for row in ks.channel_groups(model).rows if "a" in row["layers"] and row["channels"] == 8]
    assert all(row["reason"] for row in rows)
    small = ks.shrink(model, verbose=0)
    assert small.get_layer("a").units == 8
    x = RNG.normal(size=(2, *shape)).astype("float32")
    assert channel_graphs.difference(model, small, x) < 1e-5


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="its CPU kernels want channels last")
@pytest.mark.parametrize("positions", [1, 2, 3])
@pytest.mark.parametrize("sequences", [False, True])
def test_units_of_films_with_channels_first_leave(positions, sequences):
    keras.utils.set_random_seed(0)
    shape = (2, 3, *range(5, 5 + positions))
    kind, conv = (getattr(layers, f"{name}{positions}D") for name in ("ConvLSTM", "Conv"))
    x, first = keras.Input(shape), {"data_format": "channels_first"}
    y = kind(5, 2, return_sequences=sequences, name="a", **first)(x)
    reader = conv(4, 2, name="b", **first)
    y = layers.TimeDistributed(reader)(y) if sequences else reader(y)
    model = keras.Model(x, layers.Dense(3)(layers.Flatten()(y)))
    channel_graphs.randomise(model, RNG)
    reader.kernel.assign(np.where(np.arange(5)[:, None] < 2, 0, ks.graph.as_array(reader.kernel)))
    cell = model.get_layer("a").cell
    cell.recurrent_kernel.assign(np.where(np.arange(5)[:, None] < 2, 0, ks.graph.as_array(cell.recurrent_kernel)))
    promised = ks.channel_groups(model).totals
    small = ks.shrink(model, verbose=0)
    assert small.get_layer("a").filters == 3
    assert ks.channel_groups(small).totals["macs"] == promised["macs_left"]
    x = RNG.normal(size=(2, *shape)).astype("float32")
    assert channel_graphs.difference(model, small, x) < 1e-5


def ways_apart(x):
    return layers.Concatenate()(layers.Bidirectional(layers.GRU(6, name="r"), merge_mode=None, name="a")(x))


def films_both_ways(x):
    first = {} if keras.backend.backend() == "tensorflow" else {"data_format": "channels_first"}
    y = layers.ConvLSTM2D(6, 2, name="r", **first)
    return layers.Flatten(**first)(layers.Bidirectional(y, name="a")(x))


@pytest.mark.parametrize(("ways", "shape"), [(ways_apart, (5, 4)), (films_both_ways, (2, 3, 4, 5))])
def test_units_of_both_ways_leave_both(ways, shape):
    keras.utils.set_random_seed(0)
    x = keras.Input(shape)
    model = keras.Model(x, layers.Dense(3)(ways(x)))
    channel_graphs.randomise(model, RNG)
    layer = model.get_layer("a")
    both = layer.forward_layer.cell, layer.backward_layer.cell
    for cell, dead in zip(both, ([0, 1, 2], [1, 2, 3]), strict=True):
        for v in cell.weights:  # columns of a cell whose gates are all zero: a unit of zeros
            units = np.arange(v.shape[-1]) % 6
            v.assign(np.where(np.isin(units, dead), 0, ks.graph.as_array(v)))
    small = ks.shrink(model, verbose=0)
    assert small.count_params() < model.count_params()
    for way in (small.get_layer("a").forward_layer, small.get_layer("a").backward_layer):
        assert way.cell.kernel.shape[-1] == both[0].kernel.shape[-1] // 6 * 4
    x = RNG.normal(size=(2, *shape)).astype("float32")
    assert channel_graphs.difference(model, small, x) < 1e-5


class Transposed(layers.Layer):
    """Multiplies by the kernel of another layer: what no config tells."""

    def __init__(self, other, **kwargs):
        super().__init__(**kwargs)
        self.other = other

    def call(self, x):
        return ops.matmul(x, ops.transpose(self.other.kernel))

    def get_config(self):
        return super().get_config() | {"other": keras.saving.serialize_keras_object(self.other)}


def test_layers_that_share_a_weight_are_refused_by_name():
    x = keras.Input((6,))
    encoder = layers.Dense(4, name="encoder")
    outputs = Transposed(encoder, name="decoder")(layers.Dense(4, name="middle")(encoder(x)))
    model = keras.Model(x, outputs)
    before = model.get_weights()
    assert any("encoder and decoder share the weight" in row["reason"] for row in ks.channel_groups(model).rows)
    with pytest.raises(ValueError, match="share weights: the new ones would not.*encoder and decoder share"):
        ks.shrink(model)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    with pytest.raises(ValueError, match="encoder/kernel: channels: encoder and decoder share the weight"):
        ks.prune(model, 0.5, pattern="channel", filters="encoder")


def test_states_of_a_fixed_batch_stay():
    keras.utils.set_random_seed(0)
    x = keras.Input((5, 3), batch_size=4)
    model = keras.Model(x, layers.Dense(2)(layers.GRU(4, stateful=True, name="memory")(layers.Dense(6)(x))))
    channel_graphs.randomise(model, RNG)
    state = model.get_layer("memory").states[0]
    state.assign(RNG.normal(size=(4, 4)))
    before = ks.graph.as_array(state)
    assert ks.channel_groups(model).totals["macs"] == 5 * (3 * 6 + 6 * 12 + 4 * 12) + 4 * 2
    ks.prune(model, ks.Budget(macs=0.5), pattern="channel")
    small = ks.shrink(model, verbose=0)
    assert np.array_equal(ks.graph.as_array(state), before)
    state.assign(np.zeros((4, 4)))
    assert channel_graphs.difference(model, small, RNG.normal(size=(4, 5, 3)).astype("float32")) < 1e-5


@pytest.mark.parametrize(
    "make",
    [
        lambda activation: layers.Dense(8, activation=activation, name="a"),
        lambda activation: layers.Conv1D(8, 3, activation=activation, name="a"),
        lambda activation: layers.SeparableConv1D(8, 3, activation=activation, name="a"),
        lambda activation: layers.DepthwiseConv1D(3, activation=activation, name="a"),
        lambda activation: layers.EinsumDense("btc,cd->btd", (None, 8), activation=activation, name="a"),
        lambda activation: layers.GRU(8, activation=activation, return_sequences=True, name="a"),
    ],
    ids=["dense", "conv", "separable", "depthwise", "einsum", "recurrent"],
)
@pytest.mark.parametrize("called", [False, True])
def test_an_activation_that_is_a_layer_with_weights(make, called):
    """Keras builds it when it is called on numbers for the first time: nobody else may, with a shape of theirs."""
    x = keras.Input((9, 5))
    activation = layers.PReLU(shared_axes=[1])
    before = layers.Conv1D(6, 2, activation="relu", name="before")(x)
    y = layers.Dense(6, "relu", name="after")(make(activation)(before))
    model, samples = keras.Model(x, layers.Dense(2)(y)), RNG.normal(size=(4, 9, 5)).astype("float32")
    if isinstance(model.get_layer("a"), layers.RNN) and keras.config.backend() == "jax":
        pytest.skip("Keras builds the activation within JAX's loop, and ends")
    if called:
        model(samples)
    ks.channel_groups(model)
    for weight in model.weights:
        weight.assign(RNG.normal(0.2, 0.5, weight.shape))
    ks.prune(model, 0.5, pattern="channel")
    small = ks.shrink(model, verbose=0)
    assert small.get_layer("after").units == 3
    expected = ops.convert_to_numpy(model(samples))
    np.testing.assert_allclose(ops.convert_to_numpy(small(samples)), expected, atol=1e-5)


def test_what_a_softmax_makes_of_a_constant_is_none():
    """A dead unit has a constant before the softmax, and none behind it: who reads only that has none, either."""
    x = keras.Input((5,))
    a, b = layers.Dense(4, "softmax", name="a"), layers.Dense(6, "relu", name="b")
    model = keras.Model(x, layers.Dense(2)(b(a(x))))
    for weight in model.weights:
        weight.assign(np.abs(RNG.normal(size=weight.shape)))
    a.kernel.assign(ops.convert_to_numpy(a.kernel) * [0, 1, 1, 1])
    b.kernel.assign(ops.convert_to_numpy(b.kernel) * np.array([[1] * 6] + [[0] + [1] * 5] * 3))
    samples = RNG.normal(size=(9, 5))
    expected = ops.convert_to_numpy(model(samples))
    np.testing.assert_allclose(ops.convert_to_numpy(ks.shrink(model, verbose=0)(samples)), expected, atol=1e-5)


@keras.saving.register_keras_serializable("channels_special")
def centred(values):
    return values - ops.mean(values, axis=-1, keepdims=True)


@pytest.mark.parametrize("layer", [layers.LSTM, layers.GRU, layers.SimpleRNN])
def test_recurrent_layers_whose_activation_looks_at_all_units_keep_them(layer):
    x = keras.Input((7, 5))
    model = keras.Model(x, layers.Dense(2)(layer(8, activation=centred, name="loop")(layers.Dense(6, name="a")(x))))
    reasons = [row["reason"] for row in ks.channel_groups(model).rows]
    assert "the activation of loop looks at all channels" in reasons
    kernel = ops.convert_to_numpy(model.get_layer("loop").cell.kernel)
    kernel[:, ::2] = 0
    model.get_layer("loop").cell.kernel.assign(kernel)
    samples = RNG.normal(size=(4, 7, 5)).astype("float32")
    expected = ops.convert_to_numpy(model(samples))
    np.testing.assert_allclose(ops.convert_to_numpy(ks.shrink(model, verbose=0)(samples)), expected, atol=1e-5)
