"""The hard concrete distribution, against samples, against the paper's formulas in NumPy and against differences."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_sparse as ks

SHAPES = [(2 / 3, (-0.1, 1.1)), (0.3, (-0.1, 1.1)), (1.0, (-0.5, 1.2)), (2.0, (-0.05, 2.0))]
N = 100_000


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, "float64")))


@pytest.mark.parametrize("temperature, limits", SHAPES)
@pytest.mark.parametrize("log_alpha", [-3.0, -0.4, 0.0, 1.5, 4.0])
def test_probabilities_are_those_of_samples(temperature, limits, log_alpha):
    gate = ks.gates.HardConcrete(temperature, limits)
    noise = np.random.default_rng(7).uniform(1e-6, 1 - 1e-6, N).astype("float32")
    samples = ops.convert_to_numpy(gate.sample(log_alpha, noise))
    assert samples.min() >= 0 and samples.max() <= 1
    for probability, share in (
        (gate.probability_zero(log_alpha), np.mean(samples == 0)),
        (gate.probability_one(log_alpha), np.mean(samples == 1)),
        (gate.probability_nonzero(log_alpha), np.mean(samples != 0)),
    ):
        p = float(probability)
        assert abs(share - p) <= 4 * np.sqrt(p * (1 - p) / N) + 1 / N
    assert float(gate.probability_zero(log_alpha)) + float(gate.probability_nonzero(log_alpha)) == pytest.approx(1)


@pytest.mark.parametrize("temperature, limits", SHAPES)
def test_formulas_of_the_paper(temperature, limits):
    gate = ks.gates.HardConcrete(temperature, limits)
    low, high = limits
    log_alpha = np.linspace(-5, 5, 41, dtype="float32")
    u = np.random.default_rng(0).uniform(0.001, 0.999, 41).astype("float32")
    stretched = sigmoid((np.log(u) - np.log(1 - u) + log_alpha) / temperature) * (high - low) + low
    expected = {
        "sample": (gate.sample(log_alpha, u), np.clip(stretched, 0, 1)),
        "test time": (gate.expected_gate(log_alpha), np.clip(sigmoid(log_alpha) * (high - low) + low, 0, 1)),
        "nonzero": (gate.probability_nonzero(log_alpha), sigmoid(log_alpha - temperature * np.log(-low / high))),
    }
    for ours, theirs in expected.values():
        np.testing.assert_allclose(ops.convert_to_numpy(ours), theirs, atol=2e-6)


def test_strange_arguments():
    for temperature in (0, -1, True, "cold", float("inf"), float("nan")):
        with pytest.raises(ValueError, match="`temperature` must be a positive number. Received: temperature="):
            ks.gates.HardConcrete(temperature)
    for limits in ((0, 1.1), (-0.1, 1), (-0.1,), None, "ab", (-float("inf"), 2), (1.1, -0.1), (False, 2)):
        with pytest.raises(ValueError, match="`limits` must be a pair of a negative number and a number above 1"):
            ks.gates.HardConcrete(limits=limits)


def test_half_precision_of_keras_leaves_gates_alone():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        value = ks.gates.HardConcrete().expected_gate(np.float32([0.1]))
        assert keras.backend.standardize_dtype(value.dtype) == "float32"
    finally:
        keras.config.set_dtype_policy("float32")
