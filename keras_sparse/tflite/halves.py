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
        The bytes of the new file. Small weights stay as they are, too: vectors of less than 64 numbers, and kernels of
        less than 256. A bias goes with its kernel: from half a kernel that is stored without its zeros and a float32
        bias, LiteRT.js computes the bias alone (2.5.3).

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
        unpacking, constants = [], _constants(file, graph, read_by)
        for number in _fitting(graph, constants):
            values, tensor = constants[number], graph.tensors[number]
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


def _constants(file, graph, numbers):
    """`{number: values}` of the float32 weights that operators read."""
    found, outputs = {}, [int(n) for n in graph.outputs]
    for number in sorted(numbers):
        tensor = graph.tensors[number] if number >= 0 else None
        if tensor is None or file.dtype(tensor) != "float32" or number in outputs:
            continue
        data = file.data(tensor)
        if data is not None:
            found[number] = np.frombuffer(data.tobytes(), "<f4").reshape([int(n) for n in tensor.shape])
    return found


def _fitting(graph, constants):
    """Numbers of the weights to store in half precision, in order."""
    kernels = {number for number, values in constants.items() if values.ndim > 1}
    biases = {}  # of each bias, the kernels that it goes with
    for operator in graph.operators:
        read = [int(number) for number in operator.inputs if int(number) in constants]
        own = [number for number in read if number in kernels]
        for number in read:
            if own and number not in kernels:
                biases.setdefault(number, []).extend(own)
    whole = {n for n in kernels if constants[n].size < 4 * _SMALL or _loses(constants[n])}
    # What is added to an output may be off by a share of the largest that is.
    whole |= {n for n in biases if _off(constants[n])}
    # The converter stores biases of the same numbers once: all kernels that have one go with it.
    together = [{n, *own} for n, own in biases.items()]
    while any(whole & one and not one <= whole for one in together):
        whole.update(*(one for one in together if whole & one))
    others = constants.keys() - kernels - biases.keys()
    whole |= {n for n in others if constants[n].size < _SMALL or _loses(constants[n])}
    return [number for number in constants if number not in whole]


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
    axes = range(values.ndim)
    return any(_off(values, tuple(other for other in axes if other != axis)) for axis in axes or [None])


def _off(values, across=None):
    """Whether half precision changes a number by more than a share of the largest across these axes; `None`: all."""
    values = values.astype("float64")
    with np.errstate(invalid="ignore"):
        apart = np.abs(values - _half(values))
    largest = np.abs(values).max(axis=across, initial=0)
    return not (apart.max(axis=across, initial=0) <= _LOST * largest).all()
