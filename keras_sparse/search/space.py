"""A space is the set of allocations that a search chooses from: how sparse each weight may be, in which pattern."""

import dataclasses
import hashlib
import itertools
import json
import math
import operator

import keras
import numpy as np

from keras_sparse import graph, patterns, selection
from keras_sparse.identity import IdentityDict
from keras_sparse.registry import is_real
from keras_sparse.search.rounding import rounding

__all__ = ["Choice", "Part", "Space"]

# Denser in steps of about 1.4 in density, as budgets are shared in ratios.
_SPARSITIES = (0.0, 0.3, 0.5, 0.65, 0.75, 0.82, 0.87, 0.91, 0.94, 0.96, 0.975, 0.985, 0.99)


@dataclasses.dataclass(frozen=True)
class Part:
    """One weight of a choice, as plain data, so that it means the same in another process.

    Attributes:
        index: Its position in `ks.selection.weights(model)`.
        path: Its path.
        shape: Its shape.
        output_axes: The axes that count its output units.

    Example:

    >>> import keras_sparse as ks
    >>> ks.search.space.Part(0, "dense/kernel", (4, 5), (1,)).size
    20
    """

    index: int
    path: str
    shape: tuple
    output_axes: tuple

    @property
    def size(self):
        """Number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a search decides at once: a sparsity and a pattern, for one weight or for a named group of them.

    Attributes:
        name: A weight's path, or the group's name.
        parts: Tuple of `Part`.
        options: Tuple of `(sparsity, pattern)`; a pattern is a name or the config of a `Pattern`.
        removable: Whether the last option takes all units away.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, name="a")])
    >>> ks.search.Space(model, sparsities=(0.5, 0.9)).choices[0].options
    ((0.5, 'unstructured'), (0.9, 'unstructured'))
    """

    name: str
    parts: tuple
    options: tuple
    removable: bool = False

    @property
    def size(self):
        """Number of elements of all its weights."""
        return sum(part.size for part in self.parts)

    def neighbours(self, option):
        """Indices of the options next to one: the same pattern a step denser or sparser, other patterns as sparse."""
        sparsity, pattern = self.options[option]
        by_pattern = {}
        for i in sorted(range(len(self.options)), key=lambda i: self.options[i][0]):
            by_pattern.setdefault(json.dumps(self.options[i][1]), []).append(i)
        own = by_pattern.pop(json.dumps(pattern))
        at = own.index(option)
        near = own[max(0, at - 1) : at] + own[at + 1 : at + 2]
        return near + [min(same, key=lambda i: abs(self.options[i][0] - sparsity)) for same in by_pattern.values()]

    def steps(self, one, other):
        """How far two options are apart: steps of the grid, or 2 if their patterns differ."""
        order = sorted(self.alike(one), key=lambda i: self.options[i][0])
        if one == other:
            return 0
        return abs(order.index(one) - order.index(other)) if one in order and other in order else 2

    def limits(self, option):
        """The lowest and the highest sparsity among the options of the same pattern."""
        if self.removes(option):
            return self.options[option][0], self.options[option][0]
        same = [self.options[i][0] for i in self.alike(option)]
        return min(same), max(same)

    def zeros(self, option, sparsity=None):
        """The least number of zeros that its weights have in an option's pattern; see `rounding`.

        Args:
            option: Its index.
            sparsity: In place of the option's own.
        """
        own, pattern = self.options[option]
        sparsity = own if sparsity is None else sparsity
        return sum(rounding(part, pattern).zeros(sparsity) for part in self.parts)

    def alike(self, option):
        """Indices of the options of the same pattern."""
        pattern = self.options[option][1]
        return [i for i, (_, own) in enumerate(self.options) if own == pattern and not self.removes(i)]

    def removes(self, option):
        """Whether an option takes all units away."""
        return self.removable and option == len(self.options) - 1


