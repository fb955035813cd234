"""Signatures: how a model is called."""

from collections import OrderedDict

import keras
import pytest
from exported_files import tensorflow_only
from keras import layers
from tflite_models import attention, dict_of_inputs, mlp, nested, several, subclassed, two_arguments

import keras_sparse as ks
from keras_sparse.tflite.signatures import output_names, signature


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (mlp, [("pixels", (None, 64), "float32")]),
        (attention, [("tokens", (None, 12), "int32")]),
        (several, [("age", (None, 1), "float32"), ("image", (None, 8, 8, 1), "float32")]),
        (nested, [("a", (None, 16), "float32"), ("b", (None, 16), "float32"), ("c", (None, 16), "float32")]),
        (subclassed, [("inputs", (None, 32), "float32")]),
        (dict_of_inputs, [("offset", (None, 1, 48), "float32"), ("tokens", (None, 6), "float32")]),
        (two_arguments, [("offset", (None, 1, 48), "float32"), ("tokens", (None, 6), "float32")]),
    ],
)
def test_signature(build, inputs):
    called = signature(build())
    assert [(leaf.name, leaf.shape, leaf.dtype) for leaf in called.inputs] == inputs
    assert called.typed == (build not in (subclassed, dict_of_inputs, two_arguments))


def test_names_are_identifiers_and_differ():
    a, b = keras.Input((3,), name="left-hand.side"), keras.Input((3,), name="left_hand_side")
    names = [leaf.name for leaf in signature(keras.Model([a, b], layers.Dense(2)(a + b))).inputs]
    assert names == ["left_hand_side", "left_hand_side_1"]
    assert output_names({"a.b": 1, "a_b": 2}) == ["output_0", "output_1"]
    assert output_names({"b": [1, 2]}) == ["output_0", "output_1"]
    assert output_names({"b": [1, 2], "a": []}) == ["output_0", "output_1"]
    assert output_names(OrderedDict(b=1, a=2)) == ["b", "a"]  # `keras.tree` keeps its order


def test_a_batch_size_where_it_is_open():
    image, table = keras.Input((3,), name="image"), keras.Input((4,), batch_size=2, name="table")
    called = signature(keras.Model([image, table], [layers.Dense(2)(image), layers.Dense(2)(table)])).with_batch(2)
    assert [leaf.shape for leaf in called.inputs] == [(2, 3), (2, 4)]


def test_dtypes_become_those_of_phones():
    called = signature(subclassed())
    assert called.with_dtypes(["int64"]).inputs[0].dtype == "int32"
    assert called.with_dtypes(["float64"]).inputs[0].dtype == "float32"
    assert called.with_dtypes(["float16"]).inputs[0].dtype == "float32"


@pytest.mark.parametrize(
    ("given", "expected"),
    [(["模", "型"], ["input_", "input__1"]), (["größe", "größe2"], ["gr__e", "gr__e2"]), (["self"], ["input_self"])],
)
@tensorflow_only
def test_names_that_tensorflow_does_not_take(given, expected, tmp_path):
    inputs = [keras.Input((4,), name=name) for name in given]
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.ops.concatenate(inputs)))
    assert [leaf.name for leaf in signature(model).inputs] == expected
    assert ks.tflite.export(model, tmp_path / "m.tflite").parity_relative < 1e-5
