"""A Pareto front is what no other candidate beats: as good in every objective and better in one. Less is better."""

import numpy as np

__all__ = ["crowding", "fronts"]


def fronts(costs, violations=None):
    """Sort candidates into fronts, the best first.

    Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II" (2002): section III.A, and section VI for
    constraints: what violates less is better, whatever its costs.

    Args:
        costs: Array [candidates, objectives], lower being better.
        violations: By how much each candidate violates its constraints; 0 if it does not.

    Returns:
        List of lists of indices: the first is dominated by nobody, the next only by those before it.

    Example:

    >>> import keras_sparse as ks
    >>> ks.search.pareto.fronts([[1, 4], [2, 2], [3, 3], [4, 1]])
    [[0, 1, 3], [2]]
    """
    costs = np.asarray(costs, "float64").reshape(len(costs), -1)
    violations = np.zeros(len(costs)) if violations is None else np.asarray(violations, "float64")
    same = violations[:, None] == violations[None]
    no_worse = np.all(costs[:, None] <= costs[None], axis=2)
    better = np.any(costs[:, None] < costs[None], axis=2)
    dominates = (violations[:, None] < violations[None]) | (same & no_worse & better)
    left, found = np.arange(len(costs)), []
    while left.size:
        free = ~dominates[np.ix_(left, left)].any(axis=0)
        found.append(left[free].tolist())
        left = left[~free]
    return found


def crowding(costs):
    """How far each candidate of one front is from its neighbours; the ends are infinitely far.

    NSGA-II, section III.B.

    Args:
        costs: Array [candidates, objectives].

    Returns:
        Array of floats.

    Example:

    >>> import keras_sparse as ks
    >>> ks.search.pareto.crowding([[0, 4], [1, 3], [4, 0]]).tolist()
    [inf, 2.0, inf]
    """
    costs = np.asarray(costs, "float64").reshape(len(costs), -1)
    distance = np.zeros(len(costs))
    for column in costs.T:
        order = np.argsort(column, kind="stable")
        distance[order[[0, -1]]] = np.inf
        span = column[order[-1]] - column[order[0]]
        if span > 0:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return distance
