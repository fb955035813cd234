"""MACs are multiplications: how often each weight is used for one sample, read off a run of the model."""

import math

import keras
import numpy as np

from keras_sparse.graph.kinds import EMBEDDING, kind_of
from keras_sparse.graph.substitution import substituted
from keras_sparse.graph.weights import layers, weights
from keras_sparse.identity import IdentityDict

__all__ = ["uses"]


def uses(model, sample):
    """Count how many numbers each kernel's weights are multiplied with, for one sample.

    A weight of a dense layer is used once for each position along the axes between batch and features, one of a
    convolution once for each position of the output (of a transposed one: of the input), one of a recurrent layer once
    for each time step, as often as the layer is called. Embeddings are looked up, not multiplied. The weights of a
    layer without a row (see `ks.graph.register_kind`) count like a dense layer's.

    Args:
        model: A built Keras model.
        sample: Its inputs, a structure of arrays with a batch of one sample. They are run once, as often beside each
            other as the model has samples in a batch, if it says so. What the model keeps from call to call stays.

    Returns:
        `IdentityDict` from a variable to an int; variables that were not used are missing.

    Example:

    >>> import keras, numpy as np
    >>> from keras_sparse.graph.macs import uses
    >>> stack = [keras.layers.Conv2D(4, 3, name="a"), keras.layers.Flatten(), keras.layers.Dense(2, name="b")]
    >>> model = keras.Sequential([keras.Input((8, 8, 1)), *stack])
    >>> found = uses(model, np.zeros((1, 8, 8, 1)))
    >>> [found[layer.kernel] for layer in (model.layers[0], model.layers[2])]
    [36, 1]
    """
    kernels, found = IdentityDict(), IdentityDict()
    for weight in weights(model):
        if weight.kernel and weight.role != EMBEDDING:
            kernels.setdefault(weight.layer, []).append(weight)
    state = {"times": 1, "inside": False}  # how often a wrapper repeats; whether a loop is being run

    def observed(layer, call):
        kind = kind_of(layer)
        loop = kind.holder is not None

        def run(*args, **kwargs):
            if state["inside"]:
                return call(*args, **kwargs)
            state["inside"] = loop
            try:
                outputs = call(*args, **kwargs)
            finally:
                state["inside"] = False
            inputs, output = (
                next(x for x in keras.tree.flatten(each) if hasattr(x, "shape")) for each in ((args, kwargs), outputs)
            )
            if loop and not kind.recurrent:
                # What is inside may run any number of times at once: it is counted at one step.
                before, state["times"] = state["times"], state["times"] * inputs.shape[1]
                try:
                    kind.holder(layer)(keras.ops.take(inputs, 0, axis=1))
                finally:
                    state["times"] = before
                return outputs
            holders = layers(layer) if loop else [layer]
            for weight in (weight for holder in holders for weight in kernels.get(holder, ())):
                count = _positions(layer, tuple(inputs.shape), tuple(output.shape))
                found[weight.variable] = found.get(weight.variable, 0) + state["times"] * count
            return outputs

        return run

    watched = [layer for layer in layers(model) if layer in kernels or kind_of(layer).holder is not None]
    sample = _batch(model, sample)
    with substituted([(layer, "call", observed(layer, layer.call)) for layer in watched]), keras.StatelessScope():
        model(sample, training=False)
    return found


def _batch(model, sample):
    """A sample as often as a model has samples in a batch, which stateful layers want."""
    size = next((x.shape[0] for x in getattr(model, "inputs", None) or [] if x.shape[0]), 1)
    return keras.tree.map_structure(lambda x: np.repeat(x, size, axis=0), sample) if size > 1 else sample


def _positions(layer, inputs, outputs):
    """How often one call of a layer uses each of its weights, for one sample."""
    positions = kind_of(layer).positions
    if callable(positions):
        return positions(layer, inputs, outputs)
    shape = inputs if positions == "inputs" else outputs
    channels = shape[1 if getattr(layer, "data_format", None) == "channels_first" else -1]
    return math.prod(shape[1:]) // channels
