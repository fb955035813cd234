"""Data and models that tests of pruning by inputs share, and least squares in slow NumPy."""

import numpy as np

from keras_sparse.pruning.repair import DAMPING

RNG = np.random.default_rng(0)


def correlated(*shape):
    """Inputs of which each channel can be told from others, nearly."""
    few = RNG.normal(size=(*shape[:-1], 2)) @ RNG.normal(size=(2, shape[-1]))
    return (few + 0.3 * RNG.normal(size=shape)).astype("float32")


X, SEQUENCES, IMAGES = correlated(50, 8), correlated(24, 5, 8), correlated(12, 8, 8, 3)


def randomized(model, seed=0):
    rng = np.random.default_rng(seed)
    for variable in model.variables:
        if "seed" not in variable.path:
            value = 0.5 * rng.normal(size=variable.shape)
            variable.assign(value**2 + 0.5 if "variance" in variable.path else value)
    return model


def damped(x):
    moment = x.T.astype(float) @ x / len(x)
    return moment + DAMPING * np.trace(moment) / len(moment) * np.eye(len(moment))


def solved(weight, mask, moment):
    """The weights [inputs, outputs] that `mask` keeps, by least squares on the square root of the moment."""
    root, found = np.linalg.cholesky(moment).T, np.zeros(weight.shape)
    for unit in range(weight.shape[1]):
        kept = mask[:, unit]
        found[kept, unit] = np.linalg.lstsq(root[:, kept], root @ weight[:, unit], rcond=None)[0]
    return found
