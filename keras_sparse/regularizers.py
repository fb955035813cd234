"""Regularizers that pull weights to zero, and `regularize`, which puts any regularizer on a model that exists."""

import json
import warnings

import keras
import numpy as np
from keras import ops

from keras_sparse import graph, patterns, selection
from keras_sparse.identity import IdentityDict
from keras_sparse.registry import Configurable, check_penalty, serializable
from keras_sparse.reports import Report

__all__ = ["L1", "GroupLasso", "Slimming", "regularize"]


class MovableStrength(Configurable, keras.regularizers.Regularizer):
    """A regularizer with a strength that `ks.callbacks.StrengthSchedule` moves. Subclasses implement `cost(x)`."""

    def __init__(self, strength):
        check_penalty("strength", strength)
        self.strength = float(strength)
        self._moved = None

    def __call__(self, x):
        if self._moved is None:
            return self.strength * self.cost(x)
        return ops.cast(ops.convert_to_tensor(self._moved), x.dtype) * self.cost(x)

    of_others = False  # Whether it prices other weights too, of which a config cannot tell.

    def for_weights(self, model, weights):
        """List the regularizers as they are put on weights of a model: itself, or those that know where units lie.

        Args:
            model: The model.
            weights: List of `Weight`.
        """
        return [self] * len(weights)

    def move(self, fraction):
        """Make the strength `fraction` of the constructor's. Returns whether functions traced before are outdated."""
        first = self._moved is None
        if first:
            self._moved = keras.Variable(0.0, trainable=False, dtype="float32", name="strength")
        self._moved.assign(self.strength * fraction)
        # A compiled step of JAX holds the value of a variable that is not among the model's.
        return first or keras.backend.backend() == "jax"


@serializable
class L1(MovableStrength):
    """The lasso: `l1 * sum(abs(w))`, Tibshirani, "Regression shrinkage and selection via the lasso" (1996).

    It has the arguments of `keras.regularizers.L1`, and a derivative of 0 at 0 on every backend.

    Args:
        l1: At least 0. `ks.callbacks.StrengthSchedule` raises it to this value in training.

    Raises:
        ValueError: If `l1` is negative, infinite or NaN.
        TypeError: If it is no number.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> float(ks.regularizers.L1(0.5)(np.array([[1.0, -3.0]], "float32")))
    2.0
    """

    def __init__(self, l1=0.01):
        check_penalty("l1", l1)
        super().__init__(l1)
        self.l1 = self.strength

    def cost(self, x):
        """The sum of the absolute values of a tensor of any shape."""
        # Not `abs`, whose derivative at 0 is 1 on JAX: weights that are zero would be pushed off it.
        return ops.sum(x * ops.stop_gradient(ops.sign(x)))


@serializable
class Slimming(L1):
    """The lasso on the scales of batch normalizations, one for each channel: `l1 * sum(abs(gamma))`.

    Network slimming: Liu et al., "Learning efficient convolutional networks through network slimming" (2017), equation
    1. `ks.regularize` puts it on scales and not on kernels. Then `ks.prune(model, budget, "slimming",
    pattern="channel")` takes the channels with the smallest scales, with what must leave with them, and `ks.shrink`
    removes them.

    Args:
        l1: At least 0; the paper has 1e-4. `ks.callbacks.StrengthSchedule` raises it to this value in training.

    Raises:
        ValueError: If `l1` is negative, infinite or NaN.
        TypeError: If it is no number.

    Example:

    >>> import keras, keras_sparse as ks
    >>> layers = [keras.layers.Conv2D(8, 3), keras.layers.BatchNormalization(name="norm")]
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), *layers])
    >>> [row["path"] for row in ks.regularize(model, ks.regularizers.Slimming(1e-4)).rows]
    ['sequential/norm/gamma']
    """

    of_scales = True


