"""Spaces: what they are made of, how points move, and what allocations they become."""

import itertools
import json
import math

import keras
import numpy as np
import pytest

import keras_sparse as ks

# Removed connections have no weight left, and small kernels may lose all of theirs.
pytestmark = pytest.mark.filterwarnings("ignore:.* has no weight left")

GRID = (0.2, 0.5, 0.8, 0.95)


def convolutional(name="net"):
    layers = keras.layers
    inputs = keras.Input((8, 8, 3))
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same", name="stem")(inputs)))
    branch = layers.Conv2D(16, 3, padding="same", activation="relu", name="first")(x)
    branch = layers.BatchNormalization(name="norm")(layers.Conv2D(8, 3, padding="same", name="last")(branch))
    x = layers.GlobalAveragePooling2D()(layers.add([x, branch]))
    return keras.Model(inputs, layers.Dense(4, name="head")(x), name=name)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.one, self.two = keras.layers.Dense(6), keras.layers.Dense(6)

    def call(self, x):
        return self.two(self.one(x))


def test_defaults_take_what_pruning_takes():
    model = convolutional()
    space = ks.search.Space(model)
    assert [part.path for part in space.parts] == [w.path for w in ks.selection.select(model).chosen]
    assert space.size() == math.prod(len(choice.options) for choice in space.choices) > 1000
    assert all(pattern == "unstructured" for choice in space.choices for _, pattern in choice.options)


@pytest.mark.parametrize("seed", range(5))
def test_points_are_seeded_and_within_the_space(seed):
    space = ks.search.Space(convolutional(), GRID, patterns=("unstructured", "2:4", "block_1x4", "channel"))
    one, other = space.sample(seed), space.sample(seed + 100)
    assert one == space.sample(seed)
    for point in (one, other, space.mutate(one, seed), space.crossover(one, other, seed)):
        space.check(point)
        assert all(type(option) is int for option in point)
    mutated = space.mutate(one, seed)
    assert mutated == space.mutate(one, seed)
    assert sum(a != b for a, b in zip(one, mutated, strict=True)) == 1
    assert all(c in (a, b) for a, b, c in zip(one, other, space.crossover(one, other, seed), strict=True))


def test_mutation_reaches_every_point():
    space = ks.search.Space(convolutional(), (0.5, 0.9), patterns=("unstructured", "block_1x4"), filters="stem|head")
    rng, point, seen = np.random.default_rng(0), space.sample(0), set()
    for _ in range(2000):
        point = space.mutate(point, rng)
        seen.add(point)
    assert seen == set(space.points())
    assert len(seen) == space.size() == 16


def test_neighbours_are_a_step_away_or_of_another_pattern():
    choice = ks.search.Space(convolutional(), GRID, patterns=("unstructured", "2:4")).choices[0]
    near = [choice.options[i] for i in choice.neighbours(choice.options.index((0.5, "unstructured")))]
    assert sorted(near) == [(0.2, "unstructured"), (0.5, "2:4"), (0.8, "unstructured")]


def test_groups_share_a_decision():
    model = convolutional()
    groups = {"convs": {"filters": "first|last", "sparsities": (0.5, 0.9), "patterns": "block_1x4"}}
    space = ks.search.Space(model, GRID, groups=groups)
    assert [choice.name for choice in space.choices] == ["stem/kernel", "convs", "head/kernel"]
    group = space.choices[1]
    assert [part.path for part in group.parts] == ["first/kernel", "last/kernel"]
    assert group.options == ((0.5, "block_1x4"), (0.9, "block_1x4"))
    allocation = space.allocation((0, 1, 2))
    assert allocation["^first/kernel$"] == allocation["^last/kernel$"] == (0.9, "block_1x4")


def test_a_point_is_a_target_of_prune_and_of_the_callback():
    model = convolutional()
    model.compile("sgd", "mse")
    space = ks.search.Space(model, GRID, patterns=("unstructured", "2:4", "block_1x4"))
    for seed in range(3):
        point = space.sample(seed)
        allocation = space.allocation(point)
        copy = keras.models.clone_model(model)
        copy.set_weights(model.get_weights())
        rows = {row["path"]: row for row in ks.prune(copy, allocation).rows}
        for choice, option in zip(space.choices, point, strict=True):
            row = rows[choice.parts[0].path]
            assert row["sparsity"] == pytest.approx(choice.options[option][0], abs=4 / row["size"] + 0.02)
    x, y = np.ones((8, 8, 8, 3), "float32"), np.ones((8, 4), "float32")
    model.fit(x, y, epochs=2, verbose=0, callbacks=[ks.callbacks.Pruning(allocation, end=0.5)])
    total, _ = space.scaled(point)
    wanted = sum(total[f"^{part.path}$"][0] * part.size for part in space.parts) / sum(p.size for p in space.parts)
    assert ks.report(model).totals["sparsity"] == pytest.approx(wanted, abs=0.01)


