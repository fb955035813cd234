"""One table: what every public object must pass. A class enters the package by adding a row."""

import inspect
import json

import keras
import numpy as np
import pytest

import keras_sparse as ks

OBJECTS = {
    "Polynomial": ks.schedules.Polynomial(power=2),
    "Linear": ks.schedules.Linear(),
    "Cosine": ks.schedules.Cosine(),
    "Exponential": ks.schedules.Exponential(rate=3),
    "OneShot": ks.schedules.OneShot(),
    "Unstructured": ks.patterns.Unstructured(),
    "Channel": ks.patterns.Channel(),
    "Block": ks.patterns.Block(2, 8),
    "NM": ks.patterns.NM(1, 4),
    "Magnitude": ks.criteria.Magnitude(),
    "Random": ks.criteria.Random(seed=4),
    "Gradient": ks.criteria.Gradient(),
    "Taylor": ks.criteria.Taylor(),
    "Movement": ks.criteria.Movement(),
    "ScaleMagnitude": ks.criteria.ScaleMagnitude(),
    "Snip": ks.criteria.Snip(),
    "Fisher": ks.criteria.Fisher(),
    "Wanda": ks.criteria.Wanda(),
    "Obs": ks.criteria.Obs(),
    "Uniform": ks.pruning.Uniform(),
    "Global": ks.pruning.Global(floor=0.01),
    "Isomorphic": ks.pruning.Isomorphic(),
    "DynamicProgramming": ks.pruning.DynamicProgramming((0.5, 0.9)),
    "Budget": ks.Budget(macs=0.5, parameters=1000),
    "ERK": ks.pruning.ERK(),
    "Pruning": ks.callbacks.Pruning(
        {"a/": 0.8, "b/": (0.5, "unstructured")},
        criterion=ks.criteria.Random(2),
        schedule=ks.schedules.Polynomial(4),
        begin=3,
        end=0.5,
        frequency=7,
        filters=["kernel"],
        verbose=1,
    ),
    "AccuracyBudget": ks.callbacks.AccuracyBudget(
        0.02, "val_loss", "min", 0.3, 0.4, 0.9, 3, 0.2, "random", "block_1x4", "uniform", "a/", 1
    ),
    "DynamicSparseTraining": ks.callbacks.DynamicSparseTraining(
        {"a/": 0.8},
        allocation="uniform",
        grow="random",
        drop_fraction=0.2,
        schedule=ks.schedules.Polynomial(2),
        frequency=7,
        end=40,
        filters=["kernel"],
        seed=3,
        verbose=1,
    ),
    "LotteryTicket": ks.callbacks.LotteryTicket(3, 0.5, 0.1, allocation="uniform", filters="a/", verbose=1),
    "ProximalL1": ks.callbacks.ProximalL1(target_sparsity=0.5, group="block_1x4", end=0.5, frequency=3, filters="a/"),
    "KeepSparsity": ks.callbacks.KeepSparsity(["a/"]),
    "AtTargetSparsity": ks.callbacks.AtTargetSparsity(ks.callbacks.KeepSparsity()),
    "StrengthSchedule": ks.callbacks.StrengthSchedule("cosine", begin=1, end=4),
    "L1": ks.regularizers.L1(0.01),
    "Slimming": ks.regularizers.Slimming(0.01),
    "GroupLasso": ks.regularizers.GroupLasso(0.01, ks.patterns.Block(2, 8), (0, -1)),
    "HardConcrete": ks.gates.HardConcrete(0.5, (-0.2, 1.3)),
    "L0": ks.layers.L0(
        keras.layers.Dense(3, name="body"),
        0.1,
        "unit",
        open_probability=0.7,
        temperature=0.5,
        limits=(-0.2, 1.3),
        seed=4,
    ),
    "ChannelL0": ks.layers.ChannelL0(
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)]),
        0.1,
        [[2, 0, 0, True], [0, 1, 0, False]],
        [[1, 2, 3]],
        open_probability=0.7,
        temperature=0.5,
        limits=(-0.2, 1.3),
        seed=4,
    ),
    "L0Penalty": ks.callbacks.L0Penalty(ks.schedules.Cosine(), begin=3, end=0.7, frequency=5),
    "SparseOptimizer": ks.optimizers.SparseOptimizer(keras.optimizers.SGD(0.1, momentum=0.5)),
    "RandomSearch": ks.search.RandomSearch(batch=3),
    "Evolution": ks.search.Evolution(population=9, sample=3, batch=4),
    "Reinforce": ks.search.Reinforce(0.1, batch=4),
}
# What cannot be written down says so, instead of coming back as something else.
NO_CONFIG = {
    "data": (lambda: ks.callbacks.NeuronSparsity(np.ones((2, 3))), "has no config, because its data have none"),
    "function as filter": (lambda: ks.callbacks.Pruning(0.5, filters=lambda variable: True), "use regexes"),
}
ABSTRACT = {
    ks.schedules.Schedule,
    ks.patterns.Pattern,
    ks.criteria.Criterion,
    ks.criteria.InputCriterion,
    ks.criteria.Statistic,
    ks.pruning.Allocation,
    ks.callbacks.SparseCallback,
    ks.optimizers.Part,
    ks.optimizers.Parts,
    ks.search.Searcher,
}


