"""Calibrations: whether samples are enough, as others of them say."""

import re

import keras
import numpy as np
import pytest
from exported_files import tensorflow_only
from keras import layers

import keras_sparse as ks
from keras_sparse.tflite.calibration import calibrating, doubts
from keras_sparse.tflite.job import Job
from keras_sparse.tflite.signatures import signature

RNG = np.random.default_rng(0)
EVEN = RNG.normal(size=(130, 12)).astype("float32")
# Every fourth sample is of another kind, which one that was calibrated without them clips.
UNEVEN = EVEN * np.where(np.arange(130) % 4 == 3, 5, 1)[:, None].astype("float32")


def network():
    keras.utils.set_random_seed(1)
    noise = keras.initializers.RandomNormal(stddev=0.3, seed=2)
    return keras.Sequential(
        [keras.Input((12,)), layers.Dense(32, "relu", bias_initializer=noise), layers.Dense(4, bias_initializer=noise)]
    )


@tensorflow_only
@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (UNEVEN[:24], r"too few samples, 24: .* without 6 of its 24 batches is [3-9]\d.\d% off on these, and "),
        (np.repeat(EVEN[:6], 4, axis=0), None),
        (UNEVEN[:1], "with one batch: how far the file is off on others is not known"),
        (UNEVEN, None),  # as many as are used
    ],
    ids=["few", "few that are alike", "one", "many"],
)
def test_what_others_say(samples, said):
    model = network()
    found = doubts(Job(model, quantize="int8", samples=calibrating([[samples[:128]]], signature(model))))
    assert len(found) == (said is not None)
    assert said is None or re.search(said, found[0])


@tensorflow_only
@pytest.mark.slow
def test_an_export_says_so(tmp_path):
    report = ks.tflite.export(network(), tmp_path / "m.tflite", quantize="int8", representative_data=UNEVEN[:24])
    assert [note for note in report.notes if note.startswith("Calibrated with too few samples, 24")]


def test_floats_need_no_ranges():
    assert doubts(Job(network())) == []


@tensorflow_only
@pytest.mark.parametrize(("activation", "noted"), [(None, True), ("softmax", False)])
def test_outputs_that_one_scale_cannot_hold(activation, noted, tmp_path):
    """The comparison measures an output by its largest number, beside which such a feature is nothing.

    Of probabilities the small ones are near enough to 0.
    """
    model = keras.Sequential([keras.Input((12,)), layers.Dense(3, activation)])
    kernel, bias = np.random.default_rng(2).normal(size=(12, 3)), np.ones(3)
    kernel, bias = (0.1 * kernel, np.array([9.0, 0, 0])) if activation else (kernel * [1e5, 1, 1], bias)
    model.layers[0].set_weights([kernel, bias])
    report = ks.tflite.export(model, tmp_path / "m.tflite", quantize="int8", representative_data=EVEN)
    notes = [note for note in report.notes if "'output_0' reach from" in note and "one scale of 256 steps" in note]
    assert len(notes) == noted
