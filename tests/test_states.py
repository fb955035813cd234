"""State that a model keeps is left as it was, and what is measured begins where it should."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_sparse as ks
from keras_sparse import states

X = np.random.default_rng(0).normal(size=(2, 5, 4)).astype("float32")


def numbers(layer):
    return [np.array(ks.selection.as_array(state)) for state in keras.tree.flatten(layer.states)]


@pytest.mark.parametrize(
    "layer",
    [
        layers.GRU(3, stateful=True),
        layers.LSTM(3, stateful=True),
        layers.Bidirectional(layers.LSTM(3, stateful=True)),
        layers.RNN([layers.GRUCell(3), layers.LSTMCell(2)], stateful=True),
    ],
    ids=["gru", "lstm", "bidirectional", "stacked"],
)
def test_states_are_put_back(layer):
    inputs = keras.Input((5, 4), batch_size=2)
    model = keras.Model(inputs, layer(inputs))
    first = np.array(keras.ops.convert_to_numpy(model(X)))
    found = states.recurrent(model)
    before = [numbers(one) for one in found]
    with states.put_back(model) as changed:
        assert not changed()
        second = np.array(keras.ops.convert_to_numpy(model(X)))
        assert changed()
    assert np.abs(first - second).max() > 1e-3  # the state matters
    with states.put_back(model, begin=True):
        np.testing.assert_allclose(keras.ops.convert_to_numpy(model(X)), first, rtol=1e-5, atol=1e-6)
    for one, values in zip(found, before, strict=True):
        for value, expected in zip(numbers(one), values, strict=True):
            np.testing.assert_array_equal(value, expected)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(model(X)), second, rtol=1e-5, atol=1e-6)


def test_an_error_puts_them_back_too():
    inputs = keras.Input((5, 4), batch_size=2)
    layer = layers.GRU(3, stateful=True)
    model = keras.Model(inputs, layer(inputs))
    with pytest.raises(RuntimeError), states.put_back(model):
        model(X)
        raise RuntimeError
    assert not numbers(layer)[0].any()


def test_measuring_units_leaves_recurrent_states():
    inputs = keras.Input((5, 4), batch_size=2)
    layer = layers.LSTM(3, stateful=True)
    model = keras.Model(inputs, layers.Dense(2)(layers.Dense(3, activation="relu")(layer(inputs))))
    model(X)
    before = numbers(layer)
    ks.neuron_sparsity(model, X, batch_size=2)
    for value, expected in zip(numbers(layer), before, strict=True):
        np.testing.assert_array_equal(value, expected)
