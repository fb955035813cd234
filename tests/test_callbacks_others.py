"""Sparse callbacks beside others: what these see, save and stop."""

import contextlib
from functools import partial

import keras
import numpy as np
import pytest
from callback_models import TENSORFLOW, X, Y, ZerosAfterEachStep, dense_model, fit, interrupt_at, zeros

import keras_sparse as ks

# Keras's callbacks beside ours


def test_learning_rate_callbacks():
    model = dense_model()
    rates = []
    history = fit(
        model,
        ks.callbacks.Pruning(0.9),
        keras.callbacks.LearningRateScheduler(lambda epoch, lr: 0.1 * (epoch + 1)),
        keras.callbacks.LambdaCallback(on_epoch_end=lambda e, logs: rates.append(float(model.optimizer.learning_rate))),
    )
    assert history.history["learning_rate"] == pytest.approx([0.1, 0.2, 0.3])
    assert rates == pytest.approx([0.1, 0.2, 0.3])
    plateau = dense_model()
    reduce = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=0, min_delta=100.0)
    fit(plateau, ks.callbacks.Pruning(0.9), reduce, epochs=4)
    assert float(plateau.optimizer.learning_rate) < 0.001


def test_csv_logger_and_tensorboard(tmp_path):
    model = dense_model()
    callbacks = [ks.callbacks.Pruning(0.5), keras.callbacks.CSVLogger(tmp_path / "log.csv")]
    if TENSORFLOW:
        callbacks.append(keras.callbacks.TensorBoard(tmp_path / "board"))
    fit(model, *callbacks)
    assert "sparsity" in (tmp_path / "log.csv").read_text().splitlines()[0]
    if TENSORFLOW:
        assert any((tmp_path / "board").rglob("events*"))


def test_progress_bar_shows_the_sparsity(capsys):
    fit(dense_model(), ks.callbacks.Pruning(0.5), verbose=2)
    assert "sparsity: 0.5000" in capsys.readouterr().out


@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_with_restored_weights_ends_at_the_mask(first):
    model = dense_model()
    stop = keras.callbacks.EarlyStopping("loss", mode="max", patience=1, restore_best_weights=True)
    pruning = ks.callbacks.Pruning(0.9, begin=0, end=9, frequency=1)
    with pytest.warns(UserWarning, match="pruned weights were not zero"):
        fit(model, *([stop, pruning] if first else [pruning, stop]), epochs=8)
    assert zeros(model) == [108, 27]
    assert isinstance(model.optimizer, keras.optimizers.Adam)


def test_a_fit_that_is_stopped_early_says_what_it_reached():
    model = dense_model()
    stop = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", True))
    with pytest.warns(UserWarning, match="stopped before the target sparsity.* are at [34]"):
        fit(model, ks.callbacks.Pruning(0.9), stop, epochs=8)
    assert 0 < zeros(model)[0] < 108


def test_a_schedule_that_ends_after_the_fit_is_not_cut_short_but_said():
    model = dense_model()
    with pytest.warns(
        UserWarning, match="ended at step 18 of a schedule that ends at step 100.* at 40.0%.*over='fits'"
    ):
        fit(model, ks.callbacks.Pruning(0.9, begin=0, end=100))
    assert zeros(model) == [48, 12]


def test_a_schedule_over_several_fits():
    whole, parts = dense_model(), dense_model()
    fit(whole, ks.callbacks.Pruning(0.9, begin=2, end=30, frequency=4), epochs=6)
    callback, seen = ks.callbacks.Pruning(0.9, begin=2, end=30, frequency=4, over="fits"), []
    for _ in range(6):
        seen += fit(parts, callback, epochs=1).history["sparsity"]
    assert seen == sorted(seen) and len(set(seen)) >= 5
    assert zeros(parts) == zeros(whole) == [108, 27]
    with pytest.raises(ValueError, match="counts steps.* give `begin` and `end` as ints"):
        ks.callbacks.Pruning(0.9, over="fits")
    with pytest.raises(ValueError, match="`over` must be 'fit' or 'fits'"):
        ks.callbacks.Pruning(0.9, over="loop")


