"""The whole search: what it finds, and how it ends."""

import concurrent.futures
import os
import re
import time

import keras
import numpy as np
import pytest
import search_models
from search_models import data, facts, search

import keras_sparse as ks
from keras_sparse.graph import uses

OTHERS = ("random", "reinforce")


@pytest.mark.slow
def test_found_allocation_goes_into_pruning_and_beats_uniform():
    body = [keras.layers.Dense(40, activation="relu"), keras.layers.Dense(40, activation="relu"), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((6,)), *body])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    model.fit(*data(seed=1), epochs=10, verbose=0)
    before = [np.array(v) for v in model.get_weights()]
    sets = {"train": data(seed=1), "val": data(seed=2)}
    results = ks.search.search(model, sets, objective="loss", constraints={"sparsity": 0.8}, budget=40)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert len(results.candidates) == 40
    assert [one.number for one in results.candidates] == list(range(40))
    assert results.best in results.front
    assert results.best.values["loss"] == min(one.values["loss"] for one in results.candidates)
    uniform = results.candidates[0]
    assert results.best.values["loss"] < uniform.values["loss"]
    for one in results.candidates:
        assert one.values["sparsity"] == pytest.approx(0.8, abs=0.01)
        assert one.error is None
    assert len({one.point for one in results.candidates}) == 40
    report = ks.prune(model, results.best.allocation)
    assert report.totals["sparsity"] == pytest.approx(results.best.values["sparsity"])
    model.set_weights(before)
    model.fit(*data(seed=1), epochs=2, verbose=0, callbacks=[ks.callbacks.Pruning(results.best.allocation, end=0.5)])
    assert ks.report(model).totals["sparsity"] == pytest.approx(results.best.values["sparsity"])


@pytest.mark.parametrize("kind", ["functional", "subclassed"])
@pytest.mark.parametrize("searcher", ["evolution", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@pytest.mark.thorough(1)
@pytest.mark.lengthy(0)
def test_every_searcher_on_every_kind_of_model(kind, searcher):
    first, again = (facts(search(kind=kind, searcher=searcher, budget=9)) for _ in range(2))
    assert first == again
    assert first != facts(search(kind=kind, searcher=searcher, budget=9, seed=1))
    assert not any(error for *_, error, _ in first)


def test_it_begins_with_known_allocations():
    results = search(budget=3, epochs=0)
    uniform, by_shape, by_size = ([s for s, _ in one.allocation.values()] for one in results.candidates)
    assert uniform == pytest.approx([0.7, 0.7], abs=0.02)
    # ERK: densities as the sum of the dimensions over their product, (18 / 72, 15 / 36), that keep 32 of 108 weights.
    assert by_shape == pytest.approx([1 - 18 * 32.4 / 33 / 72, 1 - 15 * 32.4 / 33 / 36], abs=0.06)
    assert by_size[0] != by_size[1]


@pytest.mark.lengthy(0)
def test_several_objectives_make_a_front():
    results = search(objective={"accuracy": "max", "sparsity": "max"}, constraints=None, budget=24, epochs=0)
    values = [(one.values["accuracy"], one.values["sparsity"]) for one in results.candidates]
    brute = [a for a in values if not any(b[0] >= a[0] and b[1] >= a[1] and b != a for b in values)]
    assert sorted((one.values["accuracy"], one.values["sparsity"]) for one in results.front) == sorted(brute)
    assert len(results.front) > 2
    assert results.best.values["accuracy"] == max(value for value, _ in values)


@pytest.mark.lengthy(0)
def test_constraints_are_limits():
    results = search(constraints={"macs": 40}, budget=24, epochs=0)
    assert results.best.violation == 0
    assert results.best.values["macs"] <= 40
    over = [one for one in results.candidates if one.values["macs"] > 40]
    assert over
    assert all(one.violation == pytest.approx(one.values["macs"] / 40 - 1) for one in over)
    assert not {one.number for one in over} & {one.number for one in results.front}
    assert results.reference["macs"] == 108


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({"sparsity": 0.999}, r"reaches sparsities from 0 to 0\.99"),
        ({"macs": 0.5}, r"reaches macs from \d+ to 108"),
    ],
)
def test_what_cannot_be_met_is_said_before(constraints, message):
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        search(constraints=constraints, budget=10**6)
    assert time.monotonic() - start < 60