class Space:
    """The allocations that a search chooses from.

    A *point* of the space is a tuple of ints: which option each choice takes. Weights of the same path (they occur in
    nested models) share one choice, because an allocation tells weights apart by their paths.

    Args:
        model: A built Keras model.
        sparsities: The sparsities to choose from, in [0, 1): one grid for all weights.
        patterns: The patterns to choose from, as in `ks.callbacks.Pruning`. `"channel"` chooses how many units are
            kept (the others are dead: all zeros) and is left out where units cannot be silenced; an N:M pattern has one
            sparsity.
        groups: Dict from a name to a regex, or to a dict `{"filters": regex, "sparsities": ..., "patterns": ...}` whose
            last two override the above: weights that share one decision. The first group that matches has a weight;
            those that no group matches decide for themselves.
        removable: A regex or a list of them: connections that may also be removed. Such a kernel has one more option,
            in which all its units are dead with what belongs to them (bias, normalization), so that it adds nothing to
            what comes next: the last kernel of a residual branch removes the branch.
        filters: Which weights take part; see `ks.selection.select`. `None` leaves out what is not trainable, too.

    Raises:
        ValueError: If the model is not built, a number is out of range, a string names nothing, or a regex matches
            nothing.
        TypeError: If an argument is of the wrong type.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="a"), keras.layers.Dense(8, name="b")])
    >>> space = ks.search.Space(model, sparsities=(0.5, 0.75), patterns=("unstructured", "block_1x4"))
    >>> space.size(), [choice.name for choice in space.choices]
    (16, ['sequential.../a/kernel', 'sequential.../b/kernel'])
    >>> space.allocation((0, 3))
    {'^sequential.../a/kernel$': (0.5, 'unstructured'), '^sequential.../b/kernel$': (0.75, 'block_1x4')}
    """

    def __init__(
        self, model, sparsities=_SPARSITIES, patterns=("unstructured",), groups=None, removable=None, filters=None
    ):
        selection.check_model(model)
        index = IdentityDict((w.variable, i) for i, w in enumerate(selection.weights(model)))
        chosen = selection.select(model, filters, frozen=filters is not None).chosen
        owner, settings = _groups(groups, chosen)
        if not isinstance(removable or (), (str, list, tuple)):
            raise TypeError(f"`removable` must be a regex or a list of them. Received: removable={removable!r}")
        regexes = [removable] if isinstance(removable, str) else removable or []
        leave = {weight.path for regex in regexes for weight in selection.matching(regex, chosen)}
        members = {}
        for weight in chosen:
            key = (True, owner[weight.path]) if weight.path in owner else (False, weight.path)
            members.setdefault(key, []).append(weight)
        self.model, self.choices = model.name, []
        for (named, name), weights in members.items():
            own = settings[name] if named else {}
            options = _options(own.get("sparsities", sparsities), own.get("patterns", patterns))
            removed = any(weight.path in leave for weight in weights)
            options = _possible(options, removed, model, weights)
            parts = tuple(
                Part(index[w.variable], w.path, tuple(map(int, w.variable.shape)), w.output_axes) for w in weights
            )
            self.choices.append(Choice(name, parts, options, removed))

    @property
    def parts(self):
        """Every weight of the space."""
        return [part for choice in self.choices for part in choice.parts]

    def size(self):
        """How many points the space has."""
        return math.prod(len(choice.options) for choice in self.choices)

    def points(self):
        """Iterate over all points."""
        return itertools.product(*(range(len(choice.options)) for choice in self.choices))

    def sample(self, seed=None):
        """Draw a point, each option being as likely.

        Args:
            seed: An int or a `numpy.random.Generator`.
        """
        rng = np.random.default_rng(seed)
        return tuple(int(rng.integers(len(choice.options))) for choice in self.choices)

    def mutate(self, point, seed=None):
        """Change one decision of a point: half of the time to an option next to it, else to any other one."""
        point, rng = self.check(point), np.random.default_rng(seed)
        free = [i for i, choice in enumerate(self.choices) if len(choice.options) > 1]
        if not free:
            return point
        at = free[rng.integers(len(free))]
        candidates = self.choices[at].neighbours(point[at])
        if rng.random() >= 0.5:
            candidates = [i for i in range(len(self.choices[at].options)) if i != point[at]]
        return (*point[:at], int(candidates[rng.integers(len(candidates))]), *point[at + 1 :])

    def crossover(self, one, other, seed=None):
        """Take each decision from one of two points."""
        one, other = self.check(one), self.check(other)
        first = np.random.default_rng(seed).random(len(self.choices)) < 0.5
        return tuple(a if take else b for a, b, take in zip(one, other, first, strict=True))

    def nearest(self, sparsities):
        """The point whose densities are nearest, by their ratio, to those wanted, in each choice's first pattern.

        Args:
            sparsities: One for each choice.
        """
        point = []
        for choice, sparsity in zip(self.choices, sparsities, strict=True):
            distance = [abs(math.log((1 - s) / max(1 - sparsity, 1e-6))) for s, _ in choice.options]
            point.append(min(choice.alike(0), key=distance.__getitem__))
        return tuple(point)

    def allocation(self, point, sparsities=None):
        """Return a point as the target that `ks.callbacks.Pruning` and `ks.prune` take.

        Args:
            point: Which option each choice takes.
            sparsities: Dict from path to a sparsity that replaces the option's.

        Returns:
            Dict `{key: (sparsity, pattern)}`. Each key is what `ks.selection.only` returns for a path.

        Raises:
            ValueError: If `point` is not of this space.
        """
        point = self.check(point)
        found = {}
        for choice, option in zip(self.choices, point, strict=True):
            sparsity, pattern = choice.options[option]
            for part in choice.parts:
                value = sparsity if sparsities is None else sparsities[part.path]
                found[selection.only(part.path)] = (value, pattern)
        return found

    def reach(self):
        """The lowest and the highest share of zeros over all weights that an allocation has, or rounds to."""
        low = high = 0.0
        for choice in self.choices:
            for part in choice.parts:
                kinds = [(rounding(part, pattern), sparsity) for sparsity, pattern in choice.options]
                low += min(min(kind.zeros(s), max(s * part.size, kind.zeros(s) - kind.step / 2)) for kind, s in kinds)
                most = [(kind.zeros(s, most=True), kind.step / 2, s * part.size) for kind, s in kinds]
                high += max(max(zeros, min(asked, zeros + half)) for zeros, half, asked in most)
        size = sum(choice.size for choice in self.choices)
        return low / size, high / size

    def scaled(self, point, sparsity=None):
        """A point as an allocation that has a total sparsity.

        The densities of all weights are multiplied by one number, each as far as the grid of its pattern goes. What the
        patterns round is counted: of the allocations that have at least the total, it is the densest, and exceeds it by
        less than one group of weights.

        Args:
            point: Which option each choice takes.
            sparsity: The share of zeros over all weights of the space, or `None` for the point as it is.

        Returns:
            `(allocation, by how much it misses the sparsity)`: more than what is rounded at the ends of the grid.

        Example:

        >>> import keras, keras_sparse as ks
        >>> layers = [keras.layers.Dense(8, name="a"), keras.layers.Dense(8, name="b")]
        >>> space = ks.search.Space(keras.Sequential([keras.Input((8,)), *layers]), sparsities=(0.2, 0.6, 0.9))
        >>> allocation, missed = space.scaled((0, 1), sparsity=0.7)
        >>> [round(sparsity, 2) for sparsity, _ in allocation.values()], missed
        ([0.61, 0.8], 0.0)
        """
        if sparsity is None:
            return self.allocation(point), 0.0
        point = self.check(point)
        taken = list(zip(self.choices, point, strict=True))
        lowest, highest = np.array([choice.limits(option) for choice, option in taken], "float64").T
        density = np.maximum([1 - choice.options[option][0] for choice, option in taken], 1e-9)
        size = sum(choice.size for choice in self.choices)
        least = sparsity * size - 1e-6

        def sparsities(factor):
            return np.clip(1 - density * factor, lowest, highest)

        def zeros(found):
            return [choice.zeros(option, value) for (choice, option), value in zip(taken, found, strict=True)]

        low, high = 1e-9, 1e9
        for _ in range(50):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if sum(zeros(sparsities(middle))) < least else (middle, high)
        found, denser = sparsities(low), sparsities(high)
        have, would = zeros(found), zeros(denser)
        spare = sum(have) - least
        for i, gain in enumerate(np.subtract(have, would)):
            if 0 < gain <= spare:  # one weight after the other, for all of them are too many
                found[i], spare = denser[i], spare - gain
        by_path, rounded = {}, 0.0
        for (choice, option), value, ends in zip(taken, found, zip(lowest, highest, strict=True), strict=True):
            steps = [rounding(part, choice.options[option][1]) for part in choice.parts]
            value = float(np.clip(steps[0].snapped(value) if len(steps) == 1 else value, *ends))
            by_path |= {part.path: value for part in choice.parts}
            rounded += sum(each.step for each in steps) / 2 if value in ends else 0.0
        over = spare - 1e-6
        rounded += max(rounding(choice.parts[0], choice.options[option][1]).step for choice, option in taken) * (
            over > 0
        )
        return self.allocation(point, by_path), abs(over) / size if abs(over) > rounded + 1e-5 else 0.0

    def indexed(self, allocation):
        """An allocation by positions in `ks.selection.weights(model)`: the paths of a copy are others."""
        by_path = {key.path: value for key, value in allocation.items()}
        return {part.index: by_path[part.path] for part in self.parts}

    def to_json(self, indent=None):
        """The space as a JSON string."""
        content = {"model": self.model, "choices": [dataclasses.asdict(choice) for choice in self.choices]}
        return json.dumps(content, indent=indent)

    def digest(self):
        """A hash of the space, but for names: those of layers count on when a notebook builds a model again."""
        plain = [[[(p.index, p.shape) for p in c.parts], c.options, c.removable] for c in self.choices]
        return hashlib.sha256(json.dumps(plain).encode()).hexdigest()

    @classmethod
    def from_json(cls, text):
        """The inverse of `to_json`; needs no model."""
        space = cls.__new__(cls)
        try:
            content = json.loads(text)
            space.model, space.choices = content["model"], [_choice(choice) for choice in content["choices"]]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"Expected a string that `Space.to_json` returned. Received: {text!r}"[:500]) from error
        return space

    def check(self, point):
        """Return a point as a tuple of ints, and raise unless it is one of this space."""
        sizes = [len(choice.options) for choice in self.choices]
        try:
            plain = tuple(operator.index(option) for option in point)
        except TypeError:
            plain = ()
        if len(plain) != len(sizes) or any(not 0 <= i < n for i, n in zip(plain, sizes, strict=True)):
            raise ValueError(f"A point of this space is ints that are each below {sizes}. Received: {point!r}")
        return plain

    def __repr__(self):
        return f"<Space of {self.size():,d} allocations of {self.model!r}: {len(self.choices)} choices>"


