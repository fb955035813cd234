"""What leaves together is shrunk together: proximal steps on groups of all kinds, against a slow step by hand."""

import re

import channel_graphs
import keras
import numpy as np
import pytest

import keras_sparse as ks

L = keras.layers


def concatenation(x):
    y = L.concatenate([L.Conv2D(3, 1, name="a")(x), L.Conv2D(4, 1, name="b")(x)])
    return L.add([y, L.Conv2D(7, 1, name="c")(y)])


def squeeze_and_excite(x):
    y = L.BatchNormalization(name="n")(L.Conv2D(6, 3, name="a")(x))
    z = L.Dense(3, "relu", name="down")(L.GlobalAveragePooling2D()(y))
    return L.multiply([y, L.Reshape((1, 1, 6))(L.Dense(6, "sigmoid", name="up")(z))])


def depthwise_chain(x):
    y = L.ReLU(6)(L.BatchNormalization(name="n")(L.Conv2D(6, 1, name="a")(x)))
    y = L.DepthwiseConv2D(3, depth_multiplier=2, name="d")(y)
    return L.PReLU("random_normal", shared_axes=[1, 2], name="p")(L.BatchNormalization(name="m")(y))


def heads(x):
    return L.add([x, L.MultiHeadAttention(4, 3, name="a")(x, x)])


def shared_heads(x):
    return L.add([x, L.GroupQueryAttention(2, 8, 4, name="a")(x, x)])


def width_of_heads(x):
    return L.MultiHeadAttention(2, 6, value_dim=5, name="a")(x, x)


def feed_forward(x):
    y = L.EinsumDense("abc,cde->abde", (5, 2, 6), bias_axes="e", activation="gelu", name="a")(x)
    return L.EinsumDense("abde,def->abf", (5, 4), bias_axes="f", name="b")(y)


def gates(x):
    return L.LSTM(4, name="a")(x)


def gates_of_a_gru(x):
    return L.GRU(4, name="a")(x)


def both_ways(x):
    return L.Bidirectional(L.LSTM(4), merge_mode="sum", name="a")(x)


# Along which axis of which weights the channels lie that leave together, by hand.
THREE, FOUR, SIX = [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]
PAIRS = [0, 0, 1, 1, 2, 2, 3, 3]
CHAINS = [*PAIRS, 4, 4, 5, 5]
TOGETHER = {
    squeeze_and_excite: {"^(a|n|up)/": (-1, SIX)},
    heads: {"output/kernel": (0, FOUR)},
    gates: {"^a/": (-1, FOUR * 4)},
    concatenation: {"^a/": (-1, THREE), "^b/": (-1, [3, 4, 5, 6]), "^c/": (-1, [*range(7)])},
    depthwise_chain: {"^(a|n)/": (-1, SIX), "^d/kernel": (2, SIX), "^(d|m)/": (-1, CHAINS)},
    feed_forward: {"^a/": (-1, SIX)},
    shared_heads: {"output/kernel": (0, PAIRS)},
    width_of_heads: {"(query|key)/": (-1, SIX)},
    gates_of_a_gru: {"^a/": (-1, FOUR * 3)},
    both_ways: {"^a/": (-1, FOUR * 4)},
}


def model_of(block):
    keras.utils.set_random_seed(1)
    x = keras.Input((6, 6, 3) if block in (concatenation, squeeze_and_excite, depthwise_chain) else (5, 4))
    model = keras.Model(x, L.Dense(2, name="head")(L.Flatten()(block(x))))
    channel_graphs.randomise(model, np.random.default_rng(1))
    return model


def members_of(model, block):
    """`{path: (axis, numbers of the channels)}`."""
    found = {}
    for v in model.trainable_variables:
        key = next((key for key in TOGETHER[block] if re.search(key, v.path)), None)
        if key:
            found[v.path] = TOGETHER[block][key]
    return found


def slow_step(old, members, threshold):
    """One channel at a time, over all of its weights: `v * max(1 - threshold(v) / norm(v), 0)`."""
    new, gone = {path: value.copy() for path, value in old.items()}, []
    for number in sorted({n for _, numbers in members.values() for n in numbers}):
        own = {
            path: np.moveaxis(old[path], axis, 0)[np.array(numbers) == number]
            for path, (axis, numbers) in members.items()
        }
        every = np.concatenate([value.reshape(-1) for value in own.values()])
        factor = max(1 - threshold * np.sqrt(len(every)) / np.linalg.norm(every), 0)
        for path, (axis, numbers) in members.items():
            np.moveaxis(new[path], axis, 0)[np.array(numbers) == number] = own[path] * factor
        gone += [number] if factor == 0 else []
    return new, gone


def proximal_step(model, filters, price):
    """The optimizer's own step moves nothing: gradients are zero."""
    optimizer = ks.optimizers.SparseOptimizer(keras.optimizers.SGD(0.1))
    optimizer.build(model.trainable_variables)
    plan = ks.pruning.Plan(model, 0.0, pattern="channel", allocation="global", filters=filters)
    variables, axes, channels = zip(*plan.makers(), strict=True)
    optimizer.sparse_parts.proximal.add(list(variables), plan.goals[0].pattern, axes, channels)
    optimizer.sparse_parts.proximal.strength = price / 0.1
    optimizer.apply([keras.ops.zeros(v.shape) for v in model.trainable_variables])


@pytest.mark.thorough(5)
@pytest.mark.parametrize("block", TOGETHER, ids=lambda block: block.__name__)
def test_partners_go_to_zero_together_and_are_removed(block):
    model = model_of(block)
    members = members_of(model, block)
    old = {v.path: ks.graph.as_array(v) for v in model.weights}
    sizes = [np.sqrt(np.mean(np.square(old[path]))) for path in members if "kernel" in path]
    price, gone = min(sizes), []
    while not gone:  # a price that some channels are not worth
        price *= 1.02
        expected, gone = slow_step(old, members, price)
    kernels = [path for path in members if "kernel" in path and not path.startswith("d/")]
    proximal_step(model, kernels, price)
    for v in model.weights:
        np.testing.assert_allclose(ks.graph.as_array(v), expected[v.path], rtol=1e-4, atol=1e-6, err_msg=v.path)
    report = ks.channel_groups(model)
    assert report.totals["removable"] == report.totals["dead"] == len(gone)
    small = ks.shrink(model, verbose=0)
    assert small.count_params() < model.count_params()
    x = np.random.default_rng(2).normal(size=(3, *model.input_shape[1:])).astype("float32")
    assert channel_graphs.difference(model, small, x) < 1e-5
