"""Models whose neurons are measured."""

import keras
import numpy as np
import pytest
from keras import layers

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


def check(row, values, dead_units=None):
    """Compare a row with activations [samples, ..., units], the oracle."""
    active = (np.asarray(values) != 0).reshape(len(values), -1, values.shape[-1]).any(axis=1)
    assert row["units"] == values.shape[-1]
    assert row["inactive"] == pytest.approx(1 - active.mean(), abs=1e-6)
    assert row["never_active"] == pytest.approx((~active.any(axis=0)).mean())
    assert row["dead_units"] == dead_units


def relu(x):
    return np.maximum(x, 0)


def dense(x, layer):
    return x @ layer.get_weights()[0] + layer.get_weights()[1]


def sequential(activation=layers.ReLU):
    parts = [layers.Dense(7), layers.BatchNormalization(), activation(), layers.Dropout(0.5), layers.Dense(2)]
    return keras.Sequential([keras.Input((4,)), *parts])
