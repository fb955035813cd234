"""Tables of time say what the layers of a model take on a runtime at other widths: a budget of time counts on them."""

import json

import keras
import numpy as np

from keras_sparse import channels as removing
from keras_sparse import graph
from keras_sparse.tflite.benchmark import in_turns
from keras_sparse.tflite.commands import TIMING
from keras_sparse.tflite.convert import convert
from keras_sparse.tflite.job import Job
from keras_sparse.tflite.runtimes import Worker

__all__ = ["TimeTable"]

_SHARES = (1.0, 0.5, 0.25)  # the widths at which a layer is measured
_MEASURED = {}  # {(runtime, layer as text): milliseconds}, for as long as the process lives


class TimeTable:
    """What a model takes when channels are removed, from measurements of its layers.

    Each layer with kernels is measured alone, at its own width and with a half and a quarter of the channels that may
    leave; layers that are alike once. Between these widths time is linear in the layer's weights, and no smaller layer
    takes longer than a larger one. What the whole takes is `fixed + factor * sum of the layers`, fitted to the whole
    model at its own width and at a half: operations between the layers, and kernels that are fused.
    Everything is measured in turns with the whole model, so that both meet the same load of the machine, and scaled to
    the shortest round of the whole model at the start: these are milliseconds of an idle machine.
    The tables are HALP's: Shen et al., "Structural pruning via latency-saliency knapsack" (2022), section 3.2.

    Args:
        channels: The `ks.graph.Channels` of a model.
        groups: List of vectors: for each group the representatives of the channels that may leave.
        runtime: As in `ks.tflite.benchmark`, where it tells seconds.

    Attributes:
        whole: Milliseconds of the model as it is.
        rows: List of `{"layer", "weights", "milliseconds"}`, the two last a list with a number for each width.

    Raises:
        ValueError: If the runtime does not exist, or measures no time.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> from keras_sparse.tflite.timing import TimeTable
    >>> stack = [keras.layers.Dense(64, "relu", name="body"), keras.layers.Dense(2, name="head")]
    >>> channels = ks.graph.Channels(keras.Sequential([keras.Input((64,)), *stack]))
    >>> table = TimeTable(channels, [channels.groups[1].channels])
    >>> [row["layer"] for row in table.rows]
    ['body', 'head']
    """

    def __init__(self, channels, groups, runtime="native"):
        if runtime not in TIMING:
            raise ValueError(f"Milliseconds are measured on the runtimes {list(TIMING)}. Received: runtime={runtime!r}")
        self._channels, self._runtime, self._groups = channels, runtime, groups
        model = channels.labelled.model
        self._model = keras.Model(model.inputs, model.outputs)  # not compiled: only shapes matter
        self._calls, self.rows, self._dense = [], [], convert(Job(self._model)).content
        with Worker(self._dense, runtime) as reference:
            reference.feed()
            (rounds,) = in_turns([reference.time], 0.5)
            self.whole = 1e3 * float(rounds.min())
            self._measure(reference)

    def _measure(self, reference):
        shares = [self._kept(share) for share in _SHARES]
        for call in self._channels.calls:
            if any(part.made and len(part.variable.shape) > 1 for part in call.parts):
                points = dict(filter(None, (self._point(call, kept, reference) for kept in shares)))
                sizes = sorted(points)
                times = np.maximum.accumulate([points[size] for size in sizes])
                self._calls.append((call, np.array(sizes, float), times))
                self.rows.append({"layer": call.operation.name, "weights": sizes, "milliseconds": times.tolist()})
        self._fit(reference)

    def milliseconds(self, kept):
        """What the model takes when only what `kept`, a function from labels to booleans, says stays."""
        return self._fixed + self._factor * self._sum(kept)

    def measured(self):
        """What the model takes now without the channels that can be removed, measured."""
        with Worker(self._dense, self._runtime) as reference:
            reference.feed()
            return self._time(removing.shrink(self._model, verbose=0), reference)

    def measure(self, kept):
        """What the model takes with what `kept` says stays, measured."""
        small = self._without(kept)
        with Worker(self._dense, self._runtime) as reference:
            reference.feed()
            return self.whole if small is None else self._time(small, reference)

    def correct(self, kept, measured):
        """Scale the promises so that with what `kept` says stays they are what was measured."""
        ratio = measured / self.milliseconds(kept)
        self._fixed, self._factor = self._fixed * ratio, self._factor * ratio

    def _time(self, model, reference, seconds=1.0):
        """The milliseconds of a model, measured in turns with the whole one."""
        with Worker(convert(Job(model)).content, self._runtime) as worker:
            worker.feed()
            own, other = in_turns([worker.time, reference.time], seconds)
        return self.whole * float(own.min() / other.min())

    def _sum(self, kept):
        return float(sum(_between(_size(call, kept), sizes, times) for call, sizes, times in self._calls))

    def _kept(self, share):
        """A function from labels to booleans that keeps this share of each group."""
        leave = [classes[max(1, int(np.ceil(share * len(classes)))) :] for classes in self._groups]
        gone = np.isin(self._channels.roots, np.concatenate([*leave, np.zeros(0, int)]))
        return lambda labels: ~gone[labels]

    def _point(self, call, kept, reference):
        """How many weights a layer has when only what `kept` says stays, and what it takes; `None` if it cannot be."""
        try:
            alone = _alone(call, kept)
        except Exception:  # not any width is one that the layer can have, such as of a convolution in groups
            return None
        key = self._runtime, json.dumps([alone.get_config()["layers"], alone.input_shape], default=str)
        if key not in _MEASURED:
            _MEASURED[key] = self._time(alone, reference, 0.1)
        return _size(call, kept), _MEASURED[key]

    def _fit(self, reference):
        half = self._kept(0.5)
        points = [(self._sum(self._kept(1.0)), self.whole)]
        small = self._without(half)
        if small is not None:
            points.append((self._sum(half), self._time(small, reference)))
        (most, time), (least, less) = points[0], points[-1]
        factor = (time - less) / (most - least) if most > least and time > less else time / most
        # Neither part is negative: a line through the origin where it would be.
        self._factor = min(factor, time / most)
        self._fixed = time - self._factor * most

    def _without(self, kept):
        """The model without what `kept` says does not stay; the weights are put back. `None` if nothing leaves."""
        before = [(part.variable, graph.as_array(part.variable)) for _, part in self._channels.parts()]
        try:
            for _, part in self._channels.parts():
                part.variable.assign(part.silenced(kept))
            small = removing.shrink(self._model, verbose=0)
        finally:
            for variable, value in before:
                variable.assign(value)
        return small if small.count_params() < self._model.count_params() else None


def _alone(call, kept):
    """A model of one layer, as wide as `kept` says."""
    layer = call.operation
    inputs = [keras.Input(shape[1:], dtype=x.dtype) for shape, x in _shapes(call, kept)]
    symbols = {id(x): symbol for x, symbol in zip(call.inputs, inputs, strict=True)}
    args, kwargs = keras.tree.map_structure(lambda x: symbols.get(id(x), x), [list(call.args), call.kwargs])
    copy = type(layer).from_config(layer.get_config() | {"name": "alone"} | call.changes(kept))
    return keras.Model(inputs, copy(*args, **kwargs), name="alone")


def _shapes(call, kept):
    return zip(call.shapes_left(call.inputs, kept), call.inputs, strict=True)


def _size(call, kept):
    """How many weights a layer has when only what `kept` says stays."""
    return sum(part.count(kept) for part in call.parts)


def _between(size, sizes, times):
    """The time of a size: linear between those that were measured, and below them by the line of the last two."""
    if size >= sizes[0] or len(sizes) == 1:
        return float(np.interp(size, sizes, times))
    slope = (times[1] - times[0]) / (sizes[1] - sizes[0])
    return max(0.0, float(times[0] - slope * (sizes[0] - size)))
