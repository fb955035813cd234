"""A plan says how sparse each weight of a model should be, and leads to the masks."""

from dataclasses import replace

import numpy as np

from keras_sparse import criteria, graph, optimizers, patterns, selection
from keras_sparse.identity import IdentityDict
from keras_sparse.pruning import allocation as allocations
from keras_sparse.pruning.allocation import Goal
from keras_sparse.pruning.budget import as_target, check_target
from keras_sparse.pruning.channels import ChannelChoice

__all__ = ["UNTRAINED", "Plan"]

_OUTPUTS = "name it in `filters` to let some of what the model returns be zero"
UNTRAINED = "no step of the optimizer changes it: name it in `filters` to prune it all the same"


class Plan:
    """Which weights of a model become how sparse.

    Args:
        model: A built Keras model.
        target_sparsity: A float in [0, 1), or a dict `{regex: sparsity}` or `{regex: (sparsity, pattern)}` that is
            searched in each weight's path: the first match wins, weights that no key matches stay dense. A key that is
            one path, as `ks.selection.only` writes it, or a weight, takes what the default filters leave out, too.
        criterion: A `Criterion` or its name.
        pattern: A `Pattern`, its name, or `None`.
        allocation: An `Allocation` or its name: `"uniform"`, `"global"` or `"erk"`.
        filters: As in `ks.selection.select`.
        frozen: Whether kernels that are not trainable take part.
        whole_units: Whether the pattern `Channel` takes bias and batch normalization along, and skips kernels whose
            units would not be zero by that.
        untrained: Variables that no step of the optimizer changes; left out unless `filters` are given. So are channels
            that the model returns.
        unknown: Mapping from variables that cannot be pruned by the criterion to the reason.
        removable: Whether of channels only those take part that `ks.shrink` can remove, as with a `Budget`.

    Attributes:
        goals: List of `Goal`.
        skipped: `{id of a variable: why it is left out}`.
        channels: The `ChannelChoice` where channels of several weights are chosen as one, else `None`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, name="a"), keras.layers.Dense(5, name="b")])
    >>> plan = ks.pruning.Plan(model, {"a/": 0.5})
    >>> [(goal.weight.path.split("/")[-2], goal.sparsity) for goal in plan.goals]
    [('a', 0.5)]
    """

    def __init__(
        self,
        model,
        target_sparsity,
        criterion="magnitude",
        pattern=None,
        allocation="uniform",
        filters=None,
        frozen=False,
        whole_units=True,
        untrained=(),
        unknown=(),
        removable=False,
    ):
        check_target(target_sparsity, allocation)
        self.criterion = criteria.get(criterion)
        self.allocation = allocations.get(allocation)
        pattern = patterns.get(pattern)
        weights = selection.select(model, filters, frozen, target_sparsity if isinstance(target_sparsity, dict) else ())
        if filters is None:
            weights = weights.without(untrained, UNTRAINED)
        for variable in unknown:
            weights = weights.without([variable], unknown[variable])
        if not weights.chosen:
            reasons = "; ".join(f"{variable.path}: {reason}" for variable, reason in list(unknown.items())[:8])
            raise ValueError(
                f"There is nothing to prune by the inputs of {model.name!r}. Rows of `ks.graph.register_kind` tell "
                f"what layers of your own multiply. The reasons: {reasons}"
            )
        target = as_target(target_sparsity)
        self.goals = [
            Goal(weight, sparsity, pattern if own is None else patterns.get(own))
            for weight, sparsity, own in target.per_weight(weights.chosen)
        ]
        self.channels, self._budget = None, target.budget
        self._removable = removable or self._budget is not None or self.criterion.of_scales
        # Whoever names no weights does not mean the classes of a head; whoever does, may.
        self._outputs_stay = self._removable or (filters is None and not isinstance(target_sparsity, dict))
        if self.criterion.of_scales and not (whole_units and all(goal.pattern.whole_units for goal in self.goals)):
            raise ValueError(
                f"`{type(self.criterion).__name__}` ranks channels by the scales of their normalizations: it goes with "
                f"pattern='channel'. Received: pattern={pattern!r}"
            )
        self._alone = IdentityDict()  # kernels that lose channels which others make, too: zeros that cannot be removed
        reasons = self._complete_units(model) if whole_units else {}
        self._paths = graph.Paths(model) if self.allocation.live_paths else None
        if self._budget is None:
            self.goals = self.allocation.share(self.goals)
        if self.channels is not None:
            self.channels.aim([goal for goal in self.goals if self._in_groups(goal)])
        chosen = IdentityDict.fromkeys(goal.weight.variable for goal in self.goals)
        self.skipped = {
            id(w.variable): w.skipped or reasons.get(id(w.variable), "no key of `target_sparsity` matches")
            for w in weights
            if w.variable not in chosen
        }

    def _complete_units(self, model):
        """Find what belongs to whole channels; drop the goals for which that fails and return `{id: reason}`."""
        if not self.whole_units:
            return {}
        reasons, goals = {}, []
        if getattr(model, "inputs", None):
            whole = [goal for goal in self.goals if goal.pattern.whole_units]
            how = self._budget, self.allocation, self.criterion, self._outputs_stay
            self.channels = ChannelChoice(model, whole, *how)
            known = zip(self.channels.kernels, self.channels.with_partners, strict=True)
            axes = IdentityDict(zip((g.weight.variable for g in whole), known, strict=True))
            found = [self._units_or_reason(model, goal, axes) for goal in self.goals]
        elif self._removable:
            raise ValueError(
                "Channels that can be removed are seen in the graph of a model: build it with "
                f"`keras.Model(inputs, outputs)`. Received: {type(model).__name__} {model.name!r}"
            )
        else:
            found = graph.unit_variables(model, [goal.weight for goal in self.goals])
        for goal, units in zip(self.goals, found, strict=True):
            if not goal.pattern.whole_units:
                goals.append(goal)
            elif isinstance(units, str):
                reasons[id(goal.weight.variable)] = units
            else:
                goals.append(replace(goal, units=units))
        if not goals:
            raise ValueError(
                "There is nothing to prune in whole channels: "
                + "; ".join(f"{goal.weight.path}: {reasons[id(goal.weight.variable)]}" for goal in self.goals[:8])
            )
        self.goals = goals
        if not any(self._in_groups(goal) for goal in goals):
            self.channels = None
        return reasons

    def _in_groups(self, goal):
        """Whether its channels are chosen together with those of other weights."""
        return goal.pattern.whole_units and goal.weight.variable not in self._alone

    def _units_or_reason(self, model, goal, axes):
        """No units of its own for a goal that is chosen by groups; else its own, or why it is left out."""
        why, partners = axes.get(goal.weight.variable, ((), False))
        if not isinstance(why, str):
            return ()
        (closer,) = graph.unit_variables(model, [goal.weight])
        if partners and not self._removable and not isinstance(closer, str):
            self._alone[goal.weight.variable] = True
            return closer
        if graph.OUTPUT in why and not self._removable:
            return f"{why}: {_OUTPUTS}"
        return closer if isinstance(closer, str) and "not known" not in closer else why

    def keep_units(self, model, masks):
        """Let what belongs to dead units stay zero, in kernels whose masks take whole channels already."""
        kept = [patterns.to_matrix(mask, goal.weight.output_axes) for goal, mask in zip(self.goals, masks, strict=True)]
        dead = [i for i, matrix in enumerate(kept) if not matrix.any(axis=1).all()]
        whole = [i for i in dead if patterns.recognize(kept[i]) == "channel"]
        found = graph.unit_variables(model, [self.goals[i].weight for i in whole]) if whole else []
        for i, units in zip(whole, found, strict=True):
            if not isinstance(units, str):
                self.goals[i] = replace(self.goals[i], units=units)

    def zero_units(self, masks, parts=None):
        """Set what belongs to units without live weights to zero; `parts` with masks for it keep it there."""
        for variable, kept in self._others(masks):
            _zero(variable, kept, parts)
        for goal, mask in zip(self.goals, masks, strict=True):
            alive = goal.unit_mask(mask) if goal.units else None
            for variable in goal.units:
                _zero(variable, alive.reshape(variable.shape), parts)

    def times(self, masks):
        """Milliseconds without the channels that `masks` have taken; an empty dict if the budget is not of time.

        Returns:
            `{"asked", "promised", "measured"}`: the budget's, those of the tables, and what the model takes now that
            its channels are zero.
        """
        if self.channels is None or self.channels.times is None:
            return {}
        own = [mask for goal, mask in zip(self.goals, masks, strict=True) if self._in_groups(goal)]
        promised = self.channels.cost(self.channels.gone(own))["milliseconds"]
        return {"asked": self._budget.milliseconds, "promised": promised, "measured": self.channels.times.measured()}

    def outputs_gone(self, masks):
        """How many of the model's outputs `masks` have made zero as channels, whatever its inputs are."""
        if self.channels is None:
            return 0
        own = [mask for goal, mask in zip(self.goals, masks, strict=True) if self._in_groups(goal)]
        return self.channels.outputs_gone(self.channels.gone(own))

    def makers(self):
        """Triples `(variable, output axes, {axis: numbers of channels} or None)` of what is zero in a dead channel."""
        found, number = [], iter(self.channels.kernels if self.channels else ())
        for goal in self.goals:
            axes = self.channels.numbered(next(number)) if self.channels and self._in_groups(goal) else None
            found.append((goal.weight.variable, goal.weight.output_axes, axes))
        others = self.channels.others.items() if self.channels else ()
        return found + [(v, (-1,), self.channels.numbered(axes)) for v, axes in others if v.trainable]

    def _others(self, masks):
        """Pairs `(variable, what stays of it)` of what goes with the channels that `masks` have taken."""
        if self.channels is None:
            return []
        own = [mask for goal, mask in zip(self.goals, masks, strict=True) if self._in_groups(goal)]
        gone = self.channels.gone(own)
        return [
            (variable, self.channels.mask_of(axes, gone, tuple(variable.shape)))
            for variable, axes in self.channels.others.items()
        ]

    def masks(self, masks, fraction=1.0, statistics=None):
        """Return the masks at `fraction` of the way to the goals.

        Weights that are masked stay so: the new masks are subsets of `masks`.

        Args:
            masks: The present masks, a boolean array for each goal.
            fraction: In [0, 1].
            statistics: What the criterion's `statistic` says, an array for each goal.

        Returns:
            List of boolean arrays. `round(fraction * sparsity * groups)` groups of each weight are masked (of all
            weights together for `"global"`), or what was masked before if that is more.
        """
        statistics = [None] * len(masks) if statistics is None else statistics
        if not self.allocation.shared and self.channels is None and self._paths is None:
            # One after another: the scores of all weights take as much memory as the model.
            each = zip(self.goals, masks, statistics, strict=True)
            return [self._of_one(goal, self.scores(goal, *rest), rest[0], fraction) for goal, *rest in each]
        scores = [self.scores(*arguments) for arguments in zip(self.goals, masks, statistics, strict=True)]
        return self.keep(scores, masks, fraction)

    def _of_one(self, goal, scores, mask, fraction):
        (new,) = self.allocation.keep(self.compared([goal]), [scores], fraction)
        return new & mask

    def keep(self, scores, masks, fraction=1.0):
        """Return the masks that scores lead to, as `masks` does."""
        new = [mask & old for mask, old in zip(self._keep(scores, masks, fraction), masks, strict=True)]
        if self._paths is None:
            return new
        # Units that are on a path now stay on it, because what competes with their weights gets less.
        places = self._paths.places((goal.weight.variable, mask) for goal, mask in zip(self.goals, new, strict=True))
        every = [_on_paths(goal, places.get(goal.weight.variable)) for goal in self.goals]
        new = self._keep(_below(scores, every), masks, fraction)
        return [mask & old for mask, old in zip(new, masks, strict=True)]

    def _keep(self, scores, masks, fraction):
        goals = self.compared(self.goals)
        if self.channels is None:
            return self.allocation.keep(goals, scores, fraction)
        whole = [i for i, goal in enumerate(self.goals) if self._in_groups(goal)]
        rest = [i for i in range(len(goals)) if i not in whole]
        chosen = self.channels.keep([scores[i] for i in whole], [masks[i] for i in whole], fraction)
        others = self.allocation.keep([goals[i] for i in rest], [scores[i] for i in rest], fraction) if rest else []
        found = dict(zip([*whole, *rest], [*chosen, *others], strict=True))
        return [found[i] for i in range(len(goals))]

    @property
    def by_groups(self):
        """Whether channels of several weights are chosen as one."""
        return self.channels is not None

    @property
    def whole_units(self):
        """Whether channels are chosen."""
        return any(goal.pattern.whole_units for goal in self.goals)

    def compared(self, goals):
        """The goals, with patterns that rank within output units if the criterion compares there."""
        if not self.criterion.within_outputs:
            return goals
        return [replace(goal, pattern=patterns.WithinOutputs(goal.pattern)) for goal in goals]

    def reached(self, masks):
        """Whether `masks` are at the goals, by the counts that `masks` promises."""
        pairs = list(zip(self.goals, masks, strict=True))
        if self.channels is not None:
            whole = [mask for goal, mask in pairs if self._in_groups(goal)]
            rest = [pair for pair in pairs if not self._in_groups(pair[0])]
            return all(_dropped_enough([pair]) for pair in rest) and self.channels.reached(whole)
        return all(map(_dropped_enough, [pairs] if self.allocation.shared else [[pair] for pair in pairs]))

    def present_masks(self):
        """Masks that keep what is not zero now; zeros that an initializer put there are kept, too."""
        return [_nonzero(goal.weight) for goal in self.goals]

    def attach(self, parts, present=None):
        """Give each goal's weight a mask in `parts` that keeps the zeros it has, and the statistic it needs.

        Args:
            parts: The `Parts` of an optimizer.
            present: What `present_masks` says, if it has been asked already.
        """
        if self.criterion.of_inputs:
            raise ValueError(
                f"`{type(self.criterion).__name__}` ranks weights by the inputs that they multiply, which training "
                "does not keep: it serves in one shot, `ks.prune(model, sparsity, criterion, data=x)`."
            )
        masks = parts.masks
        new = [i for i, goal in enumerate(self.goals) if masks.of(goal.weight.variable) is None]
        weights = [self.goals[i].weight for i in new]
        kept = [_nonzero(weight) for weight in weights] if present is None else [present[i] for i in new]
        masks.add([weight.variable for weight in weights], kept)
        self._attach_units(parts)
        if self.criterion.statistic is not None:
            parts.statistics.add(self.criterion.statistic, [goal.weight.variable for goal in self.goals])

    def _attach_units(self, parts):
        """Give masks to what leaves with the units that have no weights any more."""
        if self.channels is None and not any(goal.units for goal in self.goals):
            return
        masks, attached = parts.masks, self.attached_masks(parts)
        rest = [
            (variable, goal.unit_mask(mask).reshape(variable.shape))
            for goal, mask in zip(self.goals, attached, strict=True)
            for variable in goal.units
        ]
        rest += self._others(attached)
        rest = [(variable, kept) for variable, kept in rest if variable.trainable and masks.of(variable) is None]
        masks.add([v for v, _ in rest], [kept | (selection.as_array(v) != 0) for v, kept in rest])

    def attached_masks(self, parts):
        """The masks of the goals as arrays."""
        return [selection.as_array(parts.masks.of(goal.weight.variable)) for goal in self.goals]

    def update(self, parts, fraction=1.0):
        """Move the masks in `parts` to `fraction` of the way, zero what they mask, and return them as arrays."""
        masks = self.masks(self.attached_masks(parts), fraction, self._read(parts, fraction))
        for goal, mask in zip(self.goals, masks, strict=True):
            parts.masks.of(goal.weight.variable).assign(mask)
        self.zero_units(masks, parts)
        parts.masks.apply()
        return masks

    def _read(self, parts, fraction):
        """The statistics that were kept for the criterion, as arrays."""
        statistic = self.criterion.statistic
        if statistic is None:
            return None
        if fraction * max(
            1.0 if goal.sparsity is None else goal.sparsity for goal in self.goals
        ) > 0 and not selection.as_array(parts.statistics.count_of(statistic)):
            raise ValueError(
                f"`{type(self.criterion).__name__}` ranks weights by gradients, and no training step has been taken "
                "yet. Prune after the first one: `Pruning(begin=1)`, or a later call of `update_masks`."
            )
        return [selection.as_array(parts.statistics.of(goal.weight.variable, statistic)) for goal in self.goals]

    def scores(self, goal, mask, statistic=None, value=None):
        """The scores of a goal's weight, -inf where it is masked.

        Args:
            goal: One of the goals.
            mask: The present mask.
            statistic: What the criterion looks at.
            value: The weight's value, if it is to be another one than now.
        """
        if self.criterion.of_scales:
            statistic = self.channels.scales_of(goal.weight.variable, mask.shape)
        try:
            scores = self.criterion(goal.weight.numpy() if value is None else value, statistic)
        except ValueError as error:
            raise ValueError(f"{goal.weight.path}: {error}") from error
        found = np.maximum(scores, np.finfo(scores.dtype).min)  # what is masked is below every live score
        np.copyto(found, -np.inf, where=~mask)
        return found