def unequal(convolution=8):
    """Weights of a convolution are used 100 times, those of a dense layer once."""
    layers = keras.layers
    body = [layers.Conv2D(convolution, 3, activation="relu"), layers.Flatten(), layers.Dense(3, activation="softmax")]
    model = keras.Sequential([keras.Input((12, 12, 1)), *body])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def reachable(model, constraints, **options):
    """Whether a search of a space would begin, by the checks before it."""
    space, measured = ks.search.Space(model, **options), []
    counts = uses(model, np.zeros((1, *model.input_shape[1:]), "float32"))
    counts = {i: counts[w.variable] for i, w in enumerate(ks.selection.weights(model)) if w.variable in counts}
    macs = sum(counts[part.index] * part.size for part in space.parts)

    def evaluate(allocation):
        """A file in which blocks are smaller."""
        kept = [(1 - s) * (10 if p == "unstructured" else 1) for s, p in allocation.values()]
        measured.append(100 + 100 * sum(kept))
        return {"bytes": measured[-1]}

    goals = ks.search.goals.Goals("loss", constraints)
    goals.check_reachable(space, {"macs": float(macs), "bytes": 5000.0}, lambda: counts, evaluate)
    return measured


def test_the_range_of_macs_is_that_of_all_allocations():
    """All points that have the total, against the limit that is refused."""
    model = unequal(2)
    space = ks.search.Space(model, (0.0, 0.5, 0.9, 0.97))
    least = min(
        sum(u * (1 - s) * part.size for (s, _), part, u in zip(found.values(), space.parts, (100, 1), strict=True))
        for found, missed in (space.scaled(point, 0.8) for point in space.points())
        if not missed
    )
    assert reachable(model, {"sparsity": 0.8, "macs": least + 0.1}, sparsities=(0.0, 0.5, 0.9, 0.97)) == []
    with pytest.raises(ValueError, match="reaches macs from") as refused:
        reachable(model, {"sparsity": 0.8, "macs": 100}, sparsities=(0.0, 0.5, 0.9, 0.97))
    low, high = map(float, re.search("from (.*) to ([0-9.]*)", str(refused.value)).groups())
    assert least - 4 <= low <= least  # but for what is rounded
    assert high == pytest.approx(100 * 18 + 600 - 0.8 * 618, abs=100)


def test_limits_on_bytes_look_at_every_pattern():
    options = {"sparsities": (0.5, 0.9), "patterns": ("unstructured", "block_4x4")}
    assert reachable(unequal(), {"bytes": 130.0}, **options) == pytest.approx([300, 120])
    with pytest.raises(ValueError, match=r"bytes go from 120 to 300 \(the model itself: 5000\)"):
        reachable(unequal(), {"bytes": 59.0}, **options)
    assert len(reachable(unequal(), {"bytes": 200.0, "sparsity": 0.7}, **options)) == 4


@keras.saving.register_keras_serializable("tests")
class Moody(keras.layers.Layer):
    """Fails, or gives NaN, on kernels that are sparse in a certain way."""

    def __init__(self, mood="raise", **kwargs):
        super().__init__(**kwargs)
        self.mood = mood
        self.inner = keras.layers.Dense(12, activation="relu")

    def get_config(self):
        return super().get_config() | {"mood": self.mood}

    def build(self, shape):
        self.inner.build(shape)
        super().build(shape)

    def call(self, x):
        zeros = keras.ops.sum(keras.ops.cast(keras.ops.equal(self.inner.kernel, 0), "float32"))
        if self.mood == "nan":
            return self.inner(x) + keras.ops.where(zeros > 36, float("nan"), 0.0)
        if float(keras.ops.convert_to_numpy(zeros)) > 36:
            raise OverflowError("in a bad mood")
        return self.inner(x)


def moody(mood):
    model = keras.Sequential([keras.Input((6,)), Moody("nan"), keras.layers.Dense(3)])
    model.layers[0].mood = mood
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"], run_eagerly=keras.backend.backend() != "jax", jit_compile=False)
    return model


@pytest.mark.parametrize("mood", ["nan", "raise"])
@pytest.mark.lengthy(1)
def test_a_candidate_that_fails_is_recorded(mood, tmp_path):
    if mood == "raise" and keras.config.backend() == "jax":
        pytest.skip("JAX does not run eagerly")
    model = moody(mood)
    space = ks.search.Space(model, (0.2, 0.4, 0.6, 0.8))
    results = ks.search.search(model, data(), space, searcher="random", budget=12, directory=tmp_path)
    failed = [one for one in results.candidates if one.error]
    assert 0 < len(failed) < 12
    for one in results.candidates:
        assert bool(one.error) == (one.allocation["^" + re.escape(space.parts[0].path) + "$"][0] > 0.5)
        assert not one.error or ("finite" if mood == "nan" else "in a bad mood") in one.error
    assert not results.best.error
    assert results.totals["failed"] == len(failed)
    assert f"{len(failed)} candidates failed" in str(results)
    # What failed is not tried again.
    assert facts(ks.search.search(model, data(), space, searcher="random", budget=12, directory=tmp_path)) == facts(
        results
    )


