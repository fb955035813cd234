"""Dynamic sparse training keeps a model at one sparsity while it trains, and moves the live weights around."""

import numpy as np

from keras_sparse import criteria, optimizers, patterns, pruning, schedules, selection
from keras_sparse.callbacks.scheduled import ScheduledCallback
from keras_sparse.registry import is_real, serializable

__all__ = ["DynamicSparseTraining"]


class _LatestGradient(criteria.Criterion):
    """How steep the loss is along each weight, live or not, in the step that was just taken."""

    statistic = "last_gradient"

    def scores(self, weight, statistic=None):
        # A NaN is no reason to grow.
        return np.nan_to_num(np.abs(statistic), nan=0.0)


class _Static:
    """Nothing moves."""

    moves = False
    criterion = "random"


class _Random:
    """SET: what grows is chance."""

    moves = True
    criterion = "random"

    def scores(self, statistics, weight, generator):
        """What grows first, an array of the weight's shape."""
        return generator.random(tuple(weight.variable.shape))


class _Steepest:
    """RigL: what grows is where the gradient is largest."""

    moves = True
    criterion = _LatestGradient()

    def scores(self, statistics, weight, generator):
        """What grows first, an array of the weight's shape."""
        gradient = selection.as_array(statistics.of(weight.variable, self.criterion.statistic))
        return self.criterion(weight.numpy(), gradient)


_GROW = {"gradient": _Steepest(), "random": _Random(), "static": _Static(), None: _Static()}


