"""Searchers against random search, the policy gradient against its formula, fronts against brute force."""

import itertools
import math

import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse.search.pareto import crowding, fronts

LEARNERS = {"evolution": ks.search.Evolution, "reinforce": ks.search.Reinforce}


def space_of(choices, sparsities=(0.0, 0.3, 0.5, 0.7, 0.8, 0.9)):
    layers = [keras.layers.Dense(4, name=f"d{i}") for i in range(choices)]
    return ks.search.Space(keras.Sequential([keras.Input((4,)), *layers]), sparsities)


def separable(point):
    """Each choice has an option of its own that is best; the optimum, 0, is known."""
    best = [(3 * i + 1) % 6 for i in range(len(point))]
    return float(sum(abs(option - want) for option, want in zip(point, best, strict=True)))


def deceptive(point):
    """Traps of three choices: getting closer to the optimum (all 5) is worse, until one is there."""
    cost = 0.0
    for start in range(0, len(point), 3):
        steps = sum(point[start : start + 3])
        cost += 0.0 if steps == 15 else 0.2 + 0.8 * steps / 15
    return cost


def best_of(searcher, space, objective, seed, budget=400):
    searcher.start(space, seed)
    best, done = math.inf, 0
    while done < budget:
        points = searcher.ask()[: budget - done]
        costs = [[objective(point)] for point in points]
        searcher.tell(points, costs)
        best, done = min(best, *(cost for (cost,) in costs)), done + len(points)
    return best


@pytest.mark.parametrize("objective", [separable, deceptive])
@pytest.mark.parametrize("learner", ["evolution", pytest.param("reinforce", marks=pytest.mark.slow)])
def test_beats_random_search(learner, objective):
    space = space_of(9)
    wins = losses = 0
    for seed in range(20 if learner == "evolution" else 8):  # a search of the policy gradient takes two seconds
        found = best_of(LEARNERS[learner](), space, objective, seed)
        chance = best_of(ks.search.RandomSearch(), space, objective, seed)
        wins, losses = wins + (found < chance), losses + (found > chance)
    n = wins + losses
    p = sum(math.comb(n, k) for k in range(wins, n + 1)) / 2**n  # one-sided sign test; ties say nothing
    assert p < 0.05, (wins, losses)


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.lengthy(1)
def test_finds_a_known_optimum(learner):
    found = [best_of(LEARNERS[learner](), space_of(3), separable, seed, budget=250) for seed in range(5)]
    assert sum(cost == 0 for cost in found) >= 4, found


@pytest.mark.parametrize("searcher", [ks.search.RandomSearch, *LEARNERS.values()])
def test_a_seed_is_a_search(searcher):
    def trail(seed):
        one = searcher(batch=4)
        one.start(space_of(4), seed, initial=[(1, 1, 1, 1)])
        points = []
        for _ in range(12):
            points += (batch := one.ask())
            # Costs that failed or violate constraints are part of a search, too.
            costs = [None if sum(point) % 5 == 0 else [separable(point)] for point in batch]
            one.tell(batch, costs, [float(point[0] == 0) for point in batch])
        return points

    assert trail(3) == trail(3)
    assert trail(3) != trail(4)
    assert trail(3)[0] == (1, 1, 1, 1)
    assert len(set(trail(3))) == 48, "a point was asked for twice"


def test_reinforce_follows_the_analytic_gradient():
    """Two choices of two options: with every point at its probability, the estimate is the exact gradient."""
    searcher = ks.search.Reinforce(entropy=0.0)
    searcher.start(space_of(2, (0.2, 0.6)))
    rng = np.random.default_rng(0)
    for parameter in searcher.parameters:
        parameter += rng.normal(size=parameter.shape)
    points = list(itertools.product(range(2), repeat=2))
    reward = dict(zip(points, (0.3, -1.0, 2.0, 0.5), strict=True))

    def probability(point):
        return searcher.policy(())[point[0]] * searcher.policy(point[:1])[point[1]]

    def expected():
        return sum(probability(point) * reward[point] for point in points)

    # Weighted by its probability times their number, the mean over all points is the expectation.
    advantages = [len(points) * probability(point) * (reward[point] - 0.7) for point in points]
    gradients = searcher.gradient(points, advantages)
    # By hand, for the first choice: p0 (1 - p0) (E[reward | 0] - E[reward | 1]) on the logit of option 0.
    p = searcher.policy(())
    given = [sum(searcher.policy((i,))[j] * reward[i, j] for j in range(2)) for i in range(2)]
    slope = p[0] * p[1] * (given[0] - given[1])
    np.testing.assert_allclose(gradients[0], np.outer(searcher.state(()), [slope, -slope]), atol=1e-12)
    # By finite differences, for all parameters.
    for parameter, gradient in zip(searcher.parameters, gradients, strict=True):
        for index in np.ndindex(parameter.shape):
            parameter[index] += 1e-6
            above = expected()
            parameter[index] -= 2e-6
            below = expected()
            parameter[index] += 1e-6
            np.testing.assert_allclose(gradient[index], (above - below) / 2e-6, atol=1e-8)


