"""Sameness: what rounding does to a deep network, and what it does not."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_sparse as ks
from keras_sparse.tflite.sameness import difference, of_rounding

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="of the TFLite stage")


def sensitive(gain):
    """A small change of its input is a large one of its output."""
    inputs = keras.Input((8,))
    return keras.Model(inputs, keras.ops.sin(gain * layers.Dense(8)(inputs)))


@pytest.mark.parametrize(("gain", "allowed"), [(1, 1e-4), (1e3, 1e-2)])
def test_a_sensitive_network_may_differ_by_more(gain, allowed):
    model = sensitive(gain)
    assert of_rounding(model) <= allowed and (of_rounding(model) > 1e-4) == (gain > 1)
    assert difference(model, model) == 0.0


def test_half_precision():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, dtype="mixed_float16")])
    assert of_rounding(model) == 1e-2


@pytest.mark.slow
def test_an_exact_form_is_not_given_up_for_rounding():
    """The network makes 2e-4 of the rounding; the form with shifted images would compute something else."""
    rng = np.random.default_rng(3)
    model = keras.applications.MobileNetV2((96, 96, 3), 0.35, weights=None, classes=10, classifier_activation=None)
    for weight in model.weights:
        shape = tuple(weight.shape)
        if weight.name == "gamma":
            weight.assign(rng.uniform(0.8, 1.4, shape))
        elif weight.name in ("beta", "moving_mean"):
            weight.assign(rng.normal(0, 0.3, shape))
        elif weight.name == "moving_variance":
            weight.assign(rng.uniform(0.3, 1.5, shape))
        elif len(shape) > 1:
            fan = 9 if "depthwise" in weight.path else np.prod(shape[:-1])
            weight.assign(rng.normal(0, np.sqrt(2 / fan), shape))
    _, report = ks.tflite.adapt(model)
    assert report.totals["exact"] and report.totals["difference"] < 1e-2
