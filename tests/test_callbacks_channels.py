"""Whole channels in the methods that train: they live and die by groups, and what is dead can be removed."""

import channel_graphs
import keras
import numpy as np
import pytest

import keras_sparse as ks

L = keras.layers
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(32, 6, 6, 3)).astype("float32"), RNG.normal(size=(32, 3)).astype("float32")
NAMES = ["stem", "project", "body"]


def residual(seed=0):
    """A stem and a block that make the channels of a sum, with statistics and biases that are not zero."""
    keras.utils.set_random_seed(seed)
    x = keras.Input((6, 6, 3))
    stem = L.ReLU()(L.BatchNormalization(name="norm")(L.Conv2D(8, 3, padding="same", name="stem")(x)))
    y = L.Conv2D(12, 1, name="body")(stem)
    y = L.DepthwiseConv2D(3, padding="same", name="depthwise")(L.ReLU()(L.BatchNormalization(name="inner")(y)))
    y = L.BatchNormalization(name="out")(L.Conv2D(8, 1, name="project")(y))
    y = L.GlobalAveragePooling2D()(L.Add()([stem, y]))
    model = keras.Model(x, L.Dense(3, name="head")(y))
    channel_graphs.randomise(model, np.random.default_rng(seed))
    model.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=keras.backend.backend() != "jax")
    return model


def fit(model, callback, epochs=4):
    return model.fit(X, Y, batch_size=8, epochs=epochs, verbose=0, callbacks=[callback])


def check_removable(model, widths):
    """That the model without its dead channels is of these widths and computes the same."""
    channel_graphs.randomise_live(model, np.random.default_rng(5))
    small = ks.shrink(model, verbose=0)
    assert {name: small.get_layer(name).filters for name in widths} == widths
    assert small.count_params() < model.count_params()
    assert channel_graphs.difference(model, small, X) < 1e-5


@pytest.mark.lengthy(0)
def test_channels_live_and_die_together_in_dynamic_sparse_training():
    model = residual()
    callback = ks.callbacks.DynamicSparseTraining(0.5, frequency=3, drop_fraction=0.5, pattern="channel")
    history = fit(model, callback)
    assert history.history["sparsity"][-1] == pytest.approx(0.5, abs=0.01)
    check_removable(model, {"stem": 4, "body": 6, "project": 4})


@pytest.mark.lengthy(0)
def test_a_channel_that_grows_changes_nothing_at_first_and_its_slots_start_anew():
    model, seen = residual(), []
    callback = ks.callbacks.DynamicSparseTraining(0.5, "uniform", "random", 0.5, frequency=3, pattern="channel")

    move = callback._move

    def watched(run, masks):
        dropped = [m & ~new for m, new in zip(run.plan.attached_masks(run.parts), masks, strict=True)]
        for goal, gone in zip(run.plan.goals, dropped, strict=True):
            goal.weight.variable.assign(np.where(gone, 0, goal.weight.numpy()))
        run.plan.zero_units([m & new for m, new in zip(run.plan.attached_masks(run.parts), masks, strict=True)])
        before = keras.ops.convert_to_numpy(model(X, training=False))
        moved = move(run, masks)
        after = keras.ops.convert_to_numpy(model(X, training=False))
        seen.append((moved, float(np.abs(after - before).max())))
        return moved

    callback._move = watched
    fit(model, callback)
    assert len(seen) > 3
    assert all(moved >= 4 for moved, _ in seen[1:3])
    assert max(difference for _, difference in seen[1:]) < 1e-5


@pytest.mark.lengthy(0)
def test_channels_that_are_dead_already_stay_as_many():
    model = residual()
    ks.prune(model, {"body": 0.25}, pattern="channel")
    fit(model, ks.callbacks.DynamicSparseTraining(None, grow="random", frequency=3, pattern="channel"))
    check_removable(model, {"stem": 8, "body": 9, "project": 8})


