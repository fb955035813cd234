"""A file in half precision stores its weights as float16, each unpacked by a `DEQUANTIZE` when the model is loaded.

TensorFlow's converter stores every constant so. Half precision has no numbers above 65,504 and few below 6e-5: a scale
such as that of `Rescaling(2**-31)` becomes zero, and the file computes a constant. Here these stay in float32.
"""

import numpy as np

from keras_sparse.tflite.editing import File
from keras_sparse.tflite.flatmodel import read

__all__ = ["halve", "kept_whole"]

_LOST = 2**-8  # share of a slice's largest number by which half precision may change it; where it is exact, 2**-11
_SMALL = 64  # elements of a vector up to which the operator that unpacks it takes more room than is saved
_DEQUANTIZE = 3  # the version of the operator that knows float16


def halve(content):
    """Rewrite a file with float32 weights so that they are stored in half precision, where that holds them.

    Args:
        content: The file's bytes; no weight is encoded without its zeros.

    Returns:
        The bytes of the new file. Vectors of less than 64 numbers stay as they are, too.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.job import Job
    >>> from keras_sparse.tflite.halves import halve
    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
    >>> content = convert(Job(model)).content
    >>> len(halve(content)) < 0.6 * len(content)
    True
    """
    file = File(content)
    for graph in file.model.subgraphs:
        read_by = {}
        for operator in graph.operators:
            for position, number in enumerate(operator.inputs):
                read_by.setdefault(int(number), []).append((operator, position))
        unpacking = []
        for number in sorted(read_by):
            tensor = graph.tensors[number] if number >= 0 else None
            if tensor is None or file.dtype(tensor) != "float32" or number in [int(n) for n in graph.outputs]:
                continue
            data = file.data(tensor)
            if data is None:
                continue
            values = np.frombuffer(data.tobytes(), "<f4").reshape([int(n) for n in tensor.shape])
            if (values.ndim < 2 and values.size < _SMALL) or _loses(values):
                continue
            float32, tensor.type = tensor.type, file.schema.TensorType.FLOAT16
            file.store(tensor, _half(values))
            operator, output = file.unpack(graph, number, "DEQUANTIZE", _DEQUANTIZE, float32, None)
            unpacking.append(operator)
            for reader, position in read_by[number]:
                inputs = list(reader.inputs)
                inputs[position] = output
                reader.inputs = inputs
        graph.operators = unpacking + graph.operators
    return file.pack()


def kept_whole(content):
    """Names of the weights of a file that half precision does not hold.

    Example:

    >>> from keras_sparse.tflite.flatmodel import read
    >>> from keras_sparse.tflite.halves import kept_whole
    >>> import keras
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.job import Job
    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Rescaling(2**-31), keras.layers.Dense(64)])
    >>> len(kept_whole(convert(Job(model, quantize="float16")).content))
    1
    """
    tensors = [tensor for graph in read(content).subgraphs for tensor in graph.tensors]
    stored = [tensor for tensor in tensors if tensor.dtype == "float32" and tensor.stored is not None]
    return [tensor.name for tensor in stored if _loses(tensor.values())]


def _half(values):
    with np.errstate(over="ignore"):
        return values.astype("<f2")


def _loses(values):
    """Whether a slice along some axis, such as the weights of one input or of one output, becomes another in half."""
    values = values.astype("float64")
    with np.errstate(invalid="ignore"):
        apart = np.abs(values - _half(values))
    for axis in range(values.ndim) or [None]:
        others = tuple(other for other in range(values.ndim) if other != axis)
        largest = np.abs(values).max(axis=others, initial=0)
        if not (apart.max(axis=others, initial=0) <= _LOST * largest).all():
            return True
    return False
