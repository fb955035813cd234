"""What a channel is worth: all weights that leave with it, one by one, on small graphs where they are known by hand."""

import channel_graphs
import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse.pruning.one_shot import gradient_statistics

L = keras.layers


def residual():
    x = keras.Input((6,))
    stem = L.Dense(8, "relu", name="stem")(x)
    body = L.Dense(20, "relu", name="body")(stem)
    body = L.BatchNormalization(name="norm")(L.Dense(8, name="project")(body))
    return keras.Model(x, L.Dense(3, name="head")(L.add([stem, body])))


def depthwise_chain():
    x = keras.Input((5, 5, 3))
    y = L.ReLU()(L.BatchNormalization(name="n")(L.Conv2D(6, 1, name="a")(x)))
    y = L.ReLU()(L.BatchNormalization(name="m")(L.DepthwiseConv2D(3, depth_multiplier=2, name="d")(y)))
    return keras.Model(x, L.GlobalAveragePooling2D()(L.Conv2D(4, 1, name="b")(y)))


def concatenation():
    x = keras.Input((5, 5, 3))
    y = L.concatenate([L.Conv2D(3, 1, name="other")(x), L.Conv2D(4, 3, padding="same", name="a")(x)])
    return keras.Model(x, L.GlobalAveragePooling2D()(L.Conv2D(2, 3, name="b")(y)))


def flattened():
    x = keras.Input((3, 3, 2))
    return keras.Model(x, L.Dense(5, name="b")(L.Flatten()(L.Conv2D(6, 2, name="a")(x))))


def heads():
    x = keras.Input((5, 4))
    y = L.MultiHeadAttention(6, 3, name="a")(x, x)
    return keras.Model(x, L.Dense(2, name="head")(L.Flatten()(y)))


def units_of_an_lstm():
    x = keras.Input((5, 3))
    return keras.Model(x, L.Dense(2, name="b")(L.LSTM(6, name="a")(x)))


def shared():
    x = keras.Input((4,))
    twice = L.Dense(6, name="b")
    a = L.Dense(6, "relu", name="a")(x)
    return keras.Model(x, L.Dense(2, name="c")(L.add([a, twice(a), twice(twice(a))])))


def chain():
    x = keras.Input((5,))
    return keras.Model(x, L.Dense(2, name="c")(L.Dense(6, "relu", name="b")(L.Dense(8, "relu", name="a")(x))))


N, EIGHT = list(range(6)), list(range(8))
# The weights that leave with the channels of a group, along which axis they lie, and which channel each slice is of.
MEMBERS = {
    residual: [
        ("stem/kernel", 1, EIGHT),
        ("project/kernel", 1, EIGHT),
        ("body/kernel", 0, EIGHT),
        ("head/kernel", 0, EIGHT),
    ],
    depthwise_chain: [("a/kernel", 3, N), ("d/kernel", 2, N), ("b/kernel", 2, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])],
    concatenation: [("a/kernel", 3, N[:4]), ("b/kernel", 2, [None, None, None, 0, 1, 2, 3])],
    flattened: [("a/kernel", 3, N), ("b/kernel", 0, 4 * N)],
    heads: [
        ("a/attention_output/kernel", 0, N),
        ("a/query/kernel", 1, N),
        ("a/key/kernel", 1, N),
        ("a/value/kernel", 1, N),
    ],
    units_of_an_lstm: [
        ("a/lstm_cell/kernel", 1, 4 * N),
        ("a/lstm_cell/recurrent_kernel", 1, 4 * N),
        ("a/lstm_cell/recurrent_kernel", 0, N),
        ("b/kernel", 0, N),
    ],
    shared: [("a/kernel", 1, N), ("b/kernel", 1, N), ("b/kernel", 0, N), ("c/kernel", 0, N)],
}
# What is chosen by filters: of the groups of `MEMBERS` what makes them. All that is not named stays dense.
MAKERS = {residual: ["stem/", "project/"], heads: ["attention_output/kernel"], shared: ["a/", "b/"]}


def values_of(model):
    return {v.path: ks.graph.as_array(v).astype("float64") for v in model.weights}


def slow_scores(values, members, worth):
    """One weight at a time."""
    scores = np.zeros(1 + max(n for _, _, numbers in members for n in numbers if n is not None))
    for path, axis, numbers in members:
        for place, number in enumerate(numbers):
            for weight in np.take(values[path], place, axis).reshape(-1) if number is not None else ():
                scores[number] += worth(float(weight))
    return scores


def model_of(build):
    model, rng = build(), np.random.default_rng(1)
    channel_graphs.randomise(model, rng)
    for v in model.weights:  # the same on every backend
        if "kernel" in v.path:
            v.assign(rng.normal(size=v.shape))
    return model