def _dropped_enough(pairs):
    """Whether the masks of goals that have one target drop as many groups as it says."""
    first = pairs[0][0]
    wanted = first.pattern.count(first.sparsity, [goal.group_shape for goal, _ in pairs])
    # No group is dropped without a weight, and to count weights is cheaper than to find groups.
    if sum(mask.size - int(np.count_nonzero(mask)) for _, mask in pairs) < wanted:
        return False
    return sum(goal.dropped(mask) for goal, mask in pairs) >= wanted


def _on_paths(goal, places):
    """Which weights of a goal are in a group with a place on a path, all where that is not known or whole units go."""
    if places is None or goal.pattern.whole_units:
        return True
    group = goal.pattern.groups(places.shape, goal.weight.output_axes)
    return (np.bincount(group.reshape(-1), places.reshape(-1)) > 0)[group]


def _below(scores, places):
    """Scores of which those outside of `places` are moved below all others, in the order that they had."""
    finite = [score[np.isfinite(score)] for score in scores]
    ends = [(float(score.min()), float(score.max())) for score in finite if score.size]
    apart = 1.01 * (max(high for _, high in ends) - min(low for low, _ in ends)) if ends else 0.0
    return [
        np.where(where, score, score.astype("float64") - (apart or 1.0))
        for score, where in zip(scores, places, strict=True)
    ]


def _zero(variable, kept, parts):
    """Set a variable to zero but for what is kept, and its mask, if it has one, to that."""
    variable.assign(optimizers.masked_value(variable, kept))
    state = parts.masks.of(variable) if parts is not None else None
    if state is not None:
        state.assign(kept)


def _nonzero(weight):
    return ~weight.pruned_zeros()