@serializable
class DynamicSparseTraining(ScheduledCallback):
    """Trains a sparse model from start to end: RigL, SET, or a static mask.

    The model is sparse from the first step on. Every `frequency` steps the live weights with the smallest magnitude are
    dropped in each kernel, and as many dead ones grow, where the gradient is largest (RigL, Evci et al., "Rigging the
    lottery", 2020, algorithm 1) or at random (SET, Mocanu et al., "Scalable training of artificial neural networks with
    adaptive sparse connectivity", 2018). The number of live positions in each kernel is the same after every step.

    At step t the share `drop_fraction * (1 - schedule(t / end))` of the live weights is dropped; with the cosine
    schedule that is `drop_fraction / 2 * (1 + cos(pi * t / end))`, RigL's equation 1. Positions that were just dropped
    do not grow in the same update, so no more can move than are dead. What grows starts at zero, and the optimizer's
    slots of positions that were dropped or grew are reset. The gradients are those that the optimizer has received in
    the step before the update: no extra pass is made.

    Where training starts: positions that are zero already (or masked, in an interrupted fit) are dead; random ones
    join them, or grow, until the count is exact. A kernel that is all zeros counts as zero-initialised.

    With `pattern="channel"` whole channels live, die and grow, by groups (see `ks.channel_groups`): the partners of a
    residual sum, a gate, an attention head, the gates of a recurrent layer together, so that `ks.shrink` removes what
    is dead after training. Each group keeps the number of its channels. A channel's magnitude and its gradient are the
    means over its weights, summed over the kernels that make it. A channel that grows gets small random weights where
    it is made, since behind a ReLU zeros would get no gradient (for the same reason most dead channels have the
    gradient 0, and chance decides among them), and zeros where weights read it: the network computes what it did.

    Live weights that have just grown are zero until their first step, so `logs["sparsity"]`, which counts zeros, may be
    a little above `sparsity`.

    Args:
        sparsity: The share of positions that are dead throughout: a float in [0, 1), or a dict `{regex: sparsity}` with
            `allocation="uniform"`. `None` keeps as many in each kernel as there are zeros when training starts, for
            example after `ks.prune(model, 0.9)`.
        allocation: `"erk"`: small kernels are denser, see `ks.pruning.erk_counts`; `"uniform"`: each gets `sparsity`.
            `None` is `"erk"`, and `"uniform"` for channels, of which a group takes the least that one of its kernels
            should lose.
        grow: What grows: `"gradient"` (RigL), `"random"` (SET), or `None` or `"static"`: nothing moves.
        drop_fraction: Share of the live weights that the first update would move, in (0, 1].
        schedule: How that share decays to 0 at `end`: `"cosine"`, `"linear"`, `"polynomial"` (the inverse power of
            RigL's appendix G) or another `ks.schedules.Schedule`.
        frequency: Optimizer steps between updates; `None` is a fiftieth of the steps up to `end`.
        end: When the last update is due. A float is a fraction of this `fit` (epochs x steps), an int counts optimizer
            steps from the start of this `fit`.
        filters: Which weights: a regex, a list of them, or a callable on the variable; see `ks.selection.select`.
        pattern: `None`: single weights; or `"channel"`.
        seed: Integer that the random masks and SET's choices depend on, together with the step.
        verbose: 1 prints a line at each update.

    Raises:
        ValueError: If a number is out of range, a string names nothing, no update fits in this `fit`, or a filter or
            key matches nothing.
        TypeError: If an argument is of the wrong type.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(10)])
    >>> model.compile("adam", "mse")
    >>> x, y = np.random.normal(size=(64, 20)), np.ones((64, 10))
    >>> rigl = ks.callbacks.DynamicSparseTraining(0.9, frequency=3)
    >>> history = model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[rigl])
    >>> history.history["sparsity"]
    [0.9, 0.9]
    """

    def __init__(
        self,
        sparsity,
        allocation=None,
        grow="gradient",
        drop_fraction=0.3,
        schedule="cosine",
        frequency=100,
        end=0.75,
        filters=None,
        seed=0,
        verbose=0,
        pattern=None,
    ):
        if is_real(end) and end == 0:
            raise ValueError(f"`end` must be above 0; `grow=None` moves no weight. Received: end={end!r}")
        super().__init__(0, end, frequency, filters, verbose)
        self.pattern = patterns.get(pattern)
        by_channels = self.pattern.whole_units
        if not by_channels and not self.pattern.single_weights:
            raise ValueError(
                "Dynamic sparse training moves single weights, or whole channels: `pattern` is None or 'channel'. "
                f"Received: pattern={pattern!r}"
            )
        if allocation is None:
            allocation = "uniform" if by_channels else "erk"
        if allocation not in ("erk", "uniform"):
            raise ValueError(
                "`allocation` must be 'erk' or 'uniform': which weights are live says the training. "
                f"Received: allocation={allocation!r}"
            )
        target = pruning.as_target(sparsity)
        if sparsity is not None and target.budget is None:
            pruning.check_target(sparsity, allocation)
        if target.patterned or target.budget is not None:
            raise ValueError(
                "Dynamic sparse training has one pattern: give sparsities without patterns. To meet a budget in "
                "training, take `ks.callbacks.Pruning(ks.Budget(macs=0.5), pattern='channel')`. "
                f"Received: sparsity={sparsity!r}"
            )
        if grow not in _GROW:
            raise ValueError(
                "`grow` must be 'gradient' (RigL), 'random' (SET), or 'static' or None, which move nothing. "
                f"Received: grow={grow!r}"
            )
        if not is_real(drop_fraction) or not 0 < drop_fraction <= 1:
            raise ValueError(
                "`drop_fraction` must be above 0 and at most 1, the share of live weights that an update moves; "
                f"`grow=None` moves none. Received: drop_fraction={drop_fraction!r}"
            )
        self.sparsity = sparsity
        self.allocation = allocation
        self.grow, self._grow = grow, _GROW[grow]
        self.drop_fraction = float(drop_fraction)
        self.schedule = schedules.get(schedule)
        self.end, self.frequency = end, frequency
        self.seed = criteria.Random(seed).seed
        self._prepared, self._channels = False, None

    def make_plan(self, run, untrained=()):
        self._prepared = False
        plan = self._plan(run.model, untrained)
        self._channels = pruning.MovingChannels(run.model, plan.channels) if self.pattern.whole_units else None
        return plan

    def _plan(self, model, untrained):
        if self.sparsity is not None:
            return pruning.Plan(
                model,
                self.sparsity,
                self._grow.criterion,
                self.pattern,
                self.allocation,
                self.filters,
                untrained=untrained,
                removable=True,
            )
        chosen = {id(w.variable) for w in selection.select(model, self.filters).chosen if _sparse(w)}
        if self.filters is None:
            chosen -= {id(variable) for variable in untrained}
        if not chosen:
            raise ValueError(
                f"`sparsity=None` keeps the sparsity that {model.name!r} has, and it has no zeros. Prune it first, for "
                "example with `ks.prune(model, 0.9)`, or give a sparsity. Received: sparsity=None"
            )
        return pruning.Plan(
            model,
            0.0,
            self._grow.criterion,
            self.pattern,
            filters=lambda variable: id(variable) in chosen,
            removable=True,
        )

    def start(self, run):
        if self._prepared:
            return
        self._prepared = True
        last = self.clock.last
        if self._grow.moves and last is not None and last <= self.clock.every:
            raise ValueError(
                f"Nothing would ever grow: updates are due every {self.clock.every} steps, and the last one at step "
                f"{last}. Lower `frequency`, or train for longer. "
                f"Received: frequency={self.frequency!r}, end={self.end!r}"
            )
        self._move(run, self._first_masks(run))
        if self.clock.updated < 0:  # Else a backup goes on.
            self.clock.mark(self.clock.now)

    def update(self, run, progress):
        fraction = self.drop_fraction * (1.0 - self.schedule(progress))
        if not self._grow.moves or not fraction:
            return
        moved = self._move(run, self._next_masks(run, fraction))
        if self.verbose:
            elapsed, what = self.clock.elapsed(self.clock.now), "weights" if self._channels is None else "channels"
            print(f"\nStep {elapsed}: {moved // 2} {what} dropped, as many grown")

    def finish(self, run):
        # Another callback may have put back the weights of an earlier epoch, which had other masks.
        if self._channels is not None:
            masks = self._channels.settled(run.plan.present_masks())
            for goal, mask in zip(run.plan.goals, masks, strict=True):
                run.parts.masks.of(goal.weight.variable).assign(mask)
            run.plan.zero_units(masks, run.parts)
            return
        for goal in run.plan.goals:
            state = run.parts.masks.of(goal.weight.variable)
            mask, alive = selection.as_array(state), goal.weight.numpy() != 0
            if np.count_nonzero(alive) <= np.count_nonzero(mask):
                # Those that have just grown are zero: what this mask keeps comes first.
                state.assign(patterns.keep_highest(2.0 * alive + mask, np.count_nonzero(~mask)))

    def _present(self, run):
        """Yield each goal, its mask, and a random generator that depends on nothing but the seed, step and goal."""
        elapsed = self.clock.elapsed(self.clock.now)
        for index, (goal, mask) in enumerate(zip(run.plan.goals, run.plan.attached_masks(run.parts), strict=True)):
            yield goal, mask, np.random.default_rng([self.seed, elapsed, index])

    def _first_masks(self, run):
        if self._channels is None:
            return [self._first_mask(*found) for found in self._present(run)]
        masks = run.plan.attached_masks(run.parts)
        return (
            self._channels.settled(masks) if self.sparsity is None else self._channels.first(masks, self._chance(run))
        )

    def _next_masks(self, run, fraction):
        if self._channels is None:
            return [self._next_mask(run, fraction, *found) for found in self._present(run)]
        generator = self._chance(run)
        magnitudes = [_magnitude(goal.weight.numpy()) for goal in run.plan.goals]
        growth = [self._grow.scores(run.parts.statistics, goal.weight, generator) for goal in run.plan.goals]
        return self._channels.next(run.plan.attached_masks(run.parts), magnitudes, growth, fraction, generator)

    def _chance(self, run):
        return np.random.default_rng([self.seed, self.clock.elapsed(self.clock.now), len(run.plan.goals)])

    def _first_mask(self, goal, mask, generator):
        if self.sparsity is None:
            return mask
        # Live positions rank above dead ones, and the rest is chance.
        return patterns.keep_highest(generator.random(mask.shape) + mask, round(goal.sparsity * mask.size))

    def _next_mask(self, run, fraction, goal, mask, generator):
        live = int(np.count_nonzero(mask))
        count = min(round(fraction * live), mask.size - live)
        # Live weights rank below dead ones, whatever became of them.
        kept = mask & patterns.keep_highest(np.where(mask, _magnitude(goal.weight.numpy()), np.inf), count)
        scores = self._grow.scores(run.parts.statistics, goal.weight, generator)
        return kept | patterns.keep_highest(np.where(mask, -np.inf, scores), mask.size - count)

    def _move(self, run, masks):
        """Put `masks` in place; return at how many positions they differ from what was there."""
        changed, before = {}, run.plan.attached_masks(run.parts)
        for goal, mask in zip(run.plan.goals, masks, strict=True):
            state = run.parts.masks.of(goal.weight.variable)
            changed[run.parts.index(goal.weight.variable)] = selection.as_array(state) != mask
            state.assign(mask)
        run.plan.zero_units(masks, run.parts)
        run.parts.masks.apply()
        moved = sum(int(np.count_nonzero(where)) for where in changed.values())
        if self._channels is not None:
            fresh = self._channels.grow(before, masks, self._chance(run))
            changed = {run.parts.index(v): where for v, where in fresh.items() if v.trainable}
            moved = self._channels.moved(before, masks)
        optimizers.reset_slots(run.optimizer, run.parts.trainable, changed)
        return moved


def _magnitude(value):
    return np.fmin(np.abs(value), np.finfo(value.dtype).max)


def _sparse(weight):
    zeros = int(np.count_nonzero(weight.numpy() == 0))
    return 0 < zeros < weight.size