def test_other_patterns_do_not_move():
    with pytest.raises(ValueError, match="pattern='2:4'"):
        ks.callbacks.DynamicSparseTraining(0.5, pattern="2:4")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_threshold_for_all_weights_of_a_channel(optimizer):
    # By hand, with a learning rate of 0 for the loss: the optimizer's own step moves nothing.
    model = residual()
    model.compile({"sgd": keras.optimizers.SGD(0.1), "adam": keras.optimizers.Adam(0.1)}[optimizer], "mse")
    model.optimizer.build(model.trainable_variables)
    sparse = ks.optimizers.SparseOptimizer(model.optimizer)
    plan = ks.pruning.Plan(model, 0.0, pattern="channel", allocation="global")
    variables, axes, channels = zip(*plan.makers(), strict=True)
    sparse.sparse_parts.proximal.add(list(variables), plan.goals[0].pattern, axes, channels)
    sparse.sparse_parts.proximal.strength = 0.3
    before = {v.path: ks.graph.as_array(v) for v in model.weights}
    step = 0.1 if optimizer == "sgd" else None
    gradient = 0.0 if step else 1e-4
    sparse.apply([gradient * keras.ops.ones(v.shape) for v in model.trainable_variables])
    if not step:  # a step of Adam along equal gradients is its rate; the price is that over the gradient's size
        before, step = {k: v - 0.1 * 1e-4 / (1e-4 + 1e-7) for k, v in before.items()}, 0.1 / (1e-4 + 1e-7)
    members = ["stem/kernel", "stem/bias", "norm/gamma", "norm/beta"]
    members += ["project/kernel", "project/bias", "out/gamma", "out/beta"]
    old = np.concatenate([before[name].reshape(-1, 8) for name in members])
    norms = np.linalg.norm(old, axis=0)
    factor = np.maximum(1 - 0.3 * step * np.sqrt(len(old)) / norms, 0)
    by_path = {v.path: ks.graph.as_array(v) for v in model.weights}
    new = np.concatenate([by_path[name].reshape(-1, 8) for name in members])
    np.testing.assert_allclose(new, old * factor, rtol=1e-4, atol=1e-6)
    assert (factor > 0).all() == (optimizer == "sgd")


@pytest.mark.lengthy(0)
def test_group_lasso_ends_in_channels_that_can_be_removed():
    model = residual()
    model.compile(keras.optimizers.SGD(0.05), "mse")
    fit(model, ks.callbacks.ProximalL1(0.13, group="channel", filters=NAMES), 12)
    kept = {name: np.any(ks.graph.as_array(model.get_layer(name).kernel) != 0, axis=(0, 1, 2)).sum() for name in NAMES}
    assert kept["stem"] == kept["project"] < 8
    assert kept["body"] < 12
    check_removable(model, kept)


@pytest.mark.lengthy(0)
def test_a_share_of_channels_is_met_by_proximal_steps():
    model = residual()
    callback = ks.callbacks.ProximalL1(target_sparsity=0.5, group="channel", filters=NAMES)
    fit(model, callback, 8)
    report = ks.channel_groups(model)
    assert report.totals["dead"] == report.totals["removable"] == 10


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_network_slimming(allocation):
    model = residual()
    report = ks.regularize(model, ks.regularizers.Slimming(0.05))
    assert [row["path"] for row in report.rows] == ["norm/gamma", "inner/gamma", "out/gamma"]
    assert report.totals["saved"] == 3
    start = sum(float(np.abs(ks.graph.as_array(model.get_layer(n).gamma)).sum()) for n in ("norm", "inner", "out"))
    np.testing.assert_allclose(
        sum(float(keras.ops.convert_to_numpy(loss)) for loss in model.losses), 0.05 * start, rtol=1e-5
    )
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0)
    sums = [ks.graph.as_array(model.get_layer(name).gamma) for name in ("norm", "out")]
    lowest = np.argsort(sum(map(np.abs, sums)))[:4]
    ks.prune(model, 0.5, "slimming", "channel", allocation, filters=NAMES)
    if allocation == "uniform":
        assert set(np.flatnonzero(ks.graph.as_array(model.get_layer("out").gamma) == 0)) == set(lowest)
    left = {name: np.any(ks.graph.as_array(model.get_layer(name).kernel) != 0, axis=(0, 1, 2)).sum() for name in NAMES}
    assert left["stem"] + left["body"] == 10
    check_removable(model, left)


def test_slimming_needs_scales_and_whole_channels():
    with pytest.raises(ValueError, match="pattern='channel'"):
        ks.prune(residual(), 0.5, "slimming")
    plain = keras.Sequential([keras.Input((4,)), L.Dense(4, name="a"), L.Dense(2)])
    with pytest.raises(ValueError, match="no normalization scales it"):
        ks.prune(plain, 0.5, "slimming", "channel")
    with pytest.raises(ValueError, match="scale=True"):
        ks.regularize(plain, ks.regularizers.Slimming())


def test_unit_gates_of_partners_that_close_at_the_same_channel_can_be_removed():
    model = residual()
    gated = ks.add_l0(model, 1e-6, "unit", filters=NAMES)
    for name, closed in {"stem": [0, 1], "project": [1, 2], "body": [3]}.items():
        (alpha,) = gated.get_layer(name).log_alphas
        alpha.assign(np.where(np.isin(np.arange(alpha.shape[-1]), closed), -9.0, 9.0).reshape(alpha.shape))
    baked = ks.bake(gated)
    # Of a normalization that follows, zeros become constants: those of the sum go into the head's bias, while those
    # before the padded convolution stay where they are not zero.
    small = ks.shrink(baked, verbose=0)
    assert (small.get_layer("stem").filters, small.get_layer("project").filters) == (7, 7)
    assert channel_graphs.difference(baked, small, X) < 1e-5
