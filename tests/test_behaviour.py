"""A contract of behaviour: every criterion x pattern x allocation reaches exact counts, and is better than chance."""

import functools
import math

import keras
import numpy as np
import pytest

import keras_sparse as ks

# What a criterion reads of data: gradients need targets.
WITH_TARGETS = ["taylor", "snip", "fisher", "gradient", "movement"]
WITH_INPUTS = ["wanda", "obs"]
CRITERIA = ["magnitude", *WITH_TARGETS, *WITH_INPUTS]
# N:M has a sparsity of its own in each weight, and only channels have structures that are alike.
COMBINATIONS = [
    *(
        (pattern, allocation)
        for pattern in ("unstructured", "block_1x4")
        for allocation in ("uniform", "global", "erk")
    ),
    ("2:4", "uniform"),
    *(("channel", allocation) for allocation in ("uniform", "global", "erk", "isomorphic")),
]


@functools.cache
def task():
    """A trained classifier of blobs with eight informative inputs of 32, its weights, and its samples."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 8, 512)
    x = rng.normal(size=(512, 32)).astype("float32")
    x[:, :8] += 2 * rng.normal(size=(8, 8))[y]
    # Some labels are wrong: what is learnt by heart has no gradients left to rank by.
    y = np.where(rng.random(512) < 0.2, rng.integers(0, 8, 512), y)
    layers = [
        keras.layers.Dense(48, activation="relu"),
        keras.layers.Dense(24, activation="relu"),
        keras.layers.Dense(8),
    ]
    model = keras.Sequential([keras.Input((32,)), *layers])
    model.compile(keras.optimizers.Adam(0.005), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, epochs=6, verbose=0)
    return model, model.get_weights(), x, y


def loss_after(criterion, pattern, allocation):
    model, weights, x, y = task()
    model.set_weights(weights)
    kind = criterion if isinstance(criterion, str) else None
    data = (x, y) if kind in WITH_TARGETS else x[:256] if kind in WITH_INPUTS else None
    sparsity = {"2:4": 0.5, "channel": 0.4}.get(pattern, 0.6)
    # The units of the last layer are the classes: they stay.
    filters = model.layers[:-1]
    ks.prune(model, sparsity, criterion, pattern, allocation, filters, data=data)
    kernels = [keras.ops.convert_to_numpy(layer.kernel) for layer in model.layers[:-1]]
    groups, gone = [], []
    for kernel in kernels:
        index = ks.patterns.get(pattern).groups(kernel.shape)
        groups.append(index.max() + 1)
        gone.append(sum(not kernel[index == group].any() for group in range(index.max() + 1)))
    if allocation == "uniform":
        assert gone == [round(sparsity * n) for n in groups]
    else:
        assert sum(gone) == round(sparsity * sum(groups))
    return model.evaluate(x, y, verbose=0)


@pytest.mark.thorough(3)
@pytest.mark.parametrize(("pattern", "allocation"), COMBINATIONS)
@pytest.mark.lengthy(0)
def test_counts_are_exact_and_better_than_chance(pattern, allocation):
    chance = np.mean([loss_after(ks.criteria.Random(seed), pattern, allocation) for seed in range(3)])
    losses = {criterion: loss_after(criterion, pattern, allocation) for criterion in CRITERIA}
    assert all(math.isfinite(loss) for loss in losses.values())
    worse = [criterion for criterion, loss in losses.items() if loss >= chance]
    assert not worse, (chance, losses)
