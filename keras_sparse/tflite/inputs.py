"""Random inputs show a wrong file if the model's outputs depend on them: at another scale than its own they hardly do.

A network that begins with `Rescaling(1 / 255)` makes next to nothing of normal numbers, and one for samples of 16 bits
even less: its outputs are those of its biases, and so may be those of another network. So inputs are drawn as the
model's own first layers will make normal numbers of them, where these are known, or at several scales, and tried.

Nor do probabilities show it that are all 0 or 1: behind a softmax of large numbers, those of a file with a kernel half
as large are the same.
"""

import itertools
import math
from dataclasses import replace

import keras
import numpy as np

from keras_sparse import graph, states
from keras_sparse.quiet import quiet

__all__ = ["random_batches", "spread"]

_OPEN = (32, 128, 512, 2048, 8192, 32768)  # sizes of dimensions that the model leaves open, other than the batch
_ENOUGH = 0.1  # share of an output's magnitude by which it should differ from sample to sample
_ENDS = 1 - 1e-3  # an output that reaches as far may end at 1
_SHRUNKEN = (2**-2, 2**-4)  # of the level and contrast, against outputs that are at their ends
_SCALES = (16, 2**8, 2**12, 2**16, 2**23, 2**31, 2**-8, 2**-16)
_SAMPLES = 4  # by which it is measured how far outputs depend on an input
_TOGETHER = 2**20  # numbers that a batch of such samples may have
_INTEGERS = (2, 2**8, 2**12, 2**15, 2**20, 2**31)  # upper bounds


def random_batches(model, signature, seed=0, like=None):
    """Random inputs that a model can take, in batches of 1, 2 and 3 where the batch size is open.

    Other open sizes are 32, or as much more as the model needs.

    Floats are normal, behind the `Rescaling` and `Normalization` layers that the model may begin with. If the outputs
    hardly depend on such numbers, they are of another level in each sample, or positive, larger or smaller. Integers
    stay below the number of rows of the model's smallest embedding; without one they are 0 and 1 (0 to 255 for images
    of uint8), or larger, likewise. Float inputs of a model with an embedding may be token numbers, so they are drawn
    from the valid ones.

    Args:
        model: A built Keras model.
        signature: Its `Signature`.
        seed: Of the random numbers.
        like: A flat list of arrays that have the open sizes.

    Returns:
        List of flat lists of arrays.

    Example:

    >>> import keras
    >>> from keras_sparse.tflite.signatures import signature
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Rescaling(1 / 255), keras.layers.Dense(3)])
    >>> [batch[0].shape for batch in random_batches(model, signature(model))]
    [(1, 4), (2, 4), (3, 4)]
    >>> float(random_batches(model, signature(model))[2][0].std()) > 100
    True
    """
    rng = np.random.default_rng(seed)
    with states.put_back(model):
        signature = _with_sizes(model, signature, like)
        draws = _chosen(model, signature)
    drawn = list(zip(draws, signature.inputs, strict=True))
    return [[_drawn(rng, draw, leaf, size) for draw, leaf in drawn] for size in (1, 2, 3)]


def spread(outputs):
    """How far each output differs from sample to sample, as a share of its largest magnitude.

    Of outputs that come near 1 and do not exceed it, such as probabilities, it is no more than their distance from 0
    and 1, where they hardly differ whatever is before them: the mean over the samples of the number that is farthest.
    Whole numbers are none of these.

    Args:
        outputs: List with, for each sample or batch, a list of arrays of the same shapes, one for each output.

    Returns:
        List of numbers, one for each output; numbers that are not finite count as equal.

    Example:

    >>> spread([[np.array([1.0, 2.0]), np.array(3.0)], [np.array([1.0, 4.0]), np.array(3.0)]])
    [0.5, 0.0]
    """
    return [_apart(np.stack(values)) for values in zip(*outputs, strict=True)]


def _apart(values):
    values = values.astype("float64")
    finite = np.isfinite(values).all(axis=0)
    if not finite.any():
        return 0.0
    values = values[:, finite]
    apart = float(np.ptp(values, axis=0).max() / max(np.abs(values).max(), 1e-20) * finite.mean())
    sizes = np.abs(values)
    if _ENDS <= sizes.max() <= 2 - _ENDS and (sizes % 1).any():
        apart = min(apart, float(np.minimum(sizes, np.abs(1 - sizes)).reshape(len(sizes), -1).max(axis=1).mean()))
    return apart


