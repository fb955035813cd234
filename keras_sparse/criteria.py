"""A criterion says how much each weight matters: `scores(weight, statistic) -> scores`, higher is kept longer.

Criteria that use the gradient bring the `Statistic` that they need. The optimizer that trains the model keeps it, from
the gradients that it receives anyway.
"""

import inspect
import zlib

import numpy as np

from keras_sparse.registry import Configurable, Registry

__all__ = [
    "Criterion",
    "Fisher",
    "Gradient",
    "InputCriterion",
    "Magnitude",
    "Movement",
    "Obs",
    "Random",
    "ScaleMagnitude",
    "Snip",
    "Statistic",
    "Taylor",
    "Wanda",
    "get",
    "get_statistic",
]

CRITERIA = Registry("criterion")
STATISTICS = Registry("statistic")


class Statistic(Configurable):
    """What is known of a weight beyond its value: a tensor of its shape, updated from each gradient.

    Statistics are taken from every micro-step's gradient, before it is accumulated or clipped and without the loss
    scale. Under `tf.distribute` that is the gradient summed over replicas. Subclasses implement `update` with Python's
    operators (`abs`, `*`, ...), so that they run in the training step of every backend; where those do not reach, with
    `keras.ops`. `ks.criteria.Criterion` shows how to bring one.

    Attributes:
        every_step: Whether the statistic starts at zero in each optimizer step, instead of once in a `fit`.

    Example:

    >>> import keras_sparse as ks
    >>> class MeanGradient(ks.criteria.Statistic):
    ...     def update(self, value, weight, gradient, count):
    ...         return value + (gradient - value) / count
    >>> MeanGradient().update(value=1.0, weight=5.0, gradient=4.0, count=3.0)
    2.0
    """

    every_step = False

    def update(self, value, weight, gradient, count):
        """Return the new value of the statistic; runs inside of the compiled training step.

        Args:
            value: Tensor of the weight's shape, float32 or wider: zeros at first.
            weight: The weight before the step, of the same dtype.
            gradient: Its gradient, of the same dtype.
            count: How many micro-steps there were, this one included, at most 100: a running mean that divides by it is
                plain at first and then forgets exponentially. A scalar tensor.
        """
        raise TypeError(f"`{type(self).__name__}` must implement `update(self, value, weight, gradient, count)`.")


@STATISTICS.register("gradient")
class MeanAbsoluteGradient(Statistic):
    """The running mean of abs(g)."""

    def update(self, value, weight, gradient, count):
        return value + (abs(gradient) - value) / count


@STATISTICS.register("taylor")
class MeanAbsoluteProduct(Statistic):
    """The running mean of abs(w * g)."""

    def update(self, value, weight, gradient, count):
        return value + (abs(weight * gradient) - value) / count


@STATISTICS.register("movement")
class AccumulatedMovement(Statistic):
    """The sum of -w * g."""

    def update(self, value, weight, gradient, count):
        return value - weight * gradient


@STATISTICS.register("last_gradient")
class LastGradient(Statistic):
    """The gradient of the latest optimizer step, summed over its micro-steps."""

    every_step = True

    def update(self, value, weight, gradient, count):
        return value + gradient


@STATISTICS.register("squared_gradient")
class SquaredGradient(Statistic):
    """The running mean of g * g: the diagonal of the empirical Fisher information."""

    def update(self, value, weight, gradient, count):
        return value + (gradient * gradient - value) / count


