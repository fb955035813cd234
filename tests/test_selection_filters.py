"""Filters by layers and paths, vectors that are no kernels, and models of others."""

import copy
import json
import pickle

import keras
import numpy as np
import pytest
from keras import layers
from selected_models import OwnDense, Subclassed, selected, sequential

import keras_sparse as ks

# Layers and classes as filters


def block(name="block"):
    """A model as a layer: a convolution, a recurrent layer in a wrapper, and an embedding's like."""
    inputs = keras.Input((6, 4))
    x = layers.Conv1D(4, 3, name="conv")(inputs)
    x = layers.Bidirectional(layers.LSTM(3, name="lstm"), name="both")(x)
    return keras.Model(inputs, x, name=name)


def with_block():
    inputs = keras.Input((6, 4))
    x = layers.DepthwiseConv1D(3, padding="same", name="depthwise")(inputs)
    x = block()(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(layers.Dense(5, name="body")(x)))


LAYER_FILTERS = {
    "a layer": (lambda model: model.get_layer("body"), ["body/kernel"]),
    "a list of layers": (lambda model: [model.get_layer("body"), model.get_layer("head")], ["body/", "head/"]),
    "a layer and a regex": (lambda model: [model.get_layer("body"), "head/"], ["body/", "head/"]),
    "a layer and a function": (lambda m: (m.get_layer("body"), lambda v: "head/" in v.path), ["body/", "head/"]),
    "a class": (lambda model: layers.Dense, ["body/", "head/"]),
    "a list of classes": (lambda model: [layers.Dense, layers.Conv1D], ["conv/", "body/", "head/"]),
    "a class of layers with cells": (lambda model: layers.LSTM, ["/kernel", "recurrent"] * 2),
    "a wrapper": (lambda model: layers.Bidirectional, ["/kernel", "recurrent"] * 2),
    "a model": (lambda model: model.get_layer("block"), ["conv/", *["/kernel", "recurrent"] * 2]),
    "a depthwise layer": (lambda model: model.get_layer("depthwise"), ["depthwise/kernel"]),
    "a class in a nested model": (lambda model: layers.Conv1D, ["conv/kernel"]),
    "the model itself": (lambda model: model, ["depthwise", "conv/", *["/kernel", "recurrent"] * 2, "body/", "head/"]),
}


@pytest.mark.parametrize("name", LAYER_FILTERS)
def test_layers_and_classes_are_filters(name):
    model = with_block()
    make, expected = LAYER_FILTERS[name]
    filters = make(model)
    ks.selection.check_filters(filters)
    found = [w.path for w in selected(model, filters=filters)]
    assert len(found) == len(expected)
    assert all(part in path for part, path in zip(expected, found, strict=True))
    ks.prune(model, 0.5, filters=filters)
    assert [w.path for w in ks.selection.pruned_weights(model)] == found


def test_layers_and_classes_are_keys_of_a_target():
    model = with_block()
    target = {
        model.get_layer("head"): 0.2,
        layers.Dense: 0.8,
        layers.DepthwiseConv1D: 0.5,
        model.get_layer("block"): 0.4,
    }
    rows = {row["path"]: row for row in ks.prune(model, target).rows}
    for w in ks.selection.weights(model):
        if w.kernel:
            names = {"head": 0.2, "body": 0.8, "depthwise": 0.5}
            share = next((share for name, share in names.items() if f"{name}/" in w.path), 0.4)
            assert rows[w.path]["zeros"] == round(share * w.size)


def test_layers_that_are_not_there():
    model = with_block()
    other, unbuilt = layers.Dense(3, name="other"), layers.Dense(3, name="unbuilt")
    other.build((None, 4))
    norm = layers.BatchNormalization(name="norm")
    norm.build((None, 4))
    cases = {
        "The layer 'other' is not in the model.*'body/kernel'.*Received: Dense 'other'": other,
        "The layer 'unbuilt' is not in the model.*it is not built": [unbuilt, "head/"],
        "The layer 'norm' has no kernel": norm,
        "no layer of the class Conv2D.* Conv1D, LSTMCell, Dense": layers.Conv2D,
        "no layer of the class BatchNormalization": ["head/", layers.BatchNormalization],
    }
    for message, filters in cases.items():
        with pytest.raises(ValueError, match=message):
            ks.prune(model, 0.5, filters=filters)
        one = filters if not isinstance(filters, list) else next(f for f in filters if f != "head/")
        with pytest.raises(ValueError, match=message.split(".*")[0]):
            ks.prune(model, {one: 0.5})
    for wrong in (dict, [dict, "head/"], keras.regularizers.L1):
        with pytest.raises(TypeError, match="`filters` must be.*a class of layers"):
            ks.prune(model, 0.5, filters=wrong)