def _chosen(model, signature):
    """For each input a function that draws it: the first by which the outputs differ enough, or half of the most."""
    rows = min((int(w.shape[0]) for w in model.weights if w.name == "embeddings"), default=None)
    shifting = _leading(model, len(signature.inputs))
    own = [list(_draws(leaf, rows, path)) for leaf, path in zip(signature.inputs, shifting, strict=True)]
    chosen = [draws[0] for draws in own]
    enough = _ENOUGH / len(own)
    for place, draws in enumerate(own):
        found, ways = [], [[*chosen[:place], draw, *chosen[place + 1 :]] for draw in draws] if len(draws) > 1 else []
        together = max(1, _TOGETHER // _numbers(signature))
        while len(found) < len(ways) and max(found, default=0) < enough:  # mostly the first will do
            some = ways[len(found) :][: together if found else 1]
            found += _effects(model, signature, some, place)
        if found:
            wanted = min(enough, max(found) / 2)
            chosen[place] = next(draw for draw, effect in zip(draws, found, strict=False) if effect >= wanted)
    return chosen


def _with_sizes(model, signature, like):
    """The signature with all sizes known but that of the batch."""

    def with_sizes(sizes):
        shapes = [
            (leaf.shape[0], *(new if n is None else n for n, new in zip(leaf.shape[1:], own, strict=True)))
            for leaf, own in zip(signature.inputs, sizes, strict=True)
        ]
        inputs = [replace(leaf, shape=shape) for leaf, shape in zip(signature.inputs, shapes, strict=True)]
        return replace(signature, inputs=inputs)

    if like is not None:
        return with_sizes([array.shape[1:] for array in like])
    for size in _OPEN if any(None in leaf.shape[1:] for leaf in signature.inputs) else ():
        found = with_sizes([[size] * (len(leaf.shape) - 1) for leaf in signature.inputs])
        if _runs(model, found):
            return found
    return with_sizes([[_OPEN[0]] * (len(leaf.shape) - 1) for leaf in signature.inputs])


def _runs(model, signature):
    try:
        with quiet():
            outputs = signature.call(model, [np.zeros([n or 1 for n in x.shape], x.dtype) for x in signature.inputs])
            arrays = [keras.ops.convert_to_numpy(keras.ops.cast(y, "float32")) for y in keras.tree.flatten(outputs)]
    except Exception:  # what it says does not matter: the comparison will
        return False
    return all(array.size and not np.isnan(array).all() for array in arrays)  # a mean of no steps is NaN


def _numbers(signature):
    """How many numbers the inputs have by which an effect is measured."""
    return sum(_SAMPLES * math.prod(n or 1 for n in leaf.shape) for leaf in signature.inputs)


def _effects(model, signature, ways, place):
    """How far outputs differ if one input does and the others do not, for each of several ways to draw all inputs."""
    pairs = [_pair(signature, draws, place) for draws in ways]
    try:
        outputs = list(zip(*_joined(model, signature, pairs), strict=True))
        return [_apart_most(outputs[i : i + 2]) for i in range(0, len(outputs), 2)]
    except Exception:  # not all of them can be taken, or outputs are not one for each sample
        return [_effect(model, signature, pair) for pair in pairs]


def _joined(model, signature, pairs):
    """Each output of the batches of all pairs, from one call: a deep model is called a few times, not two dozen."""
    taken = getattr(model, "inputs", None) or signature.inputs
    if any(leaf.shape[:1] != (None,) for leaf in taken):
        raise ValueError("The model takes batches of one size.")
    if _numbers(signature) > _TOGETHER:  # before arrays are made
        raise ValueError("Keras holds what all layers make of a batch: that would be much.")
    batch = [np.concatenate(arrays) for arrays in zip(*itertools.chain(*pairs), strict=True)]
    outputs = _outputs(model, signature, batch)
    if any(output.shape[:1] != (len(batch[0]),) for output in outputs):
        raise ValueError("An output has no row for each sample.")
    return [np.split(output, 2 * len(pairs)) for output in outputs]


def _effect(model, signature, pair):
    try:
        return _apart_most([_outputs(model, signature, batch) for batch in pair])
    except Exception:  # it takes no such numbers; if it takes none, the comparison says so
        return 0.0


def _apart_most(outputs):
    return max(spread(outputs), default=0.0)  # some outputs are not meant to depend on this input


def _pair(signature, draws, place):
    """Two batches that differ in one input."""
    rng = np.random.default_rng(0)
    batch = [_drawn(rng, draw, leaf, 2) for draw, leaf in zip(draws, signature.inputs, strict=True)]
    other = _drawn(rng, draws[place], signature.inputs[place], 2)
    return batch, [*batch[:place], other, *batch[place + 1 :]]


def _outputs(model, signature, batch):
    with quiet():
        found = keras.tree.flatten(signature.call(model, batch))
        return [keras.ops.convert_to_numpy(keras.ops.cast(y, "float32")) for y in found]


def _drawn(rng, draw, leaf, size):
    shape = [size if n is None else n for n in leaf.shape]
    return draw(rng, shape).astype(leaf.dtype)


def _draws(leaf, rows, path):
    """Functions that draw an input, in the order in which they should be tried."""
    dtype = np.dtype(leaf.dtype)
    if rows is not None or dtype.kind not in "fiu":
        yield lambda rng, shape: rng.integers(0, min(rows or 2, 100 if dtype.kind == "f" else 2**31), shape)
    elif dtype.kind in "iu":
        known = [bound for bound in _INTEGERS if bound - 1 <= np.iinfo(dtype).max]
        for bound in known if dtype != np.uint8 else known[1:]:
            yield lambda rng, shape, bound=bound: rng.integers(0, bound, shape)
    else:
        kinds = [_normal, _levels, lambda rng, shape: np.abs(_levels(rng, shape))]
        kinds += [lambda rng, shape, size=size: size * _levels(rng, shape) for size in _SHRUNKEN]
        for kind in kinds if path else ():
            yield lambda rng, shape, kind=kind: _before(path, kind(rng, shape))
        yield from kinds
        for scale in _SCALES:
            yield lambda rng, shape, scale=scale: scale * np.abs(_levels(rng, shape))


def _normal(rng, shape):
    return rng.normal(size=shape)


def _levels(rng, shape):
    """Each sample with a level and a contrast of its own for each channel: pooling makes white noise all alike."""
    level, contrast = rng.normal(size=(2, shape[0], *[1] * (len(shape) - 2), *shape[1:][-1:]))
    return level + contrast * rng.normal(size=shape)


def _leading(model, count=1):
    """For each input, the layers that shift and scale it before all else."""
    if isinstance(model, keras.Sequential):
        return [list(_shifting(model.layers))]
    if not getattr(model, "inputs", None):  # a subclassed model does not tell
        return [[]] * count
    try:
        readers, names = graph.consumers(model), graph.references(graph.wiring(model)["input_layers"])
    except Exception:  # nor does one with a layer that has no config
        return [[]] * count
    operations, paths = {operation.name: operation for operation in model.operations}, []
    for name in names:
        paths.append([])
        while len(readers.get(name, ())) == 1 and readers[name][0] in operations:
            [name] = readers[name]
            paths[-1].append(operations[name])
    return [list(_shifting(path)) for path in paths]


def _shifting(path):
    for layer in path:
        if isinstance(layer, keras.Model) and len(getattr(layer, "inputs", None) or ()) == 1:
            [inner] = _leading(layer)
            yield from inner
            return  # whether all of its layers are such ones does not matter much
        if isinstance(layer, (keras.layers.Rescaling, keras.layers.Normalization)):
            yield layer
        elif not isinstance(layer, keras.layers.InputLayer):
            return


def _before(path, values):
    """What these layers make `values` of."""
    for layer in reversed(path):
        if isinstance(layer, keras.layers.Rescaling):
            values = (values - np.asarray(layer.offset)) / np.asarray(layer.scale)
            continue
        mean, variance = (keras.ops.convert_to_numpy(value) for value in (layer.mean, layer.variance))
        deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
        values = (values - mean) / deviation if layer.invert else values * deviation + mean
    return values