def gone_of(model, members):
    """Which channels are zero where the first of the members makes them."""
    path, axis, numbers = members[0]
    value = np.moveaxis(values_of(model)[path], axis, 0)
    return [n for n in sorted(set(numbers)) if not value[[number == n for number in numbers]].any()]


class Fourth(ks.criteria.Criterion):
    """Of weights alone, no size: summed as it is."""

    def scores(self, weight, statistic=None):
        return weight**4


@pytest.mark.parametrize("criterion, worth", [("magnitude", lambda w: w * w), (Fourth(), lambda w: w**4)])
@pytest.mark.parametrize("build", MEMBERS, ids=lambda build: build.__name__)
def test_all_weights_that_leave_with_a_channel_count(build, criterion, worth):
    model, members = model_of(build), MEMBERS[build]
    scores = slow_scores(values_of(model), members, worth)
    ks.prune(model, 0.5, criterion, pattern="channel", filters=MAKERS.get(build, "^a/"))
    assert gone_of(model, members) == sorted(np.argsort(scores)[: len(scores) // 2].tolist())


def test_weights_that_a_criterion_of_gradients_has_not_measured_and_masked_ones_do_not_count():
    model, members = model_of(residual), [one for one in MEMBERS[residual] if one[0] != "head/kernel"]
    body = model.get_layer("body").kernel
    body.assign(np.where(np.random.default_rng(2).random(body.shape) < 0.5, 0, ks.graph.as_array(body)))
    model.compile("sgd", "mse")
    x = np.random.default_rng(3).normal(size=(16, 6)).astype("float32")
    how = {"criterion": "gradient", "pattern": "channel", "filters": ["stem/", "project/", "body/"]}
    plan = ks.pruning.Plan(model, 0.5, **how)
    found = gradient_statistics(model, plan, (x, x[:, :3]))
    measured = {g.weight.path: value.astype("float64") for g, value in zip(plan.goals, found, strict=True)}
    measured["body/kernel"] *= ks.graph.as_array(body) != 0
    scores = slow_scores(measured, members, abs)
    ks.prune(model, 0.5, data=(x, x[:, :3]), **how)
    assert gone_of(model, members) == sorted(np.argsort(scores)[:4].tolist())


def test_what_a_criterion_measures_of_inputs_counts_in_shares_of_what_layers_put_out():
    model = model_of(chain)
    x = np.random.default_rng(2).normal(size=(500, 5))
    read = {"a": x, "b": keras.ops.convert_to_numpy(model.get_layer("a")(x)).astype("float64")}
    errors = {}
    for name, inputs in read.items():
        kernel = ks.graph.as_array(model.get_layer(name).kernel).astype("float64")
        power = np.sum(np.mean((inputs @ kernel) ** 2, axis=0))
        errors[f"{name}/kernel"] = np.abs(kernel) * np.sqrt(np.mean(inputs**2, axis=0))[:, None] / power
    members = [("a/kernel", 1, EIGHT), ("b/kernel", 0, EIGHT)]
    scores = np.sort(slow_scores(errors, members, abs))
    assert scores[4] > 1.05 * scores[3]  # so that the damping of moments does not decide
    ks.prune(model, 0.5, "wanda", pattern="channel", filters=["a/", "b/"], data=x)
    assert gone_of(model, members) == sorted(np.argsort(slow_scores(errors, members, abs))[:4].tolist())


def test_a_fit_chooses_what_one_shot_chooses():
    model, members = model_of(depthwise_chain), MEMBERS[depthwise_chain]
    scores = slow_scores(values_of(model), members, lambda w: w * w)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    pruning = ks.callbacks.Pruning(0.5, pattern="channel", filters="^a/", schedule="one_shot")
    model.fit(np.ones((4, 5, 5, 3)), np.ones((4, 4)), verbose=0, callbacks=[pruning])
    assert gone_of(model, members) == sorted(np.argsort(scores)[:3].tolist())


def test_channels_that_move_are_ranked_by_what_makes_them():
    model = keras.Sequential([keras.Input((1,)), L.Dense(4, name="a"), L.Dense(1)])
    model.set_weights(
        [np.array([[1.0, 2.0, 3.0, 0.0]]), np.zeros(4), np.array([[9.0], [0.0], [0.0], [0.0]]), np.zeros(1)]
    )
    plan = ks.pruning.Plan(model, 0.25, pattern="channel", filters="a", removable=True)
    moving = ks.pruning.MovingChannels(model, plan.channels)
    arrays = [np.abs(plan.goals[0].weight.numpy())]
    (mask,) = moving.next(plan.present_masks(), arrays, arrays, 0.4, np.random.default_rng(0))
    assert mask.tolist() == [[False, True, True, True]]