class Criterion(Configurable):
    """Base class of criteria. Subclasses implement `scores(weight)`, or `scores(weight, statistic)`.

    Scores must depend on nothing but the arguments, so that the same weights give the same mask on every backend and
    after a restart.

    Attributes:
        statistic: The `Statistic` of the weight's gradient g that the scores need: `None`, a `Statistic` of your own,
            or a name: `"gradient"` (running mean of abs(g)), `"taylor"` (running mean of abs(w * g)), `"movement"` (the
            sum of -w * g), `"squared_gradient"` (running mean of g * g) or `"last_gradient"` (g of the latest optimizer
            step).
        of_inputs: Whether the scores need the inputs that the weight multiplies: see `InputCriterion`.
        repairs: Whether `ks.prune` with data solves for the weights that stay, unless it is told otherwise.
        within_outputs: Whether weights compete only with those of the same output unit.
        of_scales: Whether whole channels are ranked, by the scales of their normalizations: they are the statistic.
        norm: Whether a channel is worth the Euclidean norm of its weights' scores, for sizes, instead of their sum,
            for what the loss or an output would lose.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> class Largest(ks.criteria.Criterion):
    ...     def scores(self, weight):
    ...         return weight
    >>> Largest()(np.array([-3.0, 2.0]))
    array([-3.,  2.])
    >>> class Steepest(ks.criteria.Criterion):
    ...     statistic = "last_gradient"
    ...     def scores(self, weight, statistic):
    ...         return np.abs(statistic)
    >>> Steepest()(np.array([-3.0, 2.0]), np.array([0.5, -0.25]))
    array([0.5 , 0.25])

    A statistic of one's own comes with its criterion:

    >>> class SignedTaylor(ks.criteria.Statistic):
    ...     def update(self, value, weight, gradient, count):
    ...         return value + (weight * gradient - value) / count
    >>> class SignedSensitivity(ks.criteria.Criterion):
    ...     statistic = SignedTaylor()
    ...     def scores(self, weight, statistic):
    ...         return np.abs(statistic)
    >>> pruning = ks.callbacks.Pruning(0.9, criterion=SignedSensitivity())
    """

    statistic = None
    of_inputs = False
    repairs = False
    within_outputs = False
    of_scales = False
    norm = False

    def scores(self, weight, statistic=None):
        """Return how much each weight matters.

        Args:
            weight: NumPy array, floating point.
            statistic: Array of the same shape, if the class names a `statistic`. Subclasses that name none may leave
                the argument out.

        Returns:
            Floating-point array of the same shape. NaN scores are kept.
        """
        raise TypeError(f"`{type(self).__name__}` must implement `scores(self, weight, statistic)`.")

    def __call__(self, weight, statistic=None):
        """Return the scores of `weight`, checked.

        Raises:
            ValueError: If `scores` does not return floating-point scores of the weight's shape.
        """
        try:
            inspect.signature(self.scores).bind(weight, statistic)
        except TypeError:
            scores = np.asarray(self.scores(weight))
        else:
            scores = np.asarray(self.scores(weight, statistic))
        if scores.shape != weight.shape or scores.dtype.kind != "f":
            raise ValueError(
                f"`{type(self).__name__}.scores` must return floating-point scores of the weight's shape "
                f"{weight.shape}. Received: shape {scores.shape}, dtype {scores.dtype}"
            )
        return scores


@CRITERIA.register("magnitude")
class Magnitude(Criterion):
    """The absolute value of the weight, as in Han et al., "Learning both weights and connections" (2015).

    Channels are ranked by their norm: Fang et al., "DepGraph: towards any structural pruning" (2023), section 3.3.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> ks.criteria.Magnitude().scores(np.array([-3.0, 2.0]))
    array([3., 2.])
    """

    norm = True

    def scores(self, weight, statistic=None):
        return np.abs(weight)


@CRITERIA.register("random")
class Random(Criterion):
    """Uniform random scores: the baseline that every other criterion should beat.

    The numbers are drawn from a generator seeded with `seed` and the weight's values: reproducible, the same on every
    backend, and different for layers of the same shape.

    Args:
        seed: Integer. Defaults to 0.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> weight = np.ones((2, 3), "float32")
    >>> scores = ks.criteria.Random(seed=1).scores(weight)
    >>> bool((scores == ks.criteria.Random(seed=1).scores(weight)).all())
    True
    """

    def __init__(self, seed=0):
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
            raise ValueError(f"`seed` must be an integer of at least 0. Received: seed={seed!r}")
        self.seed = int(seed)

    def scores(self, weight, statistic=None):
        digest = zlib.crc32(np.ascontiguousarray(weight).tobytes())
        return np.random.default_rng([self.seed, digest]).random(weight.shape, dtype="float32")


