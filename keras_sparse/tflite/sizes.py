"""Sizes that a file computes while it runs are written down where they are known, and kept away from its outputs.

At an open batch size TensorFlow's converter computes the shape of each `RESHAPE`, by up to seven operators. LiteRT's
GPU accelerator and TFLite Micro refuse these, XNNPACK leaves what comes after to slower kernels, and from an output
whose size follows while the file runs LiteRT's `CompiledModel` and LiteRT.js read zeros, or whatever was in memory.
"""

import numpy as np

from keras_sparse.tflite.editing import File
from keras_sparse.tflite.flatmodel import read

__all__ = ["settle"]

_OPEN = -1  # a size that is not known, in a signature and in the shape that a `RESHAPE` takes
# Operators whose output's size follows while the file runs: always, or where the input at that position is computed.
_FOLLOWS = {"TOPK_V2": None, "RESHAPE": 1, "TRANSPOSE_CONV": 0, "BROADCAST_TO": 1}


def settle(content):
    """Rewrite a .tflite file so that sizes which are known are not computed.

    The shape of a `RESHAPE` is stored if at most one size is open: that one follows from the number of elements. An
    output whose size follows while the file runs is passed through such a `RESHAPE`. Measured, ai-edge-litert 2.3.0
    and LiteRT.js 2.5.3.

    Args:
        content: The file's bytes.

    Returns:
        The bytes of the file, which computes the same; `content` itself if nothing changed.

    Example:

    >>> import keras
    >>> import tempfile
    >>> from keras_sparse.tflite.converter import save, to_tflite
    >>> from keras_sparse.tflite.flatmodel import read
    >>> from keras_sparse.tflite.job import Job
    >>> from keras_sparse.tflite.sizes import settle
    >>> model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(12), keras.layers.Reshape((3, 4))])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     content = to_tflite(save(Job(model), folder, batch=None)[0])
    >>> [[operator.name for operator in read(file).subgraphs[0].operators] for file in (content, settle(content))]
    [['FULLY_CONNECTED', 'SHAPE', 'STRIDED_SLICE', 'PACK', 'RESHAPE'], ['FULLY_CONNECTED', 'RESHAPE']]
    """
    if not any(tensor.opened for graph in read(content).subgraphs for tensor in graph.tensors):
        return content  # the converter has found all sizes
    file, changed = File(content), False
    for graph in file.model.subgraphs:
        changed |= _write_down(file, graph)
    changed |= _pass_out(file, file.model.subgraphs[0])
    return file.pack() if changed else content


def _write_down(file, graph):
    """Store the shapes of a graph's `RESHAPE` operators that are known but computed. Returns whether there were any."""
    unread, changed = set(), False
    for index, operator in enumerate(graph.operators):
        if file.name(operator) != "RESHAPE" or not _follows(file, graph, operator):
            continue
        output = int(operator.outputs[0])
        sizes = file.sizes(graph.tensors[output])
        if sizes.count(_OPEN) == len(sizes) == 2:
            sizes[1] = _depth(file, graph, output)
        if not sizes or 0 in sizes or sizes.count(_OPEN) > 1:
            continue
        changed = True
        unread.add(int(operator.inputs[1]))
        graph.operators[index] = file.reshape(graph, operator.inputs[0], output, sizes)
        graph.tensors[output].shape = np.array([max(1, n) for n in sizes], "int32")
        graph.tensors[output].shapeSignature = np.array(sizes, "int32") if _OPEN in sizes else None
    _drop(graph, unread)
    return changed


def _depth(file, graph, number):
    """How many columns a matrix must have for the Dense layers that alone read it, or -1."""
    readers = [operator for operator in graph.operators if number in operator.inputs]
    plain = all(
        file.name(operator) == "FULLY_CONNECTED"
        and list(operator.inputs).count(number) == 1
        and operator.inputs[0] == number
        and not operator.builtinOptions.keepNumDims
        for operator in readers
    )
    widths = {int(graph.tensors[operator.inputs[1]].shape[-1]) for operator in readers} if plain else ()
    return widths.pop() if len(widths) == 1 and number not in graph.outputs else _OPEN


def _drop(graph, unread):
    """Remove the operators that made tensors which nobody reads any more, and what only those have read."""
    for operator in reversed(list(graph.operators)):
        made = {int(number) for number in operator.outputs}
        if not made or not made <= unread:  # one that makes none writes a variable
            continue
        used = {int(number) for other in graph.operators for number in other.inputs} | set(map(int, graph.outputs))
        if not made & used:
            graph.operators = [other for other in graph.operators if other is not operator]
            unread |= {int(number) for number in operator.inputs}


def _follows(file, graph, operator):
    """Whether the size of an operator's output follows while the file runs."""
    name = file.name(operator)
    if name not in _FOLLOWS:
        return False
    position = _FOLLOWS[name]
    if position is None:
        return True
    return position < len(operator.inputs) and file.data(graph.tensors[operator.inputs[position]]) is None


def _pass_out(file, graph):
    """Give outputs whose size follows while the file runs a `RESHAPE` of a stored shape. Returns whether any are."""
    operators = []
    for operator in graph.operators:
        operators.append(operator)
        for position, number in enumerate(list(operator.outputs)):
            sizes = file.sizes(graph.tensors[number])
            if number in graph.outputs and sizes.count(_OPEN) == 1 and _follows(file, graph, operator):
                made = list(operator.outputs)
                made[position] = file.like(graph, number, b"/computed")
                operator.outputs = made
                operators.append(file.reshape(graph, made[position], number, sizes))
    changed = len(operators) > len(graph.operators)
    graph.operators = operators
    return changed
