"""Proximal L1 shrinks weights after every optimizer step, so that training ends in exact zeros."""

import math
import warnings

import numpy as np

from keras_sparse import optimizers, patterns, pruning, schedules, selection
from keras_sparse.callbacks.scheduled import ScheduledCallback
from keras_sparse.registry import check_penalty, serializable

__all__ = ["ProximalL1"]

# The controller: where the strength starts, the way on which the share of zeros is led to the target, and how much of
# the error goes into the logarithm of the strength in one update. Weights need several updates to arrive at zero, so a
# higher gain winds up (with 0.5, and with the target from the start, LeNet-300-100 lost whole layers).
_FIRST_STRENGTH, _RAMP, _GAIN, _LARGEST_STEP = 3e-5, schedules.Polynomial(), 0.25, 0.4


@serializable
class ProximalL1(ScheduledCallback):
    """L1 regularization that ends in exact zeros: weights are soft-thresholded after every optimizer step.

    A term in the loss leaves small weights that are not zero. The proximal step of `strength * sum(abs(w))` is
    `w = sign(w) * max(abs(w) - step * strength, 0)` after each step, with the step size of that very step, in graph;
    with `group`, whole groups are shortened: `w * max(1 - step * strength * sqrt(n) / norm(w), 0)` for n weights.
    Micro-steps that only accumulate gradients and steps that float16 loss scaling skips do not shrink.

    For SGD without momentum this is the exact proximal gradient method (ISTA; Parikh & Boyd 2014, section 4.2), with
    `step` the learning rate. With momentum `m`, `step` is the sum of `m**k` times the rate of k steps ago. For Adam,
    AdamW, Nadam, Adamax, RMSprop, Adagrad and Adadelta each weight has its own, such as `rate / (sqrt(v) + epsilon)`
    (Yun, Lozano & Yang 2020, equation 4; groups take the mean of theirs). With those, training comes to rest at the
    same weights, those of the penalised loss, on another way. For other optimizers `step` is the plain learning rate,
    which a warning says.

    Args:
        strength: The price of a weight's magnitude in units of the loss, at least 0, as in `keras.regularizers.L1`.
        target_sparsity: The share of weights to be zero at `end`, in (0, 1), instead of `strength`: a controller finds
            the strength. At `end` the smallest weights are cut to meet the target, by one ranking over all weights, or
            surplus zeros are let go, of which some may stay zero; from then on nothing is shrunk any more.
        group: `None`: each weight for itself. A `Pattern` or its name: `"channel"` for output units, `"block_1x4"`.
            Channels that must leave together (a residual sum, a concatenation, `ks.channel_groups` lists them) are
            shrunk by one norm over all weights that make them, those of biases and normalizations too, so that they
            arrive at zero together and `ks.shrink` removes them. Where a kernel of a group is not among `filters`, or
            the graph of the model cannot be seen, units are those of one kernel.
        begin: When shrinking begins: a float is a fraction of this `fit`, an int counts optimizer steps.
        end: When shrinking ends and the zeros are kept. Defaults to 0.65 with `target_sparsity`, and to never with
            `strength`.
        frequency: Optimizer steps between updates of the strength. Defaults to a fiftieth of the span.
        filters: Which weights: as in `ks.selection.select`.
        verbose: 1 prints a line at each update.

    Raises:
        ValueError: If both or neither of `strength` and `target_sparsity` are given, a number is out of range, or the
            groups do not divide a weight evenly.
        TypeError: If an argument is of the wrong type.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(10)])
    >>> model.compile(keras.optimizers.SGD(0.1), "mse")
    >>> x, y = np.eye(20), np.zeros((20, 10))
    >>> history = model.fit(x, y, epochs=40, verbose=0, callbacks=[ks.callbacks.ProximalL1(target_sparsity=0.8)])
    >>> history.history["sparsity"][-1]
    0.8
    """

    alone = True

    def __init__(
        self,
        strength=None,
        target_sparsity=None,
        group=None,
        begin=0.0,
        end=None,
        frequency=None,
        filters=None,
        verbose=0,
    ):
        if (strength is None) == (target_sparsity is None):
            raise ValueError(
                "Give either `strength`, the price of a weight's magnitude, or `target_sparsity`, for which the "
                f"strength is found. Received: strength={strength!r}, target_sparsity={target_sparsity!r}"
            )
        if strength is not None:
            check_penalty("strength", strength)
        elif pruning.as_target(target_sparsity).budget is not None:
            raise ValueError(
                "`ProximalL1` leads to a share of zeros; a budget counts what a model costs without its channels. "
                "Take `ks.callbacks.Pruning(budget, pattern='channel')`. "
                f"Received: target_sparsity={target_sparsity!r}"
            )
        elif isinstance(target_sparsity, dict):
            raise TypeError(
                "`target_sparsity` must be a number in (0, 1): one strength serves all weights. Use `filters` to name "
                f"some of them. Received: {target_sparsity!r}"
            )
        else:
            pruning.check_target(target_sparsity)
            if target_sparsity == 0:
                raise ValueError("`target_sparsity` must be above 0. Received: target_sparsity=0")
        freezes = 0.65 if strength is None else 1.0
        super().__init__(begin, freezes if end is None else end, frequency, filters, verbose)
        self.strength, self.target_sparsity = strength, target_sparsity
        self.group = None if group is None else patterns.get(group)
        self.begin, self.end, self.frequency = begin, end, frequency
        self._frozen = False

    @property
    def reached(self):
        """Whether the model is at its target sparsity; without one, always."""
        return self.target_sparsity is None or self._frozen

    @property
    def finished(self):
        """Whether the zeros are settled."""
        return self._frozen

    def make_plan(self, run, untrained=()):
        optimizer = run.optimizer
        if getattr(optimizer, "optimizers", None):
            raise ValueError(
                "`ProximalL1` needs one learning rate, and this optimizer has several. Compile the model with a single "
                f"optimizer. Received: {optimizer.__class__.__name__}"
            )
        if not optimizers.knows_step(optimizer):
            warnings.warn(
                f"The proximal step of {optimizer.__class__.__name__} is not known: weights shrink by learning rate "
                "times strength. Tune the strength, or use SGD or Adam.",
                stacklevel=2,
            )
        plan = _FreePlan(
            run.model,
            self.target_sparsity or 0.0,
            pattern=self.group,
            allocation="global",
            filters=self.filters,
            whole_units=bool(getattr(run.model, "inputs", None)),
            untrained=untrained,
        )
        weights = [goal.weight for goal in plan.goals]
        if self.group is not None:
            for weight in weights:
                _check_groups(self.group, weight)
        self._frozen = False
        variables, axes, channels = zip(*plan.makers(), strict=True)
        run.parts.proximal.add(list(variables), self.group, axes, channels)
        return plan

    def start(self, run):
        # A backup that is resumed may have passed the end.
        last = self.clock.last
        if self._freezes and last is not None and self.clock.elapsed(self.clock.updated) >= last and not self._frozen:
            self._frozen = True
            self._stop_shrinking(run)

    @property
    def _freezes(self):
        return self.target_sparsity is not None or self.end is not None

    def update(self, run, progress):
        proximal = run.parts.proximal
        if progress >= 1.0 and self._freezes:
            self._freeze(run)
        elif self.target_sparsity is None:
            proximal.strength = self.strength
        else:
            error = self.target_sparsity * _RAMP(progress) - self.share(run)
            gain = _GAIN if error > 0 else 3 * _GAIN
            step = float(np.clip(gain * error, -_LARGEST_STEP, _LARGEST_STEP))
            proximal.strength = (proximal.strength or _FIRST_STRENGTH) * math.exp(step)
        if self.verbose:
            self.say(run)

    def _freeze(self, run):
        """Keep the zeros from now on: exactly the target's if there is one."""
        if self.target_sparsity is None:
            for goal in run.plan.goals:
                variable = goal.weight.variable
                run.parts.masks.of(variable).assign(selection.as_array(variable) != 0)
            run.plan.zero_units(run.plan.attached_masks(run.parts), run.parts)
        else:
            run.plan.update(run.parts)
        self._frozen = True
        self._stop_shrinking(run)

    def _stop_shrinking(self, run):
        # The step need not shrink any more.
        run.parts.proximal.stop()
        run.parts.changed = True
        optimizers.refresh(run.model, run.parts, in_fit=True)

    def finish(self, run):
        if not self._freezes or self._frozen:
            self.warn_of_emptied(run)
            return
        sparsity = f"{self.share(run):.1%}"
        if run.epochs_done < self.params["epochs"]:
            warnings.warn(
                f"Training stopped before the zeros were settled: the selected weights are at {sparsity}.",
                stacklevel=2,
            )
            return
        self._freeze(run)
        warnings.warn(
            f"This fit ended before the schedule did, at a sparsity of {sparsity}; the zeros were settled by a last "
            f"update that no training followed. Lower `end`, or train for longer. Received: end={self.end!r}",
            stacklevel=2,
        )


class _FreePlan(pruning.Plan):
    """A plan whose masks keep everything at first: what is zero may come back to life until the zeros are settled."""

    def attach(self, parts):
        units = [variable for goal in self.goals for variable in goal.units if variable.trainable]
        parts.masks.add([*(variable for variable, _, _ in self.makers()), *units])


def _check_groups(group, weight):
    sizes = np.bincount(group.groups(tuple(weight.variable.shape), weight.output_axes).reshape(-1))
    if (sizes != sizes[0]).any():
        raise ValueError(
            f"The groups of `{type(group).__name__}` must divide {weight.path} evenly, which has the shape "
            f"{tuple(weight.variable.shape)}. Choose another size, or leave the weight out by `filters`. "
            f"Received: group={group.get_config()}"
        )