@serializable
class GroupLasso(MovableStrength):
    """The group lasso: `strength * sum over groups g of sqrt(|g|) * ||w_g||_2`, `|g|` being the weights of a group.

    Yuan & Lin, "Model selection and estimation in regression with grouped variables" (2006), equation 2.1 with the
    weights of their section 2. It pulls groups to zero as a whole. The gradient at a group of zeros is 0.

    Args:
        strength: At least 0. `ks.callbacks.StrengthSchedule` raises it to this value in training.
        group: Which weights belong together: `"channel"` (output units and filters), `"block_1x4"` and the like, or a
            `ks.patterns.Pattern`. All groups of a weight must have the same size.
        output_axes: The axes of the weight that count output units. `ks.regularize` knows them for each layer.

    Raises:
        ValueError: If the strength is negative, infinite or NaN, or, when called, if groups do not divide the weight.
        TypeError: If an argument is of the wrong type.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> weight = np.array([[3.0, 0.0], [4.0, 0.0]], "float32")
    >>> round(float(ks.regularizers.GroupLasso(1.0)(weight)), 4)
    7.0711
    """

    def __init__(self, strength, group="channel", output_axes=(-1,)):
        super().__init__(strength)
        self.group = patterns.get(group)
        self.output_axes = tuple(int(axis) for axis in output_axes)

    def cost(self, x):
        """The sum of the groups' norms, each times the root of the group's size, of a tensor of a kernel's shape."""
        size, order = self.layout(tuple(int(n) for n in x.shape))
        # Equal groups: weights in the order of their groups are a matrix with a group in each row.
        squares = ops.sum(ops.reshape(ops.take(ops.reshape(ops.square(x), (-1,)), order), (-1, size)), axis=1)
        # The root has no derivative at 0, and a gradient of NaN would pass through one `where`.
        positive = squares > 0
        norms = ops.where(positive, ops.sqrt(ops.where(positive, squares, ops.ones_like(squares))), 0.0)
        return size**0.5 * ops.sum(norms)

    def for_weights(self, model, weights):
        by_graph = self.group.whole_units and getattr(model, "inputs", None)
        joined = _joined(model, weights) if by_graph else IdentityDict()
        return [
            _Together(self.strength, joined[w.variable]) if w.variable in joined else self._for_weight(w)
            for w in weights
        ]

    def _for_weight(self, weight):
        own = type(self).from_config(self.get_config() | {"output_axes": weight.output_axes})
        own.layout(tuple(weight.variable.shape))  # Raises now, before anything changes, if groups do not divide it.
        return own

    def layout(self, shape):
        """Return the size of a group, and the flat indices of the weights of `shape` ordered by group."""
        groups = self.group.groups(shape, self.output_axes).reshape(-1)
        sizes = np.bincount(groups)
        if np.any(sizes != sizes[0]):
            raise ValueError(
                f"The groups do not divide the weight: they would be of {sizes.min()} to {sizes.max()} weights. Choose "
                f"a block that divides the matrix [outputs, inputs]. Received: shape={shape}, "
                f"output_axes={self.output_axes}, group={type(self.group).__name__}({self.group.get_config()})"
            )
        return int(sizes[0]), np.argsort(groups, kind="stable").astype("int32")


