"""Goals are what a search makes good, and the limits that it must keep."""

import math

from keras_sparse.registry import is_real

__all__ = ["CONSTRAINTS", "MEASURES", "Goals"]

# Measures besides those of `model.evaluate`, and whether more is better.
MEASURES = {"sparsity": True, "macs": False, "bytes": False, "latency_ms": False}
CONSTRAINTS = ("sparsity", "bytes", "macs", "latency_ms")
_LIMITS = CONSTRAINTS[1:]  # what may not be exceeded; candidates are scaled to a sparsity
# In the names of Keras's metrics of which less is better.
_SMALL = ("loss", "error", "mse", "mae", "mape", "msle", "divergence", "crossentropy", "hinge", "perplexity", "poisson")


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
            raise ValueError(f"`objective` must be of {known}. Received: {unknown}")

    def costs(self, values):
        """The objectives' values, those to maximise negated."""
        return [-values[name] if direction == "max" else values[name] for name, direction in self.directions.items()]

    def violation(self, values):
        """By which share limits are exceeded, in all; 0 if they are kept."""
        limits = self.constraints
        return float(sum(max(0.0, values[name] / limits[name] - 1) for name in _LIMITS if name in limits))

    def check_reachable(self, space, evaluate):
        """Raise if no point of the space can meet a constraint.

        Args:
            space: The `Space`.
            evaluate: What measures an allocation, for limits that must be measured: called at most twice.
        """
        reach = space.reach()
        wanted = self.sparsity
        if wanted is not None and not reach[0] - 1e-9 <= wanted <= reach[1] + 1e-9:
            raise ValueError(
                f"The space reaches sparsities from {reach[0]:.4g} to {reach[1]:.4g}: widen its grid. "
                f"Received: constraints={self.constraints!r}"
            )
        named = [name for name in _LIMITS if name in self.constraints]
        if not named:
            return
        ends = []
        for pick in (max, min):
            point = [pick(range(len(c.options)), key=lambda i, c=c: c.options[i][0]) for c in space.choices]
            ends.append(evaluate(space.scaled(point, wanted)[0]))
        for values in ends:
            if "error" in values:
                raise RuntimeError(f"The ends of the space cannot be evaluated. The first one:\n{values['error']}")
        for name in named:
            sparse, dense = (values[name] for values in ends)
            if min(sparse, dense) > self.constraints[name]:
                raise ValueError(
                    f"The space reaches {name} from {sparse:.6g} to {dense:.6g}: widen its grid or raise the limit. "
                    f"Received: constraints={self.constraints!r}"
                )


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
