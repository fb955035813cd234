"""A model is accepted for export if TFLite has what it computes with; else an error says how to mend it."""

import os

import keras
import numpy as np

from keras_sparse import selection
from keras_sparse.layers import gated_layers

__all__ = ["accepted"]


def accepted(model):
    """Check that a model can be exported; load it if it is a file.

    Args:
        model: A built Keras model, or the path of a .keras file.

    Returns:
        The Keras model.

    Raises:
        ValueError: If it is none that can be exported, with the way to mend it.
        TypeError: If it is no Keras 3 model.
        FileNotFoundError: If there is no such file.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.acceptance import accepted
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> accepted(model) is model
    True
    """
    if isinstance(model, (str, os.PathLike)):
        file = os.fspath(model)
        if not file.endswith(".keras"):
            raise ValueError(f"`model` must be a Keras model or the path of a .keras file. Received: model={file!r}")
        if not os.path.isfile(file):
            raise FileNotFoundError(f"There is no such file. Received: model={file!r}")
        try:
            model = keras.saving.load_model(file, compile=False)
        except Exception as error:
            raise ValueError(
                "The .keras file cannot be loaded. If the model has custom classes, import the module that registers "
                f"them, load it yourself and pass the model. Received: model={file!r} "
                f"({type(error).__name__}: {str(error).strip()[:300]})"
            ) from error
    selection.check_model(model)
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a `keras.Model`: put the layer into a `keras.Sequential`. "
            f"Received: {type(model).__name__}"
        )
    gated = [layer.name for layer in gated_layers(model)]
    if gated:
        raise ValueError(f"Fold the gates in first: `export(ks.bake(model), ...)`. Received: `ks.layers.L0` {gated}")
    quantized = [
        f"{layer.path} ({layer.dtype_policy.name})"
        for layer in selection.layers(model)
        if isinstance(layer.dtype_policy, keras.dtype_policies.QuantizedDTypePolicy)
    ]
    if quantized:
        raise ValueError(
            "`model` was quantized by Keras (`model.quantize`), in a form that TFLite has no operators for. Export the "
            "model as it was before, with quantize='dynamic' or 'int8' here. Received: quantized layers "
            f"{', '.join(quantized)}"
        )
    double = [weight.path for weight in model.weights if weight.dtype == "float64"]
    if double:
        raise ValueError(
            "`model` must compute in float32 or half precision: TFLite does not in float64. Build it under the policy "
            f"'float32' and copy the weights. Received: float64 in {', '.join(double)}"
        )
    broken = [weight.path for weight in model.weights if not np.isfinite(selection.as_array(weight)).all()]
    if broken:
        raise ValueError(
            "The weights of `model` must be finite: its training diverged. Train it again with a smaller learning rate "
            "or `clipnorm`, from a checkpoint before that (`keras.callbacks.TerminateOnNaN` stops in time). "
            f"Received: NaN or infinity in {', '.join(broken)}"
        )
    return model
