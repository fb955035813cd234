"""Acceptance: what TFLite has nothing for is refused before anything is converted."""

import keras
import pytest
from tflite_models import mlp

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
