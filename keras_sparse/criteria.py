"""A criterion says how much each weight matters: `scores(weight, statistic) -> scores`, higher is kept longer.

Criteria that use the gradient name the statistic that they need. The optimizer that trains the model keeps it, from the
gradients that it receives anyway: see `ks.optimizers.statistics.Statistic`.
"""

import inspect
import zlib

import numpy as np

from keras_sparse.registry import Configurable, Registry

__all__ = ["Criterion", "Gradient", "Magnitude", "Movement", "Random", "Snip", "Taylor", "get"]

_REGISTRY = Registry("criterion")


class Criterion(Configurable):
    """Base class of criteria. Subclasses implement `scores(weight)`, or `scores(weight, statistic)`.

    Scores must depend on nothing but the arguments, so that the same weights give the same mask on every backend and
    after a restart.

    Attributes:
        statistic: The statistic of the weight's gradient g that the scores need: `None`, `"gradient"` (running mean of
            abs(g)), `"taylor"` (running mean of abs(w * g)), `"movement"` (the sum of -w * g) or `"last_gradient"` (g
            of the latest optimizer step).

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
    """

    statistic = None

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


@_REGISTRY.register("magnitude")
class Magnitude(Criterion):
    """The absolute value of the weight, as in Han et al., "Learning both weights and connections" (2015).

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> ks.criteria.Magnitude().scores(np.array([-3.0, 2.0]))
    array([3., 2.])
    """

    def scores(self, weight, statistic=None):
        return np.abs(weight)


@_REGISTRY.register("random")
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

    def get_config(self):
        return {"seed": self.seed}


class _Statistical(Criterion):
    """A criterion whose scores are its statistic."""

    def scores(self, weight, statistic=None):
        return statistic


@_REGISTRY.register("gradient")
class Gradient(_Statistical):
    """The running mean of abs(g): how strongly the loss reacts to the weight.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> ks.criteria.Gradient().scores(np.array([-3.0, 2.0]), statistic=np.array([0.1, 0.4]))
    array([0.1, 0.4])
    """

    statistic = "gradient"


@_REGISTRY.register("taylor")
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


@_REGISTRY.register("movement")
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


@_REGISTRY.register("snip")
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


def get(identifier):
    """Return a `Criterion` from an instance, a config, or a name.

    The names are `"magnitude"`, `"random"`, `"gradient"`, `"taylor"`, `"movement"` and `"snip"`.

    Example:

    >>> import keras_sparse as ks
    >>> type(ks.criteria.get("magnitude")).__name__
    'Magnitude'
    """
    return _REGISTRY.get(identifier, Criterion)
