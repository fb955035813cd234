"""The clock alone: which steps are due. (In real fits: test_callbacks.py.)"""

import keras
import pytest

import keras_sparse as ks
from keras_sparse.callbacks.clock import Clock


def due_steps(clock, steps_per_epoch=10, epochs=4, stride=1, known=True):
    """Run a clock over a fit whose callbacks come every `stride` steps; return its updates: step and progress."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    sparse = ks.optimizers.SparseOptimizer(keras.optimizers.SGD())
    sparse.build(model.trainable_variables)
    sparse.sparse_parts.clock.begin()
    clock.restart(sparse.sparse_parts.clock, 0)
    found = []

    def check(now):
        progress = clock.progress(now)
        if progress is not None:
            found.append((now, round(progress, 4)))
            clock.mark(now)

    for epoch in range(epochs):
        check(clock.start_epoch(epoch, epochs, steps_per_epoch if known else None))
        for end in range(stride - 1, steps_per_epoch, stride):
            sparse.iterations.assign(epoch * steps_per_epoch + end + 1)
            exact = clock.progress(epoch * steps_per_epoch + end + 1) is not None
            assert clock.may_be_due(end) or not exact
            if clock.may_be_due(end):
                check(clock.read(end))
    return found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"begin": 0, "end": 20, "frequency": 10}, [(0, 0.0), (10, 0.5), (20, 1.0)]),
        ({"begin": 0.0, "end": 0.5, "frequency": 10}, [(0, 0.0), (10, 0.5), (20, 1.0)]),
        ({"begin": 5, "end": 12, "frequency": 4}, [(5, 0.0), (9, 0.5714), (12, 1.0)]),
        ({"begin": 5, "end": 12, "frequency": 100}, [(5, 0.0), (12, 1.0)]),
        ({"begin": 0.25, "end": 40, "frequency": 30}, [(10, 0.0), (40, 1.0)]),
        ({"begin": 35, "end": 100, "frequency": 3}, [(35, 0.0), (38, 0.0462)]),
    ],
    ids=str,
)
def test_due_steps(arguments, expected):
    assert due_steps(Clock(**arguments)) == expected


def test_an_update_fires_at_the_first_callback_at_or_past_its_step():
    assert due_steps(Clock(0, 20, 7), stride=5) == [(0, 0.0), (10, 0.5), (15, 0.75), (20, 1.0)]


def test_default_frequency_is_a_fiftieth_of_the_span():
    steps = [step for step, _ in due_steps(Clock(0.0, 1.0), steps_per_epoch=50)]
    assert steps == list(range(0, 201, 4))


def test_unknown_epochs_are_measured_by_the_first():
    assert due_steps(Clock(0.5, 0.75, 5), known=False) == [(20, 0.0), (25, 0.5), (30, 1.0)]


def test_length_and_last_update_are_state():
    sparse = ks.optimizers.SparseOptimizer(keras.optimizers.SGD())
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    sparse.build(model.trainable_variables)
    time = sparse.sparse_parts.clock
    time.begin()
    first, again = Clock(0, 20, 10), Clock(0, 20, 10)
    first.restart(time, 0)
    first.start_epoch(0, 4, 10)
    first.mark(10)
    sparse.iterations.assign(10)
    again.restart(time, 0)
    now = again.start_epoch(1, 4, 10)
    assert again.progress(now) is None
    assert again.progress(20) == 1.0
    assert time.length == 40


def started():
    """An optimizer, and a clock at the beginning of its first fit."""
    sparse = ks.optimizers.SparseOptimizer(keras.optimizers.SGD())
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    sparse.build(model.trainable_variables)
    sparse.sparse_parts.clock.begin()
    clock = Clock(0.0, 0.5)
    clock.restart(sparse.sparse_parts.clock, 0)
    return sparse, clock


def test_steps_that_come_otherwise_than_batches_correct_the_length():
    sparse, clock = started()
    for epoch, iterations in enumerate((0, 5, 10)):  # A `train_step` that steps at every other of 10 batches.
        sparse.iterations.assign(iterations)
        clock.start_epoch(epoch, 4, 10)
        assert clock.length == (40 if epoch == 0 else 20)
    assert (clock.planned, clock.last) == (40, 10)


@pytest.mark.parametrize("accumulation", [3, 5, 7])
def test_steps_that_take_longer_than_an_epoch(accumulation, recwarn):
    """Epochs of 4 batches: no step in the first one is no sign of another optimizer, and the length is known."""
    sparse, clock = started()
    for epoch in range(10):
        sparse.iterations.assign(4 * epoch // accumulation)
        clock.start_epoch(epoch, 10, 4, accumulation)
        assert clock.length == 40 // accumulation
    assert not [w for w in recwarn if "no step" in str(w.message)]
