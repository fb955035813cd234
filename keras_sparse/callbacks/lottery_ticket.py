"""A lottery ticket is a sparse subnetwork that trains well from the weights that the dense network started with."""

import numbers
import sys
import warnings

import numpy as np

from keras_sparse import optimizers, pruning
from keras_sparse.callbacks.scheduled import ScheduledCallback
from keras_sparse.registry import is_real, serializable

__all__ = ["LotteryTicket"]


@serializable
class LotteryTicket(ScheduledCallback):
    """Finds and trains a lottery ticket by iterative magnitude pruning with rewinding.

    One `fit` holds all rounds: its epochs are divided among them. Every round trains the weights that are left. After
    every round but the last, the share `rate` of them with the smallest magnitude is pruned, the others go back to the
    values that they had at `rewind_to` in the first round, and the optimizer starts anew: its slots, its iterations and
    with them a learning-rate schedule. The last round trains the ticket. Its sparsity is
    `1 - (1 - rate) ** (rounds - 1)`; give `target_sparsity` to have the rate computed from it.

    `rewind_to=0` is Frankle & Carbin, "The lottery ticket hypothesis" (2019), strategy 1 of appendix B; a few hundred
    steps or more are the late rewinding of Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis"
    (2020), which large networks need. (There a learning-rate schedule goes on from that step; here each round has the
    whole schedule.)

    It is a callback and not a function that calls `fit` in a loop, because then everything that belongs to a `fit`
    works over all of the rounds: `History`, loggers, and `BackupAndRestore`, which resumes within any round. The copy
    of the weights to go back to is part of the optimizer's state, as the masks are. Let a learning-rate schedule
    (`keras.optimizers.schedules`) span one round; callbacks that count epochs, such as `LearningRateScheduler`, do not
    start anew. Statistics of BatchNorm are not rewound: they forget by themselves. Hold `EarlyStopping` and
    `ModelCheckpoint(save_best_only=True)` back until the last round with `AtTargetSparsity`.

    Args:
        rounds: How often the network is trained, at least 2; it must divide the `epochs` of `fit`.
        rate: The share of the remaining weights that is pruned after each round but the last, in (0, 1).
        rewind_to: The step of the first round whose weights are gone back to. An int counts optimizer steps, a float is
            a fraction of this `fit` (epochs x steps), as in `Pruning`.
        allocation: `"global"`: the smallest of all weights go first; `"uniform"`: of each weight; `"erk"`: see
            `ks.pruning.erk_counts`.
        filters: Which weights: a regex, a list of them, or a callable on the variable; see `ks.selection.select`.
        verbose: 1 prints a line at each rewinding.
        target_sparsity: Instead of `rate`: the sparsity of the last round, in (0, 1).

    Raises:
        ValueError: If not exactly one of `rate` and `target_sparsity` is given, a number is out of range, `rounds`
            does not divide the epochs, `rewind_to` is not in the first round, or a filter matches nothing.
        TypeError: If an argument is of the wrong type.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(10)])
    >>> model.compile("adam", "mse")
    >>> x, y = np.ones((64, 20)), np.ones((64, 10))
    >>> ticket = ks.callbacks.LotteryTicket(rounds=3, rate=0.5)
    >>> history = model.fit(x, y, epochs=6, verbose=0, callbacks=[ticket])
    >>> history.history["sparsity"]
    [0.0, 0.0, 0.5, 0.5, 0.75, 0.75]
    """

    alone = True

    def __init__(
        self, rounds, rate=None, rewind_to=0, allocation="global", filters=None, verbose=0, target_sparsity=None
    ):
        # The clock's only task is to say when `rewind_to` is.
        super().__init__(rewind_to, sys.maxsize, sys.maxsize, filters, verbose, name="rewind_to")
        if isinstance(rounds, bool) or not isinstance(rounds, numbers.Integral) or rounds < 2:
            raise ValueError(
                "`rounds` must be a whole number of at least 2: the first trains the dense network, the last the "
                f"ticket. Received: rounds={rounds!r}"
            )
        if (rate is None) == (target_sparsity is None):
            raise ValueError(
                "Give either `rate`, the share of the remaining weights that a round prunes, or `target_sparsity`, the "
                f"sparsity of the last round. Received: rate={rate!r}, target_sparsity={target_sparsity!r}"
            )
        if target_sparsity is not None:
            if not is_real(target_sparsity) or not 0 < target_sparsity < 1:
                raise ValueError(
                    f"`target_sparsity` must be above 0 and below 1. Received: target_sparsity={target_sparsity!r}"
                )
        elif not is_real(rate) or not 0 < rate < 1:
            raise ValueError(
                "`rate` must be above 0 and below 1, the share of the remaining weights that a round prunes. "
                f"Received: rate={rate!r}"
            )
        self.rounds = int(rounds)
        self.rate, self.target_sparsity = rate, target_sparsity
        self.rewind_to = rewind_to
        pruning.check_target(self._sparsity(1), allocation)
        self.allocation = pruning.allocation.get(allocation)
        self._round = 0

    @property
    def reached(self):
        """Whether the last round has begun."""
        return self._round == self.rounds - 1

    def _sparsity(self, prunings):
        """The sparsity after a number of prunings."""
        last = self.rounds - 1
        if self.target_sparsity is None:
            return 1.0 - (1.0 - self.rate) ** prunings
        return self.target_sparsity if prunings == last else 1.0 - (1.0 - self.target_sparsity) ** (prunings / last)

    def make_plan(self, run, untrained=()):
        self._round = 0
        run.parts.rewind_point.add()
        target = self._sparsity(self.rounds - 1)
        return pruning.Plan(
            run.model, target, "magnitude", allocation=self.allocation, filters=self.filters, untrained=untrained
        )

    def start(self, run):
        epochs, length = self.params["epochs"], self.clock.length
        if epochs % self.rounds:
            raise ValueError(
                f"The rounds share the epochs equally: `epochs` must be a multiple of {self.rounds}. "
                f"Received: epochs={epochs}, rounds={self.rounds}"
            )
        if length and self.clock.first >= length // self.rounds:
            raise ValueError(
                f"`rewind_to` must be a step of the first round, which has {length // self.rounds} steps. "
                f"Received: rewind_to={self.rewind_to!r}"
            )
        self._round = run.epoch // (epochs // self.rounds)
        if self._round:
            before = run.plan.attached_masks(run.parts)
            fraction = self._sparsity(self._round) / self._sparsity(self.rounds - 1)
            after = run.plan.update(run.parts, fraction)
            # If nothing changed, a backup from within this round was restored: it goes on.
            if any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True)):
                self._rewind(run)

    def _rewind(self, run):
        if self.clock.updated < 0:
            raise ValueError(
                "The first round is over, and there is no point to rewind to: a ticket cannot begin in the middle. "
                "Train from epoch 0, or resume the fit that began. "
                f"Received: rewind_to={self.rewind_to!r}, epoch={run.epoch}"
            )
        parts = run.parts
        parts.rewind_point.put_back()
        parts.masks.apply()
        # An optimizer that came in the middle of the fit starts at 0.
        start = min(parts.clock.start, parts.clock.iterations)
        parts.clock.rewind(parts.clock.iterations - start)
        optimizers.restart(run.optimizer, parts.trainable, start)
        if self.verbose:
            print(f"\nRound {self._round + 1} of {self.rounds} trains at sparsity {self._sparsity(self._round):.4f}")

    def update(self, run, progress):
        if self.clock.updated < 0:
            run.parts.rewind_point.keep()

    def finish(self, run):
        self.warn_of_emptied(run)
        if not self.reached:
            warnings.warn(
                f"Training stopped in round {self._round + 1} of {self.rounds}, at a sparsity of "
                f"{self._sparsity(self._round):.1%} instead of {self._sparsity(self.rounds - 1):.1%}. Wrap "
                "`EarlyStopping` in `ks.callbacks.AtTargetSparsity` to let it stop only in the last.",
                stacklevel=2,
            )
