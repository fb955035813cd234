"""A gate is a random factor between 0 and 1 for weights that leave together: the hard concrete distribution."""

import math

from keras import ops

from keras_sparse.registry import Configurable, is_real, serializable

__all__ = ["HardConcrete"]


@serializable
class HardConcrete(Configurable):
    """The hard concrete distribution: a stretched and clipped sigmoid of a logistic variable.

    Louizos, Welling & Kingma, "Learning Sparse Neural Networks through L0 Regularization" (2018), section 2.2. It has
    mass at exactly 0 and exactly 1, and is differentiable in its one parameter, `log_alpha`.

    Args:
        temperature: `beta`, positive: how far from binary the distribution is. The paper uses 2/3.
        limits: `(gamma, zeta)`, the interval to which samples are stretched before they are clipped to [0, 1]: a
            negative number and one above 1. The paper uses (-0.1, 1.1).

    Raises:
        ValueError: If an argument is out of range.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> gate = ks.layers.HardConcrete()
    >>> [round(float(p), 3) for p in (gate.probability_zero(0.0), gate.probability_one(0.0))]
    [0.168, 0.168]
    >>> [float(gate.expected_gate(x)) for x in (-4.0, 0.0, 4.0)]
    [0.0, 0.5, 1.0]
    """

    def __init__(self, temperature=2 / 3, limits=(-0.1, 1.1)):
        if not is_real(temperature) or not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` must be a positive number. Received: temperature={temperature!r}")
        pair = isinstance(limits, (tuple, list)) and len(limits) == 2 and all(map(is_real, limits))
        if not pair or not (-math.inf < limits[0] < 0 and 1 < limits[1] < math.inf):
            raise ValueError(
                "`limits` must be a pair of a negative number and a number above 1, such as (-0.1, 1.1). "
                f"Received: limits={limits!r}"
            )
        self.temperature = float(temperature)
        self.limits = tuple(float(limit) for limit in limits)

    def sample(self, log_alpha, noise):
        """Return a gate for each uniform random number (equations 10 and 11 of the paper).

        Args:
            log_alpha: Tensor of parameters.
            noise: Tensor of numbers in (0, 1), broadcastable to `log_alpha`.

        Returns:
            Tensor of numbers in [0, 1].
        """
        noise, log_alpha = ops.convert_to_tensor(noise), ops.convert_to_tensor(log_alpha)
        logits = ops.log(noise) - ops.log1p(-noise) + log_alpha
        return self._stretch(ops.sigmoid(logits / self.temperature))

    def expected_gate(self, log_alpha):
        """The gate at test time (equation 13): `clip(sigmoid(log_alpha) * (zeta - gamma) + gamma, 0, 1)`."""
        return self._stretch(ops.sigmoid(ops.convert_to_tensor(log_alpha)))

    def probability_zero(self, log_alpha):
        """The probability that a sample is exactly 0."""
        low, high = self.limits
        return ops.sigmoid(self.temperature * math.log(-low / high) - ops.convert_to_tensor(log_alpha))

    def probability_nonzero(self, log_alpha):
        """The probability that a sample is not 0 (equation 12), what the L0 penalty sums."""
        low, high = self.limits
        return ops.sigmoid(ops.convert_to_tensor(log_alpha) - self.temperature * math.log(-low / high))

    def probability_one(self, log_alpha):
        """The probability that a sample is exactly 1."""
        low, high = self.limits
        shift = self.temperature * math.log((1 - low) / (high - 1))
        return ops.sigmoid(ops.convert_to_tensor(log_alpha) - shift)

    def _stretch(self, value):
        low, high = self.limits
        return ops.clip(value * (high - low) + low, 0.0, 1.0)
