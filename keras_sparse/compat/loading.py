"""A model of Keras 2 is loaded: its graph is built twice, first to see that it fits the file, then for good."""

import math
import os

import keras
import numpy as np

from keras_sparse.compat import graphs, hdf5, keras2, savedmodel, wrappers
from keras_sparse.registry import Configurable

__all__ = ["load"]


def load(path, safe_mode=True):
    """Load a model that Keras 2 (`tf_keras`, `tf.keras` before TensorFlow 2.16) saved, with tfmot or without.

    The wrappers of tensorflow-model-optimization are taken off: what is left is a plain Keras 3 model whose layers have
    the names that they had before `prune_low_magnitude`. Masked weights are zero, weights in clusters have the value
    of their centroid, and a model that `quantize_model` made becomes the float model that it trained. Neither
    `tf_keras` nor tfmot is needed. The model is not compiled.

    Args:
        path: Path of an `.h5` file, or of the folder of a SavedModel: of that, only what Keras wrote about its layers
            is read, and no function in it is run.
        safe_mode: Whether to refuse `Lambda` layers, which are Python code that loading would run.

    Returns:
        A `keras.Model`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, describes no model (that of a subclassed one does not), or one with layers
            that Keras 3 does not have.

    Example:

    >>> import keras_sparse as ks
    >>> ks.compat.tfmot.load("pruned.h5")
    Traceback (most recent call last):
    ...
    FileNotFoundError: There is no such file. Received: 'pruned.h5'
    """
    config, weights = (savedmodel if os.path.isdir(path) else hdf5).read(path)
    try:
        largest = max((array.size for arrays in weights.values() for _, array in arrays), default=0)
        _plan(_build(config, safe_mode, _Zeros(largest)), weights)
        node = _build(config, safe_mode, None)
        for variable, value in _plan(node, weights):
            variable.assign(value)
    except Exception as error:  # A configuration may be anything, and Keras raises anything on it.
        text = hdf5.in_a_line(error, 900)
        kind = "" if isinstance(error, ValueError) else f" ({type(error).__name__})"
        raise ValueError(f"The model cannot be loaded{kind}. {text} Received: {os.fspath(path)!r}") from error
    for leaf in node.leaves():
        if isinstance(leaf.layer, keras.layers.Normalization):
            leaf.layer.finalize_state()
    node.freeze()
    return node.layer


@keras.saving.register_keras_serializable("keras_sparse", "keras2_zeros")
class _Zeros(Configurable, keras.initializers.Initializer):
    """Zeros, but no more than the file has to put in their place: a size in a configuration may be anything."""

    def __init__(self, most=0):
        self.most = most

    def __call__(self, shape, dtype=None):
        if math.prod(shape) > max(self.most, 1):
            raise ValueError(f"A weight of shape {tuple(shape)} is larger than all that the file holds.")
        return keras.ops.zeros(shape, dtype)


def _build(config, safe_mode, initializer):
    return graphs.Graph(keras2.LayerFactory(safe_mode, initializer)).model(config)


def _plan(node, weights):
    """List pairs of a variable and its value, for all variables that the file should have."""
    pairs, left = [], {name for name, arrays in weights.items() if arrays}
    for child in node.children:
        pairs += _values(child, weights.get(child.name, []))
        left.discard(child.name)
    if left:
        raise ValueError(f"The file has weights of {sorted(left)[:5]}, and no such layers.")
    return pairs


def _values(node, arrays):
    """Pairs of variable and value for one layer of the model at the top, from its arrays in the file."""
    added = {}
    for leaf in node.leaves():
        arrays, added[id(leaf)] = wrappers.split(arrays, leaf.around)
    trained, rest = _order(node)
    chunks = trained + rest
    count = sum(len(variables) for _, variables in chunks)
    if count != len(arrays):
        raise ValueError(f"The layer {node.name!r} has {count} weights, and the file has {len(arrays)} for it.")
    found, start = {}, 0
    for leaf, variables in chunks:
        values = _matched(node.name, variables, arrays[start : start + len(variables)])
        found.setdefault(id(leaf), []).extend(zip(variables, values, strict=True))
        start += len(variables)
    pairs = []
    for leaf in node.leaves():
        own = found.get(id(leaf), [])
        named = [(variable.path.split("/")[-1], value) for variable, value in own]
        merged = wrappers.merge(named, leaf.around, added[id(leaf)])
        pairs += [(variable, value) for (variable, _), value in zip(own, merged, strict=True)]
    return pairs


def _order(node):
    """The order in which Keras 2 stores weights: the trained ones of all layers first, then all others.

    Returns:
        Two lists of pairs of a leaf and its variables.
    """
    if node.children is not None:
        parts = [_order(child) for child in node.children]
        trained, rest = ([pair for part in parts for pair in part[i]] for i in (0, 1))
    elif node.layer is None:
        return [], []
    else:
        variables = [v for v in node.layer.variables if "seed_generator" not in v.path and not _is_state(node.layer, v)]
        trained = [(node, [v for v in variables if v.trainable])]
        rest = [(node, [v for v in variables if not v.trainable])]
    return ([], trained + rest) if node.frozen else (trained, rest)


def _is_state(layer, variable):
    """Whether it is the state of a stateful RNN, which Keras 2 does not save."""
    states = [one for part in (layer, getattr(layer, "forward_layer", None), getattr(layer, "backward_layer", None))
              for one in keras.tree.flatten(getattr(part, "states", None) or [])]  # fmt: skip
    return any(one is variable for one in states)


def _matched(layer, variables, arrays):
    """The arrays for variables, by order; by name and shape where the order is another one."""
    named = [(name.split("/")[-1], array) for name, array in arrays]

    def fits(variable, name, array):
        return variable.path.split("/")[-1] == name and tuple(variable.shape) == array.shape

    pairs = list(zip(variables, named, strict=True))
    if not all(fits(variable, *one) for variable, one in pairs):
        choices = [[one for one in named if fits(variable, *one)] for variable in variables]
        if all(len(choice) == 1 for choice in choices):
            named = [choice[0] for choice in choices]
    values = []
    for variable, (name, array) in zip(variables, named, strict=True):
        if tuple(variable.shape) != array.shape:
            raise ValueError(
                f"The weight {variable.path!r} of the layer {layer!r} has the shape {tuple(variable.shape)}, and the "
                f"file has {name!r} of shape {array.shape} for it."
            )
        values.append(np.asarray(array, keras.backend.standardize_dtype(variable.dtype)))
    return values