def plain(config):
    return json.loads(json.dumps(config))


@pytest.mark.parametrize("name", OBJECTS)
def test_config_round_trip(name):
    thing = OBJECTS[name]
    config = thing.get_config()
    revived = type(thing).from_config(plain(config))
    assert plain(revived.get_config()) == plain(config)
    serialized = keras.saving.serialize_keras_object(thing)
    assert serialized["registered_name"] == f"keras_sparse>{name}"
    again = keras.saving.deserialize_keras_object(plain(serialized))
    assert type(again) is type(thing)
    assert plain(again.get_config()) == plain(config)


@pytest.mark.parametrize("name", OBJECTS)
def test_config_holds_every_argument(name):
    thing = OBJECTS[name]
    arguments = set(inspect.signature(type(thing).__init__).parameters) - {"self", "args", "kwargs"}
    inherited = {"name", "dtype", "trainable"} if isinstance(thing, keras.layers.Layer) else set()
    assert set(thing.get_config()) - inherited == arguments - {"kwargs"}


def test_every_public_class_has_a_row():
    public = {
        getattr(module, name)
        for module in (
            ks.schedules,
            ks.patterns,
            ks.criteria,
            ks.gates,
            ks.layers,
            ks.callbacks,
            ks.optimizers,
            ks.pruning,
            ks.regularizers,
            ks.search,
        )
        for name in module.__all__
    }
    classes = {thing for thing in public if inspect.isclass(thing) and hasattr(thing, "get_config")} - ABSTRACT
    assert classes == {thing.__class__ for thing in OBJECTS.values()} | {type(make()) for make, _ in NO_CONFIG.values()}


def test_abstract_classes_say_what_is_missing():
    with pytest.raises(TypeError, match="must implement `fraction"):
        ks.schedules.Schedule()(0.5)
    with pytest.raises(TypeError, match="must implement `pool"):
        ks.patterns.Pattern().mask(np.ones(3), 0.5)
    with pytest.raises(TypeError, match="must implement `expand"):
        ks.patterns.Pattern().expand(np.ones(3), (3,))
    with pytest.raises(TypeError, match="must implement `scores"):
        ks.criteria.Criterion().scores(np.ones(3))
    with pytest.raises(TypeError, match="must implement `measure"):
        ks.criteria.InputCriterion().measure(np.ones((3, 3)))


@pytest.mark.parametrize("name", NO_CONFIG)
def test_what_has_no_config_says_so(name):
    make, message = NO_CONFIG[name]
    with pytest.raises(ValueError, match=message):
        make().get_config()
    with pytest.raises(ValueError, match=message):
        keras.saving.serialize_keras_object(make())
    assert keras.saving.get_registered_name(type(make())) == f"keras_sparse>{type(make()).__name__}"


