"""Schedules against their formulas."""

import math

import numpy as np
import pytest

import keras_sparse as ks

FORMULAS = {
    "polynomial": lambda p: 1 - (1 - p) ** 3,
    "linear": lambda p: p,
    "cosine": lambda p: (1 - math.cos(math.pi * p)) / 2,
    "exponential": lambda p: (1 - math.exp(-5 * p)) / (1 - math.exp(-5)),
    "one_shot": lambda p: 1.0,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_follows_its_formula_and_ends_at_one(name):
    schedule = ks.schedules.get(name)
    progress = np.linspace(0, 1, 101)
    values = [schedule(p) for p in progress]
    assert values == pytest.approx([FORMULAS[name](p) for p in progress], abs=1e-12)
    assert values == sorted(values)
    assert schedule(1.0) == 1.0
    assert (schedule(-3), schedule(7)) == (schedule(0), 1.0)


def test_polynomial_is_tfmots():
    # Zhu & Gupta 2017, equation 1, with s_i = 0 and s_f = 0.9, as tfmot.sparsity.keras.PolynomialDecay computes it.
    for step in range(11):
        expected = 0.9 + (0.0 - 0.9) * (1 - step / 10) ** 3
        assert 0.9 * ks.schedules.Polynomial()(step / 10) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "3", True])
def test_shape_parameters_are_checked(value):
    with pytest.raises(ValueError, match="positive, finite"):
        ks.schedules.Polynomial(power=value)
    with pytest.raises(ValueError, match="positive, finite"):
        ks.schedules.Exponential(rate=value)
