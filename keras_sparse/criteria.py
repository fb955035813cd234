"""A criterion says how much each weight matters: `criterion.scores(weight) -> scores`, higher is kept longer."""

import zlib

import numpy as np

from keras_sparse.registry import Configurable, Registry

__all__ = ["Criterion", "Magnitude", "Random", "get"]

_REGISTRY = Registry("criterion")


class Criterion(Configurable):
    """Base class of criteria. Subclasses implement `scores(weight)`.

    Scores must depend on nothing but the arguments, so that the same weights give the same mask on every backend and
    after a restart.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> class Largest(ks.criteria.Criterion):
    ...     def scores(self, weight):
    ...         return weight
    >>> Largest().scores(np.array([-3.0, 2.0]))
    array([-3.,  2.])
    """

    def scores(self, weight):
        """Return how much each weight matters.

        Args:
            weight: NumPy array, floating point.

        Returns:
            Floating-point array of the same shape. NaN scores are kept.
        """
        raise TypeError(f"`{type(self).__name__}` must implement `scores(self, weight)`.")


@_REGISTRY.register("magnitude")
class Magnitude(Criterion):
    """The absolute value of the weight, as in Han et al., "Learning both weights and connections" (2015).

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> ks.criteria.Magnitude().scores(np.array([-3.0, 2.0]))
    array([3., 2.])
    """

    def scores(self, weight):
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

    def scores(self, weight):
        digest = zlib.crc32(np.ascontiguousarray(weight).tobytes())
        return np.random.default_rng([self.seed, digest]).random(weight.shape, dtype="float32")

    def get_config(self):
        return {"seed": self.seed}


def get(identifier):
    """Return a `Criterion` from an instance, a config, or one of the names `"magnitude"` and `"random"`.

    Example:

    >>> import keras_sparse as ks
    >>> type(ks.criteria.get("magnitude")).__name__
    'Magnitude'
    """
    return _REGISTRY.get(identifier, Criterion)
