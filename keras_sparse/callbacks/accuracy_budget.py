"""A budget of accuracy is what a user is ready to lose: the model becomes as sparse as that allows."""

import math
import sys
import warnings

import numpy as np
from keras import ops

from keras_sparse import criteria, optimizers, patterns, pruning, reports
from keras_sparse.callbacks.scheduled import ScheduledCallback
from keras_sparse.optimizers.parts import Ledger
from keras_sparse.registry import check_whole, is_real, serializable

__all__ = ["AccuracyBudget"]

_HIGHER = ("acc", "auc", "precision", "recall", "f1", "iou", "r2")
_LOWER = ("loss", "error", "mse", "mae", "perplexity")
_UPDATES = 8  # on the way from one sparsity to the next


@serializable
class AccuracyBudget(ScheduledCallback):
    """Raises the sparsity from epoch to epoch while a metric holds, and ends with the sparsest epoch within a budget.

    Each epoch trains at one sparsity, which the first half of its first epoch leads to. While `monitor` stays within
    `max_drop` of the baseline, the density (what is left) is halved; after `patience` epochs out of the budget the best
    epoch's weights and masks come back and the next sparsity lies half-way, in densities, between that and the one that
    failed. The search ends when the two are within `tolerance`, or `max_sparsity` holds. If some of the budget is spent
    by then, training goes on at the sparsity that holds, until the metric has not become better for `patience` epochs.
    What failed is tried once more, from the weights that hold: before that training if less than half of the budget is
    spent, else after it. In the end the model has the weights and masks of the sparsest epoch within the budget: the
    last in which the search tried that sparsity, or a better one after it. It is the accuracy-aware training of NNCF
    (Kozlov et al., "Neural network compression framework for fast model inference", 2020, section 4.6), on densities.

    Moving statistics of batch normalization, which a short epoch hardly moves, forget before each validation what they
    were before the last step towards the sparsity.

    It is meant for a trained model. Give `fit` more epochs than it needs, a low learning rate, and validation data. The
    metric is noisy, and the sparsest of several epochs is a lucky one: measure what the model is worth on other data.
    `History` has `sparsity` and the metric of each epoch; `front()` is a table of them.

    Resumes with `keras.callbacks.BackupAndRestore`, listed after this callback, which judges an epoch at its end.

    Args:
        max_drop: How much worse the metric may become, in its own units: 0.01 is one point of accuracy.
        monitor: A name in the logs.
        mode: `"max"` if higher is better, `"min"` if lower, `"auto"` to tell it by the name.
        baseline: The metric to compare with. `None`: that of the first epoch, which trains the model as it is.
        initial_sparsity: What is tried first, in (0, 1); at most `max_sparsity`.
        max_sparsity: What is never exceeded, in (0, 1); for patterns such as `"2:4"` their own by default.
        patience: Epochs that a sparsity gets to come back into the budget, at least 1. One that halves what is missing
            of it, against the epoch before, does not count. After the search: epochs without a better metric.
        tolerance: By which factor the density of the result may exceed that of one that failed, above 0.
        criterion: As in `Pruning`.
        pattern: As in `Pruning`.
        allocation: As in `Pruning`.
        filters: As in `Pruning`.
        verbose: 1 prints a line after each epoch.

    Raises:
        ValueError: If a number is out of range, a string names nothing, or the logs lack `monitor`.
        TypeError: If an argument is of the wrong type.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(10)])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.ones((64, 20)), np.ones((64, 10))
    >>> budget = ks.callbacks.AccuracyBudget(0.5, monitor="loss", max_sparsity=0.8)
    >>> history = model.fit(x, y, epochs=5, verbose=0, callbacks=[budget])
    >>> history.history["sparsity"], budget.reached
    ([0.0, 0.5, 0.75, 0.8], True)
    """

    alone = True

    def __init__(
        self,
        max_drop=0.01,
        monitor="val_accuracy",
        mode="auto",
        baseline=None,
        initial_sparsity=0.5,
        max_sparsity=None,
        patience=2,
        tolerance=0.1,
        criterion="magnitude",
        pattern=None,
        allocation="global",
        filters=None,
        verbose=0,
    ):
        super().__init__(0, sys.maxsize, sys.maxsize, filters, verbose)
        if mode not in ("auto", "max", "min"):
            raise ValueError(f"`mode` must be 'auto', 'max' or 'min'. Received: mode={mode!r}")
        if not isinstance(monitor, str):
            raise TypeError(f"`monitor` must be a name in the logs. Received: monitor={monitor!r}")
        for name, value, low in (("max_drop", max_drop, 0), ("tolerance", tolerance, 1e-6)):
            if not is_real(value) or not low <= value < math.inf:
                raise ValueError(f"`{name}` must be a number of at least {low:g}. Received: {name}={value!r}")
        if baseline is not None and not is_real(baseline):
            raise TypeError(f"`baseline` must be a number or None. Received: baseline={baseline!r}")
        check_whole("patience", patience)
        self.pattern = patterns.get(pattern)
        self.max_sparsity = (self.pattern.sparsity or 0.99) if max_sparsity is None else max_sparsity
        pruning.final_target(self.max_sparsity, allocation, self.pattern)
        pruning.check_target(initial_sparsity)
        if not 0 < initial_sparsity:
            raise ValueError(f"`initial_sparsity` must be above 0. Received: initial_sparsity={initial_sparsity!r}")
        self.max_drop, self.monitor, self.mode, self.baseline = max_drop, monitor, mode, baseline
        self.initial_sparsity, self.patience, self.tolerance = initial_sparsity, patience, tolerance
        self.criterion = criteria.get(criterion)
        self.allocation = pruning.allocation.get(allocation)
        self._higher = _higher_is_better(monitor, mode)
        self._ledger, self._front = None, []

    @property
    def reached(self):
        """Whether the search has ended."""
        return self._ledger is not None and bool(self._ledger.get("over"))

    def front(self):
        """What was tried, a `Report` with a row for each epoch: `epoch`, `sparsity`, the metric, `within` the budget.

        Totals: `sparsity` and the metric of the epoch that was kept, and `baseline`.
        """
        found = self._ledger
        totals = {name: found and found.get(key) for name, key in (("sparsity", "share"), ("baseline", "baseline"))}
        totals[self.monitor] = found and found.get("quality")
        formats = {"sparsity": ".1%", self.monitor: ".4f", "baseline": ".4f"}
        return reports.Report("Accuracy budget", [dict(row) for row in self._front], totals, self._notes(), formats)

    def _notes(self):
        if self._ledger is None:
            return ["No epoch has been judged yet."]
        level, cap = self._ledger.get("kept"), self.max_sparsity
        if level >= cap - 1e-6:
            return [f"The budget holds at `max_sparsity`, {cap:.1%}: the limit is not the budget."]
        if not level:
            return [f"No sparsity that was tried was within {self.max_drop:g} of the baseline."]
        return []

    def make_plan(self, run, untrained=()):
        return pruning.Plan(
            run.model,
            self.max_sparsity,
            self.criterion,
            self.pattern,
            self.allocation,
            self.filters,
            untrained=untrained,
        )

    def attach(self, run):
        super().attach(run)
        self._ledger = run.parts.of(_Ledger)
        state = [*run.model.trainable_variables, *run.model.non_trainable_variables]
        self._ledger.add([variable for variable in state if "float" in variable.dtype])
        self._front = []

    def start(self, run):
        ledger = self._ledger
        if not ledger.get("begun"):
            ledger.put(begun=1, baseline=math.nan if self.baseline is None else self.baseline, failed=math.nan)
            ledger.put(level=0 if self.baseline is None else self._capped(self.initial_sparsity), quality=math.nan)
            ledger.keep()
        if ledger.get("back"):
            ledger.put_back()
            run.parts.masks.apply()
            ledger.put(back=0)
        steps = (self.params.get("steps") or 0) // (run.optimizer.gradient_accumulation_steps or 1)
        self._begun, self._span, self._met = self.clock.now, steps // 2, False
        self.clock.every = max(1, self._span // _UPDATES)
        self.update(run, 0.0)

    def update(self, run, progress):
        """Take the next step from the sparsity that holds to the one that is tried, which half an epoch later is met.

        Densities fall by equal factors. A sparsity that is tried for another epoch has been met.
        """
        ledger, way = self._ledger, 1.0
        if self._span and not ledger.get("tries"):
            way = min(1.0, (self.clock.now - self._begun) / self._span)
        density = (1 - ledger.get("kept")) ** (1 - way) * (1 - ledger.get("level")) ** way
        run.plan.update(run.parts, (1 - density) / self.max_sparsity)
        if not self._met:
            self._met = way == 1
            self.note_pruned(run, self._met)

    def watch(self, run, logs):
        """Judge an epoch, and decide what the next one tries."""
        if self.monitor not in logs:
            raise ValueError(
                f"`AccuracyBudget` judges epochs by {self.monitor!r}, which is not in the logs. They have "
                f"{sorted(logs)}; names with val_ need `validation_data`, and `validation_freq=1`. "
                f"Received: monitor={self.monitor!r}"
            )
        ledger, quality = self._ledger, float(logs[self.monitor])
        level, share = ledger.get("level"), self.share(run)
        if math.isnan(ledger.get("baseline")):
            ledger.put(baseline=quality)
        within = bool(self._drop(quality) <= self.max_drop + 1e-7)  # float32 has less than seven digits
        self._front.append({"epoch": run.epoch, "sparsity": share, self.monitor: quality, "within": within})
        if self.verbose:
            print(f"\nEpoch {run.epoch + 1}: sparsity {share:.4f}, {'within' if within else 'out of'} the budget")
        if ledger.get("settles"):
            self._settle(run, share, quality)
            return
        if within:
            ledger.put(kept=level, share=share, quality=quality, tries=0)
            ledger.keep()
            self._go_on(run, level)
            return
        gap, tries = self._drop(quality) - self.max_drop, ledger.get("tries")
        recovers = tries > 0 and gap < ledger.get("gap") / 2
        ledger.put(tries=tries + (not recovers), gap=gap)
        if ledger.get("tries") >= self.patience:
            ledger.put(failed=level, tries=0, back=1)
            self._go_on(run, ledger.get("kept"))

    def _go_on(self, run, level):
        """Try the next sparsity after one that holds, or stop."""
        ledger, failed = self._ledger, self._ledger.get("failed")
        if math.isnan(failed):
            next_level = self._capped(max(self.initial_sparsity, 1 - (1 - level) / 2))
            over = level >= self.max_sparsity - 1e-6
        else:
            next_level = 1 - math.sqrt((1 - level) * (1 - failed))
            over = (1 - level) <= (1 - failed) * (1 + self.tolerance)
            if over and self._may_retry() and self._drop(ledger.get("quality")) <= self.max_drop / 2:
                next_level, over = self._retried(), False
        if over and self._drop(ledger.get("quality")) > 0 and ledger.get("settled") != level:
            ledger.put(settles=1, settled=level, tries=0, back=1)
            next_level, over = level, False
        ledger.put(level=next_level)
        if over:
            self._stop(run)

    def _settle(self, run, share, quality):
        """Keep what has become better at the sparsity that holds, or stop."""
        ledger, tries = self._ledger, self._ledger.get("tries") + 1
        quality = float(np.float32(quality))  # as what is kept
        if self._drop(quality) < self._drop(ledger.get("quality")):
            ledger.put(share=share, quality=quality)
            ledger.keep()
            tries = 0
        ledger.put(tries=tries)
        if tries >= self.patience and self._may_retry():
            ledger.put(level=self._retried(), settles=0, tries=0, back=1)
        elif tries >= self.patience:
            self._stop(run)

    def _stop(self, run):
        self._ledger.put(over=1)
        run.model.stop_training = True

    def _may_retry(self):
        """Whether a sparsity failed that has not had its second try.

        The first was a longer step from weights that were trained less, and with a rate that falls at a higher one.
        """
        failed = self._ledger.get("failed")
        return not math.isnan(failed) and failed != self._ledger.get("retried")

    def _retried(self):
        """The sparsity that failed, which gets its second try."""
        failed = self._ledger.get("failed")
        self._ledger.put(failed=math.nan, retried=failed)
        return failed

    def _drop(self, quality):
        """How much worse a metric is than the baseline."""
        baseline = self._ledger.get("baseline")
        return baseline - quality if self._higher else quality - baseline

    def _capped(self, level):
        return min(level, self.max_sparsity)

    def finish(self, run):
        if not self._ledger.get("begun"):
            return
        self._ledger.put_back()
        run.parts.masks.apply()
        for note in self._notes():
            if not self._ledger.get("kept"):
                warnings.warn(f"{note} The model is as sparse as it was.", stacklevel=2)
            elif self.verbose:
                print(note)
        self.warn_of_emptied(run)


def _higher_is_better(monitor, mode):
    if mode != "auto":
        return mode == "max"
    name = monitor.lower()
    if any(word in name for word in _LOWER):
        return False
    if any(word in name for word in _HIGHER):
        return True
    raise ValueError(f"Whether {monitor!r} should be high or low is not known: pass `mode='max'` or 'min'.")


class _Ledger(Ledger):
    """Where the search stands, and the weights and masks of the epoch to end with."""

    name = "accuracy_budget"
    names = ("begun", "baseline", "level", "kept", "share", "quality", "failed", "retried")
    names += ("tries", "gap", "back", "settles", "settled", "over")

    def __init__(self, parts):
        super().__init__(parts)
        self._sources = {}

    def add(self, variables):
        """Make room for the numbers, and for copies of variables and of the masks."""
        self.claim_numbers()
        self._sources = {(1, i): variable for i, variable in enumerate(variables)}
        self._sources |= {(2, self.parts.index(variable)): mask for variable, mask in self.parts.masks.pairs}
        for key, source in self._sources.items():
            self.claim(key, lambda s=source: optimizers.variable_like(s, self.name))

    def keep(self):
        for key, source in self._sources.items():
            self.variables[key].assign(ops.copy(source))

    def put_back(self):
        for key, source in self._sources.items():
            source.assign(ops.copy(self.variables[key]))
