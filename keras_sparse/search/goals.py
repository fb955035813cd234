"""Goals are what a search makes good, and the limits that it must keep."""

import json
import math

from keras_sparse.registry import is_real
from keras_sparse.search.rounding import rounding

__all__ = ["CONSTRAINTS", "MEASURES", "Goals"]

# Measures besides those of `model.evaluate`, and whether more is better.
MEASURES = {"sparsity": True, "macs": False, "bytes": False, "latency_ms": False}
CONSTRAINTS = ("sparsity", "bytes", "macs", "latency_ms")
_LIMITS = CONSTRAINTS[1:]  # what may not be exceeded; candidates are scaled to a sparsity
# In the names of Keras's metrics of which less is better.
_SMALL = (
    *("loss", "error", "mse", "mae", "mape", "msle", "divergence", "crossentropy", "hinge", "perplexity", "poisson"),
    *("bce", "cce", "kld", "logcosh", "log_cosh", "huber"),
    *("false_positives", "false_negatives", "falsepositives", "falsenegatives"),
)


class Goals:
    """The objectives and the constraints of a search.

    Args:
        objective: A name, a list of names, or a dict from names to `"min"` or `"max"`; `None` is the first metric.
        constraints: Dict: `"sparsity"` is met by scaling, `"bytes"`, `"macs"` and `"latency_ms"` are upper limits.

    Raises:
        ValueError: If a name is unknown or a number is out of range.
        TypeError: If an argument is of the wrong type.

    Example:

    >>> from keras_sparse.search.goals import Goals
    >>> goals = Goals(["accuracy", "bytes"], {"macs": 1000})
    >>> goals.directions, goals.measures
    ({'accuracy': 'max', 'bytes': 'min'}, ('macs', 'bytes'))
    >>> goals.costs({"accuracy": 0.9, "bytes": 300.0, "macs": 1500.0}), goals.violation({"macs": 1500.0})
    ([-0.9, 300.0], 0.5)
    """

    def __init__(self, objective=None, constraints=None):
        self.directions = None if objective is None else _directions(objective)
        self.constraints = _constraints(constraints)

    @property
    def sparsity(self):
        """The total sparsity that candidates are scaled to, or `None`."""
        return self.constraints.get("sparsity")

    @property
    def measures(self):
        """What must be measured besides what `model.evaluate` returns and the sparsity."""
        names = {*(self.directions or ()), *self.constraints} - {"sparsity"}
        return tuple(name for name in MEASURES if name in names)

    def settle(self, reference):
        """Choose the objective, where none was given, from what was measured of the model, and check its names."""
        if self.directions is None:
            metrics = [name for name in reference if not name.endswith("loss") and name not in MEASURES]
            name = metrics[0] if metrics else "loss"
            self.directions = {name: _direction(name)}
        unknown = sorted(set(self.directions) - set(reference))
        if unknown:
            known = sorted({*reference, *MEASURES})
            raise ValueError(f"`objective` must be of {known}: metrics that are one number. Received: {unknown}")

    def costs(self, values):
        """The objectives' values, those to maximise negated."""
        return [-values[name] if direction == "max" else values[name] for name, direction in self.directions.items()]

    def violation(self, values):
        """By which share limits are exceeded, in all; 0 if they are kept."""
        limits = self.constraints
        return float(sum(max(0.0, values[name] / limits[name] - 1) for name in _LIMITS if name in limits))

    def check_reachable(self, space, reference, uses, evaluate):
        """Raise if no point of the space can meet a constraint.

        MACs are linear in the numbers of zeros, so their range is known. Bytes and latency are only known where they
        are measured: at the ends of the space, in each pattern. Other points may take less, so only a limit below half
        of the least is refused.

        Args:
            space: The `Space`.
            reference: What was measured of the model itself.
            uses: A function that returns `{index of a weight: how often it is multiplied}`.
            evaluate: What measures an allocation, for limits on bytes and latency.
        """
        wanted = self.sparsity
        if wanted is not None:
            low, high = space.reach()
            if not low - 1e-9 <= wanted <= high + 1e-9:
                raise ValueError(
                    f"The space reaches sparsities from {low:.4g} to {high:.4g}: widen its grid. "
                    f"Received: constraints={self.constraints!r}"
                )
        limits = [name for name in _LIMITS if name in self.constraints]
        uses = uses() if limits else {}
        if "macs" in limits:
            low, high = (reference["macs"] - gone for gone in _macs_gone(space, uses, wanted))
            if low > self.constraints["macs"]:
                raise ValueError(
                    f"The space reaches macs from {low:.6g} to {high:.6g}: widen its grid or raise the limit. "
                    f"Received: constraints={self.constraints!r}"
                )
        measured = [name for name in limits if name != "macs"]
        points = _ends(space, uses, wanted) if measured else ()
        ends = [evaluate(space.scaled(point, wanted)[0]) for point in points]
        for name in measured:
            found = [values[name] for values in ends if "error" not in values]  # one that fails says nothing of others
            if found and min(found) / 2 > self.constraints[name]:
                raise ValueError(
                    f"At the ends of the space {name} go from {min(found):.6g} to {max(found):.6g} (the model itself: "
                    f"{reference[name]:.6g}), and the limit is below half of that: widen its grid or raise the limit. "
                    f"Received: constraints={self.constraints!r}"
                )