@pytest.mark.slow
def test_statistics_and_steps_of_broken_off_fits_go_on_in_a_schedule_over_several_fits():
    whole, parts = dense_model(), dense_model()
    make = partial(ks.callbacks.Pruning, 0.9, "taylor", begin=2, end=20, frequency=4)
    fit(whole, make(), x=X[:16], y=Y[:16], epochs=24)
    callback = make(over="fits")
    for steps, broken in ((3, False), (3, False), (5, True), (13, False)):
        others = [interrupt_at(steps)] if broken else []
        with contextlib.suppress(KeyboardInterrupt):
            fit(parts, callback, *others, x=X[:16], y=Y[:16], epochs=9 if broken else steps)
    for a, b in zip(whole.get_weights(), parts.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_at_target_sparsity(tmp_path):
    model = dense_model()
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", "loss", mode="max", save_best_only=True)
    stop = keras.callbacks.EarlyStopping("loss", mode="max", patience=0)
    fit(
        model,
        ks.callbacks.AtTargetSparsity(checkpoint),
        ks.callbacks.Pruning(0.9, begin=0, end=15),
        ks.callbacks.AtTargetSparsity(stop),
        epochs=8,
    )
    best = keras.saving.load_model(tmp_path / "best.keras")
    assert zeros(best) == [108, 27]
    assert zeros(model) == [108, 27]


def test_at_target_sparsity_lets_validations_through():
    seen, losses = [], []

    class Watch(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            seen.append("begin")

        def on_test_batch_end(self, batch, logs=None):
            seen.append(batch)

        def on_test_end(self, logs=None):
            seen.append("end")

    for held in (False, True):
        model = dense_model(optimizer=keras.optimizers.Adam(0.05, use_ema=True))
        others = [keras.callbacks.SwapEMAWeights(), Watch()]  # the first validates with the moving averages
        others = [ks.callbacks.AtTargetSparsity(one) for one in others] if held else others[:1]
        pruning = ks.callbacks.Pruning(0.9, begin=0, end=15)  # in the third epoch
        history = fit(model, pruning, *others, epochs=4, validation_data=(X, Y), validation_batch_size=len(X))
        losses.append(history.history["val_loss"])
    assert seen == ["begin", 0, "end"] * 2
    assert losses[0][:2] != losses[1][:2] and losses[0][2:] == losses[1][2:]


def test_at_target_sparsity_needs_a_pruning():
    with pytest.raises(ValueError, match="waits for a `ks.callbacks.Pruning`"):
        fit(dense_model(), ks.callbacks.AtTargetSparsity(keras.callbacks.EarlyStopping("loss")))
    with pytest.raises(TypeError, match="must be a Keras callback"):
        ks.callbacks.AtTargetSparsity("early_stopping")


def test_evaluate_and_predict_leave_the_model_as_it_was():
    model = dense_model()
    optimizer, weights = model.optimizer, model.get_weights()
    callback = ks.callbacks.Pruning(0.9)
    model.evaluate(X, Y, verbose=0, callbacks=[callback])
    model.predict(X, verbose=0, callbacks=[callback])
    assert model.optimizer is optimizer
    assert all((a == b).all() for a, b in zip(weights, model.get_weights(), strict=True))
    fit(model, callback, validation_data=(X, Y))
    assert zeros(model) == [108, 27]
    assert model.optimizer is optimizer


@pytest.mark.parametrize("same", [True, False])
def test_interrupted_fit_started_again(same):
    model, callback = dense_model(), ks.callbacks.Pruning(0.9, schedule="linear", begin=0, end=12)
    record = ZerosAfterEachStep()
    with pytest.raises(KeyboardInterrupt):
        fit(model, callback, interrupt_at(8))
    assert type(model.optimizer) is type(keras.optimizers.Adam())
    assert "sparse_state" not in vars(model.optimizer)
    before = sum(zeros(model))
    again = callback if same else ks.callbacks.Pruning(0.9, schedule="linear", begin=0, end=12)
    fit(model, again, record)
    # The clock begins anew; the zeros that are there stay.
    assert [counts[0] == 108 for counts in record.counts] == [False] * 11 + [True] * 7
    assert before > 0
    assert record.revived == 0
    assert not isinstance(model.optimizer, ks.optimizers.SparseOptimizer)