def test_entropy_bonus_is_the_gradient_of_the_entropy():
    searcher = ks.search.Reinforce(entropy=1.0)
    searcher.start(space_of(1))
    searcher.parameters[0] += np.random.default_rng(0).normal(size=searcher.parameters[0].shape)

    def entropy():
        p = searcher.policy(())
        return -(p * np.log(p)).sum()

    (gradient,) = searcher.gradient([(0,)], [0.0])
    for index in np.ndindex(gradient.shape):
        searcher.parameters[0][index] += 1e-6
        above = entropy()
        searcher.parameters[0][index] -= 2e-6
        below = entropy()
        searcher.parameters[0][index] += 1e-6
        np.testing.assert_allclose(gradient[index], (above - below) / 2e-6, atol=1e-8)


def brute_force_front(costs):
    def beats(a, b):
        return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))

    return [i for i, cost in enumerate(costs) if not any(beats(other, cost) for other in costs)]


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_fronts_equal_brute_force(objectives):
    costs = np.random.default_rng(objectives).integers(0, 12, (300, objectives))
    found, left = fronts(costs), list(range(300))
    for front in found:
        expected = [left[i] for i in brute_force_front(costs[left].tolist())]
        assert front == expected
        left = [i for i in left if i not in set(front)]
    assert not left
    assert crowding(costs[found[0]]).shape == (len(found[0]),)


def test_less_violation_comes_first():
    assert fronts([[1, 1], [2, 2], [0, 0]], [0, 0, 0.5]) == [[0], [1], [2]]


@pytest.mark.slow
def test_evolution_finds_the_whole_front():
    """4,096 points, two objectives: sparsity against a sum of costs that differ by choice."""
    space = space_of(6, (0.0, 0.5, 0.75, 0.9))

    def costs(point):
        return [sum(point), sum((3 - option) * 2**i for i, option in enumerate(point))]

    everything = list(space.points())
    assert len(everything) == space.size() == 4096
    values = np.array([costs(point) for point in everything])
    # Brute force by sums: the least second cost of each first cost, if it is below that of all lower ones.
    expected, least = set(), math.inf
    for first in sorted(set(values[:, 0])):
        second = values[values[:, 0] == first, 1].min()
        if second < least:
            expected.add((first, second))
            least = second
    searcher, seen = ks.search.Evolution(population=48), {}
    searcher.start(space, seed=0)
    for _ in range(300):  # batches of 8
        points = searcher.ask()
        seen |= {point: tuple(costs(point)) for point in points}
        searcher.tell(points, [costs(point) for point in points])
    members = list(seen.values())
    found = {members[i] for i in fronts(members)[0]}
    assert found == expected
    assert {tuple(values[i]) for i in fronts(values)[0]} == expected


def test_reinforce_begins_at_the_best_of_the_initial_points():
    space, known, best = space_of(3), [(0, 0, 0), (4, 1, 2), (5, 5, 5)], (4, 1, 2)
    searcher = ks.search.Reinforce(batch=3)
    searcher.start(space, seed=0, initial=known)
    assert np.allclose(searcher.policy(()), 1 / 6)
    assert searcher.ask() == known
    searcher.tell(known, [[float(point != best)] for point in known])
    for i, option in enumerate(best):
        odds = np.exp(-0.5 * (np.arange(6) - option) ** 2)
        assert np.allclose(searcher.policy(best[:i]), odds / odds.sum())


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        *((name, "min") for name in ("loss", "bce", "cce", "logcosh", "log_cosh", "kl_divergence", "FalsePositives")),
        *((name, "min") for name in ("o1_mae", "false_negatives", "bytes")),
        *((name, "max") for name in ("accuracy", "auc", "cosine_similarity", "dice", "true_positives", "sparsity")),
    ],
)
def test_names_tell_directions(name, direction):
    assert ks.search.goals.Goals(name).directions == {name: direction}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ks.search.Evolution(sample=30), "must not exceed"),
        (lambda: ks.search.RandomSearch(batch=0), "whole number"),
        (lambda: ks.search.Reinforce(decay=1.0), "decay"),
        (lambda: ks.search.Reinforce(learning_rate="a"), "number above 0"),
        (lambda: ks.search.Reinforce(learning_rate=math.inf), "number above 0"),
        (lambda: ks.search.Evolution().ask(), "Begin a search first"),
        (lambda: ks.search.searchers.get("evolutoin"), "Did you mean 'evolution'"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
