"""A scheduled callback makes weights sparse at the due steps of a clock."""

import warnings

from keras_sparse import optimizers, reports, selection
from keras_sparse.callbacks.clock import Clock
from keras_sparse.callbacks.sparse_callback import SparseCallback
from keras_sparse.pruning.batch_norm import Recent
from keras_sparse.pruning.plan import UNTRAINED

__all__ = ["ScheduledCallback"]

_ENOUGH = 8  # batches to take statistics from


class ScheduledCallback(SparseCallback):
    """Base of the callbacks that have a plan of weights and act on it at the due steps of a clock.

    Args:
        begin: When the first update is due, as in `ks.callbacks.clock.Clock`.
        end: When the last one is due.
        frequency: Optimizer steps between updates.
        filters: Which weights, as in `ks.selection.select`.
        verbose: 1 prints a line at each update.
        name: What a user calls `begin`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a number is out of range.

    Example:

    >>> import keras_sparse as ks
    >>> isinstance(ks.callbacks.Pruning(0.9), ks.callbacks.scheduled.ScheduledCallback)
    True
    """

    def __init__(self, begin, end, frequency, filters, verbose, name="begin"):
        super().__init__()
        self.clock = Clock(begin, end, frequency, name)
        selection.check_filters(filters)
        if verbose not in (0, 1, 2):
            raise ValueError(f"`verbose` must be 0, 1 or 2. Received: verbose={verbose!r}")
        self.filters = filters
        self.verbose = verbose
        self._recent = []

    def make_plan(self, run, untrained=()):
        """Return the `Plan` for a built model, without the weights that no step changes.

        Args:
            run: The `Run`.
            untrained: Variables to leave out unless `filters` name them.
        """
        raise TypeError(f"`{type(self).__name__}` must implement `make_plan(self, run, untrained)`.")

    def attach(self, run):
        """Give the weights of the plan their masks, and let reports know why the others are left dense."""
        untrained = run.untrained()
        run.plan = self.make_plan(run, untrained)
        run.plan.attach(run.parts)
        reports.remember(run.model, run.plan.skipped)
        names = [v.path for v in untrained if run.plan.skipped.get(id(v)) == UNTRAINED]
        if names:
            warnings.warn(
                f"No optimizer step changes {names[:5]}{' and others' if len(names) > 5 else ''} (a teacher, a frozen "
                "copy, weights that get no gradient): left as they are. Name them in `filters` to prune them all the "
                "same.",
                stacklevel=2,
            )

    def note_pruned(self, run, final, step=None):
        """Take note that weights were pruned: statistics of batch normalization have been another network's so far.

        Args:
            run: The `Run`.
            final: Whether this was the last time for now.
            step: The step at which it was; `None`: now. The statistics of a step before are those of its epoch's end.
        """
        once = run.fit.in_call and run.fit.steps_are_keras_own  # else nobody knows how often a batch runs the model
        recent = Recent(run.model) if once and (final or not self._recent) else None
        if recent is not None and recent.layers and run.fit.count_zeros()[0]:
            accumulation = run.optimizer.gradient_accumulation_steps or 1
            before = 0 if step is None else (self.clock.now - step) * accumulation
            self._recent.append((recent, before - run.batches))

    def end_epoch(self, run):
        """Let statistics of batch normalization be those of the batches since weights were pruned."""
        # Of batches, not of steps: one that float16 skips, or that only accumulates, has moved them, too.
        counted = [(recent, run.batches + before) for recent, before in self._recent]
        enough = [(recent, count) for recent, count in counted if count >= _ENOUGH]
        for recent, count in enough[-1:] or counted[:1]:
            recent.settle(count)
        self._recent = []

    def leave_out_untrained(self, run):
        """Take weights out of the plan that turned out to be trained by no one, once a step has been seen."""
        chosen = {id(goal.weight.variable) for goal in run.plan.goals}
        untrained = [variable for variable in run.untrained() if id(variable) in chosen]
        if self.filters is None and untrained:
            run.parts.masks.remove(untrained)
            self.attach(run)
            optimizers.refresh(run.model, run.parts, in_fit=True)

    def warn_of_emptied(self, run):
        """Say which kernels have lost all of their weights."""
        weights = [goal.weight for goal in run.plan.goals]
        sentences = reports.emptied(weights, [weight.numpy() != 0 for weight in weights])
        if sentences:
            warnings.warn(" ".join(sentences), stacklevel=2)

    def share(self, run):
        """The share of zeros over the weights that the fit makes sparse."""
        zeros, size = run.fit.count_zeros()
        return zeros / size if size else 0.0

    def say(self, run):
        """Print where the model is."""
        print(f"\nStep {self.clock.elapsed(self.clock.now)}: sparsity {self.share(run):.4f}")
