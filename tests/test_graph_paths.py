"""Weights on dead paths: found as a slow search finds them, and pruned first."""

import keras
import numpy as np
import pytest

import keras_sparse as ks

L = keras.layers


def mlp(*units, seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((units[0],)), *(L.Dense(n, activation="relu") for n in units[1:])])


def searched(masks):
    """Which weights of an MLP lie on a path from an input to an output, by following every path."""
    found = [np.zeros_like(mask) for mask in masks]

    def follow(layer, unit, path):
        if layer == len(masks):
            for number, place in enumerate(path):
                found[number][place] = True
            return
        for after in np.flatnonzero(masks[layer][unit]):
            follow(layer + 1, after, [*path, (unit, after)])

    for unit in range(masks[0].shape[0]):
        follow(0, unit, [])
    return found


@pytest.mark.parametrize("seed", range(8))
def test_dense_layers_against_a_search(seed):
    rng = np.random.default_rng(seed)
    model = mlp(*rng.integers(2, 9, 5).tolist(), seed=seed)
    kernels = [layer.kernel for layer in model.layers]
    masks = [rng.random(tuple(kernel.shape)) < rng.uniform(0.1, 0.5) for kernel in kernels]
    paths = ks.graph.Paths(model)
    alive = paths.alive(list(zip(kernels, masks, strict=True)))
    for kernel, expected in zip(kernels, searched(masks), strict=True):
        np.testing.assert_array_equal(alive[kernel], expected)
    # A weight in any place between live units is on a path itself.
    places = paths.places(list(zip(kernels, masks, strict=True)))
    fuller = [mask | places[kernel] for kernel, mask in zip(kernels, masks, strict=True)]
    for kernel, after in zip(kernels, searched(fuller), strict=True):
        assert after[places[kernel]].all()
    for kernel, mask in zip(kernels, masks, strict=True):
        kernel.assign(kernel * mask)
    for kernel, expected in zip(kernels, searched(masks), strict=True):
        np.testing.assert_array_equal(paths.alive()[kernel], expected)


def convolutional():
    x = inputs = keras.Input((6, 6, 2))
    x = L.Conv2D(4, 3, activation="relu")(x)
    x = L.BatchNormalization()(x)
    x = L.DepthwiseConv2D(3, padding="same")(x)
    x = L.Conv2D(3, 1)(L.ReLU()(x))
    x = L.concatenate([L.MaxPooling2D(2)(x), L.AveragePooling2D(2)(x)])
    x = L.Flatten()(L.Permute((2, 1, 3))(x))
    return keras.Model(inputs, L.Dense(2)(x))


def branched():
    x = inputs = keras.Input((5,))
    left, right = L.Dense(6)(x), L.Dense(4)(x)
    both = keras.ops.concatenate([left[:, 1:4], keras.ops.relu(right)], axis=-1)
    return keras.Model(inputs, [L.Dense(3)(both), L.Dense(2)(right)])


def sequence():
    x = inputs = keras.Input((3, 4))
    x = L.EinsumDense("abc,cd->abd", (None, 5))(x)
    x = L.Conv1D(4, 2, padding="same")(x)
    x = L.GlobalAveragePooling1D()(L.TimeDistributed(L.Dense(5))(x))
    return keras.Model(inputs, L.Dense(2)(x))


def attention():
    x = inputs = keras.Input((3, 4))
    x = L.Dense(4)(x)
    x = L.MultiHeadAttention(2, 3)(x, x)
    return keras.Model(inputs, L.Dense(2)(L.Dense(4)(x)))


def recurrent():
    x = inputs = keras.Input((3, 4))
    x = L.SimpleRNN(5, activation="relu", return_sequences=True)(x)
    return keras.Model(inputs, L.Dense(2)(L.Dense(4)(x)))


def residual():
    x = inputs = keras.Input((4,))
    x = L.Dense(5)(x)
    x = L.Add()([x, L.Dense(5)(L.Dense(6)(x))])
    return keras.Model(inputs, L.Dense(2)(x))


EXACT = [convolutional, sequence]
AT_MOST = [branched, attention, recurrent, residual]  # where not all that is dead is known to be


@pytest.mark.parametrize("build", EXACT + AT_MOST)
def test_graphs_against_what_changes_the_output(build):
    # With positive weights and inputs and without biases nothing cancels: a weight is on a path if the outputs see it.
    model, rng = build(), np.random.default_rng(5)
    for variable in model.weights:
        if len(variable.shape) > 1:
            kept = 1.0 if "depthwise" in variable.path else rng.random(variable.shape) < 0.25
            if len(variable.shape) == 4 and "depthwise" not in variable.path:  # by channels, as single zeros kill none
                kept = np.broadcast_to(rng.random(variable.shape[-2:]) < 0.4, variable.shape)
            variable.assign(rng.uniform(0.5, 1, variable.shape) * kept)
    x = rng.uniform(0.5, 1, (2, *model.inputs[0].shape[1:])).astype("float32")
    alive = ks.graph.Paths(model).alive()
    before = outputs(model, x)
    dead = 0
    for variable, found in alive.items():
        value = keras.ops.convert_to_numpy(variable)
        for place in rng.permutation(np.argwhere(value))[:12].tolist():
            place = tuple(place)
            other = value.copy()
            other[place] *= 3
            variable.assign(other)
            seen = any(not np.array_equal(a, b) for a, b in zip(outputs(model, x), before, strict=True))
            assert (
                found[place] == seen
                if build in EXACT and "depthwise" not in variable.path
                else found[place] or not seen
            )
            dead += not found[place]
        variable.assign(value)
        assert not found[value == 0].any()
    assert dead