def _choice(content):
    """The inverse of `dataclasses.asdict` on a `Choice`, after a way through JSON."""
    parts = (Part(**part | {key: tuple(part[key]) for key in ("shape", "output_axes")}) for part in content["parts"])
    return Choice(**content | {"parts": tuple(parts), "options": tuple(map(tuple, content["options"]))})


def _groups(groups, weights):
    """`{path: name of its group}`, and the groups' own grids."""
    if not isinstance(groups or {}, dict):
        raise TypeError(f"`groups` must be a dict from a name to a regex or a dict. Received: groups={groups!r}")
    owner, settings = {}, {}
    for name, value in (groups or {}).items():
        settings[name] = value if isinstance(value, dict) else {"filters": value}
        unknown = set(settings[name]) - {"filters", "sparsities", "patterns"}
        if unknown or "filters" not in settings[name]:
            raise ValueError(
                "A group is a regex or a dict with `filters` and, if wanted, `sparsities` and `patterns`. "
                f"Received: {name!r}: {value!r}"
            )
        for weight in selection.matching(settings[name]["filters"], weights):
            owner.setdefault(weight.path, name)
    return owner, settings


def _options(sparsities, kinds):
    kinds = [kinds] if isinstance(kinds, (str, patterns.Pattern, dict)) else kinds
    sparsities = [sparsities] if is_real(sparsities) else sparsities
    for name, value in (("sparsities", sparsities), ("patterns", kinds)):
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise TypeError(f"`{name}` must be one or a list of them. Received: {name}={value!r}")
    kinds, sparsities = list(kinds), list(sparsities)
    bad = [s for s in sparsities if not is_real(s) or not 0 <= s < 1]
    if bad or not sparsities:
        raise ValueError(f"`sparsities` must be numbers of at least 0 and below 1. Received: {bad or sparsities!r}")
    if not kinds:
        raise ValueError("`patterns` must name at least one pattern. Received: []")
    options = []
    for kind in kinds:
        pattern = patterns.get(kind)
        plain = kind if isinstance(kind, str) else keras.saving.serialize_keras_object(pattern)
        grid = sorted(set(sparsities)) if pattern.sparsity is None else [pattern.sparsity]
        options += [(float(sparsity), plain) for sparsity in grid]
    return tuple(dict.fromkeys(options)) if all(isinstance(p, str) for _, p in options) else tuple(options)


def _possible(options, removed, model, weights):
    """The options without whole channels, where their units could not be silenced; with removal, where it is wanted."""
    channel = [patterns.get(pattern).whole_units for _, pattern in options]
    if not removed and not any(channel):
        return options
    reasons = [found for found in graph.unit_variables(model, weights) if isinstance(found, str)]
    if not reasons:
        # So little is left that no unit is: counts are rounded.
        units = max(math.prod(weight.variable.shape[axis] for axis in weight.output_axes) for weight in weights)
        return (*options, (1 - 0.25 / units, "channel")) if removed else options
    if removed:
        raise ValueError(
            f"{weights[0].path} cannot be removed, since its units cannot be silenced: {reasons[0]}. Leave it out of "
            "`removable`."
        )
    left = tuple(option for option, whole in zip(options, channel, strict=True) if not whole)
    if not left:
        raise ValueError(
            f"{weights[0].path} has no pattern to choose from: whole channels cannot leave ({reasons[0]}). Add "
            "'unstructured' to `patterns`, or leave the weight out by `filters`."
        )
    return left
