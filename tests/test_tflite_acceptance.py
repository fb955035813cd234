"""Acceptance: what TFLite has nothing for is refused before anything is converted."""

import keras
import pytest
from tflite_models import mlp

import keras_sparse as ks
from keras_sparse.tflite.acceptance import accepted

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="of the TFLite stage")


@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_models_that_keras_has_quantized(mode):
    model = mlp()
    assert accepted(model) is model
    model.layers[1].quantize(mode)
    with pytest.raises(ValueError, match=r"quantized by Keras \(`model.quantize`\).*Received: quantized layers dense"):
        accepted(model)


def test_models_from_files(tmp_path):
    mlp().save(tmp_path / "m.keras")
    assert accepted(tmp_path / "m.keras").count_params() == mlp().count_params()
    with pytest.raises(FileNotFoundError, match="no such file"):
        accepted(str(tmp_path / "n.keras"))


def test_a_check_takes_and_refuses_what_an_export_does(tmp_path):
    mlp().save(tmp_path / "m.keras")
    assert len(ks.tflite.check(tmp_path / "m.keras").rows) == 2
    with pytest.raises(FileNotFoundError, match="no such file"):
        ks.tflite.check(str(tmp_path / "n.keras"))
    model = mlp()
    model.layers[1].bias.assign([float("nan")] * model.layers[1].units)
    with pytest.raises(ValueError, match="must be finite"):
        ks.tflite.check(model)
