"""Models that the tests of one-shot pruning share."""

import keras


def make(*units, seed=0):
    keras.utils.set_random_seed(seed)
    dense = [keras.layers.Dense(int(n), name=f"d{i}") for i, n in enumerate(units[1:])]
    return keras.Sequential([keras.Input((int(units[0]),)), *dense])


def kernels(model):
    return [layer.kernel.numpy() for layer in model.layers]
