"""What leaves together is shrunk together: proximal steps and group lasso on groups of all kinds, against slow sums."""

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


def slow_lasso(values, members):
    """The sum over channels of the root of their number of weights times their norm."""
    total = 0.0
    for number in sorted({n for _, numbers in members.values() for n in numbers}):
        own = [np.moveaxis(values[p], axis, 0)[np.array(n) == number] for p, (axis, n) in members.items()]
        every = np.concatenate([value.reshape(-1) for value in own]).astype("float64")
        total += np.sqrt(len(every)) * np.linalg.norm(every)
    return total


def kernels_of(model):
    return {v.path: ks.graph.as_array(v) for v in model.trainable_variables if "kernel" in v.path}


def penalty(model):
    return float(keras.ops.convert_to_numpy(sum(model.losses)))


@pytest.mark.thorough(5)
@pytest.mark.parametrize("block", TOGETHER, ids=lambda block: block.__name__)
def test_group_lasso_has_one_norm_for_partners(block):
    model = model_of(block)
    members = {path: place for path, place in members_of(model, block).items() if "kernel" in path}
    with pytest.warns(UserWarning, match="a config cannot say which other weights make its channels"):
        ks.regularize(model, ks.regularizers.GroupLasso(0.2), lambda v: v.path in members)
    assert penalty(model) == pytest.approx(0.2 * slow_lasso(kernels_of(model), members), rel=1e-5)
    ks.regularize(model, None, lambda v: v.path in members)
    assert not model.losses


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_of_group_lasso_follows_the_gradient_of_the_whole(frozen):
    model = model_of(concatenation)
    members = {path: place for path, place in members_of(model, concatenation).items() if "kernel" in path}
    model.get_layer("a").kernel.assign(np.zeros((1, 1, 3, 3)))
    for v in (model.get_layer("b").kernel, model.get_layer("c").kernel):
        v.assign(np.where(np.arange(v.shape[-1]) == v.shape[-1] - 1, 0, ks.graph.as_array(v)))  # a channel of zeros
    with pytest.warns(UserWarning, match="3 of 3"):
        ks.regularize(model, ks.regularizers.GroupLasso(0.2), list(members))
    model.get_layer("b").trainable = not frozen
    before = kernels_of(model)
    whole = {**before, "b/kernel": ks.graph.as_array(model.get_layer("b").kernel)}
    model.compile(keras.optimizers.SGD(1.0), lambda y, p: 0.0 * keras.ops.sum(p))
    model.fit(np.zeros((2, 6, 6, 3)), np.zeros((2, 2)), verbose=0)
    after = kernels_of(model)
    for path, place in ((path, place) for path, place in members.items() if path in before):
        for index in map(tuple, np.argwhere(before[path])):
            step = np.zeros(before[path].shape)
            step[index] = 1e-4
            near = [slow_lasso({**whole, path: whole[path] + sign * step}, members) for sign in (1, -1)]
            moved = before[path][index] - after[path][index]
            assert moved == pytest.approx(0.2 * (near[0] - near[1]) / 2e-4, abs=1e-4), (path, index, place)
        np.testing.assert_array_equal(after[path][before[path] == 0], 0)


def test_group_lasso_of_channels_that_are_one_weights_alone_is_saved():
    model = keras.Sequential([keras.Input((4,)), L.Dense(5, name="a"), L.ReLU(), L.Dense(3, name="b")])
    assert ks.regularize(model, ks.regularizers.GroupLasso(0.1)).totals == {"weights": 2, "saved": 2}


def test_a_partner_that_stays_dense_leaves_each_weight_its_own_norm():
    model = model_of(concatenation)
    assert ks.regularize(model, ks.regularizers.GroupLasso(0.1), ["a/kernel", "b/kernel"]).totals["saved"] == 2


def test_the_strength_of_a_joint_norm_moves():
    model = model_of(gates)
    with pytest.warns(UserWarning, match="2 of 2"):
        ks.regularize(model, ks.regularizers.GroupLasso(0.2), "^a/")
    regularizer = model.get_layer("a").cell.kernel.regularizer
    assert repr(regularizer) == "GroupLasso(strength=0.2) over a/lstm_cell/kernel, a/lstm_cell/recurrent_kernel"
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x, y = np.zeros((4, 5, 4)), np.zeros((4, 2))
    schedule = ks.callbacks.StrengthSchedule("linear", end=1.0)
    found = model.fit(x, y, epochs=3, verbose=0, callbacks=[schedule]).history
    steps = np.diff(found["loss"]) / np.diff(found["strength"])
    members = {path: place for path, place in members_of(model, gates).items() if "kernel" in path}
    np.testing.assert_allclose(steps, slow_lasso(kernels_of(model), members), rtol=1e-4)
