"""Pruning makes a model sparse step by step while `model.fit` trains it."""

import warnings

import keras

from keras_sparse import criteria, patterns, pruning, reports, schedules, selection
from keras_sparse.callbacks.masks import ScheduledMasks, count_zeros, plain_filters
from keras_sparse.registry import serializable

__all__ = ["Pruning"]


@serializable
class Pruning(ScheduledMasks):
    """Prunes the model gradually while it trains.

    Add it to `model.fit` and get the same model with zeros: same layers, same names, same file format. Pruned weights
    are exactly zero after every optimizer step, and stay so: `Pruning` never revives a weight. The share of zeros over
    the selected weights goes into the logs as `sparsity`.

    Args:
        target_sparsity: The share of weights to be zero at `end`: a float in [0, 1), or a dict `{regex: sparsity}` or
            `{regex: (sparsity, pattern)}` searched in `variable.path` (first match wins, weights that no key matches
            stay dense). A key may also be a callable on the variable; `ks.selection.only(path)` names one weight, also
            an embedding or a depthwise kernel, which need no `filters` then.
        criterion: Which weights matter: `"magnitude"`, `"random"`, those that use the gradients of this training
            (`"gradient"`, `"taylor"`, `"movement"`) or a `ks.criteria.Criterion`.
        pattern: Where zeros may stand: `None`, `"unstructured"`, `"channel"`, such as `"block_1x4"` or `"2:4"` (whose
            target, 1 - n/m, may be left out), or a `ks.patterns.Pattern`.
        schedule: The way from 0 to the target: `"polynomial"` (Zhu & Gupta 2017), `"linear"`, `"cosine"`,
            `"exponential"`, `"one_shot"` (all at `begin`) or a `ks.schedules.Schedule`.
        allocation: `"uniform"`: each weight gets the target; `"global"`: the smallest of all weights go first (with a
            floor for each: `ks.pruning.Global(floor=0.01)`); `"erk"`: small kernels stay denser, by the rule of
            `ks.pruning.erk_counts`.
        begin: When pruning starts. A float is a fraction of this `fit` (epochs x steps), an int counts optimizer steps
            from the start of this `fit`.
        end: When the target is reached, like `begin`. The last update lands exactly on the target.
        frequency: Optimizer steps between updates. Defaults to a fiftieth of the span from `begin` to `end`.
        filters: Which weights: a regex, a list of them, or a callable on the variable; see `ks.selection.select`.
        verbose: 1 prints a line at each update.

    Raises:
        ValueError: If a number is out of range, a string names nothing, `end <= begin`, the schedule can never fire in
            this `fit`, or a filter or key matches nothing.
        TypeError: If an argument is of the wrong type.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(10)])
    >>> model.compile("adam", "mse")
    >>> x, y = np.ones((64, 20)), np.ones((64, 10))
    >>> history = model.fit(x, y, epochs=2, verbose=0, callbacks=[ks.callbacks.Pruning(0.9)])
    >>> history.history["sparsity"][-1]
    0.9
    """

    def __init__(
        self,
        target_sparsity=None,
        criterion="magnitude",
        pattern=None,
        schedule="polynomial",
        allocation="uniform",
        begin=0.0,
        end=0.75,
        frequency=None,
        filters=None,
        verbose=0,
    ):
        super().__init__(begin, end, frequency, filters, verbose)
        if target_sparsity is None and patterns.get(pattern).sparsity is None:
            raise ValueError(
                "`target_sparsity` is missing: the share of weights to set to zero, such as 0.9, or a dict "
                "{regex: sparsity}. Received: target_sparsity=None"
            )
        self.target_sparsity = pruning.final_target(target_sparsity, allocation, pattern)
        self.criterion = criteria.get(criterion)
        self.pattern = patterns.get(pattern)
        self.schedule = schedules.get(schedule)
        self.allocation = pruning.allocation.get(allocation)
        self.begin, self.end, self.frequency = begin, end, frequency
        self._reached = False

    def get_config(self):
        """The constructor's arguments as plain data."""
        target = self.target_sparsity
        if isinstance(target, dict):
            target = {
                regex: [value[0], keras.saving.serialize_keras_object(patterns.get(value[1]))]
                if isinstance(value, (tuple, list))
                else value
                for regex, value in target.items()
            }
        return {
            "target_sparsity": target,
            "criterion": keras.saving.serialize_keras_object(self.criterion),
            "pattern": keras.saving.serialize_keras_object(self.pattern),
            "schedule": keras.saving.serialize_keras_object(self.schedule),
            "allocation": keras.saving.serialize_keras_object(self.allocation),
            "begin": self.begin,
            "end": self.end,
            "frequency": self.frequency,
            "filters": plain_filters(self.filters),
            "verbose": self.verbose,
        }

    @property
    def reached(self):
        """Whether the model is at its target sparsity."""
        return self._reached

    def _plan(self, model):
        plan = pruning.Plan(model, self.target_sparsity, self.criterion, self.pattern, self.allocation, self.filters)
        reports.remember(model, plan.skipped)
        return plan

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._reached = False

    def _prepare(self, sparse, now):
        if not self._reached:  # A backup or a file that is resumed may be there already.
            masks = [selection.as_array(sparse.mask_of(goal.weight.variable)) for goal in self._goals.goals]
            self._reached = self._goals.reached(masks)

    def _finished(self):
        return self._reached

    def _update(self, sparse, now, progress):
        self._reached = self._goals.reached(self._goals.update(sparse, self.schedule(progress)))
        if self.verbose:
            self._say(sparse, now)

    def _complete(self, sparse):
        if self._reached or self._goals is None:
            return
        zeros, size = count_zeros(sparse)
        if self._epochs_done < self.params["epochs"]:
            warnings.warn(
                f"Training stopped before the target sparsity: the selected weights are at {zeros / size:.1%}. "
                "Wrap `EarlyStopping` in `ks.callbacks.AtTargetSparsity` to let it stop only after that.",
                stacklevel=2,
            )
            return
        now = self._clock.now(sparse)
        self._update(sparse, now, progress=1.0)
        warnings.warn(
            f"This fit ended before the schedule did, at a sparsity of {zeros / size:.1%}; the target was reached with "
            "a last update that no training followed. Lower `end`, or train for longer. "
            f"Received: begin={self.begin!r}, end={self.end!r}, steps={self._clock.elapsed(now)}",
            stacklevel=2,
        )
