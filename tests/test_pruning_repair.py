"""Solvers against slow NumPy: optimal brain surgeon one weight at a time, `lstsq` on the kept columns."""

import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse.pruning import repair


def problem(units=6, inputs=12, samples=200, seed=0, sparsity=0.5):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, inputs)) @ rng.normal(size=(inputs, inputs))
    weights, masks = rng.normal(size=(units, inputs)), rng.random((units, inputs)) >= sparsity
    return x, weights, masks, x.T @ x / samples


def by_lstsq(x, weights, masks):
    found = np.zeros_like(weights)
    for row, (weight, mask) in enumerate(zip(weights, masks, strict=True)):
        found[row, mask] = np.linalg.lstsq(x[:, mask], x @ weight, rcond=None)[0]
    return found


def one_at_a_time(weight, inverse, count):
    """Remove the weight of the lowest saliency and let the others make up for it, `count` times."""
    weight, inverse, gone = weight.copy(), inverse.copy(), []
    for _ in range(count):
        diagonal = np.diagonal(inverse).copy()
        saliency = np.where(np.isin(np.arange(weight.size), gone), np.inf, weight**2 / np.where(diagonal, diagonal, 1))
        i = int(np.argmin(saliency))
        weight -= weight[i] / inverse[i, i] * inverse[:, i]
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        gone.append(i)
        weight[gone] = 0
    return weight


@pytest.mark.parametrize("seed", range(4))
def test_least_squares_is_lstsq_on_the_kept_columns(seed):
    x, weights, masks, moment = problem(seed=seed, sparsity=0.2 + 0.2 * seed)
    masks[0], masks[1] = False, True
    expected = by_lstsq(x, weights, masks)
    found = repair.least_squares(weights, masks, moment)
    np.testing.assert_allclose(found, expected, atol=1e-8)
    assert not found[~masks].any()
    np.testing.assert_array_equal(found[1], weights[1])


def test_optimal_brain_surgeon_one_weight_at_a_time_ends_where_least_squares_does():
    _, weights, _, moment = problem()
    for weight in weights:
        expected = one_at_a_time(weight, np.linalg.inv(moment), 8)
        found = repair.least_squares(weight[None], expected[None] != 0, moment)
        np.testing.assert_allclose(found[0], expected, atol=1e-8)


def test_saliency_is_the_error_that_removal_and_repair_make():
    _, weights, _, moment = problem()
    masks = np.ones(weights.shape, bool)
    statistic = repair.input_statistic(ks.criteria.Obs(), masks, moment[None], np.zeros(len(weights), int))
    scores = ks.criteria.Obs()(weights, statistic)
    for row, column in ((0, 3), (5, 11)):
        one = masks.copy()
        one[row, column] = False
        change = (repair.least_squares(weights, one, moment) - weights)[row]
        np.testing.assert_allclose(0.5 * change @ moment @ change, scores[row, column], rtol=1e-8)


def test_column_updates_are_exact_for_the_weights_to_the_right():
    _, weights, _, moment = problem(inputs=300, samples=2000)
    masks = np.ones(weights.shape, bool)
    masks[:, :40] = np.random.default_rng(1).random((len(weights), 40)) > 0.5
    # All that leaves lies left of column 40: what is there and stays, stays as it is when its turn comes.
    found = repair.column_updates(weights, masks, moment)
    assert not found[~masks].any()
    exact = repair.least_squares(weights, masks, moment)
    for row in range(len(weights)):
        errors = [change @ moment @ change for change in (new[row] - weights[row] for new in (exact, found))]
        dropped = np.where(masks[row], 0, weights[row])
        assert errors[0] <= errors[1] + 1e-9
        assert errors[1] < 0.5 * dropped @ moment @ dropped
    # With one column to remove, the first, there is nothing to the left: the exact solution.
    masks = np.ones(weights.shape, bool)
    masks[:, 0] = False
    np.testing.assert_allclose(
        repair.column_updates(weights, masks, moment), repair.least_squares(weights, masks, moment), atol=1e-8
    )


@pytest.mark.parametrize("samples", [1, 5])
def test_singular_moments_are_damped(samples):
    x, weights, masks, moment = problem(samples=samples)
    x[:, 2] = 0
    moment = repair.damped(x.T @ x / samples)
    extra = np.sqrt(moment[2, 2]) * np.eye(x.shape[1])
    expected = by_lstsq(np.concatenate([x / np.sqrt(samples), extra]), weights, masks)
    found = repair.repaired(weights, masks, moment[None], np.zeros(len(weights), int))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.isfinite(repair.damped(np.zeros((3, 3)))).all()
    np.linalg.inv(repair.damped(np.zeros((3, 3))))


def test_groups_have_moments_of_their_own():
    first, second = problem(seed=1), problem(seed=2)
    weights, masks = (np.concatenate([a, b]) for a, b in zip(first[1:3], second[1:3], strict=True))
    moments, group_of = np.stack([first[3], second[3]]), np.repeat([0, 1], 6)
    expected = np.concatenate([by_lstsq(*first[:3]), by_lstsq(*second[:3])])
    np.testing.assert_allclose(repair.repaired(weights, masks, moments, group_of), expected, atol=1e-8)
    error = np.abs(repair.repaired(weights, masks, moments, group_of, exact=0) - expected).max()
    assert 1e-3 < error < np.abs(expected).max()
