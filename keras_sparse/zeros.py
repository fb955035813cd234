"""Zeros of a weight count as pruned, unless its initializer put them there."""

import math
import weakref

import keras
import numpy as np

__all__ = ["pruned", "remember"]

# What pruning has kept of the variables of this process: {id(variable): (reference to it, packed mask)}.
_KEPT = {}


def remember(variable, mask):
    """Remember which entries of a variable pruning has set to zero, as long as the variable lives.

    It is forgotten when one of them is no longer zero: then the variable has got other values.

    Args:
        variable: A `keras.Variable`.
        mask: Array of its shape, false where it was pruned.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> layer = keras.layers.Dense(2, kernel_initializer="zeros")
    >>> layer.build((None, 2))
    >>> ks.zeros.remember(layer.kernel, np.array([[True, False], [True, True]]))
    >>> ks.zeros.pruned(np.zeros((2, 2)), layer.kernel, layer).sum()
    np.int64(1)
    """
    key = id(variable)
    _KEPT[key] = weakref.ref(variable, lambda _: _KEPT.pop(key, None)), np.packbits(np.asarray(mask, bool))


def pruned(value, variable, layer):
    """Return where the zeros of a weight count as pruned, an array of booleans.

    All of them do, unless they stand exactly where the weight's initializer puts zeros (and pruning is known to have
    put them). The initializer is the one that the layer keeps as `kernel_initializer`, `recurrent_initializer` and
    the like. Identities, also one for each gate, and kernels that are zero but for their central position (Dirac,
    delta-orthogonal) are taken for initial, too. Without an initializer to ask, so are weights that are all zeros.

    Args:
        value: The value of the weight as an array.
        variable: The `keras.Variable`.
        layer: The layer that owns it.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> layer = keras.layers.Dense(8, kernel_initializer="identity")
    >>> layer.build((None, 8))
    >>> ks.zeros.pruned(np.eye(8), layer.kernel, layer).sum()
    np.int64(0)
    >>> ks.zeros.pruned(np.diag([1, 1, 1, 1, 1, 1, 1, 0]), layer.kernel, layer).sum()
    np.int64(57)
    """
    zero = value == 0
    if not zero.any():
        return zero
    known = _remembered(variable, zero)
    if np.array_equal(known, zero):
        return zero
    for initial in _initial_zeros(variable, layer, live=int(np.count_nonzero(~zero))):
        if initial.shape == zero.shape and np.array_equal(initial | known, zero):
            return known
    return zero


def _remembered(variable, zero):
    """Where pruning is known to have made zeros that are still there."""
    reference, packed = _KEPT.get(id(variable), (None, None))
    if reference is None or reference() is not variable:
        return np.zeros_like(zero)
    dropped = ~np.unpackbits(packed, count=zero.size).reshape(zero.shape).astype(bool)
    return np.zeros_like(zero) if (dropped & ~zero).any() else dropped


def _initial_zeros(variable, layer, live):
    """Yield where zeros may stand from the beginning; `live` is how many entries are not zero now."""
    shape = tuple(map(int, variable.shape))
    stem = variable.name.removesuffix("_kernel")
    names = f"{variable.name}_initializer", f"{stem}_initializer", "depthwise_initializer"
    found = [vars(layer)[name] for name in names if vars(layer).get(name) is not None][:1]
    if not found:  # Nobody says how this weight began; any initializer that the layer keeps may be its own.
        yield np.ones(shape, bool)
        found = [kept for kept in vars(layer).values() if isinstance(kept, keras.initializers.Initializer)]
    for initializer in found:
        yield from _zeros_of(initializer, shape, variable.dtype)
    yield from _identities(shape, live)


def _zeros_of(initializer, shape, dtype):
    """Yield where an initializer puts zeros, if it can be asked."""
    # Keras's random initializers make no zeros, or zeros alone (a scale of 0), which a small array shows.
    random = type(initializer).__module__.split(".")[0] == "keras" and hasattr(initializer, "seed")
    if random and isinstance(initializer.seed, keras.random.SeedGenerator):
        return  # Asking it would change what it draws next.
    try:
        value = keras.initializers.get(initializer)((2,) * len(shape) if random else shape, dtype=dtype)
        zero = keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(value)) == 0
    except Exception:  # An initializer of the user's own may work only once, or for other shapes.
        return
    yield np.full(shape, zero.all()) if random else zero


def _identities(shape, live):
    """Yield the zeros of kernels that begin by passing on what they get, of at least 4 entries that are not zero."""
    if len(shape) < 2 or math.prod(shape) < 16 or live < 4:
        return
    rows, columns = shape[-2:]
    stack = math.prod(shape[:-2])
    center = np.zeros((*shape[:-2], 1, 1), bool)
    center[tuple((size - 1) // 2 for size in shape[:-2])] = True
    if stack > 1 and live <= rows * columns:
        yield np.broadcast_to(~center, shape)
    if live <= stack * max(rows, columns):
        eyes = [np.eye(rows, columns, dtype=bool)]
        if columns % rows == 0:
            eyes.append(np.tile(np.eye(rows, dtype=bool), columns // rows))
        elif rows % columns == 0:
            eyes.append(np.tile(np.eye(columns, dtype=bool), (rows // columns, 1)))
        for eye in eyes:
            yield np.broadcast_to(~eye, shape)
            yield ~(center & eye)
    for axis in range(1, len(shape)):  # A matrix that is an identity and has several axes on a side (attention).
        side = math.prod(shape[:axis])
        if side**2 == math.prod(shape) and live <= side:
            yield ~np.eye(side, dtype=bool).reshape(shape)
