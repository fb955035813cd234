"""Paddings: Keras itself says where windows begin."""

import keras
import numpy as np
import pytest

from keras_sparse.tflite.padding import same, windows


@pytest.mark.parametrize("size", [8, 9, 10, 13])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize(("stride", "rate"), [(1, 1), (2, 1), (3, 1), (1, 2)])
def test_same_is_that_padding(size, kernel, stride, rate):
    x = np.random.default_rng(0).normal(size=(1, size, 7, 1)).astype("float32")
    options = {"use_bias": False, "kernel_initializer": "ones", "dilation_rate": (rate, 1)}
    layer = keras.layers.Conv2D(1, (kernel, 1), stride, padding="same", **options)
    expected = keras.ops.convert_to_numpy(layer(x))
    front, behind = same(size, layer, 0)
    valid = keras.layers.Conv2D(1, (kernel, 1), stride, **options)
    padded = np.pad(x, ((0, 0), (front, behind), (0, 0), (0, 0)))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(valid(padded)), expected, atol=1e-6)
    first, read, count = windows(size, (front, behind), layer, 0)
    assert (first, count) == (front, expected.shape[1]) and read <= behind
    # What is said not to be read may be anything.
    padded[:, front + size + read :] = np.nan
    np.testing.assert_allclose(keras.ops.convert_to_numpy(valid(padded)), expected, atol=1e-6)
