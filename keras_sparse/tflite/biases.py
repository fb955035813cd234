"""A bias in integers counts in units of its operator's products: one that two operators read is right for one of them.

TensorFlow's converter for 16-bit activations (tensorflow 2.21) stores the bias of a layer that is called several times
once, in the units of the first call, without an error.
"""

import copy

import numpy as np

from keras_sparse.tflite.editing import File

__all__ = ["own_biases"]

# Where operators have their inputs, kernel and bias.
_PLACES = {
    "CONV_2D": (0, 1, 2),
    "CONV_3D": (0, 1, 2),
    "DEPTHWISE_CONV_2D": (0, 1, 2),
    "FULLY_CONNECTED": (0, 1, 2),
    "TRANSPOSE_CONV": (2, 1, 3),
}
_APART = 1e-4  # share by which two scales differ: more than rounding of float32


def own_biases(content):
    """Give each operator a bias in its own units, where that which it reads is in others.

    Args:
        content: Bytes of a .tflite file that computes in integers.

    Returns:
        The bytes of the new file; the same, if nothing changed.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.biases import own_biases
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.job import Job
    >>> content = convert(Job(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]))).content
    >>> own_biases(content) is content
    True
    """
    file = File(content)
    changes = [_changed(file, graph, operator) for graph in file.model.subgraphs for operator in graph.operators]
    return file.pack() if any(changes) else content


def _changed(file, graph, operator):
    """Whether an operator got a bias of its own."""
    places = _PLACES.get(file.name(operator))
    inputs = [int(number) for number in operator.inputs]
    if places is None or len(inputs) <= places[2] or inputs[places[2]] < 0:
        return False
    given, kernel, bias = (graph.tensors[inputs[place]] for place in places)
    dtype, stored = file.dtype(bias), file.data(bias)
    if stored is None or dtype not in ("int32", "int64"):
        return False
    units, own = _scale(bias), _scale(given) * _scale(kernel)
    if not units.size or not own.size or np.allclose(units, own, rtol=_APART, atol=0):
        return False
    limits = np.iinfo(dtype)
    values = np.round(np.frombuffer(stored.tobytes(), dtype) * (units / own))
    mine = copy.copy(bias)
    mine.name = graph.tensors[int(operator.outputs[0])].name + b"/bias"
    mine.quantization = copy.copy(bias.quantization)
    mine.quantization.scale = own.astype("float32")
    mine.quantization.zeroPoint = np.zeros(own.size, "int64")
    file.store(mine, np.clip(values, limits.min, limits.max).astype(dtype))
    graph.tensors.append(mine)
    inputs[places[2]] = len(graph.tensors) - 1
    operator.inputs = inputs
    return True


def _scale(tensor):
    """The real number of one step of a tensor, or of each channel of its; none if it holds floats."""
    scale = None if tensor.quantization is None else tensor.quantization.scale
    return np.asarray([] if scale is None else scale, "float64")