def test_frozen_kernels_take_part_if_filters_name_them():
    model = convolutional()
    model.get_layer("stem").trainable = False
    assert [part.path for part in ks.search.Space(model).parts] == ["first/kernel", "last/kernel", "head/kernel"]
    assert len(ks.search.Space(model, filters="kernel").parts) == 4


def test_embeddings_and_depthwise_kernels_are_targets_where_filters_chose_them():
    layers = keras.layers
    body = [layers.Embedding(20, 4), layers.SeparableConv1D(4, 3), layers.Flatten(), layers.Dense(3)]
    model = keras.Sequential([keras.Input((5,), dtype="int32"), *body])
    model.compile("sgd", "mse")
    space = ks.search.Space(model, (0.5,), filters=["embeddings", "depthwise", "dense"])
    allocation = space.allocation((0, 0, 0))
    x, y = np.ones((8, 5), "int32"), np.ones((8, 3), "float32")
    model.fit(x, y, epochs=2, verbose=0, callbacks=[ks.callbacks.Pruning(allocation, end=0.5)])
    for report in (ks.report(model), ks.prune(model, allocation)):
        sparse = {row["path"]: row["sparsity"] for row in report.rows if row["sparsity"]}
        assert sparse == dict.fromkeys((part.path for part in space.parts), pytest.approx(0.5, abs=0.05))


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
def test_scaling_meets_the_total_within_the_grid(sparsity):
    model = convolutional()
    space = ks.search.Space(model, GRID, patterns=("unstructured", "block_1x4"))
    sizes = {part.path: part.size for part in space.parts}
    for seed in range(20):
        point = space.sample(seed)
        allocation, missed = space.scaled(point, sparsity)
        own = {path: allocation[f"^{path}$"][0] for path in sizes}
        assert missed == 0.0
        taken = zip(space.choices, point, own.values(), strict=True)
        zeros = sum(choice.zeros(option, value) for choice, option, value in taken)
        assert -1e-6 <= zeros - sparsity * sum(sizes.values()) < 4  # less than a block
        assert all(0.2 - 1e-12 <= value <= 0.95 + 1e-12 for value in own.values())
        # Ratios of densities stay, but for those at an end of the grid, and for what is rounded.
        densities = [1 - choice.options[option][0] for choice, option in zip(space.choices, point, strict=True)]
        inside = [
            ((1 - own[choice.parts[0].path]) / density, 8 / choice.size / density)
            for choice, density in zip(space.choices, densities, strict=True)
            if 0.2 < own[choice.parts[0].path] - 8 / choice.size < 0.95 - 16 / choice.size
        ]
        assert all(ratio == pytest.approx(inside[0][0], abs=bound + inside[0][1]) for ratio, bound in inside)


PATTERNS = ["channel", "block_4x4", ("unstructured", "block_1x4"), ("unstructured", "2:4", "block_2x2")]


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
@pytest.mark.parametrize("units", [6, 16])
def test_the_total_is_met_by_the_zeros_that_patterns_make(patterns, units):
    rng = np.random.default_rng(0)
    layers = [keras.layers.Dense(units, activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((7,)), *layers, keras.layers.Dense(3)])
    space = ks.search.Space(model, patterns=patterns)
    for seed in range(8):
        allocation, missed = space.scaled(space.sample(seed), 0.6)
        model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
        ks.prune(model, allocation)
        kernels = [layer.kernel.numpy() for layer in model.layers]
        zeros, size = sum(np.sum(kernel == 0) for kernel in kernels), sum(kernel.size for kernel in kernels)
        assert (zeros / size >= 0.6) == (missed == 0), (zeros / size, missed)
        if missed:  # so much is 2:4
            assert missed == pytest.approx(0.6 - zeros / size, abs=1e-5)


def test_a_pattern_that_cannot_have_its_sparsity_misses_it():
    """Of 7 inputs 2:4 takes 3."""
    model = keras.Sequential([keras.Input((7,)), keras.layers.Dense(8)])
    space = ks.search.Space(model, patterns="2:4")
    assert space.reach() == pytest.approx((3 / 7, 3 / 7), abs=0.01)
    assert space.scaled((0,), 0.5)[1] == pytest.approx(0.5 - 3 / 7, abs=1e-5)
    # But to round is no violation.
    space = ks.search.Space(keras.Sequential([keras.Input((7,)), keras.layers.Dense(7)]), 0.5)
    assert space.scaled((0,), 0.5)[1] == 0.0


def test_a_sparsity_beyond_the_grid_is_missed_and_said():
    space = ks.search.Space(convolutional(), (0.2, 0.5))
    assert space.reach() == pytest.approx((0.2, 0.5), abs=0.001)
    _, missed = space.scaled(space.sample(0), 0.9)
    assert missed == pytest.approx(0.4, abs=0.001)


