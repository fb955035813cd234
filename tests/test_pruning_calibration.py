"""Calibrations run a model as Keras does in inference: with masks, states and inputs as they are there."""

import keras
import numpy as np
import pytest
from calibrated_models import RNG, SEQUENCES, X, damped, randomized, solved

import keras_sparse as ks

L = keras.layers


@pytest.mark.parametrize("kind", ["sequential", "functional"])
def test_masks_of_steps_reach_layers_behind_others(kind):
    front = [L.Embedding(20, 6, mask_zero=True), L.Dropout(0.1), L.GRU(5)]
    inputs, head = keras.Input((7,), dtype="int32"), L.Dense(4, name="head")
    if kind == "sequential":
        model = keras.Sequential([inputs, *front, head])
    else:
        model = keras.Model(inputs, head(front[2](front[1](front[0](inputs)))))
    weight = randomized(model).get_layer("head").get_weights()[0]
    tokens = np.where(np.arange(7) < RNG.integers(1, 8, 40)[:, None], RNG.integers(1, 20, (40, 7)), 0)
    ks.prune(model, 0.5, data=tokens, repair=True, batch_size=16)
    states = ks.graph.as_array(front[2](front[0](tokens)))  # of the pruned GRU, as Keras computes them
    found = model.get_layer("head").get_weights()[0]
    np.testing.assert_allclose(found, solved(weight, found != 0, damped(states)), atol=2e-4)


def test_inputs_have_the_rank_that_keras_gives_them():
    x, number, base = keras.Input((8,)), keras.Input(()), keras.Sequential([keras.Input((8,)), L.Dense(3, name="a")])
    scaled = L.Multiply()([base(inputs=x), L.Reshape((1,))(number)])
    model = randomized(keras.Model([x, number], L.Dense(2, name="b")(scaled)))
    other, factors = keras.models.clone_model(model), RNG.normal(size=(50, 1))
    other.set_weights(model.get_weights())
    ks.prune(model, 0.5, "obs", data=[X, factors[:, 0]])
    ks.prune(other, 0.5, "obs", data=[X, factors])
    for value, same in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(value, same)


@pytest.mark.parametrize("kind", ["sequential", "functional"])
def test_layers_run_as_in_inference(kind):
    class Augmented(L.Layer):
        def call(self, x, training=True):  # by default, as Keras's own random layers
            return -3 * x if training else x

    base = keras.Sequential([keras.Input((8,)), L.Dense(6, "tanh"), L.Dropout(0.5)], name="base")
    inputs, head = keras.Input((8,)), L.Dense(4, name="head")
    if kind == "sequential":
        model = keras.Sequential([inputs, Augmented(), base, head])
    else:
        model = keras.Model(inputs, head(base(Augmented()(inputs), training=False)))
    kernel, bias, weight, _ = randomized(model).get_weights()
    ks.prune(model, 0.5, data=X, repair=True, filters="head", batch_size=16)
    found = head.get_weights()[0]
    np.testing.assert_allclose(found, solved(weight, found != 0, damped(np.tanh(X @ kernel + bias))), atol=2e-4)


def test_states_that_are_passed_by_place_are_those_that_steps_begin_with():
    found, data = [], [SEQUENCES[:, :2], 3 * RNG.normal(size=(24, 4))]
    for by_name in (True, False):
        x, state, layer = keras.Input((2, 8)), keras.Input((4,)), L.SimpleRNN(4)
        model = randomized(keras.Model([x, state], layer(x, initial_state=state) if by_name else layer(x, state)))
        ks.prune(model, 0.5, "obs", data=data)
        found.append(layer.get_weights()[1])
    np.testing.assert_array_equal(*found)


def test_states_that_a_layer_keeps_are_gone_on_with_and_put_back():
    inputs, layer = keras.Input((3, 8), batch_size=8), L.SimpleRNN(4, stateful=True)
    model = randomized(keras.Model(inputs, L.BatchNormalization()(layer(inputs))))
    start, x = RNG.normal(size=(8, 4)), SEQUENCES[:, :3]
    layer.states[0].assign(start)
    kernel, recurrent, bias = layer.get_weights()
    met = [start]
    for step in x.reshape(3, 8, 3, 8).transpose(0, 2, 1, 3).reshape(9, 8, 8):  # a batch begins where one ended
        met.append(np.tanh(step @ kernel + met[-1] @ recurrent + bias))
    ks.prune(model, 0.5, data=x, repair=True, batch_size=8)
    found = layer.get_weights()[1]
    np.testing.assert_allclose(found, solved(recurrent, found != 0, damped(np.concatenate(met[:-1]))), atol=2e-4)
    ks.sensitivity(model, x, levels=(0.7,), batch_size=8)
    ks.reestimate_batch_norm(model, x, batch_size=8)
    np.testing.assert_allclose(ks.graph.as_array(layer.states[0]), start, rtol=1e-6)


@pytest.mark.parametrize("how", ["reestimate", "repair", "channels"])
def test_batch_norm_leaves_out_what_is_masked_as_in_training(how):
    layers = [L.Masking(), L.SimpleRNN(6, return_sequences=True), L.Dense(6), L.BatchNormalization(), L.Dense(2)]
    model = randomized(keras.Sequential([keras.Input((5, 4)), *layers]))
    x = np.concatenate([SEQUENCES, SEQUENCES])[..., :4]
    present = np.arange(5) < RNG.integers(0, 6, len(x))[:, None]
    present[:16] = False  # all of a batch
    x = np.where(present[..., None], x, 0)
    if how == "reestimate":
        assert ks.reestimate_batch_norm(model, x, batch_size=16) == 1
    else:
        ks.prune(model, 0.3, pattern="channel" if how == "channels" else None, data=x, repair=True, batch_size=16)
    norm = layers[3]
    inputs = ks.graph.as_array(keras.Sequential([keras.Input((5, 4)), *layers[:3]])(x))[present].astype(float)
    np.testing.assert_allclose(ks.selection.as_array(norm.moving_mean), inputs.mean(0), atol=1e-4)
    np.testing.assert_allclose(ks.selection.as_array(norm.moving_variance), inputs.var(0), rtol=1e-3, atol=1e-5)