class _Together(GroupLasso):
    """The group lasso of one weight on channels that it makes with others, or that lie in it several times.

    Summed over these weights it is `strength * sum over channels c of sqrt(n_c) * ||w_c||_2`, of which each tells the
    share `||own_c||^2 / ||w_c||` and has the gradient of the whole, so that frozen ones do no harm.

    Args:
        strength: As in `GroupLasso`.
        members: Pairs `(variable, {axis: numbers})` of the weights that make a channel, the weight itself first: from 1
            on the channels are numbered, what is numbered 0 counts in none.
    """

    of_others = True

    def __init__(self, strength, members):
        super().__init__(strength)
        self.members = members

    def cost(self, x):
        count = 1 + max(int(numbers.max()) for _, axes in self.members for numbers in axes.values())
        own = _squares(x, self.members[0][1], count)
        others, sizes = ops.zeros_like(own), np.zeros(count)
        for index, (variable, axes) in enumerate(self.members):
            if index:
                others = others + _squares(ops.cast(ops.convert_to_tensor(variable), x.dtype), axes, count)
            for numbers in axes.values():
                sizes += np.bincount(numbers, minlength=count) * (int(np.prod(variable.shape)) // len(numbers))
        sizes[0] = 0
        total = own + ops.stop_gradient(others)
        positive = total > 0  # the root has no derivative at 0
        norms = ops.sqrt(ops.where(positive, total, ops.ones_like(total)))
        roots = ops.cast(np.sqrt(sizes), x.dtype) * ops.cast(positive, x.dtype)
        whole, share = ops.sum(roots * norms), ops.sum(roots * own / norms)
        return whole + ops.stop_gradient(share - whole)

    def __repr__(self):
        return f"GroupLasso(strength={self.strength!r}) over {', '.join(variable.path for variable, _ in self.members)}"


def _squares(value, axes, count):
    """The sum of the squares of each channel's weights, by its number."""
    squares, found = ops.square(value), 0.0
    for axis, numbers in axes.items():
        sums = ops.sum(squares, [i for i in range(len(value.shape)) if i != axis])
        found = found + ops.segment_sum(sums, ops.convert_to_tensor(numbers.astype("int32")), count)
    return found


def regularize(model, regularizer, filters=None):
    """Put a regularizer on weights of a model that exists, trained or not.

    The loss grows by the regularizer's value, once for each weight. It takes effect without `compile`, replaces what
    was there, and is saved with the model where the layers have an argument for it.

    Args:
        model: A built Keras model.
        regularizer: A Keras regularizer, a name such as `"l1"`, or `None` to remove what is there. Each weight gets a
            `GroupLasso` of its own, with the weight's `output_axes`; with `group="channel"`, channels that must leave
            together (a residual sum, gates, heads, `ks.channel_groups` lists them) have one norm over all chosen
            weights that make them, in a functional or Sequential model. A `Slimming` is put on the scales of batch
            normalizations, of which `filters` name some; all others on kernels.
        filters: Which weights: a regex, a list of them, or a callable on the variable; see `ks.selection.select`.

    Returns:
        A `Report` with a row for each chosen weight: `path`, `regularizer`, `saved` and the `reason` if it is not.

    Warns:
        UserWarning: If a saved and loaded model would not have the regularizer on some weight.

    Raises:
        ValueError: If the model is not built, the filters select nothing, or groups do not divide a weight.
        TypeError: If an argument is of the wrong type.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, kernel_initializer="ones")])
    >>> ks.regularize(model, ks.regularizers.L1(0.5)).rows[0]["saved"]
    True
    >>> float(model.losses[0])
    6.0
    """
    selection.check_model(model)
    regularizer = keras.regularizers.get(regularizer)
    if regularizer is not None and not callable(regularizer):
        raise TypeError(f"Expected a Keras regularizer, a name or `None`. Received: regularizer={regularizer!r}")
    of_scales = getattr(regularizer, "of_scales", False)
    chosen = _scales(model, filters) if of_scales else selection.select(model, filters).chosen
    ours = isinstance(regularizer, MovableStrength)
    attached = regularizer.for_weights(model, chosen) if ours else [regularizer] * len(chosen)
    reasons = _why_not_saved(model, chosen)
    for index, (weight, own) in enumerate(zip(chosen, attached, strict=True)):
        weight.variable.regularizer = own
        attribute = _attribute(weight)
        of_others = getattr(own, "of_others", False)
        if of_others:
            reasons[index] = "a config cannot say which other weights make its channels"
        if attribute:
            setattr(weight.layer, attribute, None if of_others else own)
    if isinstance(model, keras.Model):
        model.train_function = model.test_function = None  # They were traced with other penalties.
    name = "none" if regularizer is None else getattr(regularizer, "__name__", type(regularizer).__name__)
    rows = [
        {"path": w.path, "regularizer": name, "saved": reason is None, "reason": reason or ""}
        for w, reason in zip(chosen, reasons, strict=True)
    ]
    lost = [row for row in rows if not row["saved"]]
    if lost and regularizer is not None:
        warnings.warn(
            f"{len(lost)} of {len(rows)} weights have the regularizer now, but not after the model is saved and "
            "loaded; call `ks.regularize` again then. "
            + "; ".join(f"{row['path']}: {row['reason']}" for row in lost[:8]),
            stacklevel=2,
        )
    return Report("Regularizers", rows, {"weights": len(rows), "saved": len(rows) - len(lost)})


def _scales(model, filters):
    """The weights that scale channels."""
    selection.check_filters(filters)
    found = [weight for weight in selection.weights(model) if weight.variable is graph.scale_of(weight.layer)]
    if not found:
        raise ValueError(
            "`Slimming` needs layers that scale channels, such as `BatchNormalization(scale=True)`. "
            f"Received: {model.name!r}, which has none"
        )
    if filters is None:
        return found
    keys = filters if isinstance(filters, (list, tuple)) else [filters]
    named = IdentityDict.fromkeys(w.variable for key in keys for w in selection.matching(key, found))
    return [weight for weight in found if weight.variable in named]


def _joined(model, chosen):
    """`{variable: members}` as `_Together` takes them, of weights whose channels are not theirs alone."""
    channels, weights = graph.Channels(model), IdentityDict((weight.variable, weight) for weight in chosen)
    made = [part for _, part in channels.parts() if part.made]
    dense = IdentityDict.fromkeys(
        w.variable
        for w in selection.weights(model)
        if w.kernel and w.role != graph.DEPTHWISE and w.variable not in weights
    )
    free = np.ones(len(channels.roots), bool)
    free[[0, *channels.reasons]] = False
    for part in made:
        if part.variable in dense:
            free[np.concatenate([channels.roots[part.axes[axis]] for axis in part.made])] = False
    roots = IdentityDict()
    for part in made:
        axes = {axis: channels.roots[part.axes[axis]] for axis in part.made}
        axes = {axis: np.where(free[own], own, 0) for axis, own in axes.items() if free[own].any()}
        if part.variable in weights and axes:
            roots[part.variable] = axes
    places = np.zeros(len(free), int)
    for axes in roots.values():
        for own in axes.values():
            np.add.at(places, own, 1)
    found = IdentityDict()
    for variable, axes in roots.items():
        units = {axis % len(variable.shape) for axis in weights[variable].output_axes}
        own = np.unique(np.concatenate(list(axes.values())))
        own = own[own > 0]
        if (places[own] > 1).any() or units != set(axes):
            numbers = np.zeros(len(free), int)
            numbers[own] = 1 + np.arange(len(own))
            members = [(variable, axes), *((v, a) for v, a in roots.items() if v is not variable)]
            members = [(v, {axis: numbers[labels] for axis, labels in a.items()}) for v, a in members]
            found[variable] = [(v, a) for v, a in members if any(labels.any() for labels in a.values())]
    return found


def _attribute(weight):
    """The layer's attribute that its config takes the regularizer of this weight from, or `None`."""
    name = weight.variable.name
    for candidate in (
        "depthwise_regularizer" if name == "kernel" else "",
        f"{name}_regularizer",
        f"{name.removesuffix('_kernel')}_regularizer",
    ):
        if hasattr(weight.layer, candidate):
            return candidate
    return None


@serializable
class _Marker(Configurable, keras.regularizers.Regularizer):
    """A regularizer to be looked for in a config."""

    def __init__(self, mark):
        self.mark = mark


def _why_not_saved(model, chosen):
    """For each weight, why the model's config would not bring its regularizer back; `None` if it would."""
    places = [(w.layer, _attribute(w)) for w in chosen]
    before = [getattr(layer, name) if name else None for layer, name in places]
    marks = [f"keras_sparse_mark_{index}_" for index in range(len(chosen))]
    try:
        for (layer, name), mark in zip(places, marks, strict=True):
            if name:
                setattr(layer, name, _Marker(mark))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = json.dumps(model.get_config(), default=str)
    except Exception:  # Whatever a config of the user's raises, it carries nothing.
        config = ""
    finally:
        for (layer, name), old in zip(places, before, strict=True):
            if name:
                setattr(layer, name, old)
    return [
        f"{type(layer).__name__} has no argument for it"
        if not name
        else None
        if mark in config
        else f"the config of {type(model).__name__} {model.name!r} does not hold the regularizer of {layer.name!r}"
        for (layer, name), mark in zip(places, marks, strict=True)
    ]