def test_a_shared_layer_is_found_through_each_that_holds_it():
    shared = layers.Dense(4, name="shared")
    first = keras.Sequential([keras.Input((4,)), shared], name="first")
    second = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="own"), shared], name="second")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, second(first(inputs)))
    assert [w.layer.name for w in selected(model, filters=first)] == ["shared"]
    assert {w.layer.name for w in selected(model, filters=second)} == {"own", "shared"}


# Selections, and keys that are one weight


def test_a_selection_is_all_weights_chosen_or_skipped():
    model = with_block()
    found = ks.selection.select(model, filters="head/")
    assert [w.path for w in found] == [w.path for w in ks.selection.weights(model)]
    assert [w.path for w in found.chosen] == ["head/kernel"]
    assert all(w.skipped for w in found.skipped) and len(found) == len(found.chosen) + len(found.skipped)
    everything = ks.selection.select(model)
    body = model.get_layer("body").kernel
    fewer = everything.without([body, model.get_layer("body").bias], "said so")
    assert len(fewer.chosen) == len(everything.chosen) - 1
    assert [w.skipped for w in fewer if w.layer.name == "body"] == ["said so", "bias of Dense: not a kernel"]


def test_a_path_and_a_weight_are_keys_and_filters():
    keys = {
        "path": lambda model: ks.selection.only("depthwise/kernel"),
        "weight": lambda model: next(w for w in ks.selection.weights(model) if w.layer.name == "depthwise"),
    }
    for make in keys.values():
        model = with_block()
        key = make(model)
        assert [w.path for w in selected(model, filters=key)] == ["depthwise/kernel"]
        assert [w.path for w in selected(model, filters=[key, "head/"])] == ["depthwise/kernel", "head/kernel"]
        report = ks.prune(model, {key: 0.5, "head/": 0.2})
        assert [row["zeros"] for row in report.rows if "depthwise/kernel" in row["path"]] == [6]
    with pytest.raises(ValueError, match="is 'tail/kernel'. Those are: 'depthwise/kernel'"):
        ks.prune(with_block(), 0.5, filters=ks.selection.only("tail/kernel"))


def test_a_path_survives_copies_and_files():
    key = ks.selection.only("block.1/kernel")
    for other in (copy.deepcopy(key), pickle.loads(pickle.dumps(key))):
        assert (other, other.path) == (key, "block.1/kernel")
    assert list(json.loads(json.dumps({key: 0.5}))) == [r"^block\.1/kernel$"]


# Vectors and embeddings of custom layers


VARIOUS = {
    "scale": (1, 8),
    "shift": (1, 1, 8),
    "attention": (6, 1),
    "class_token": (1, 1, 8),
    "class_embedding": (1, 8),
    "one": (1, 1),
    "pos_embed": (6, 8),
    "position": (1, 6, 8),
    "abs_pos_table": (6, 8),
    "token_embedding": (6, 8),
    "w": (8, 8),
    "composition": (8, 8),
    "transposed": (8, 8),
    "kernel": (8, 1),
}


@keras.saving.register_keras_serializable("tests")
class Various(layers.Layer):
    """Weights that broadcast, tables, and real kernels."""

    def build(self, shape):
        for name, size in VARIOUS.items():
            setattr(self, f"of_{name}", self.add_weight(shape=size, name=name))

    def call(self, x):
        return keras.ops.matmul(x * self.of_scale, self.of_w)


@keras.saving.register_keras_serializable("tests")
class PositionalEncoding(layers.Layer):
    def build(self, shape):
        self.table = self.add_weight(shape=shape[1:], name="table")

    def call(self, x):
        return x + self.table