def _macs_gone(space, uses, sparsity):
    """The most multiplications that zeros can take away, and about the least."""
    most, least, excess = [], [], 0.0
    for choice in space.choices:
        for part in choice.parts:
            own = [(rounding(part, pattern), value) for value, pattern in choice.options]
            each = uses.get(part.index, 0)
            most.append((each, max(kind.zeros(value, most=True) for kind, value in own)))
            least.append((each, min(kind.zeros(value) for kind, value in own)))
            excess += max(kind.excess for kind, _ in own)
    if sparsity is None:
        return tuple(sum(each * zeros for each, zeros in end) for end in (most, least))
    total = sparsity * sum(part.size for part in space.parts)
    gone = []
    # The zeros where they take most away, or least: a continuous knapsack. What is rounded may come on top.
    for sign, budget in ((-1, total + excess), (1, total)):
        left = budget - sum(zeros for _, zeros in least)
        taken = sum(each * zeros for each, zeros in least)
        rooms = [(each, high - low) for (each, high), (_, low) in zip(most, least, strict=True)]
        for each, room in sorted(rooms, key=lambda pair: sign * pair[0]):
            taken += each * max(0.0, min(room, left))
            left -= room
        gone.append(taken)
    return tuple(gone)


def _ends(space, uses, sparsity):
    """Points at the ends of the space, in each pattern: the zeros where weights are most used, and least used.

    Without a total it is the sparsest point of each pattern.
    """
    use = [max(uses.get(part.index, 0) for part in choice.parts) for choice in space.choices]
    kinds = {json.dumps(pattern): pattern for choice in space.choices for _, pattern in choice.options}
    total, found = math.inf if sparsity is None else sparsity * sum(part.size for part in space.parts), []
    for kind in kinds.values():
        chains = []
        for choice in space.choices:
            options = sorted(range(len(choice.options)), key=lambda i, own=choice.options: own[i][0])
            chains.append([i for i in options if choice.options[i][1] == kind] or options)
        for sign in (-1, 1):
            point = [chain[0] for chain in chains]
            for i in sorted(range(len(point)), key=lambda i, sign=sign: sign * use[i]):
                if sum(c.zeros(option) for c, option in zip(space.choices, point, strict=True)) < total:
                    point[i] = chains[i][-1]
            found.append(tuple(point))
    return list(dict.fromkeys(found))


def _constraints(constraints):
    if not isinstance(constraints or {}, dict):
        raise TypeError(f"`constraints` must be a dict. Received: constraints={constraints!r}")
    limits = dict(constraints or {})
    unknown = sorted(set(limits) - set(CONSTRAINTS))
    if unknown:
        raise ValueError(f"`constraints` must be of {list(CONSTRAINTS)}. Received: {unknown}")
    for name, value in limits.items():
        if not is_real(value):
            raise TypeError(f"The constraint on {name!r} must be a number. Received: {value!r}")
        if not 0 < value < (1 if name == "sparsity" else math.inf):
            raise ValueError(
                f"The constraint on {name!r} must be above 0{' and below 1' if name == 'sparsity' else ''}. "
                f"Received: {value!r}"
            )
    return limits


def _directions(objective):
    if isinstance(objective, dict):
        bad = {name: direction for name, direction in objective.items() if direction not in ("min", "max")}
        if bad:
            raise ValueError(f"The direction of an objective is 'min' or 'max'. Received: {bad!r}")
        names = objective
    else:
        names = [objective] if isinstance(objective, str) else objective
    if not isinstance(names, (list, tuple, dict)) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            "`objective` must be a name, a list of names, or a dict from names to 'min' or 'max'. "
            f"Received: objective={objective!r}"
        )
    if not names:
        raise ValueError(f"`objective` must name something to make good. Received: objective={objective!r}")
    return dict(objective) if isinstance(objective, dict) else {name: _direction(name) for name in names}


def _direction(name):
    if name in MEASURES:
        return "max" if MEASURES[name] else "min"
    return "min" if any(word in name.lower() for word in _SMALL) else "max"
