"""A model that is laid out again computes the same, or what its other layers compute."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_sparse as ks


def branched():
    """A shared layer, operations of tensors, an operation with constants, several outputs."""
    inputs = keras.Input((6,), name="x")
    shared = layers.Dense(6, "tanh", name="shared")
    x = shared(inputs) + shared(inputs * 2.0)
    x = keras.ops.relu6(layers.BatchNormalization(name="norm")(x))
    return keras.Model(inputs, {"a": layers.Dense(3, name="a")(x), "b": layers.Concatenate()([x, inputs])})


def several_inputs():
    inputs = {"one": keras.Input((4,), name="one"), "two": keras.Input((4,), name="two")}
    return keras.Model(inputs, layers.Add()([layers.Dense(4, name="d")(inputs["one"]), inputs["two"]]))


def nested():
    block = keras.Sequential([keras.Input((6,)), layers.Dense(5, "relu", name="in"), layers.Dense(6, name="out")])
    inputs = keras.Input((6,))
    return keras.Sequential([keras.Input((6,)), keras.Model(inputs, block(block(inputs)) + inputs), layers.Dense(2)])


def nested_outputs():
    """A model that is called twice, and whose outputs are the outer one's."""
    inner_inputs = keras.Input((6,))
    inner = keras.Model(inner_inputs, layers.Dense(6, "tanh", name="in")(inner_inputs))
    inputs = keras.Input((6,))
    once = inner(inputs)
    return keras.Model(inputs, [once, inner(once)])


def data(model):
    rng = np.random.default_rng(0)
    drawn = [rng.normal(size=(4, *x.shape[1:])).astype("float32") for x in model.inputs]
    return drawn[0] if len(drawn) == 1 else dict(zip(("one", "two"), drawn, strict=True))


def rebuilt(model, change=lambda copy, layer, args, kwargs: copy(layer)(*args, **kwargs), flat=True):
    rebuilding = ks.graph.Rebuilding(model)

    def call(layer, args, kwargs):
        if flat and isinstance(layer, keras.Model):
            outputs = ks.graph.replay(layer, keras.tree.flatten(args), call)
            return keras.tree.pack_sequence_as(layer.output, outputs)
        return change(rebuilding.copy, layer, args, kwargs)

    return rebuilding.model(ks.graph.replay(model, rebuilding.inputs, call))


@pytest.mark.parametrize("make", [branched, several_inputs, nested, nested_outputs])
def test_the_same_layers_compute_the_same(make):
    model = make()
    for variable in model.weights:
        variable.assign(np.random.default_rng(1).uniform(0.5, 1.5, variable.shape))
    before, other = model.get_weights(), rebuilt(model)
    ours, theirs = (keras.tree.flatten(each.predict(data(model), verbose=0)) for each in (model, other))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert not {id(v) for v in model.weights} & {id(v) for v in other.weights}
    for variable in other.weights:
        variable.assign(np.zeros(variable.shape))
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nested_layers_lie_flat_under_names_of_their_own():
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.Sequential([keras.Input((3,)), layers.Dense(3, name="same")], name="one"),
            keras.Sequential([keras.Input((3,)), layers.Dense(3, name="same")], name="two"),
        ]
    )
    assert [layer.name for layer in rebuilt(model).layers][1:] == ["same", "same_1"]


def test_other_layers_with_other_weights():
    def change(copy, layer, args, kwargs):
        if layer.name != "a":
            return copy(layer)(*args, **kwargs)
        kernel, bias = layer.get_weights()
        return copy(layer, {"units": 2}, [kernel[:, 1:], bias[1:]])(*args, **kwargs)

    model = branched()
    other = rebuilt(model, change)
    ours, theirs = (each.predict(data(model), verbose=0)["a"] for each in (model, other))
    np.testing.assert_allclose(theirs, ours[:, 1:], rtol=1e-5)


def test_a_layer_of_another_class():
    def change(copy, layer, args, kwargs):
        activation = layer.name == "norm"
        return copy(layer, {}, [], layers.ReLU)(*args) if activation else copy(layer)(*args, **kwargs)

    assert type(rebuilt(branched(), change).get_layer("norm")) is layers.ReLU


def test_a_shared_layer_cannot_differ_from_call_to_call():
    units = iter([6, 5])

    def change(copy, layer, args, kwargs):
        return copy(layer, {"units": next(units)} if layer.name == "shared" else None)(*args, **kwargs)

    with pytest.raises(ValueError, match="called several times.*Received: 'shared'"):
        rebuilt(branched(), change)


def test_methods_are_put_back_when_the_block_fails():
    layer = layers.ReLU()
    with pytest.raises(RuntimeError), ks.graph.substituted([(layer, "call", lambda x: x + 1)]):
        assert float(layer(keras.ops.zeros(()))) == 1
        raise RuntimeError
    assert float(layer(keras.ops.ones(()))) == 1


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="strings are TensorFlow's")
def test_a_vocabulary_goes_with_the_weights():
    lookup = layers.StringLookup(name="lookup")
    lookup.adapt(["Lyon", "Ghent", "Turin"])
    inputs = {"city": keras.Input((1,), dtype="string", name="city"), "area": keras.Input((1,), name="area")}
    x = layers.Concatenate()([layers.Flatten()(layers.Embedding(5, 4)(lookup(inputs["city"]))), inputs["area"]])
    model = keras.Model(inputs, layers.Dense(2, bias_initializer="ones")(layers.Dense(8, "relu")(x)))
    ks.prune(model, 0.5, pattern="channel")
    small = ks.shrink(model, verbose=0)
    assert small.count_params() < model.count_params()
    words = keras.ops.convert_to_tensor(np.array([["Turin"], ["Lyon"], ["Rome"]]), "string")
    batch = {"city": words, "area": keras.ops.ones((3, 1))}
    np.testing.assert_allclose(small(batch), model(batch), atol=1e-6)
    assert small.get_layer("lookup").get_vocabulary() == lookup.get_vocabulary()
