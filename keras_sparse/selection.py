"""A selection: which weights of a model may become sparse, and why the others may not."""

import re
from collections.abc import Sequence
from dataclasses import replace

import keras

from keras_sparse.graph import NO_KERNELS, Weight, as_array, check_model, layers, weights
from keras_sparse.identity import IdentityDict

__all__ = [
    "NO_KERNELS",
    "Only",
    "Selection",
    "Weight",
    "as_array",
    "check_filters",
    "check_model",
    "layers",
    "matching",
    "only",
    "pruned_weights",
    "pruned_zeros",
    "select",
    "weights",
]


class Selection(Sequence):
    """The weights of a model, chosen or skipped: a sequence of all of them, in the order of `ks.graph.weights`.

    Args:
        weights: List of `Weight`; of those that are skipped, `skipped` is the reason.

    Attributes:
        chosen: List of the weights that are selected.
        skipped: List of the others.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="a")])
    >>> selection = ks.selection.select(model)
    >>> [w.path for w in selection.chosen], [w.path for w in selection.skipped]
    (['sequential/a/kernel'], ['sequential/a/bias'])
    """

    def __init__(self, weights):
        self._weights = list(weights)
        self.chosen = [weight for weight in self._weights if weight.skipped is None]
        self.skipped = [weight for weight in self._weights if weight.skipped is not None]

    def __getitem__(self, index):
        return self._weights[index]

    def __len__(self):
        return len(self._weights)

    def without(self, variables, reason):
        """The selection with some of the chosen weights, told by their variables, skipped for a reason."""
        gone = IdentityDict.fromkeys(variables)
        return Selection(
            replace(w, skipped=reason) if w.variable in gone and w.skipped is None else w for w in self._weights
        )


def select(model, filters=None, frozen=False, named=()):
    """Select weights of a built model.

    Args:
        model: A built Keras model or layer.
        filters: A regex, a layer, a class of layers, a callable on the variable, or a list of them. Regexes are
            searched in `variable.path`. A layer or a model stands for every kernel in it, a class for all layers that
            are instances of it. Only weights that multiply inputs are asked about: biases, normalization weights and
            vectors are never selected. `None` selects all but depthwise kernels and embeddings.
        frozen: Whether kernels that are not trainable are selected as well.
        named: What `only` returns, weights, layers, classes of layers. Without `filters`, they select a depthwise
            kernel or an embedding that they name.

    Returns:
        A `Selection`, in which at least one weight is chosen.

    Raises:
        ValueError: If a filter, or all of them together, select nothing.
        TypeError: If `filters` is none of the above.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="a"), keras.layers.Dense(3, name="b")])
    >>> [w.path for w in ks.selection.select(model, filters="a/").chosen]
    ['sequential/a/kernel']
    >>> [w.path for w in ks.selection.select(model, filters=[model.layers[1], "a/"]).chosen]
    ['sequential/a/kernel', 'sequential/b/kernel']
    """
    everything = weights(model)
    matches = _matcher(filters, everything)
    selected = []
    for weight in everything:
        skipped = weight.skipped
        if weight.kernel:
            if matches is not None:
                skipped = None if matches(weight.variable) else "not matched by `filters`"
            elif any(_names(key, weight) for key in named):
                skipped = None
            if skipped is None and not (weight.trainable or frozen):
                skipped = "not trainable: set `trainable = True` to prune it during training"
                if getattr(weight.layer, "lora_enabled", False):
                    skipped = "frozen by LoRA: save and load the model, which merges the update, and prune that"
        selected.append(replace(weight, skipped=skipped))
    selection = Selection(selected)
    if not selection.chosen:
        received = "" if filters is None else f" Received: filters={filters!r}."
        raise ValueError(
            f"There is nothing to prune in {model.name!r}: every weight is skipped.{received} The reasons: "
            + "; ".join(f"{w.path}: {w.skipped}" for w in selected[:8])
        )
    return selection


def pruned_weights(model, filters=None):
    """List the kernels of a built model that have zeros which count as pruned; `Weight.pruned_zeros` says which.

    Args:
        model: A built Keras model or layer.
        filters: As in `select`, but `None` stands for every kernel: depthwise kernels and embeddings too, trainable or
            not.

    Returns:
        List of `Weight`, in which `skipped` is `None`. Kernels that pruning has emptied belong to it, kernels with the
        zeros of their initializer do not. `pruned_zeros` returns the zeros with them.

    Raises:
        ValueError: If a filter matches no kernel.
        TypeError: If `filters` are of the wrong type.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((9,)), keras.layers.Dense(8, name="a"), keras.layers.Dense(8, name="b")])
    >>> report = ks.prune(model, {"a/": 0.5})
    >>> [w.path for w in ks.selection.pruned_weights(model)]
    ['sequential/a/kernel']
    """
    return [weight for weight, _ in pruned_zeros(model, filters)]


def pruned_zeros(model, filters=None):
    """List pairs of each weight of `pruned_weights` and where its zeros count as pruned, an array of booleans.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((9,)), keras.layers.Dense(8, name="a"), keras.layers.Dense(8, name="b")])
    >>> report = ks.prune(model, {"a/": 0.5})
    >>> [(w.layer.name, int(zeros.sum())) for w, zeros in ks.selection.pruned_zeros(model)]
    [('a', 36)]
    """
    everything = weights(model)
    matches = _matcher(filters, everything)
    kernels = [w for w in everything if w.kernel and (matches is None or matches(w.variable))]
    found = [(replace(weight, skipped=None), weight.pruned_zeros()) for weight in kernels]
    return [(weight, zeros) for weight, zeros in found if zeros.any()]


