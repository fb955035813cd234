"""Pruning makes a model sparse step by step while `model.fit` trains it."""

import warnings

from keras_sparse import criteria, patterns, pruning, schedules
from keras_sparse.callbacks.scheduled import ScheduledCallback
from keras_sparse.registry import serializable

__all__ = ["Pruning"]


@serializable
class Pruning(ScheduledCallback):
    """Prunes the model gradually while it trains.

    Add it to `model.fit` and get the same model with zeros: same layers, same names, same file format. Pruned weights
    are exactly zero after every optimizer step, and stay so: `Pruning` never revives a weight. The share of zeros over
    the selected weights goes into the logs as `sparsity`.

    Moving statistics of batch normalization follow slowly, and after a short fit would be those of the dense network.
    At the end of each epoch they are made those of the batches since weights were pruned: see
    `ks.pruning.batch_norm.Recent`, which says for which models. Of others, `ks.reestimate_batch_norm` measures them.

    Args:
        target_sparsity: The share of weights to be zero at `end`: a float in [0, 1), or a dict `{regex: sparsity}` or
            `{regex: (sparsity, pattern)}` searched in `variable.path` (first match wins, weights that no key matches
            stay dense). A key may also be a callable on the variable; `ks.selection.only(path)` names one weight, also
            an embedding or a depthwise kernel, which need no `filters` then. Or a `ks.Budget`: what the model may cost
            once its channels are removed, with `pattern="channel"`.
        criterion: Which weights matter: `"magnitude"`, `"random"`, those that use the gradients of this training
            (`"gradient"`, `"taylor"`, `"movement"`) or a `ks.criteria.Criterion`.
        pattern: Where zeros may stand: `None`, `"unstructured"`, `"channel"`, such as `"block_1x4"` or `"2:4"` (whose
            target, 1 - n/m, may be left out), or a `ks.patterns.Pattern`.
        schedule: The way from 0 to the target: `"polynomial"` (Zhu & Gupta 2017), `"linear"`, `"cosine"`,
            `"exponential"`, `"one_shot"` (all at `begin`) or a `ks.schedules.Schedule`.
        allocation: `"uniform"`: each weight gets the target; `"global"`: the smallest of all weights go first (with a
            floor for each: `ks.pruning.Global(floor=0.01)`); `"erk"`: small kernels stay denser, by the rule of
            `ks.pruning.erk_counts`; `"isomorphic"`: channels are ranked among groups of the same structure.
        begin: When pruning starts. A float is a fraction of this `fit` (epochs x steps), an int counts optimizer steps
            from the start of this `fit`.
        end: When the target is reached, like `begin`. The last update lands exactly on the target.
        frequency: Optimizer steps between updates. Defaults to a fiftieth of the span from `begin` to `end`.
        filters: Which weights: a regex, a list of them, a layer, a layer class, or a callable on the variable; see
            `ks.selection.select`.
        verbose: 1 prints a line at each update.
        over: `"fit"`: the schedule is that of one `fit` and begins anew in each. `"fits"`: it goes on over all calls of
            `fit` that get this object, as in a loop of reinforcement or active learning; `begin` and `end` count steps
            from the first of them.

    Attributes:
        milliseconds: After a fit to a budget of milliseconds `{"asked", "promised", "measured"}`; else an empty dict.

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
        over="fit",
    ):
        super().__init__(begin, end, frequency, filters, verbose)
        if over not in ("fit", "fits"):
            raise ValueError(f"`over` must be 'fit' or 'fits'. Received: over={over!r}")
        by_steps = isinstance(self.clock.end, int) and (begin == 0 or isinstance(self.clock.begin, int))
        if over == "fits" and not by_steps:
            raise ValueError(
                "A schedule over several fits counts steps, since nobody knows how many fits there will be: give "
                f"`begin` and `end` as ints. Received: begin={begin!r}, end={end!r}, over='fits'"
            )
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
        self.over, self._statistics = over, None
        self.reached, self.milliseconds = False, {}

    @property
    def finished(self):
        """Whether the target is met and nothing is left to do."""
        return self.reached

    def make_plan(self, run, untrained=()):
        self.reached = False
        return pruning.Plan(
            run.model,
            self.target_sparsity,
            self.criterion,
            self.pattern,
            self.allocation,
            self.filters,
            untrained=untrained,
        )

    def leave(self, run):
        if self.over == "fits":
            self.clock.carry_on()
            self._statistics = run.parts.statistics.snapshot()

    def start(self, run):
        if self._statistics:  # Of the fit before, in a schedule over several.
            run.parts.statistics.put(self._statistics)
            self._statistics = None
        if not self.reached:  # A backup or a file that is resumed may be there already, and so may the weights.
            self.reached = run.plan.reached(run.plan.attached_masks(run.parts))
        if self.reached and self.clock.updated >= 0:
            self.note_pruned(run, True, self.clock.updated)

    def update(self, run, progress):
        self.reached = run.plan.reached(run.plan.update(run.parts, self.schedule(progress)))
        self.note_pruned(run, self.reached)
        if self.verbose:
            self.say(run)

    def finish(self, run):
        now = self.clock.now
        if self.reached:
            self.milliseconds = run.plan.times(run.plan.attached_masks(run.parts))
            self.warn_of_emptied(run)
            return
        if self.clock.stands_still:
            self.clock.warn_of_no_steps(run.epochs_done)
            return
        sparsity, steps = f"{self.share(run):.1%}", self.clock.elapsed(now)
        if run.epochs_done < self.params["epochs"]:
            if self.over == "fit":
                warnings.warn(
                    f"Training stopped before the target sparsity: the selected weights are at {sparsity}. Wrap "
                    "`EarlyStopping` in `ks.callbacks.AtTargetSparsity` to let it stop only after that.",
                    stacklevel=2,
                )
            return
        if isinstance(self.end, int) and self.end > self.clock.planned:
            if self.over == "fit":
                warnings.warn(
                    f"This fit ended at step {steps} of a schedule that ends at step {self.end}: the selected weights "
                    f"are at {sparsity}, not at the target. For a schedule over several fits pass `over='fits'` and "
                    f"the same object to each; else lower `end`, or train for longer. Received: end={self.end!r}",
                    stacklevel=2,
                )
            return
        self.update(run, progress=1.0)
        warnings.warn(
            f"This fit ended before the schedule did, at a sparsity of {sparsity}; the target was reached with a last "
            "update that no training followed. Lower `end`, or train for longer. "
            f"Received: begin={self.begin!r}, end={self.end!r}, steps={steps}",
            stacklevel=2,
        )
