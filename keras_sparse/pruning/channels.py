"""Channels are chosen by groups: what can only be removed together is ranked as one and masked as one.

A channel's score is that of all weights that leave with it (`keras_sparse.pruning.members`). Scores are divided by
their mean over the group, so that groups of different kinds compare: Fang et al., "DepGraph" (2023), section 3.3, and
"Isomorphic pruning for vision models" (2024), section 3.2, which ranks only like with like.
"""

import functools

import numpy as np

from keras_sparse import graph
from keras_sparse.identity import IdentityDict
from keras_sparse.pruning.members import Members

__all__ = ["ChannelChoice"]


_MEASUREMENTS, _CLOSE = 4, 0.03  # of a chosen model at most; how near to the budget is near enough


class ChannelChoice:
    """Which channels of a model leave, and what is masked with them.

    Args:
        model: A built functional or Sequential model.
        goals: The goals whose pattern is whole channels.
        budget: A `Budget`, or `None` if the goals' sparsities count.
        allocation: The `Allocation`.
        criterion: The `Criterion`. If it ranks scales of normalizations, channels without one stay.
        removable: Whether channels that cannot be removed, such as the model's outputs, stay.

    Attributes:
        kernels: For each goal, the `{axis: labels}` that it makes; a string that says why if it makes none.
        with_partners: For each goal, whether kernels that are not selected make its channels, too.
        others: `{variable: {axis: labels}}` of biases, normalizations and the like that go with channels.
        groups: For each group of channels that take part the labels that stand for them, a vector.
        times: A `ks.tflite.timing.TimeTable` if the budget is one of milliseconds, else `None`.
        targets: For each group the share that is to leave, where the target is one.

    Example:

    >>> import keras, keras_sparse as ks
    >>> x = keras.Input((4,))
    >>> a, b = keras.layers.Dense(8, name="a")(x), keras.layers.Dense(8, name="b")(x)
    >>> model = keras.Model(x, keras.layers.Dense(2, "softmax")(keras.layers.add([a, b])))
    >>> plan = ks.pruning.Plan(model, 0.5, pattern="channel")
    >>> [goal.weight.layer.name for goal in plan.goals]
    ['a', 'b']
    """

    def __init__(self, model, goals, budget, allocation, criterion, removable=False):
        self._channels = channels = graph.Channels(model)
        self._roots, self._budget, self._allocation = channels.roots, budget, allocation
        selected = IdentityDict((goal.weight.variable, goal) for goal in goals)
        made = [(layer, part) for layer, part in channels.parts() if part.made]
        self._returned = [c for c, why in channels.reasons.items() if why.startswith(graph.OUTPUT)]
        # What a model returns cannot be removed, but it can be zero, where a sparsity is asked for and not a cost.
        reasons = {c: why for c, why in channels.reasons.items() if removable or not why.startswith(graph.OUTPUT)}
        if criterion.of_scales:
            reasons = dict.fromkeys(np.flatnonzero(self._scales() < 0).tolist(), "no normalization scales it") | reasons
        reasons |= channels.not_silenced(reasons)
        partners = self._not_selected(made, selected, reasons)
        reasons |= partners
        self._groups = []
        for group in channels.groups:
            free = np.array([c for c in group.channels.tolist() if c not in reasons], int)
            variables = [part.variable for _, part in group.members if part.made and part.variable in selected]
            own = [v for v in variables if self._makes(made, v, free)]
            if len(free) > 1 and own:
                self._groups.append((free, [selected[v] for v in own], group))
        self._free = np.zeros(len(self._roots), bool)
        for free, _, _ in self._groups:
            self._free |= np.isin(self._roots, free)
        self.kernels, self.with_partners, self.others = [], [], IdentityDict()
        parts = IdentityDict((part.variable, part) for _, part in made)
        for goal in goals:
            part = parts.get(goal.weight.variable)
            axes = {} if part is None else self._axes_of(part)
            why = self._unseen(goal.weight) if part is None else self._why(part, reasons)
            self.kernels.append(axes or f"channels: {why}")
            labels = [] if part is None else [part.axes[axis].reshape(-1) for axis in part.made]
            roots = self._roots[np.concatenate([*labels, np.zeros(0, int)]).astype(int)].tolist()
            self.with_partners.append(any(root in partners for root in roots))
        for _, part in made:
            axes = self._axes_of(part)
            if axes and part.variable not in selected:
                self.others[part.variable] = axes
        self._variables = [goal.weight.variable for goal in goals]
        members = [(layer, part) for layer, part in channels.parts() if self._takes_part(part)]
        self._members = Members(model, members, self._roots, criterion)
        self.targets = None
        self.times = None if budget is None or not self._groups else budget.times(channels, self.groups)
        self._final = False

    @functools.cached_property
    def _whole(self):
        return self.cost(np.zeros(len(self._roots), bool))

    def aim(self, goals):
        """Take the sparsities of these goals, which are those that make channels, in order, for the groups."""
        self.kernels = [axes for axes in self.kernels if not isinstance(axes, str)]
        self._variables = [goal.weight.variable for goal in goals]
        sparsity = IdentityDict((goal.weight.variable, goal.sparsity) for goal in goals)
        self.targets = [
            min(sparsity.get(goal.weight.variable, goal.sparsity) or 0.0 for goal in own) for _, own, _ in self._groups
        ]
        self._check_budget()

    def outputs_gone(self, gone):
        """How many channels that the model returns are among those that are gone, booleans as `gone` returns them."""
        return int(np.count_nonzero(gone[self._returned]))

    def _takes_part(self, part):
        return any(self._free[labels].any() for labels in part.axes.values())

    def _axes_of(self, part):
        return {axis: part.axes[axis] for axis in part.made if self._free[part.axes[axis]].any()}

    def _makes(self, made, variable, free):
        return any(
            np.isin(self._roots[part.axes[axis]], free).any()
            for _, part in made
            if part.variable is variable
            for axis in part.made
        )

    def _unseen(self, weight):
        closed = self._channels.labelled.closed
        for layer in weight.holders:
            if layer in closed:
                return f"{layer.name} ({type(layer).__name__}) cannot be run on symbolic inputs ({closed[layer]})"
        reasons = self._channels.reasons
        for call in self._channels.calls:
            if call.fixed and call.operation in weight.holders:
                return reasons[int(self._roots[call.outputs[0].labels.flat[0]])]
        return "no graph that could be seen makes its channels"

    def _why(self, part, reasons):
        found = [reasons.get(c) for axis in part.made for c in np.unique(self._roots[part.axes[axis]]).tolist()]
        return next((reason for reason in found if reason), "it has one channel")

    def _not_selected(self, made, selected, reasons):
        """`{class: reason}` for channels that a kernel makes, too, which is left dense."""
        found = {}
        for layer, part in made:
            kernel = graph.kernel_of(layer, part.variable.name, part.variable.shape)[0]
            ranked = len(part.variable.shape) > 1 and (kernel is None or kernel.role != graph.DEPTHWISE)
            if ranked and part.variable not in selected and "bias" not in part.variable.name:
                for axis in part.made:
                    for root in np.unique(self._roots[part.axes[axis]]).tolist():
                        if root not in reasons:
                            found[root] = f"{part.variable.path} makes them, too, and is left dense"
        return found

    @property
    def groups(self):
        return [free for free, _, _ in self._groups]

    def parts(self):
        """Yield `(layer, part)` for all weights of the model that have channels."""
        return self._channels.parts()

    def numbered(self, axes):
        """`{axis: numbers}` of `{axis: labels}`: those of the channels from 1 on, 0 for what takes no part."""
        numbers = np.zeros(len(self._roots), int)
        numbers[np.concatenate(self.groups)] = 1 + np.arange(sum(map(len, self.groups)))
        return {axis: numbers[self._roots[labels]] for axis, labels in axes.items()}

    def spread(self, classes):
        """For each label whether it belongs to one of these classes."""
        return np.isin(self._roots, classes)

    # Scores, ranking, masks

    def scales_of(self, variable, shape):
        """The scales of the channels that a goal's weight makes, summed over their normalizations, in its shape."""
        (part,) = (part for _, part in self._channels.parts() if part.variable is variable)
        scales, found = self._scales(), np.zeros(shape, "float32")
        for axis in part.made:
            found += graph.along(axis, scales[self._roots[part.axes[axis]]], len(shape))
        return found

    def _scales(self):
        """The sum of the absolute scales of each class, -1 where there is none."""
        found, sums = np.full(len(self._roots), -1.0), np.zeros(len(self._roots))
        for layer, part in self._channels.parts():
            if part.variable is graph.scale_of(layer):
                for labels in part.axes.values():
                    found[self._roots[labels]] = 0
                    np.add.at(sums, self._roots[labels], np.abs(graph.as_array(part.variable)).reshape(-1))
        return found + sums

    def keep(self, scores, masks, fraction):
        """Return the new masks of the goals' weights.

        Args:
            scores: The scores of each goal's weight, -inf where it is masked.
            masks: The present masks.
            fraction: The way to the target, in [0, 1].
        """
        gone = self._gone_already(masks)
        values = self.scores(scores)
        ranked = [self._ranking(group, values, gone) for group in self._groups]
        leaving = gone.copy()
        for classes in self._leaving(ranked, gone, fraction):
            leaving |= np.isin(self._roots, classes)
        return self.masks_without(leaving, masks)

    def masks_without(self, gone, masks):
        """Masks of the goals' weights, of the shapes of `masks`, without the labels that `gone` says."""
        return [self.mask_of(axes, gone, mask.shape) for axes, mask in zip(self.kernels, masks, strict=True)]

    def mask_of(self, axes, gone, shape):
        """What stays of a weight without the classes that `gone` says, a boolean array."""
        mask = np.ones(shape, bool)
        for axis, labels in axes.items():
            mask &= ~graph.along(axis, gone[labels], len(shape))
        return mask

    def gone(self, masks):
        """For each label whether its channel is masked in all kernels that make it."""
        return self._gone_already(masks)

    def _gone_already(self, masks):
        alive, seen = np.zeros(len(self._roots), bool), np.zeros(len(self._roots), bool)
        for axes, mask in zip(self.kernels, masks, strict=True):
            for axis, labels in axes.items():
                roots = self._roots[labels]
                seen[roots] = True
                alive[roots[mask.any(axis=tuple(i for i in range(mask.ndim) if i != axis))]] = True
        return (seen & ~alive & self._free)[self._roots] & self._free

    def scores(self, scores):
        """The score of each class, from scores of the goals' weights: that of all weights that leave with it."""
        return self._members.scores(IdentityDict(zip(self._variables, scores, strict=True)))

    def made(self, scores):
        """The score of each class by the kernels alone that make it: the sum of the means over its weights there."""
        return self._members.made(IdentityDict(zip(self._variables, scores, strict=True)))

    def _ranking(self, group, values, gone):
        """The free channels of a group, the lowest score first, and these scores over their mean."""
        free = group[0]
        own = np.where(gone[free], -np.inf, values[free])
        live = np.abs(own[np.isfinite(own)])
        scale = live.mean() if live.size and live.mean() > 0 else 1.0
        order = np.argsort(own, kind="stable")
        return free[order], own[order] / scale

    def _leaving(self, ranked, gone, fraction):
        """Lists of the classes that leave."""
        if self._budget is None:
            if not self._shared:
                shares = [sparsity * fraction for sparsity in self.targets]
                return [free[: self._count(share, free)] for share, (free, _) in zip(shares, ranked, strict=True)]
            return self._by_share(ranked, fraction * self.targets[0])
        if self.times is None or fraction < 1:
            return self._within_budget(ranked, gone, fraction)
        self._final = True
        return self._measured(ranked, gone)

    def _measured(self, ranked, gone):
        """What leaves so that the model is as fast as the budget says, measured and not only promised.

        Time goes in steps where a line is promised: kernels compute so many channels at once.
        """
        limit, found = self._budget.limits(self._whole)["milliseconds"], []
        for _ in range(_MEASUREMENTS):
            leaving = self._within_budget(ranked, gone, 1.0)
            kept = self._kept(self._also(gone, leaving))
            measured = self.times.measure(kept)
            found.append((measured, leaving, kept))
            self.times.correct(kept, measured)
            if abs(measured / limit - 1) < _CLOSE:
                break
        # The slowest that is fast enough, or else the fastest.
        fit = [one for one in found if one[0] < limit * (1 + _CLOSE)]
        measured, leaving, kept = max(fit, key=lambda one: one[0]) if fit else min(found, key=lambda one: one[0])
        self.times.correct(kept, measured)
        return leaving

    def _within_budget(self, ranked, gone, fraction):
        whole = self._whole
        limits = {k: whole[k] - fraction * (whole[k] - limit) for k, limit in self._budget.limits(whole).items()}
        low, high = 0.0, 1.0
        more, fewer = self._by_share(ranked, 1.0), self._by_share(ranked, 0.0)
        for _ in range(1 + int(np.ceil(np.log2(1 + sum(len(free) for free, _ in ranked)))) + 4):
            share = (low + high) / 2
            leaving = self._by_share(ranked, share)
            if self._fits(leaving, gone, limits):
                high, more = share, leaving
            else:
                low, fewer = share, leaving
        return self._between(fewer, more, ranked, gone, limits)

    def _between(self, fewer, more, ranked, gone, limits):
        """What leaves when groups go from `fewer` to `more` one by one, the lowest scores first, until it fits."""
        steps = [
            (float(np.mean(ranked[n][1][len(few) : len(many)])), n)
            for n, (few, many) in enumerate(zip(fewer, more, strict=True))
            if len(few) < len(many)
        ]
        leaving = list(fewer)
        for _, n in sorted(steps):
            if self._fits(leaving, gone, limits):
                break
            leaving[n] = more[n]
        return leaving

    def _fits(self, leaving, gone, limits):
        return self._within(self._also(gone, leaving), limits)

    def _also(self, gone, leaving):
        """`gone` with the classes of some lists."""
        out = gone.copy()
        out[np.concatenate([*leaving, np.zeros(0, int)]).astype(int)] = True
        return out

    def _kept(self, gone):
        """A function from labels to booleans: what stays without the classes that `gone` says."""
        return lambda labels: ~gone[self._roots[labels]]

    def _within(self, gone, limits):
        cost = self.cost(gone)
        return all(cost[name] <= limit for name, limit in limits.items())

    def cost(self, gone):
        """What the model costs without the classes that `gone` says: as `ks.graph.Channels.cost`, and milliseconds."""
        kept = self._kept(gone)
        found = self._channels.cost(kept)
        return found if self.times is None else found | {"milliseconds": self.times.milliseconds(kept)}

    def _by_share(self, ranked, share):
        """The classes that leave of each group when `share` of all channels does."""
        if not self._shared:
            return self._rounded([free[: self._count(share, free)] for free, _ in ranked], ranked)
        kinds = {}
        for number, (_, _, group) in enumerate(self._groups):
            kind = tuple(sorted(type(layer).__name__ + part.variable.name for layer, part in group.members))
            kinds.setdefault(kind if self._allocation.like_with_like else "", []).append(number)
        leaving = [free[:0] for free, _ in ranked]
        for numbers in kinds.values():
            places = [(n, i) for n in numbers for i in range(self._most(len(ranked[n][0])))]
            scores = np.array([ranked[n][1][i] for n, i in places])
            total = sum(len(ranked[n][0]) for n in numbers)
            for k in np.argsort(scores, kind="stable")[: round(share * total)].tolist():
                n, i = places[k]
                leaving[n] = ranked[n][0][: max(len(leaving[n]), i + 1)]
        return self._rounded(leaving, ranked)

    def _rounded(self, leaving, ranked):
        """The same, so that groups keep multiples of what the budget says, if they keep more than that at all."""
        multiple = 1 if self._budget is None else self._budget.round_to
        found = []
        for classes, (free, _), (_, _, group) in zip(leaving, ranked, self._groups, strict=True):
            stay = len(group.channels) - len(classes)
            if multiple > 1 and classes.size and stay > multiple:
                stay = multiple * round(stay / multiple)
                classes = free[: max(0, min(len(group.channels) - stay, self._most(len(free))))]
            found.append(classes)
        return found

    def reached(self, masks):
        """Whether as many channels are masked as the goals say."""
        gone = self._gone_already(masks)
        counts = [(int(gone[free].sum()), len(free)) for free, _, _ in self._groups]
        if self._budget is not None:
            if self.times is not None:
                return self._final  # else what was promised has not been measured
            return self._within(gone, self._budget.limits(self._whole))
        if not self._shared:
            pairs = zip(counts, self.targets, strict=True)
            return all(have >= round(share * n) for (have, n), share in pairs)
        most, wanted = sum(self._most(n) for _, n in counts), round(self.targets[0] * sum(n for _, n in counts))
        return sum(have for have, _ in counts) >= min(most, wanted)

    @property
    def _shared(self):
        return self._allocation.shared

    def _most(self, count):
        """How many of the channels of a group may leave for a budget or in one ranking: one stays at least."""
        return count - max(1, self._allocation.least(count))

    def _count(self, share, free):
        count = round(share * len(free))
        return count if self._budget is None else min(self._most(len(free)), count)

    def _check_budget(self):
        """Raise unless the budget can be met."""
        if self._budget is None:
            return
        whole = self._whole
        out = np.zeros(len(self._roots), bool)
        for free, _, _ in self._groups:
            out[free[1:]] = True
        least = self.cost(out)
        for name, limit in self._budget.limits(whole).items():
            if not least[name] <= limit:
                raise ValueError(
                    f"The budget cannot be met: with one channel of each group the model has {_said(least[name])} "
                    f"{name}, {least[name] / whole[name]:.1%} of its {_said(whole[name])}. Give {name} of at least "
                    f"that, or let more layers take part (`filters`). Received: {self._budget!r}"
                )


def _said(amount):
    return f"{amount:,}" if isinstance(amount, int) else f"{amount:.4g}"