class Only(str):
    """The path of weights as a filter or a key of a target: it means the weights of this path and no others.

    As a string it is a regex of the same meaning, which can stand in a file; as an object it may also name an embedding
    or a depthwise kernel.

    Args:
        path: A weight's path.

    Attributes:
        path: The same.

    Example:

    >>> import keras_sparse as ks
    >>> key = ks.selection.Only("dense/kernel")
    >>> key, key.path
    ('^dense/kernel$', 'dense/kernel')
    """

    def __new__(cls, path):
        self = super().__new__(cls, f"^{re.escape(path)}$")
        self.path = path
        return self

    def __getnewargs__(self):
        return (self.path,)


def only(path):
    """Return a key that means the weights of a path and no others.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((6,)), keras.layers.Embedding(9, 4, name="table")])
    >>> report = ks.prune(model, {ks.selection.only("sequential/table/embeddings"): 0.5})
    >>> report.totals["zeros"]
    18
    """
    return Only(path)


def matching(pattern, candidates):
    """Return the weights among `candidates` whose path the regex hits, or raise if there is none.

    A weight, what `only` returns, a layer, a class of layers, or a callable on the variable does instead of a regex.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="a"), keras.layers.Dense(3, name="b")])
    >>> weights = ks.selection.weights(model)
    >>> [w.path for w in ks.selection.matching(model.layers[1], weights) if w.kernel]
    ['sequential/b/kernel']
    """
    if _is_layer(pattern):
        return _held_by(pattern, candidates)
    if isinstance(pattern, (Only, Weight)):
        found = [w for w in candidates if _names(pattern, w)]
        if not found:
            there = _some(repr(w.path) for w in candidates)
            raise ValueError(f"No weight that could be pruned is {pattern.path!r}. Those are: {there}.")
        return found
    if callable(pattern):
        found = [w for w in candidates if pattern(w.variable)]
        if not found:
            raise ValueError(f"{pattern!r} is true for no weight that could be pruned.")
        return found
    try:
        found = [w for w in candidates if re.search(pattern, w.path)]
    except re.error as error:
        raise ValueError(f"Expected a regular expression ({error}). Received: {pattern!r}") from error
    except TypeError as error:
        raise TypeError(
            "Expected a regular expression as a string, a layer, a class of layers, or a callable on the variable. "
            f"Received: {pattern!r} of type {type(pattern).__name__}"
        ) from error
    if not found:
        raise ValueError(
            f"The regular expression {pattern!r} matches no weight that could be pruned. Those are: "
            f"{_some(repr(w.path) for w in candidates)}. (Biases and normalization weights are never pruned.)"
        )
    return found


def _held_by(pattern, candidates):
    """The weights among `candidates` in a layer, or in the layers of a class."""
    found = [w for w in candidates if any(_is_of(layer, pattern) for layer in w.holders)]
    if found:
        return found
    if isinstance(pattern, type):
        there = _some(dict.fromkeys(type(w.layer).__name__ for w in candidates))
        raise ValueError(
            f"There is no layer of the class {pattern.__name__} with a weight that could be pruned. Such weights are "
            f"in layers of: {there}. Received: {pattern!r}"
        )
    own = any(w.kernel for w in weights(pattern)) if pattern.built else True
    reason = "is not in the model, or all of its kernels are left out" if own else "has no kernel"
    raise ValueError(
        f"The layer {pattern.name!r} {reason}{'' if pattern.built else ' (it is not built)'}. Weights that could be "
        f"pruned are: {_some(repr(w.path) for w in candidates)}. Received: {type(pattern).__name__} {pattern.name!r}"
    )


def _is_layer(pattern):
    return isinstance(pattern, keras.layers.Layer) or (
        isinstance(pattern, type) and issubclass(pattern, keras.layers.Layer)
    )


def _names(key, weight):
    """Whether a key stands for this weight by what it is: a path, the weight itself, its layer or the layer's class."""
    if isinstance(key, Only):
        return weight.path == key.path
    if isinstance(key, Weight):
        return weight.variable is key.variable
    return _is_of(weight.layer, key)


def _is_of(layer, pattern):
    """Whether a layer is the one that `pattern` is, or an instance of it."""
    return _is_layer(pattern) and (isinstance(layer, pattern) if isinstance(pattern, type) else layer is pattern)


def _some(names):
    names = list(names)
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") or "none"


def check_filters(filters):
    """Raise unless `filters` are what `select` takes; whether they match anything, a model shows.

    Raises:
        TypeError: If they are something else.

    Example:

    >>> import keras_sparse as ks
    >>> ks.selection.check_filters(3)
    Traceback (most recent call last):
    ...
    TypeError: `filters` must be a regex as a string, a layer, a class of layers, a callable on the variable, or ...
    """
    found = filters if isinstance(filters, (list, tuple)) else [filters]
    known = found and all(
        isinstance(one, (str, re.Pattern, Weight)) or _is_layer(one) or _is_function(one) for one in found
    )
    if filters is not None and not known:
        raise TypeError(
            "`filters` must be a regex as a string, a layer, a class of layers, a callable on the variable, or a list "
            f"of them. Received: filters={filters!r}"
        )


def _is_function(filters):
    return callable(filters) and not isinstance(filters, (type, keras.layers.Layer))


def _matcher(filters, everything):
    check_filters(filters)
    if filters is None or _is_function(filters):
        return filters
    candidates = [w for w in everything if w.kernel]
    patterns = filters if isinstance(filters, (list, tuple)) else [filters]
    hit = IdentityDict.fromkeys(w.variable for pattern in patterns for w in matching(pattern, candidates))
    return hit.__contains__