def test_vectors_in_disguise_are_no_kernels():
    model = keras.Sequential([keras.Input((6, 8)), PositionalEncoding(), Various(), layers.Dense(1)])
    found = {w.variable.name: w for w in ks.selection.weights(model)[:-2]}
    for name in ("scale", "shift", "attention", "class_token", "class_embedding", "one"):
        assert not found[name].kernel
        assert "a vector of shape" in found[name].skipped
    for name in ("pos_embed", "position", "abs_pos_table", "token_embedding", "table"):
        assert found[name].kernel
        assert "embedding: left dense" in found[name].skipped
    assert [w.variable.name for w in selected(model)] == ["w", "composition", "transposed", "kernel", "kernel"]
    named = {w.variable.name for w in selected(model, filters=lambda v: True)}
    assert named == {name for name, w in found.items() if w.kernel}
    with pytest.raises(ValueError, match="matches no weight"):
        ks.selection.select(model, filters="scale")


def test_kernels_with_one_unit_or_one_input_stay_kernels():
    model = keras.Sequential([keras.Input((1,)), layers.Dense(5), OwnDense(1), layers.Dense(1)])
    assert [w.variable.shape for w in selected(model)] == [(1, 5), (5, 1), (1, 1)]


# Errors


def test_unbuilt_and_foreign_models():
    with pytest.raises(ValueError, match="is not built"):
        ks.prune(keras.Sequential([layers.Dense(2)]), 0.5)
    with pytest.raises(ValueError, match="is not built"):
        ks.report(Subclassed())
    with pytest.raises(ValueError, match="has no weights"):
        ks.report(keras.Sequential([keras.Input((2,)), layers.ReLU()]))
    with pytest.raises(TypeError, match="Expected a Keras 3 model. Received: 'model.keras'"):
        ks.report("model.keras")


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf_keras is TensorFlow's")
@pytest.mark.filterwarnings("ignore")
def test_tf_keras_objects():
    tf_keras = pytest.importorskip("tf_keras")
    layer = tf_keras.layers.Dense(2)
    model = tf_keras.Sequential([tf_keras.Input((4,)), layer])
    for function in (lambda m: ks.prune(m, 0.5), ks.report, ks.callbacks.Pruning(0.5).set_model):
        for thing in (model, layer):
            with pytest.raises(TypeError, match="tf_keras, the legacy Keras 2.*ks.compat.tfmot"):
                function(thing)
    model.compile("adam", "mse")
    with pytest.raises(TypeError, match="tf_keras"):
        model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0, callbacks=[ks.callbacks.Pruning(0.5)])


@pytest.mark.parametrize(
    ("filters", "error", "message"),
    [
        ("(", ValueError, "Expected a regular expression"),
        (3, TypeError, "`filters` must be"),
        ([], TypeError, "`filters` must be"),
        ([3], TypeError, "as a string"),
        (layers.Conv3D, ValueError, "no layer of the class Conv3D"),
        ("nothing", ValueError, "matches no weight"),
        (["kernel", "nothing"], ValueError, "'nothing' matches no weight"),
        (lambda variable: False, ValueError, "nothing to prune"),
    ],
)
def test_bad_filters(filters, error, message):
    with pytest.raises(error, match=message):
        ks.prune(sequential(), 0.5, filters=filters)


# One of each family: the others repeat its blocks.
APPLICATIONS = """
    ConvNeXtTiny DenseNet121 EfficientNetB0 EfficientNetV2B0 InceptionV3 MobileNet MobileNetV2 MobileNetV3Small
    NASNetMobile ResNet50 ResNet50V2 VGG16 Xception
""".split()


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="selection is the same on every backend")
@pytest.mark.parametrize("name", APPLICATIONS)
def test_every_application_can_be_pruned(name):
    model = getattr(keras.applications, name)(weights=None, input_shape=(96, 96, 3))
    report = ks.prune(model, 0.8)
    pruned = [row for row in report.rows if row["status"] == "pruned"]
    assert pruned
    assert all(row["zeros"] == round(0.8 * row["size"]) for row in pruned)
    dense = [row for row in report.rows if row["status"] != "pruned" and row["path"].endswith("/kernel")]
    assert all("depthwise" in row["reason"] for row in dense)
    keras.backend.clear_session()