class _Statistical(Criterion):
    """A criterion whose scores are its statistic."""

    def scores(self, weight, statistic=None):
        return statistic


@CRITERIA.register("gradient")
class Gradient(_Statistical):
    """The running mean of abs(g): how strongly the loss reacts to the weight.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> ks.criteria.Gradient().scores(np.array([-3.0, 2.0]), statistic=np.array([0.1, 0.4]))
    array([0.1, 0.4])
    """

    statistic = "gradient"


@CRITERIA.register("taylor")
class Taylor(_Statistical):
    """The running mean of abs(w * g): how much the loss would change without the weight, to first order.

    Molchanov et al., "Pruning convolutional neural networks for resource efficient inference" (2017), equation 8, for
    single weights.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> ks.criteria.Taylor().scores(np.array([-3.0, 2.0]), statistic=np.array([0.3, 0.8]))
    array([0.3, 0.8])
    """

    statistic = "taylor"


@CRITERIA.register("movement")
class Movement(_Statistical):
    """The sum of -w * g over all steps: weights that move away from zero matter, made for fine-tuning.

    Sanh et al., "Movement pruning: adaptive sparsity by fine-tuning" (2020), equation 4. (There the learning rate of
    the scores is a factor, which does not change their order.)

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> ks.criteria.Movement().scores(np.array([-3.0, 2.0]), statistic=np.array([-0.3, 0.8]))
    array([-0.3,  0.8])
    """

    statistic = "movement"


@CRITERIA.register("slimming")
class ScaleMagnitude(Criterion):
    """The absolute value of the scale that batch normalization gives to a channel, for `pattern="channel"`.

    Network slimming: Liu et al., "Learning efficient convolutional networks through network slimming" (2017), sections
    3.2 and 3.3. Train with `ks.regularize(model, ks.regularizers.Slimming(1e-4))`, which pulls scales to zero, and
    prune by them. Of a group with several normalizations the scales are summed; channels without one are left.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> layers = [keras.layers.Dense(4, name="body"), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
    >>> model = keras.Sequential([keras.Input((8,)), *layers])
    >>> model.layers[1].gamma.assign([0.01, 1.0, -2.0, 0.02]) is None
    False
    >>> report = ks.prune(model, 0.5, "slimming", pattern="channel", filters="body")
    >>> np.any(keras.ops.convert_to_numpy(model.layers[0].kernel) != 0, axis=0)
    array([False,  True,  True, False])
    """

    of_scales = True

    def scores(self, weight, statistic=None):
        if statistic is None:
            raise ValueError("`ScaleMagnitude` ranks channels by scales of normalizations. Received: a weight alone")
        return np.abs(statistic)


@CRITERIA.register("snip")
class Snip(Criterion):
    """The connection sensitivity abs(w * g), where g is the gradient of the loss over some data.

    Lee et al., "SNIP: single-shot network pruning based on connection sensitivity" (2019), equations 4 to 6, without
    the normalization, which does not change the order. The paper ranks all weights together: `allocation="global"`. It
    is made for pruning before training, `ks.prune(model, sparsity, criterion="snip", data=(x, y))`, where the weights
    stand still and the sum of w * g over batches is w times the sum of g. In training it is the absolute value of
    `Movement`.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> ks.criteria.Snip().scores(np.array([-3.0, 2.0]), statistic=np.array([-0.3, 0.8]))
    array([0.3, 0.8])
    """

    statistic = "movement"

    def scores(self, weight, statistic=None):
        return np.abs(statistic)


@CRITERIA.register("fisher")
class Fisher(Criterion):
    """The loss that removing the weight costs to second order, w^2 / 2 times the running mean of g^2.

    Theis et al., "Faster gaze prediction with dense networks and Fisher pruning" (2018), equation 10, for single
    weights: the Hessian's diagonal is taken to be that of the empirical Fisher information. Gradients are those of
    batches, as training sees them.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> ks.criteria.Fisher().scores(np.array([-3.0, 2.0]), statistic=np.array([0.1, 0.4]))
    array([0.45, 0.8 ])
    """

    statistic = "squared_gradient"

    def scores(self, weight, statistic=None):
        return 0.5 * weight * weight * statistic


