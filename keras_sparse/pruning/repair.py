"""A repair solves for the weights that stay, so that a layer's outputs are as they were as nearly as these can make it.

All in float64, on matrices [output units, inputs], with the second moments of `ks.pruning.operands.Moment`.
"""

import numpy as np

__all__ = ["column_updates", "damped", "input_statistic", "least_squares", "repaired"]

# Of the mean of the moment's diagonal: what makes the moments of few samples and of dead inputs invertible.
DAMPING = 3e-2
EXACT = 3e10


def damped(moment, damping=DAMPING):
    """Return a moment with `damping` times the mean of its diagonal added to it (1, if it is zero).

    Example:

    >>> import numpy as np
    >>> from keras_sparse.pruning.repair import damped
    >>> damped(np.array([[2.0, 2.0], [2.0, 2.0]]), 0.5).tolist()
    [[3.0, 2.0], [2.0, 3.0]]
    """
    return moment + (damping * np.trace(moment) / len(moment) or 1.0) * np.eye(len(moment))


def repaired(weights, masks, moments, group_of, exact=EXACT):
    """Return the weights that minimize E[((v - w) x)^2] over v with the zeros of a mask, for each output unit.

    Args:
        weights: Array w [units, inputs].
        masks: Booleans of that shape, `True` for weights that stay.
        moments: Damped second moments, an array [groups, inputs, inputs].
        group_of: The group of each unit.
        exact: The sum of (weights that stay)^3 over the units up to which each gets a system of equations of its own.
            Beyond it, `column_updates` come near the minimum.

    Returns:
        Float64 array, with exact zeros where the mask is `False`. Units from which nothing is taken stay as they are.
        Exact by `least_squares` up to a size of the problem, above it `column_updates`.

    Example:

    >>> import numpy as np
    >>> from keras_sparse.pruning.repair import repaired
    >>> moments = np.array([[[1.0, 0.5], [0.5, 1.0]]])
    >>> repaired(np.array([[2.0, 1.0]]), np.array([[True, False]]), moments, np.array([0])).tolist()
    [[2.5, 0.0]]
    """
    solve = least_squares if cost(masks) <= exact else column_updates
    new = np.array(weights, np.float64)
    for group in np.unique(group_of):
        units = np.flatnonzero((group_of == group) & ~masks.all(axis=1))
        if units.size:
            new[units] = solve(new[units], masks[units], moments[group])
    return new


def cost(masks):
    """The sum of (weights that stay)^3 over those output units that differ in which these are.

    Example:

    >>> import numpy as np
    >>> from keras_sparse.pruning.repair import cost
    >>> cost(np.array([[True, False], [True, False], [True, True]]))
    9.0
    """
    return float(np.sum(_distinct(masks)[0].sum(axis=1, dtype=np.float64) ** 3))


def _distinct(masks):
    """The different rows, and which of them each row is."""
    _, first, inverse = np.unique(np.packbits(masks, axis=1), axis=0, return_index=True, return_inverse=True)
    return masks[first], inverse.reshape(-1)


def least_squares(weights, masks, moment):
    """Solve the normal equations of each output unit: v_S = w_S + H_SS^-1 H_SD w_D.

    S are the inputs of which the weights stay, D the others: the limit of Frantar and Alistarh, "Optimal brain
    compression" (2022), equation 3, applied to all of D at once (section 4, group OBS).

    Args:
        weights: Float64 array w [units, inputs].
        masks: Booleans of that shape.
        moment: The moment H [inputs, inputs], positive definite.

    Example:

    >>> import numpy as np
    >>> from keras_sparse.pruning.repair import least_squares
    >>> least_squares(np.array([[2.0, 1.0]]), np.array([[False, True]]), np.array([[1.0, 0.5], [0.5, 1.0]])).tolist()
    [[0.0, 2.0]]
    """
    new = np.where(masks, weights, 0.0)
    rows, which = _distinct(masks)
    for number, mask in enumerate(rows):
        units, kept, gone = np.flatnonzero(which == number), np.flatnonzero(mask), np.flatnonzero(~mask)
        if kept.size and gone.size:
            # Half of all work is to gather: by rows first, which lie together.
            system = moment[kept]
            right = system[:, gone] @ weights[np.ix_(units, gone)].T
            new[np.ix_(units, kept)] += np.linalg.solve(system[:, kept], right).T
    return new


def column_updates(weights, masks, moment):
    """Go over the inputs once; those to the right make up for what each takes away: SparseGPT's update.

    Frantar and Alistarh, "SparseGPT" (2023), algorithm 1, with a mask that is known: inputs^3 for all output units
    together, where `least_squares` needs as much for each. Weights to the left of one that leaves stay as they are.

    Args:
        weights: Float64 array [units, inputs].
        masks: Booleans of that shape.
        moment: The moment [inputs, inputs], positive definite.

    Example:

    >>> import numpy as np
    >>> from keras_sparse.pruning.repair import column_updates
    >>> column_updates(np.array([[2.0, 1.0]]), np.array([[False, True]]), np.array([[1.0, 0.5], [0.5, 1.0]])).tolist()
    [[0.0, 2.0]]
    """
    upper = np.linalg.cholesky(np.linalg.inv(moment)).T
    new, width = np.array(weights), 128
    for start in range(0, new.shape[1], width):
        end = min(start + width, new.shape[1])
        errors = np.zeros((len(new), end - start))
        for i in range(start, end):
            errors[:, i - start] = np.where(masks[:, i], 0.0, new[:, i]) / upper[i, i]
            new[:, i:end] -= errors[:, i - start, None] * upper[i, i:end]
        new[:, end:] -= errors @ upper[start:end, end:]
    return np.where(masks, new, 0.0)


def input_statistic(criterion, masks, moments, group_of):
    """What an `InputCriterion` measures for each weight, among those of its output unit that a mask keeps.

    Args:
        criterion: The criterion.
        masks: Booleans [units, inputs].
        moments: Damped second moments, an array [groups, inputs, inputs].
        group_of: The group of each unit.

    Returns:
        Float64 array [units, inputs]; 1 where the mask is `False`.

    Example:

    >>> import numpy as np, keras_sparse as ks
    >>> from keras_sparse.pruning.repair import input_statistic
    >>> moments, masks = np.array([[[4.0, 0.0], [0.0, 9.0]]]), np.array([[True, True], [False, True]])
    >>> input_statistic(ks.criteria.Wanda(), masks, moments, np.zeros(2, int)).tolist()
    [[2.0, 3.0], [1.0, 3.0]]
    """
    found = np.ones(masks.shape)
    for group in np.unique(group_of):
        units = np.flatnonzero(group_of == group)
        rows, which = _distinct(masks[units])
        for number, mask in enumerate(rows):
            kept = np.flatnonzero(mask)
            if kept.size:
                values = np.asarray(criterion.measure(moments[group][np.ix_(kept, kept)]), np.float64)
                found[np.ix_(units[which == number], kept)] = values
    return found
