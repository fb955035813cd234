"""Batch normalization's statistics are those of the inputs that training saw; other weights before it make others."""

import contextlib

import keras
import numpy as np

from keras_sparse import graph, selection, states
from keras_sparse.identity import IdentityDict
from keras_sparse.pruning.calibration import blocks

__all__ = ["Recent", "measured", "normalizations", "reestimate", "reestimate_batch_norm", "set_statistics"]

_ROWS = 1 << 14  # of a normalization's inputs that are looked at together


def reestimate_batch_norm(model, data, batch_size=128):
    """Set the moving mean and variance of each `BatchNormalization` to those of its inputs on data, in place.

    Pruning changes what the layers before a normalization make of the data, and its statistics are no longer those of
    its inputs. The model runs once over the data, as in inference but for the normalizations, which take the statistics
    of the batch; then each gets the mean and variance over all batches, whether it is trainable or not.

    Args:
        model: A built Keras model.
        data: Data as all functions take them, see `keras_sparse.batches`: inputs, as for `predict`, of which some
            hundred samples will do. Targets are not looked at.
        batch_size: Samples in a batch if `data` are arrays.

    Returns:
        How many layers have new statistics, an int.

    Raises:
        ValueError: If the model is not built, `data` have less than two samples or are not finite, or the model does
            not take them. The model is then as it was.
        TypeError: If `model` is not a Keras 3 model, or `data` is of the wrong type.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.BatchNormalization()])
    >>> ks.reestimate_batch_norm(model, np.array([[1.0], [3.0]]))
    1
    >>> ks.selection.as_array(model.layers[0].moving_mean).tolist()
    [2.0]
    """
    selection.check_model(model)
    return reestimate(model, blocks(data, batch_size))


def reestimate(model, data, without=()):
    """`reestimate_batch_norm` on a list of batches, but for the layers in `without`.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> ks.pruning.batch_norm.reestimate(model, [np.ones((2, 1))])
    0
    """
    observing = [one for one in normalizations(model) if one not in IdentityDict.fromkeys(without)]
    if not observing:
        return 0
    sums = IdentityDict()

    def observed(layer, call):
        def run(*args, **kwargs):
            x = args[0] if args else kwargs["inputs"]
            own = measured(layer, x, kwargs.get("mask"))
            sums[layer] = sums.get(layer, 0) + own
            set_statistics(layer, own)
            return call(*args, **{**kwargs, "training": False})

        return run

    with unchanged_on_failure(model):
        watched = graph.substituted([(layer, "call", observed(layer, layer.call)) for layer in observing])
        with states.rewound(model), watched:
            for batch in data:
                model(batch, training=False)
        for layer, own in sums.items():
            if not np.isfinite(own[2]).all():
                raise ValueError(f"The inputs of {layer.path} are not finite on `data`. Received: {model.name!r}")
            set_statistics(layer, own)
    return len(sums)


def normalizations(model):
    """List the `BatchNormalization` layers of a model, nested ones too.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="norm")])
    >>> [layer.name for layer in ks.pruning.batch_norm.normalizations(model)]
    ['norm']
    """
    return [layer for layer in graph.layers(model) if isinstance(layer, keras.layers.BatchNormalization)]


def measured(layer, x, mask=None):
    """How many numbers each channel of a normalization's inputs has, their sum and that of their squares.

    Args:
        layer: A `BatchNormalization`.
        x: A tensor.
        mask: Booleans with a dimension less, of which Keras's own statistics leave out what is `False`, or `None`.

    Returns:
        float64 array `[3, channels]`; those of several batches are added.

    Example:

    >>> import keras, numpy as np
    >>> from keras_sparse.pruning.batch_norm import measured
    >>> measured(keras.layers.BatchNormalization(), np.array([[1.0], [3.0]])).tolist()
    [[2.0], [4.0], [10.0]]
    """
    rows = _rows(layer, graph.as_array(x))
    if mask is not None:
        present = _rows(layer, np.broadcast_to(graph.as_array(mask).astype(bool)[..., None], x.shape))
    sums = np.zeros((3, rows.shape[1]))
    # In parts: in float64, all of an early layer's outputs may be the largest array of a whole calibration.
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS].astype(np.float64)
        count = np.full(len(sums[0]), len(part))
        if mask is not None:
            count = present[start : start + _ROWS].sum(axis=0)
            part = np.where(present[start : start + _ROWS], part, 0)
        sums += [count, part.sum(axis=0), (part**2).sum(axis=0)]
    return sums