class InputCriterion(Criterion):
    """Base class of criteria that look at what a weight multiplies, on unlabelled data, before it is removed.

    They serve in one shot: `ks.prune(model, sparsity, criterion, data=x)`. Subclasses implement `measure(moment)`, and
    `scores(weight, statistic)` with what it returned, spread over the weight.

    Example:

    The size of the products that a weight adds to a sum:

    >>> import numpy as np, keras_sparse as ks
    >>> class Contribution(ks.criteria.InputCriterion):
    ...     def measure(self, moment):
    ...         return np.diagonal(moment)
    ...     def scores(self, weight, statistic):
    ...         return weight**2 * statistic
    >>> contribution = Contribution()
    >>> contribution.scores(np.array([2.0, 3.0]), contribution.measure(np.diag([1.0, 0.25])))
    array([4.  , 2.25])
    """

    of_inputs = True

    def measure(self, moment):
        """Return a number for each input.

        Args:
            moment: The second moment E[x x^T] of the inputs x that one output unit multiplies with weights which have
                not been removed, a symmetric positive definite float64 array [inputs, inputs].
        """
        raise TypeError(f"`{type(self).__name__}` must implement `measure(self, moment)`.")


@CRITERIA.register("wanda")
class Wanda(InputCriterion):
    """The weight's absolute value times the root mean square of its input, compared within an output unit.

    Sun et al., "A simple and effective pruning approach for large language models" (2024), equation 1 and section 3.
    Each output unit (each row of blocks, in a pattern) loses the same share of its weights.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> wanda = ks.criteria.Wanda()
    >>> wanda.scores(np.array([-3.0, 2.0]), wanda.measure(np.diag([1.0, 4.0])))
    array([3., 4.])
    """

    within_outputs = True

    def measure(self, moment):
        return np.sqrt(np.diagonal(moment))

    def scores(self, weight, statistic=None):
        return np.abs(weight) * statistic


@CRITERIA.register("obs")
class Obs(InputCriterion):
    """The error that a layer's output makes when the weight leaves and the others of its unit make up for it.

    It is w^2 / (2 [H^-1]_ii), where H is the second moment of what the output unit multiplies: Hassibi and Stork,
    "Second order derivatives for network pruning: optimal brain surgeon" (1993), equation 5, with the layer's squared
    error in the place of the loss, as Frantar and Alistarh, "Optimal brain compression" (2022), equation 3.
    `ks.prune` removes weights in several rounds, and solves in each for those that stay.

    Example:

    Two inputs that are nearly equal: without one of the weights, the other takes over.

    >>> import numpy as np, keras_sparse as ks
    >>> obs = ks.criteria.Obs()
    >>> obs.scores(np.array([2.0, 1.0]), obs.measure(np.array([[1.0, 0.9], [0.9, 1.0]]))).round(3)
    array([0.38 , 0.095])
    """

    repairs = True

    def measure(self, moment):
        return np.diagonal(np.linalg.inv(moment))

    def scores(self, weight, statistic=None):
        return 0.5 * weight * weight / statistic


def get_statistic(identifier):
    """Return the `Statistic` that a criterion's `statistic` stands for, an instance or a name; `None` for `None`.

    Example:

    >>> import keras_sparse as ks
    >>> type(ks.criteria.get_statistic("taylor")).__name__
    'MeanAbsoluteProduct'
    """
    return None if identifier is None else STATISTICS.get(identifier, Statistic)


def get(identifier):
    """Return a `Criterion` from an instance, a config, or a name.

    The names are `"magnitude"`, `"random"`, `"gradient"`, `"taylor"`, `"movement"`, `"snip"`, `"fisher"`, and
    with the layers' inputs `"wanda"` and `"obs"`.

    Example:

    >>> import keras_sparse as ks
    >>> type(ks.criteria.get("magnitude")).__name__
    'Magnitude'
    """
    return CRITERIA.get(identifier, Criterion)