def test_all_candidates_failing_is_an_error():
    model = moody("nan")
    with pytest.raises(RuntimeError, match=r"(?s)All 4 candidates failed.*Traceback.*no finite numbers"):
        ks.search.search(model, data(), ks.search.Space(model, (0.8, 0.9)), budget=8)


def test_a_model_that_fails_itself_is_an_error():
    x, y = data()
    with pytest.raises(RuntimeError, match=r"(?s)The model itself cannot be evaluated.*no finite numbers"):
        ks.search.search(search_models.model(), (x * np.float32("nan"), y))


def test_candidates_that_take_too_long_are_recorded():
    with pytest.raises(RuntimeError, match="took longer than"):
        search(timeout=1e-9, budget=4)


@pytest.mark.slow
def test_time_limit_ends_between_batches():
    results = search(time_limit=1e-9, budget=100)
    assert len(results.candidates) == 8


@pytest.mark.slow
def test_threads_find_the_same():
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        assert facts(search(executor=executor, budget=16)) == facts(search(budget=16))


class Own(ks.search.Searcher):
    """Asks for what it is told to."""

    def __init__(self, asked, batch=8):
        super().__init__(batch)
        self.asked, self.told = asked, []

    def ask(self):
        return self.asked

    def tell(self, points, costs, violations=None):
        self.told += zip(points, costs, violations, strict=True)


@pytest.mark.parametrize("asked", [[(1, 2), (1, 2), (3, 2)], np.array([[1, 2], [1, 2], [3, 2]])], ids=["ints", "array"])
def test_points_that_are_asked_for_again_are_not_evaluated_again(tmp_path, asked):
    own = Own(asked)
    found = search(tmp_path, searcher=own, budget=5, epochs=0)
    assert [one.point for one in found.candidates] == [(1, 2), (3, 2)]
    first, second = ([costs[0] for _, costs, _ in own.told if _ is not None][i] for i in (0, 2))
    assert [point for point, *_ in own.told] == [(1, 2), (1, 2), (3, 2), (1, 2), (1, 2)]
    assert [costs for _, costs, _ in own.told] == [[first], [first], [second], [first], [first]]
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 3


def test_a_search_ends_when_it_knows_the_whole_space():
    model = search_models.model()
    found = ks.search.search(model, data(), ks.search.Space(model, (0.0, 0.5)), budget=60, objective=["loss", "macs"])
    assert sorted(one.point for one in found.candidates) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({one.point for one in found.front}) == len(found.front)


@pytest.mark.parametrize("asked", [[], [(1,)], [(99, 0)], [(1.0, 2.0)], [None]], ids=str)
@pytest.mark.thorough(2)
def test_wrong_points_of_a_searcher(asked):
    with pytest.raises(ValueError, match="at least one point|ints that are each below"):
        search(searcher=Own(asked), budget=5, epochs=0)


@pytest.mark.slow
def test_numbers_may_be_of_numpy(tmp_path):
    options = {"seed": 1, "batch_size": 32, "constraints": {"macs": 50}, "epochs": 0, "budget": 2}
    found = search(tmp_path, **options)
    numpy = {"seed": np.int64(1), "batch_size": np.int64(32), "constraints": {"macs": np.int64(50)}}
    assert facts(search(tmp_path, **options | numpy)) == facts(found)


class Interrupted(ks.search.RandomSearch):
    def tell(self, points, costs, violations=None):
        raise KeyboardInterrupt


def test_an_interrupted_search_leaves_the_model_alone_and_nothing_behind(tmp_path):
    model = search_models.model()
    before = [np.array(v) for v in model.get_weights()]
    optimizer = model.optimizer
    with pytest.raises(KeyboardInterrupt):
        sets = {"train": data(), "val": data(seed=2)}
        ks.search.search(model, sets, searcher=Interrupted(batch=2), epochs=1, directory=tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert model.optimizer is optimizer
    assert int(keras.ops.convert_to_numpy(optimizer.iterations)) == 0
    assert os.listdir(tmp_path) == ["journal.jsonl"]
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 3
