"""Encoding files that others wrote: see test_tflite_verify.py for what comes of them."""

import keras
import pytest

import keras_sparse as ks

tensorflow_only = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="about files, made the fast way")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        ks.tflite.encode(tmp_path / "none.tflite", tmp_path / "out.tflite")
    with pytest.raises(ValueError, match="needs a `target`"):
        ks.tflite.encode(tmp_path / "none.tflite", tmp_path / "out.tflite", None)


@tensorflow_only
@pytest.mark.lengthy(0)
def test_weights_of_8_bits_that_are_multiplied_as_floats(tmp_path):
    """The dense file rounds the inputs of each layer to 8 bits, the encoded one does not: outputs differ a little."""
    keras.utils.set_random_seed(0)
    body = [keras.layers.Conv2D(32, 3, activation="relu"), keras.layers.Conv2D(64, 3, activation="relu")]
    head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(128, activation="relu"), keras.layers.Dense(10)]
    model = keras.Sequential([keras.Input((16, 16, 3)), *body, *head])
    for layer in (*body, *head[1:]):
        layer.bias.assign(keras.random.normal(layer.bias.shape) * 0.1)
    ks.prune(model, 0.9)
    dense = ks.tflite.export(model, tmp_path / "dense.tflite", sparse=False, quantize="dynamic", batch_size=1)
    report = ks.tflite.encode(dense.path, tmp_path / "sparse.tflite")
    assert report.totals["encoding"] == "sparse" and report.totals["bytes_file"] < 0.7 * dense.bytes_file
    assert 0 < report.totals["parity_relative"] < 2e-2
    assert ks.tflite.verify(tmp_path / "sparse.tflite", model).right
