"""A budget of costs is a target that is no share of zeros: what a model may cost once its channels are removed."""

import numbers

from keras_sparse.registry import Configurable, check_whole, is_real, serializable

__all__ = ["Budget"]


@serializable
class Budget(Configurable):
    """What a model may cost after `ks.shrink`, in place of a target sparsity; it goes with `pattern="channel"`.

    Of several amounts all are kept to. Channels leave until they are: no more than needed, but for the last one.

    Args:
        macs: Multiplications by weights, for one sample: a float is a share of those that the model has, in (0, 1], an
            int an amount.
        parameters: Weights, likewise, biases and statistics included.
        bytes: Bytes of the weights in memory, likewise.
        round_to: A group that keeps more than so many channels keeps a multiple of it, and the budget is counted on
            that. Kernels compute in multiples of 8 or 16: other widths cost time for nothing.

    Raises:
        ValueError: If none is given, or a number is out of range.
        TypeError: If one is not a number.

    Example:

    >>> import keras, keras_sparse as ks
    >>> layers = [keras.layers.Dense(64, "relu"), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
    >>> model = keras.Sequential([keras.Input((20,)), *layers])
    >>> report = ks.prune(model, ks.Budget(parameters=0.5), pattern="channel")
    >>> small = ks.shrink(model, verbose=0)
    >>> 0.48 < small.count_params() / model.count_params() <= 0.5
    True
    """

    def __init__(self, macs=None, parameters=None, bytes=None, round_to=1):
        self.macs, self.parameters, self.bytes, self.round_to = macs, parameters, bytes, round_to
        check_whole("round_to", round_to)
        if not self._given():
            raise ValueError("A budget needs `macs`, `parameters` or `bytes`. Received: none of them")
        for name, value in self._given().items():
            if not is_real(value):
                raise TypeError(f"`{name}` must be a number. Received: {name}={value!r} of type {type(value).__name__}")
            whole = isinstance(value, numbers.Integral)
            if not (value >= 1 if whole else 0 < value <= 1):
                raise ValueError(
                    f"`{name}` must be a share in (0, 1] as a float, or an amount of at least 1 as an int. "
                    f"Received: {name}={value!r}"
                )

    def _given(self):
        every = {"macs": self.macs, "parameters": self.parameters, "bytes": self.bytes}
        return {name: value for name, value in every.items() if value is not None}

    def limits(self, whole):
        """The amounts that may be left, `{name: amount}`, of a model that costs `whole`, `{name: amount}`."""
        return {
            name: value if isinstance(value, numbers.Integral) else value * whole[name]
            for name, value in self._given().items()
        }