def _rows(layer, array):
    """The numbers of each channel as a column."""
    moved = np.moveaxis(array, layer.axis, -1)
    return moved.reshape(-1, moved.shape[-1])


def set_statistics(layer, sums):
    """Set a normalization's statistics to those of sums, as `measured` returns them.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> layer = keras.layers.BatchNormalization()
    >>> layer.build((None, 1))
    >>> ks.pruning.batch_norm.set_statistics(layer, np.array([[2.0], [4.0], [10.0]]))
    >>> float(layer.moving_mean[0]), float(layer.moving_variance[0])
    (2.0, 1.0)
    """
    count, total, square = sums
    if not count.all():  # a batch that is masked as a whole
        return
    layer.moving_mean.assign(total / count)
    layer.moving_variance.assign(np.maximum(square / count - (total / count) ** 2, 0))


class Recent:
    """Moving statistics of the batches that training sees from now on, without what they were before.

    A moving average of `momentum` m keeps m**k of its former value after k batches: 54 % after 62 batches with Keras's
    0.99. That part is taken out as Adam corrects its bias (Kingma & Ba 2015, section 3). It holds for normalizations
    that run once for each batch; those of which a functional or Sequential model does not say so are left alone.

    Args:
        model: A built Keras model.

    Attributes:
        layers: The normalizations whose statistics these are.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.BatchNormalization()])
    >>> recent = ks.pruning.batch_norm.Recent(model)
    >>> outputs = model(np.array([[4.0], [6.0]]), training=True)
    >>> round(float(model.layers[0].moving_mean[0]), 4)
    0.05
    >>> recent.settle(batches=1)
    >>> round(float(model.layers[0].moving_mean[0]), 4)
    5.0
    """

    def __init__(self, model):
        self.layers = _running_once(model) if normalizations(model) else []
        self._before = [
            (layer, variable, np.array(graph.as_array(variable)))
            for layer in self.layers
            for variable in (layer.moving_mean, layer.moving_variance)
        ]

    def settle(self, batches):
        """Take the former values out of the statistics, which so many batches have moved since."""
        for layer, variable, before in self._before:
            left, now = layer.momentum**batches, graph.as_array(variable)
            if left < 1 and not np.array_equal(now, before):  # as of a frozen layer
                recent = (now - left * before) / (1 - left)
                variable.assign(np.maximum(recent, 0) if variable is layer.moving_variance else recent)


def _running_once(model):
    """The normalizations that a model of models runs once for each batch, as far as that is known."""
    if not isinstance(model, keras.Sequential) and not getattr(model, "operations", None):
        return []
    nodes = [] if isinstance(model, keras.Sequential) else graph.wiring(model)["layers"]
    repeated = {layer["name"] for layer in nodes if len(layer["inbound_nodes"]) > 1}
    found = []
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            found += [layer] * (layer.name not in repeated)
        elif isinstance(layer, keras.Model) and layer.name not in repeated:
            found += _running_once(layer)
    return found


@contextlib.contextmanager
def unchanged_on_failure(model):
    """Put a model's weights back if the block raises.

    Example:

    >>> import keras
    >>> from keras_sparse.pruning.batch_norm import unchanged_on_failure
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
    >>> try:
    ...     with unchanged_on_failure(model):
    ...         _ = model.layers[0].kernel.assign([[5.0]])
    ...         raise KeyboardInterrupt
    ... except KeyboardInterrupt:
    ...     print(float(model.layers[0].kernel[0, 0]))
    1.0
    """
    before = [(variable, np.array(graph.as_array(variable))) for variable in model.variables]
    try:
        yield
    except BaseException:
        for variable, value in before:
            variable.assign(value)
        raise
