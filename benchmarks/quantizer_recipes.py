"""Quantizer recipes: what LiteRT's quantizer makes of the zeros of a pruned model, and `ks.tflite.encode` of its file.

`pip install ai-edge-quantizer`. The network has convolutions and Dense layers with random biases, 90 % of each kernel
zero. Zeros are counted by value.
"""

import os
import tempfile

import result  # isort: skip - sets the environment that TensorFlow reads

import keras
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import quantizer, recipe

import keras_sparse as ks
from keras_sparse.quiet import quiet


def network(rng):
    """A pruned model."""
    body = [
        keras.layers.Conv2D(32, 3, activation="relu"),
        keras.layers.Conv2D(64, 3, activation="relu"),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(256, activation="relu"),
        keras.layers.Dense(10),
    ]
    model = keras.Sequential([keras.Input((16, 16, 3)), *body])
    for layer in model.layers:
        if getattr(layer, "bias", None) is not None:
            layer.bias.assign(rng.normal(size=layer.bias.shape) * 0.1)
    ks.prune(model, 0.9)
    return model


def quantized(path, name, samples, out):
    """Write the file that a recipe makes."""
    made = quantizer.Quantizer(path)
    made.load_quantization_recipe(getattr(recipe, name)())
    found = None
    if made.need_calibration:
        signatures = Interpreter(path).get_signature_list()
        (key,) = signatures
        found = made.calibrate({key: [{signatures[key]["inputs"][0]: sample[None]} for sample in samples]})
    made.quantize(found).export_model(out, overwrite=True)


def row(path, name, samples, folder):
    """One row of the table."""
    out, encoded = os.path.join(folder, "q.tflite"), os.path.join(folder, "e.tflite")
    try:
        with quiet():
            quantized(path, name, samples, out)
    except Exception as error:
        return [f"`{name}`", f"fails: {type(error).__name__}", "", ""]
    kernels = [tensor for tensor in ks.tflite.inspect(out).rows if len(tensor["shape"]) > 1]
    zeros = [tensor["sparsity"] for tensor in kernels if tensor["sparsity"] is not None]
    said = f"{min(zeros):.0%} to {max(zeros):.0%}" if len(zeros) == len(kernels) else "not read (2 bits)"
    size = f"{os.path.getsize(out):,d}"
    try:
        ks.tflite.encode(out, encoded, target="xnnpack")
        return [f"`{name}`", said, size, f"{os.path.getsize(encoded):,d}"]
    except ValueError:
        return [f"`{name}`", said, size, "cannot be run"]


def main():
    rng = np.random.default_rng(0)
    keras.utils.set_random_seed(0)
    samples = rng.normal(size=(8, 16, 16, 3)).astype("float32")
    names = [name for name in dir(recipe) if name.startswith(("dynamic", "weight_only", "static"))]
    with tempfile.TemporaryDirectory() as folder:
        report = ks.tflite.export(network(rng), os.path.join(folder, "dense.tflite"), sparse=False, batch_size=1)
        rows = [row(report.path, name, samples, folder) for name in names]
        notes = [f"Before: {report.bytes_file:,d} bytes."]
    result.show("Zeros after quantization, 90 % before", ["recipe", "zeros", "bytes", "encoded"], rows, notes)


if __name__ == "__main__":
    main()
