"""A budget of costs is a target that is no share of zeros: what a model may cost once its channels are removed."""

import importlib
import math
import numbers

from keras_sparse.pruning.budget import Target
from keras_sparse.registry import check_whole, is_real, serializable

__all__ = ["Budget"]


@serializable
class Budget(Target):
    """What a model may cost after `ks.shrink`, in place of a target sparsity; it goes with `pattern="channel"`.

    Of several amounts all are kept to. Channels leave until they are: no more than needed, but for the last one.

    Args:
        macs: Multiplications by weights, for one sample: a float is a share of those that the model has, in (0, 1], an
            int an amount.
        parameters: Weights, likewise, biases and statistics included.
        bytes: Bytes of the weights in memory, likewise.
        round_to: A group that keeps more than so many channels keeps a multiple of it, and the budget is counted on
            that. Kernels compute in multiples of 8 or 16: other widths cost time for nothing.
        milliseconds: What one sample may take as a .tflite file, float or int: an amount, never a share. Before any
            training each layer is measured at several widths on the runtime, seconds for a layer, and the budget is
            counted on these tables: `ks.tflite.timing.TimeTable`. The report of `ks.prune` has what they promise, and
            what the model without its channels was then measured to take.
        runtime: Where milliseconds are measured: a name of `ks.tflite.benchmark` that tells seconds.

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

    def __init__(self, macs=None, parameters=None, bytes=None, round_to=1, milliseconds=None, runtime="native"):
        self.macs, self.parameters, self.bytes, self.round_to = macs, parameters, bytes, round_to
        self.milliseconds, self.runtime = milliseconds, runtime
        check_whole("round_to", round_to)
        if not self._given():
            raise ValueError("A budget needs `macs`, `parameters`, `bytes` or `milliseconds`. Received: none of them")
        if not isinstance(runtime, str):
            raise TypeError(f"`runtime` must be the name of a runtime. Received: {runtime!r}")
        for name, value in self._given().items():
            if not is_real(value):
                raise TypeError(f"`{name}` must be a number. Received: {name}={value!r} of type {type(value).__name__}")
            if name == "milliseconds":
                if not 0 < value < math.inf:
                    raise ValueError(f"`milliseconds` must be above 0. Received: milliseconds={value!r}")
                continue
            whole = isinstance(value, numbers.Integral)
            if not (value >= 1 if whole else 0 < value <= 1):
                raise ValueError(
                    f"`{name}` must be a share in (0, 1] as a float, or an amount of at least 1 as an int. "
                    f"Received: {name}={value!r}"
                )

    def _given(self):
        every = {name: getattr(self, name) for name in ("macs", "parameters", "bytes", "milliseconds")}
        return {name: value for name, value in every.items() if value is not None}

    @property
    def budget(self):
        return self

    def check(self, allocation):
        if allocation.redistributes:
            raise ValueError(
                "A `Budget` goes with allocation='uniform', 'global' or 'isomorphic'. "
                f"Received: allocation={allocation!r}, target={self!r}"
            )

    def check_pattern(self, pattern, allocation, on_the_way=False):
        if not pattern.whole_units:
            raise ValueError(
                "A `Budget` counts what is left when channels are removed: it goes with pattern='channel'. "
                f"Received: pattern={pattern!r}, target={self!r}"
            )

    def per_weight(self, weights):
        return [(weight, None, None) for weight in weights]

    def limits(self, whole):
        """The amounts that may be left, `{name: amount}`, of a model that costs `whole`, `{name: amount}`."""
        return {
            name: value if name == "milliseconds" or isinstance(value, numbers.Integral) else value * whole[name]
            for name, value in self._given().items()
        }

    def times(self, channels, groups):
        """What measures the time of a model without channels, a `ks.tflite.timing.TimeTable`; `None` if no time counts.

        Args:
            channels: The `ks.graph.Channels` of the model.
            groups: The channels that may leave, a vector for each group.
        """
        if self.milliseconds is None:
            return None
        # The one arrow that points up: who measures is known when milliseconds are asked for, by name.
        timing = importlib.import_module("keras_sparse.tflite.timing")
        return timing.TimeTable(channels, groups, self.runtime)
