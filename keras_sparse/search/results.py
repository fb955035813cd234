"""Results are the candidates that a search has evaluated, the best of them, and the front that nobody beats."""

import dataclasses

from keras_sparse.reports import Report, figure_class
from keras_sparse.search.pareto import fronts

__all__ = ["Candidate", "SearchResults"]


@dataclasses.dataclass
class Candidate:
    """One evaluated allocation.

    Attributes:
        number: Its place in the search, from 0.
        point: The point of the space.
        allocation: `{ks.selection.only(path): (sparsity, pattern)}`, as `ks.callbacks.Pruning` and `ks.prune` take it.
        values: What was measured, `{name: float}`; empty if it failed.
        error: The traceback, or `None`.
        violation: By how much it violates the constraints; 0 if it does not.
        seconds: How long its evaluation took.

    Example:

    >>> import keras_sparse as ks
    >>> from keras_sparse.search.results import Candidate
    >>> Candidate(0, (1,), {ks.selection.only("a"): (0.5, "unstructured")}, {"loss": 1.0}).error is None
    True
    """

    number: int
    point: tuple
    allocation: dict
    values: dict
    error: str | None = None
    violation: float = 0.0
    seconds: float | None = None


class SearchResults(Report):
    """What a search has found. It prints the front, and the best allocation.

    Attributes:
        candidates: List of all `Candidate`, in the order of asking.
        best: The best by the first objective, of those that meet the constraints (or violate them least).
        front: List of those that no other beats in all objectives, the best by the first objective first.
        reference: What was measured of the model itself.
        allocation: A `Report` of the best allocation: the sparsity and the pattern of each weight.

    Example:

    >>> import keras_sparse as ks
    >>> from keras_sparse.search.goals import Goals
    >>> from keras_sparse.search.results import Candidate, SearchResults
    >>> key = ks.selection.only("a")
    >>> found = [Candidate(i, (i,), {key: (i / 4, "2:4")}, {"loss": 1.0 - i / 10}) for i in range(3)]
    >>> results = SearchResults(found, Goals("loss"), {"loss": 0.5})
    >>> results.best.number, results.allocation.rows
    (2, [{'weight': 'a', 'sparsity': 0.5, 'pattern': '2:4'}])
    """

    def __init__(self, candidates, goals, reference):
        self.candidates, self.reference, self._objective = list(candidates), dict(reference), dict(goals.directions)
        living = [one for one in candidates if not one.error]
        costs = [goals.costs(one.values) for one in living]
        first = fronts(costs, [one.violation for one in living])[0]
        self.front = [living[i] for i in sorted(first, key=lambda i: costs[i][0])]
        self.best = self.front[0]
        rows = [{"candidate": "the model itself", **reference}]
        rows += [{"candidate": str(one.number), **one.values} for one in self.front]
        notes = []
        failed = [one for one in candidates if one.error]
        if failed:
            notes.append(f"{len(failed)} candidates failed. The first: {failed[0].error.strip().splitlines()[-1]}")
        if self.best.violation:
            notes.append("No candidate meets the constraints. These violate them least.")
        totals = {"candidates": len(self.candidates), "failed": len(failed)}
        formats = dict.fromkeys(self.best.values, ".4f") | dict.fromkeys(("bytes", "macs"), ",.0f")
        super().__init__("Front of the search", rows, totals, notes, formats | {"sparsity": ".2%"})
        rows = [
            {"weight": key.path, "sparsity": sparsity, "pattern": _name(pattern)}
            for key, (sparsity, pattern) in self.best.allocation.items()
        ]
        title = f"Best allocation: candidate {self.best.number}"
        self.allocation = Report(title, rows, {}, formats={"sparsity": ".2%"})
        self.below = [self.allocation]

    def to_dict(self):
        """The results as plain data, with `objective`, `reference`, `best`, `front` and `candidates`."""
        return super().to_dict() | {
            "objective": self._objective,
            "reference": self.reference,
            "best": dataclasses.asdict(self.best),
            "front": [one.number for one in self.front],
            "candidates": [dataclasses.asdict(one) for one in self.candidates],
        }

    def plot(self):
        """Draw all candidates and the front: the first objective over the second, or over the sparsity."""
        names = [*self._objective, "sparsity"]
        y, x = names[0], names[1] if names[1] != names[0] else "number"
        living = [one for one in self.candidates if not one.error]

        def values(candidates, name):
            return [one.number if name == "number" else one.values[name] for one in candidates]

        figure = figure_class()(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.scatter(values(living, x), values(living, y), s=14, color="tab:gray", label="candidates")
        axes.plot(values(self.front, x), values(self.front, y), "o-", color="tab:blue", label="front")
        axes.set(xlabel=x, ylabel=y, title=self.title)
        axes.legend()
        return figure


def _name(pattern):
    return pattern if isinstance(pattern, str) else f"{pattern['class_name']}{tuple(pattern['config'].values())}"