def test_the_point_nearest_to_sparsities():
    space = ks.search.Space(convolutional(), GRID)
    for wanted in itertools.product((0.0, 0.49, 0.9, 0.99), repeat=len(space.choices)):
        point = space.nearest(wanted)
        for choice, option, value in zip(space.choices, point, wanted, strict=True):
            ratios = [abs(math.log((1 - s) / (1 - value))) for s, _ in choice.options]
            assert ratios[option] == min(ratios)


def test_json_keeps_all():
    space = ks.search.Space(convolutional(), GRID, patterns=(ks.patterns.Block(2, 2), "2:4"), removable="last")
    again = ks.search.Space.from_json(space.to_json(indent=1))
    assert again.choices == space.choices
    assert again.model == space.model
    assert again.to_json() == space.to_json()
    for seed in range(5):
        assert again.allocation(again.sample(seed)) == space.allocation(space.sample(seed))
    assert json.loads(space.to_json())["model"] == "net"


def test_a_removed_connection_adds_nothing():
    model = convolutional()
    space = ks.search.Space(model, GRID, removable="last/")
    choice = space.choices[2]
    assert choice.removes(len(choice.options) - 1)
    assert not choice.removes(0)
    point = (0, 0, len(choice.options) - 1, 0)
    model.get_layer("norm").beta.assign(np.ones(8))
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype("float32")
    ks.prune(model, space.allocation(point))
    branch = keras.Model(model.input, model.get_layer("norm").output)
    assert not np.any(branch.predict(x, verbose=0))
    assert not np.any(keras.ops.convert_to_numpy(model.get_layer("norm").beta))
    # Scaling leaves it removed.
    assert space.scaled(point, 0.8)[0]["^last/kernel$"][0] == choice.options[-1][0]


def test_channels_only_where_units_can_be_silenced():
    layers = keras.layers
    body = [layers.Dense(8, activation="sigmoid", name="a"), layers.Dense(8, activation="relu", name="b")]
    model = keras.Sequential([keras.Input((8,)), *body])
    space = ks.search.Space(model, (0.5,), patterns=("unstructured", "channel"))
    assert [len(choice.options) for choice in space.choices] == [1, 2]
    with pytest.raises(ValueError, match="no pattern to choose from"):
        ks.search.Space(model, (0.5,), patterns="channel")
    with pytest.raises(ValueError, match="cannot be removed"):
        ks.search.Space(model, (0.5,), removable="a/")


def test_weights_of_one_path_share_a_choice():
    def block(name):
        inputs = keras.Input((6,))
        return keras.Model(inputs, keras.layers.Dense(6, name="dense")(inputs), name=name)

    inputs = keras.Input((6,))
    space = ks.search.Space(keras.Model(inputs, block("one")(block("two")(inputs))), (0.5, 0.9))
    assert [part.path for part in space.parts] == ["dense/kernel"] * 2
    assert [len(choice.parts) for choice in space.choices] == [2]
    assert space.indexed(space.allocation((1,))) == dict.fromkeys((0, 2), (0.9, "unstructured"))


def test_subclassed_models_have_spaces():
    model = Subclassed()
    model(np.ones((1, 6), "float32"))
    assert ks.search.Space(model, (0.5, 0.9)).size() == 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsities": (0.5, 1.0)}, ValueError, "at least 0 and below 1"),
        ({"sparsities": ()}, ValueError, "sparsities"),
        ({"patterns": ()}, ValueError, "at least one pattern"),
        ({"patterns": 3}, TypeError, "`patterns`"),
        ({"patterns": None}, TypeError, "`patterns`"),
        ({"sparsities": None}, TypeError, "`sparsities`"),
        ({"removable": True}, TypeError, "regex"),
        ({"patterns": "5:4"}, ValueError, "5"),
        ({"patterns": "chanel"}, ValueError, "channel"),
        ({"groups": {"a": {"regex": "stem"}}}, ValueError, "`filters`"),
        ({"groups": {"a": "nothing"}}, ValueError, "matches no weight"),
        ({"groups": ["stem"]}, TypeError, "dict"),
        ({"filters": "nothing"}, ValueError, "matches no weight"),
        ({"removable": "nothing"}, ValueError, "matches no weight"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ks.search.Space(convolutional(), **arguments)


def test_points_of_other_spaces_are_refused():
    space = ks.search.Space(convolutional(), GRID)
    for point in ((0, 0, 0), (0, 0, 0, 4), (0, 0, 0, -1), (0, 0, 0, 1.0), None, "abcd"):
        for use in (space.allocation, space.mutate, lambda one: space.crossover(one, one), space.scaled):
            with pytest.raises(ValueError, match="ints that are each below"):
                use(point)
    assert space.allocation(np.array([0, 1, 2, 3])) == space.allocation((0, 1, 2, 3))
    for text in ("", "{}", "[]", "null", None, '{"model": "a", "choices": [{}]}'):
        with pytest.raises(ValueError, match=r"Space\.to_json"):
            ks.search.Space.from_json(text)
    with pytest.raises(ValueError, match="not built"):
        ks.search.Space(keras.Sequential([keras.layers.Dense(2)]))