SIGNATURES = {
    "Pruning": (
        ks.callbacks.Pruning,
        "(target_sparsity=None, criterion='magnitude', pattern=None, schedule='polynomial', allocation='uniform', "
        "begin=0.0, end=0.75, frequency=None, filters=None, verbose=0, over='fit')",
    ),
    "DynamicSparseTraining": (
        ks.callbacks.DynamicSparseTraining,
        "(sparsity, allocation=None, grow='gradient', drop_fraction=0.3, schedule='cosine', frequency=100, end=0.75, "
        "filters=None, seed=0, verbose=0, pattern=None)",
    ),
    "LotteryTicket": (
        ks.callbacks.LotteryTicket,
        "(rounds, rate=None, rewind_to=0, allocation='global', filters=None, verbose=0, target_sparsity=None)",
    ),
    "prune": (
        ks.prune,
        "(model, sparsity, criterion='magnitude', pattern=None, allocation='uniform', filters=None, data=None, "
        "repair=None, batch_size=32)",
    ),
    "neuron_sparsity": (ks.neuron_sparsity, "(model, data, batch_size=32)"),
    "NeuronSparsity": (ks.callbacks.NeuronSparsity, "(data, batch_size=32)"),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_that_users_rely_on(name):
    thing, signature = SIGNATURES[name]
    assert str(inspect.signature(thing)) == signature


TRAINING = {
    "plain": {},
    "jit": {"jit_compile": True},
    "eager graph": {"jit_compile": False},
    "mixed_float16": {"policy": "mixed_float16"},
    "mixed_bfloat16": {"policy": "mixed_bfloat16"},
}


@pytest.mark.parametrize("how", TRAINING)
@pytest.mark.parametrize(
    "callback",
    [
        lambda: ks.callbacks.Pruning(0.75),
        lambda: ks.callbacks.Pruning(0.75, criterion="random"),
        lambda: ks.callbacks.Pruning(0.75, criterion="gradient"),
        lambda: ks.callbacks.Pruning(0.75, criterion="taylor"),
        lambda: ks.callbacks.Pruning(0.75, criterion="movement"),
        lambda: ks.callbacks.Pruning(0.75, criterion="fisher"),
        lambda: ks.callbacks.Pruning(0.75, schedule="cosine"),
        lambda: ks.callbacks.Pruning(0.75, schedule="exponential"),
        lambda: ks.callbacks.Pruning(0.75, allocation="global"),
        lambda: ks.callbacks.Pruning(0.75, allocation="erk"),
        lambda: ks.callbacks.DynamicSparseTraining(0.75, frequency=2),
        lambda: ks.callbacks.DynamicSparseTraining(0.75, grow="random", frequency=2),
        lambda: ks.callbacks.LotteryTicket(2, 0.75),
    ],
)
@pytest.mark.thorough(8)
def test_train_save_load_and_predict_alike(how, callback, tmp_path):
    arguments = dict(TRAINING[how])
    if keras.backend.backend() == "torch" and arguments.get("jit_compile"):
        pytest.skip("Keras compiles torch models for minutes")
    keras.config.set_dtype_policy(arguments.pop("policy", "float32"))
    try:
        inputs = keras.Input((6, 6, 2))
        x = keras.layers.Conv2D(4, 3, activation="relu")(inputs)
        model = keras.Model(inputs, keras.layers.Dense(2, dtype="float32")(keras.layers.Flatten()(x)))
        model.compile(keras.optimizers.Adam(0.01), "mse", **arguments)
        x = np.random.default_rng(0).normal(size=(32, 6, 6, 2)).astype("float32")
        model.fit(x, np.ones((32, 2)), batch_size=8, epochs=2, verbose=0, callbacks=[callback()])
        # A weight that has just grown may still be zero.
        assert 150 <= ks.report(model).totals["zeros"] < 160
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_allclose(
            model.predict(x, verbose=0), loaded.predict(x, verbose=0), rtol=1e-3 if "mixed" in how else 1e-5, atol=1e-5
        )
    finally:
        keras.config.set_dtype_policy("float32")