def outputs(model, x):
    return [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(model(x, training=False))]


ALLOCATIONS = [ks.pruning.Uniform, ks.pruning.ERK, ks.pruning.Global]


@pytest.mark.parametrize("criterion", ["magnitude", "movement"])
@pytest.mark.parametrize("pattern", [None, "block_1x4", "2:4"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_counts_stay_exact_and_what_leads_nowhere_goes_first(allocation, pattern, criterion):
    if pattern == "2:4" and allocation is not ks.pruning.Uniform:
        pytest.skip("the pattern says what each weight gets")
    model, rng = mlp(32, 24, 16, 8), np.random.default_rng(1)
    # A wide spread of units: some are small altogether.
    for layer in model.layers:
        layer.kernel.assign(layer.kernel * rng.lognormal(0, 1, layer.kernel.shape[-1]))
    statistics = [rng.normal(size=layer.kernel.shape) for layer in model.layers] if criterion == "movement" else None
    arguments = model, 0.5 if pattern == "2:4" else 0.9, criterion, pattern
    plain, plan = (ks.pruning.Plan(*arguments, allocation(live_paths=live)) for live in (False, True))
    present = plan.present_masks()
    before, once = (each.masks(present, 1.0, statistics) for each in (plain, plan))
    assert total(once) == total(before)
    # What was on a path stays on one, and a weight off all paths only where its kernel has no place left on them.
    places = ks.graph.Paths(model).places([(g.weight.variable, m) for g, m in zip(plan.goals, before, strict=True)])
    for goal, old, new, found in zip(plan.goals, searched(before), once, searched(once), strict=True):
        where = places[goal.weight.variable]
        assert (found >= old).all()
        assert pattern is not None or (new <= found).all() or (new >= where).all()
    masks = present
    for fraction in (0.5, 0.8, 1.0):
        after = plan.masks(masks, fraction, statistics)
        assert total(after) == total(plain.masks(present, fraction, statistics))
        assert all((mask >= new).all() for mask, new in zip(masks, after, strict=True))
        again = plan.masks(after, fraction, statistics)
        for one, other in zip(after, again, strict=True):
            np.testing.assert_array_equal(one, other)
        masks = after
    assert plan.reached(masks)


def total(masks):
    return sum(int(mask.sum()) for mask in masks)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_in_training(allocation):
    # Units die as training goes, and all that leads to them or from them goes at the next update.
    model, rng = mlp(20, 16, 12, 20), np.random.default_rng(0)
    model.compile("adam", "mse", run_eagerly=True)
    data = rng.normal(size=(32, 20)), rng.normal(size=(32, 20))
    pruning = ks.callbacks.Pruning(0.9, allocation=allocation(live_paths=True), end=0.5, frequency=2)
    history = model.fit(*data, batch_size=8, epochs=2, verbose=0, callbacks=[pruning])
    sizes = [layer.kernel.shape[0] * layer.kernel.shape[1] for layer in model.layers]
    assert history.history["sparsity"][-1] == pytest.approx(0.9, abs=0.01)
    masks = [keras.ops.convert_to_numpy(layer.kernel) != 0 for layer in model.layers]
    left = [int(mask.sum()) for mask in masks]
    if allocation is ks.pruning.Uniform:
        assert left == [size - round(0.9 * size) for size in sizes]
    elif allocation is ks.pruning.Global:
        assert sum(left) == sum(sizes) - round(0.9 * sum(sizes))
    assert total(searched(masks)) >= 0.97 * total(masks)
    config = ks.callbacks.Pruning.from_config(pruning.get_config())
    assert config.allocation.live_paths and type(config.allocation) is allocation


def test_with_data_repair_and_custom_loops():
    rng = np.random.default_rng(0)
    x, allocation = rng.normal(size=(64, 24)).astype("float32"), ks.pruning.Uniform(live_paths=True)
    for arguments in ({"criterion": "obs"}, {"repair": True}):
        model = mlp(24, 16, 12, 20)
        ks.prune(model, 0.9, allocation=allocation, data=x, **arguments)
        masks = [layer.kernel.numpy() != 0 for layer in model.layers]
        assert [int((~mask).sum()) for mask in masks] == [round(0.9 * mask.size) for mask in masks]
        assert total(searched(masks)) >= 0.85 * total(masks)  # so small a network has few places
    model = mlp(24, 16, 12, 20)
    model.compile(ks.optimizers.SparseOptimizer(keras.optimizers.SGD(0.1)), "mse")
    ks.update_masks(model, 0.9, allocation=allocation)
    masks = [layer.kernel.numpy() != 0 for layer in model.layers]
    assert total(searched(masks)) >= 0.85 * total(masks)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.body = L.Dense(3)

    def call(self, x):
        return self.body(x)


def test_errors_leave_the_model_as_it_was():
    model = Subclassed()
    model(np.ones((1, 4)))
    before = model.get_weights()
    with pytest.raises(ValueError, match="Dead paths are seen in the graph of a model"):
        ks.prune(model, 0.5, allocation=ks.pruning.ERK(live_paths=True))
    np.testing.assert_array_equal(model.get_weights()[0], before[0])
    with pytest.raises(TypeError, match="`live_paths` must be True or False"):
        ks.pruning.Global(0.1, live_paths=1)
