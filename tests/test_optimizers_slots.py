"""Slots of each Keras optimizer: found by name, and reset to what a new optimizer has."""

import keras
import numpy as np
import pytest

import keras_sparse as ks

X = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(32, 4)).astype("float32")
optimizers = keras.optimizers
KINDS = {
    "SGD": (optimizers.SGD(0.1), set()),
    "SGD, momentum": (optimizers.SGD(0.1, momentum=0.9), {"momentum"}),
    "RMSprop": (optimizers.RMSprop(momentum=0.9, centered=True), {"velocity", "momentum", "average_gradient"}),
    "Adam": (optimizers.Adam(), {"momentum", "velocity"}),
    "Adam, amsgrad": (optimizers.Adam(amsgrad=True), {"momentum", "velocity", "velocity_hat"}),
    "AdamW": (optimizers.AdamW(), {"momentum", "velocity"}),
    "Adadelta": (optimizers.Adadelta(), {"accumulated_grad", "accumulated_delta_var"}),
    "Adagrad": (optimizers.Adagrad(initial_accumulator_value=0.3), {"accumulator"}),
    "Adamax": (optimizers.Adamax(), {"momentum", "norm"}),
    "Adafactor": (optimizers.Adafactor(), {"velocity"}),
    "Nadam": (optimizers.Nadam(), {"momentum", "velocity"}),
    "Ftrl": (optimizers.Ftrl(initial_accumulator_value=0.2), {"accumulator", "linear"}),
    "Lion": (optimizers.Lion(), {"momentum"}),
    "Lamb": (optimizers.Lamb(), {"momentum", "velocity"}),
    "Muon": (optimizers.Muon(exclude_layers=["b"]), {"momentum", "velocity"}),
    "averages and accumulation": (
        optimizers.Adam(use_ema=True, gradient_accumulation_steps=3),
        {"momentum", "velocity", "average", "gradient_accumulator"},
    ),
}


def make(optimizer):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="a"), keras.layers.Dense(4, name="b")])
    model.compile(type(optimizer).from_config(optimizer.get_config()), "mse")
    return model


def values(states):
    return [(index, kind, ks.selection.as_array(state)) for index, kind, state in states]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.thorough(4)
def test_reset_slots_are_those_of_a_new_optimizer(name):
    optimizer, kinds = KINDS[name]
    model, new = make(optimizer), make(optimizer)
    for _ in range(4):
        model.train_on_batch(X, Y)
    new.optimizer.build(new.trainable_variables)
    fresh = values(ks.optimizers.slots(new.optimizer, new.trainable_variables))
    before = values(ks.optimizers.slots(model.optimizer, model.trainable_variables))
    assert {kind for _, kind, _ in before} == kinds
    where = np.random.default_rng(2).random((8, 8)) < 0.5
    ks.optimizers.reset_slots(model.optimizer, model.trainable_variables, {0: where})
    after = values(ks.optimizers.slots(model.optimizer, model.trainable_variables))
    for (index, kind, old), (_, _, now), (_, _, initial) in zip(before, after, fresh, strict=True):
        if index == 0 and kind not in ("average", "gradient_accumulator"):
            np.testing.assert_array_equal(now[where], initial[where])
            np.testing.assert_array_equal(now[~where], old[~where])
            # Or the test would show nothing. (Adafactor leaves the slot of a factored kernel alone.)
            assert name == "Adafactor" or (old[where] != initial[where]).any()
        else:
            np.testing.assert_array_equal(now, old)


def test_slots_of_repeated_paths_and_of_names_that_begin_alike():
    variables = [
        keras.Variable(np.ones((2, 2)), name="kernel"),
        keras.Variable(np.ones((2, 2)), name="kernel_scale"),
        keras.Variable(np.ones((2, 2)), name="kernel"),
        keras.Variable(np.ones((3,)), name="kernel"),
    ]
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer.build(variables)
    found = ks.optimizers.slots(optimizer, variables)
    assert [(index, kind) for index, kind, _ in found] == [(i, "momentum") for i in range(4)]
    assert [state for _, _, state in found] == optimizer.variables[2:]


def test_slots_of_a_multi_optimizer():
    for_kernels, for_others = keras.optimizers.Adagrad(0.1, 0.3), keras.optimizers.Adam(0.1)
    model = make(keras.optimizers.SGD())
    model.compile(keras.optimizers.MultiOptimizer(lambda v: for_kernels if "kernel" in v.path else for_others), "mse")
    model.train_on_batch(X, Y)
    ks.optimizers.reset_slots(model.optimizer, model.trainable_variables, {0: np.ones((8, 8), bool)})
    found = {
        (index, kind): ks.selection.as_array(state)
        for index, kind, state in ks.optimizers.slots(for_kernels, model.trainable_variables)
    }
    np.testing.assert_array_equal(found[0, "accumulator"], np.full((8, 8), 0.3, "float32"))
    assert (found[2, "accumulator"] > 0.3).any()
