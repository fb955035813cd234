"""A match is the weight of a model that a tensor of a file holds: found by its values, else by the names of tensors.

The converter renames, transposes and rescales weights (it folds batch normalization into kernels), and may melt several
layers into one operator.
"""

import re

import keras
import numpy as np

from keras_sparse import patterns, selection
from keras_sparse.graph import kind_of, operator_axes
from keras_sparse.tflite.flatmodel import UNPACK
from keras_sparse.tflite.signatures import output_names

__all__ = ["LayerNames", "match", "readers"]

_UNITS = 16  # output units in which a tensor is compared with a weight
# How far the cosine of two rows of the same weights may be from 1: rounding to 8 bits moves it, to 16 hardly.
_ROUNDING = {"int8": 1e-2}
_EXACT = 1e-5


def readers(graph):
    """Tell which operator reads each tensor first, through those that unpack it.

    Args:
        graph: A `Subgraph`.

    Returns:
        Dict from the number of a tensor to `(the operator's name, the input's position)`, in the order of execution.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.flatmodel import read
    >>> from keras_sparse.tflite.job import Job
    >>> from keras_sparse.tflite.matching import readers
    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(3)])
    >>> graph = read(convert(Job(model)).content).subgraphs[0]
    >>> {graph.tensors[n].shape: reader for n, reader in readers(graph).items()}[3, 64]
    ('FULLY_CONNECTED', 1)
    """
    made, found = {n: operator for operator in graph.operators for n in operator.outputs}, {}
    for operator in graph.operators:
        for position, number in enumerate(() if operator.name in UNPACK else operator.inputs):
            while number in made and made[number].name in UNPACK:
                number = made[number].inputs[0]
            found.setdefault(number, (operator.name, position))
    return found


def match(model, tensors, weights):
    """Find the weight that each tensor of a file holds.

    Args:
        model: The Keras model that the file was made of.
        tensors: Pairs of an operator's name and a `Tensor`, as `readers` tells.
        weights: List of the model's weights that may be found, as `selection.weights` returns them.

    Returns:
        A list with a weight or `None` for each tensor. No weight is found twice.

    Example:

    >>> import keras, keras_sparse as ks
    >>> from keras_sparse.tflite.convert import convert
    >>> from keras_sparse.tflite.flatmodel import read
    >>> from keras_sparse.tflite.job import Job
    >>> from keras_sparse.tflite.matching import match, readers
    >>> layers = [keras.layers.Dense(64, name="a"), keras.layers.Dense(64, name="b")]
    >>> model = keras.Sequential([keras.Input((64,)), *layers])
    >>> graph = read(convert(Job(model)).content).subgraphs[0]
    >>> tensors = [(name, graph.tensors[n]) for n, (name, position) in readers(graph).items() if position == 1]
    >>> [weight.layer.name for weight in match(model, tensors, ks.selection.weights(model))]
    ['a', 'b']
    """
    names, left, found = LayerNames(model), list(weights), [None] * len(tensors)
    named = [set(names.candidates(tensor.name)) for _, tensor in tensors]
    # What a tensor holds says more than its name: names decide among equals, and what is left over.
    for holds in (_holds, _holds_in_another_order, None):
        for place, (operator, tensor) in enumerate(tensors):
            if found[place] is None:
                able = [weight for weight in left if weight.size == tensor.size]
                able.sort(key=lambda weight: weight.layer.name not in named[place])
                found[place] = next(
                    (
                        weight
                        for weight in able
                        if (holds(operator, tensor, weight) if holds else weight.layer.name in named[place])
                    ),
                    None,
                )
                left = [weight for weight in left if weight is not found[place]]
    return found


class LayerNames:
    """Finds the layers of a model by the names that the converter gives to tensors.

    Args:
        model: A built Keras model.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.matching import LayerNames
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="head")])
    >>> LayerNames(model).candidates("sequential_1/head_1/MatMul;StatefulPartitionedCall")
    ['head']
    """

    def __init__(self, model):
        self._kinds = {layer.name: kind_of(layer) for layer in selection.layers(model) if layer is not model}
        self._outputs = _output_layers(model)

    def layer(self, operator, name):
        """The layer that a tensor comes from, of those that the converter melted into one; or the tensor's name."""
        found = self.candidates(name)
        if not found and name in self._outputs:
            return self._outputs[name]
        return next((one for one in found if operator in self._kinds[one].operators), found[0] if found else name)

    def candidates(self, name):
        """Names of all layers that the name of a tensor mentions."""
        found = []
        for part in re.split("[/;]", name):
            for one in (part, re.sub(r"_\d+$", "", part)):
                if one in self._kinds and one not in found:
                    found.append(one)
        return found


def _output_layers(model):
    """What computes each output of a model that knows its layers: `{name that the converter gives it: layer}`."""
    if isinstance(model, keras.Sequential):
        names, layers = output_names(model.outputs[0]), [model.layers[-1].name]
    elif getattr(model, "outputs", None) and hasattr(model, "output_names"):
        names, layers = output_names(model.output), model.output_names
    else:
        return {}
    order = sorted(range(len(names)), key=names.__getitem__)  # a SavedModel sorts its outputs by name
    return {f"StatefulPartitionedCall_1:{number}": layers[i] for number, i in enumerate(order)}


def _holds(operator, tensor, weight):
    """Whether a tensor holds a weight, but for a factor for each output unit: of a normalization that was folded in."""
    ours = patterns.to_matrix(weight.numpy(), weight.output_axes)
    theirs = patterns.to_matrix(tensor.real_values(), operator_axes().get(operator, (0,)))
    if ours.shape != theirs.shape:
        return False
    ours, theirs = ours[:_UNITS].astype("float64"), theirs[:_UNITS].astype("float64")
    cosines, norms = np.abs((ours * theirs).sum(axis=1)), np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return bool((cosines >= (1 - _ROUNDING.get(tensor.dtype, _EXACT)) * norms).all())


def _holds_in_another_order(operator, tensor, weight):
    """Whether a tensor holds the numbers of a weight in any order, such as that of a transposed matrix."""
    ours, theirs = (np.sort(values, axis=None).astype("float64") for values in (weight.numpy(), tensor.real_values()))
    norms = np.linalg.norm(ours) * np.linalg.norm(theirs)
    return bool((ours * theirs).sum() >= (1 - _EXACT) * norms > 0)
