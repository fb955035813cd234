"""A searcher proposes points of a space and learns from what they cost: `ask()` and `tell(points, costs)`.

`ask` returns as many points as make a batch; `tell` receives the costs of a batch in the order of asking. A batch has
the same size however many workers there are, so that a seed leads to the same search on one worker and on many.
Everything is NumPy, seeded.
"""

import math
from collections import deque

import numpy as np

from keras_sparse.registry import Configurable, Registry, check_whole, is_real
from keras_sparse.search.pareto import crowding, fronts

__all__ = ["Evolution", "RandomSearch", "Reinforce", "Searcher", "get"]

SEARCHERS = Registry("searcher")


class Searcher(Configurable):
    """Base class of searchers.

    Subclasses implement `propose` (one point) and `tell`. A searcher can be started any number of times.

    Args:
        batch: How many points are asked for before any of them is told.

    Raises:
        ValueError: If `batch` is no whole number of at least 1.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8), keras.layers.Dense(8)])
    >>> searcher = ks.search.RandomSearch(batch=3)
    >>> searcher.start(ks.search.Space(model), seed=0)
    >>> points = searcher.ask()
    >>> searcher.tell(points, [[sum(point)] for point in points])
    >>> len(points)
    3
    """

    def __init__(self, batch=8):
        check_whole("batch", batch)
        self.batch = batch

    def start(self, space, seed=0, initial=()):
        """Begin a search.

        Args:
            space: A `Space`.
            seed: An int.
            initial: Points to ask for first.
        """
        self.space, self.rng = space, np.random.default_rng(seed)
        self._initial = deque(dict.fromkeys(tuple(point) for point in initial))
        self._asked = set()

    def ask(self):
        """Return a list of points, new ones as far as they are found."""
        if not hasattr(self, "space"):
            raise ValueError("Begin a search first: `searcher.start(space, seed)`.")
        return [self._next() for _ in range(self.batch)]

    def tell(self, points, costs, violations=None):
        """Learn what points cost.

        Args:
            points: The points of the last `ask`, or the first of them.
            costs: For each point a list of costs, lower being better, or `None` if it failed.
            violations: By how much each point violates constraints; 0, the default, if it does not.
        """
        raise TypeError(f"`{type(self).__name__}` must implement `tell(self, points, costs, violations)`.")

    def propose(self):
        """Return one point."""
        raise TypeError(f"`{type(self).__name__}` must implement `propose(self)`.")

    def _next(self):
        if self._initial:
            point = self._initial.popleft()
        else:
            for _ in range(50):  # A space may have been asked for all of its points.
                point = self.propose()
                if point not in self._asked:
                    break
        self._asked.add(point)
        return point


@SEARCHERS.register("random")
class RandomSearch(Searcher):
    """Draws points at random: what other searchers must beat.

    Example:

    >>> import keras_sparse as ks
    >>> ks.search.RandomSearch(batch=16).get_config()
    {'batch': 16}
    """

    def propose(self):
        return self.space.sample(self.rng)

    def tell(self, points, costs, violations=None):
        """Random search learns nothing."""


@SEARCHERS.register("evolution")
class Evolution(Searcher):
    """Evolves a population of points by mutation and selection.

    With one objective it is regularized evolution (Real et al., "Regularized evolution for image classifier
    architecture search", 2019, algorithm 1): the parent is the best of a random sample of the population, its child
    differs in one decision, and the oldest member dies, however good it is. With several objectives it keeps a Pareto
    front as NSGA-II does (Deb et al. 2002): parents win tournaments by front, then by crowding distance; their children
    cross and mutate; the best of parents and children survive.

    Args:
        population: Members.
        sample: Members of a tournament (with several objectives always 2).
        batch: How many points are asked for before any of them is told.

    Raises:
        ValueError: If a number is not whole, or `sample` exceeds `population`.

    Example:

    >>> import keras_sparse as ks
    >>> ks.search.Evolution(population=20).get_config()
    {'population': 20, 'sample': 6, 'batch': 8}
    """

    def __init__(self, population=24, sample=6, batch=8):
        super().__init__(batch)
        check_whole("population", population)
        check_whole("sample", sample)
        self.population, self.sample = population, sample
        if sample > population:
            raise ValueError(
                f"`sample` must not exceed `population`. Received: sample={sample}, population={population}"
            )

    def start(self, space, seed=0, initial=()):
        super().start(space, seed, initial)
        self._members = []  # (point, costs, violation): the oldest first, or, with several objectives, the best
        self._told = 0

    def propose(self):
        if self._told < self.population or not self._members:
            return self.space.sample(self.rng)
        if len(self._members[0][1]) == 1:
            drawn = self.rng.choice(len(self._members), min(self.sample, len(self._members)), replace=False)
            parent = min((self._members[i] for i in drawn), key=lambda member: (member[2], member[1]))
            return self.space.mutate(parent[0], self.rng)
        one, other = (self._members[min(self.rng.integers(len(self._members), size=2))][0] for _ in range(2))
        return self.space.mutate(self.space.crossover(one, other, self.rng), self.rng)

    def tell(self, points, costs, violations=None):
        violations = [0.0] * len(points) if violations is None else violations
        self._told += len(points)
        self._members += [
            (tuple(point), tuple(cost), violation)
            for point, cost, violation in zip(points, costs, violations, strict=True)
            if cost is not None
        ]
        if self._members and len(self._members[0][1]) > 1:
            self._members = [self._members[i] for i in _ranking(self._members)][: self.population]
        else:
            self._members = self._members[-self.population :]


def _ranking(members):
    """Indices of the members, by front and then by crowding distance."""
    costs, order = np.array([cost for _, cost, _ in members]), []
    for front in fronts(costs, [violation for *_, violation in members]):
        order += [front[i] for i in np.argsort(-crowding(costs[front]), kind="stable")]
    return order


_FEATURES = 7  # of a state


@SEARCHERS.register("reinforce")
class Reinforce(Searcher):
    """Learns a policy over the choices from rewards: REINFORCE with a moving-average baseline and an entropy bonus.

    The controller goes through the choices in the model's order, as AMC does layer by layer (He et al., "AMC: AutoML
    for model compression", 2018, section 3.1). At each it sees the state (the layer's place, the sizes of this weight
    and of those to come, the shares of weights kept and dropped so far, the last decision), and draws an option from
    `softmax(state @ parameters)`, with parameters for each choice. It is trained by the policy gradient of Zoph & Le,
    "Neural architecture search with reinforcement learning" (2017), section 3.2, whose baseline is the moving average
    of the rewards.

    The policy begins at the best of the points that a search starts with: an option is drawn the less, the more steps
    of the grid it is away from there (a normal distribution with a deviation of one step; other patterns count as two
    steps away). Without such points it begins uniform.

    The reward is the negative cost. Costs are divided by their spread so far, so that the learning rate does not depend
    on their unit; several objectives are averaged after that. A point that failed, or violates a constraint, gets the
    worst reward so far.

    Args:
        learning_rate: Step size of Adam.
        entropy: Weight of the policy's entropy, which keeps it exploring.
        decay: Of the moving average, in [0, 1).
        batch: Points for each gradient.

    Raises:
        ValueError: If a number is out of range.

    Example:

    >>> import keras_sparse as ks
    >>> ks.search.Reinforce(entropy=0.0).get_config()["entropy"]
    0.0
    """

    def __init__(self, learning_rate=0.15, entropy=0.02, decay=0.8, batch=8):
        super().__init__(batch)
        numbers = all(is_real(value) for value in (learning_rate, entropy, decay))
        if not numbers or not 0 < learning_rate < math.inf or not 0 <= entropy < math.inf or not 0 <= decay < 1:
            raise ValueError(
                "`learning_rate` must be a number above 0, `entropy` one of at least 0 and `decay` in [0, 1). "
                f"Received: learning_rate={learning_rate!r}, entropy={entropy!r}, decay={decay!r}"
            )
        self.learning_rate, self.entropy, self.decay = learning_rate, entropy, decay

    def start(self, space, seed=0, initial=()):
        super().start(space, seed, initial)
        sizes = np.array([choice.size for choice in space.choices], "float64")
        self._sizes = sizes / sizes.sum()
        # Zeros: every option is as likely. A row for each feature of the state, of which the last is always 1.
        self.parameters = [np.zeros((_FEATURES, len(choice.options))) for choice in space.choices]
        self._moments = [(np.zeros_like(p), np.zeros_like(p)) for p in self.parameters]
        self._steps, self._baseline, self._costs = 0, None, []
        self._leads, self._lead = set(self._initial), None

    def state(self, options):
        """What the controller sees after the first decisions, `options`: an array of features."""
        i, sizes = len(options), self._sizes
        kept = np.array([1 - choice.options[o][0] for choice, o in zip(self.space.choices, options, strict=False)])
        sums = sizes[i + 1 :].sum(), (sizes[:i] * kept).sum(), (sizes[:i] * (1 - kept)).sum()
        return np.array([i / len(sizes) - 0.5, sizes[i], *sums, kept[-1] if i else 0.0, 1.0])

    def policy(self, options):
        """The probability of each option of the next choice, after the first decisions."""
        logits = self.state(options) @ self.parameters[len(options)]
        odds = np.exp(logits - logits.max())
        return odds / odds.sum()

    def propose(self):
        point = ()
        for choice in self.space.choices:
            point += (int(self.rng.choice(len(choice.options), p=self.policy(point))),)
        return point

    def gradient(self, points, advantages):
        """Estimate the gradient of the expected reward by the parameters, from points that the policy drew.

        Zoph & Le (2017), section 3.2: the mean over the points of `advantage * d log p(point)`. The gradient of the
        decisions' entropy times `entropy` is added.

        Args:
            points: List of points.
            advantages: The reward of each, less the baseline.

        Returns:
            List of arrays like `parameters`.
        """
        gradients = [np.zeros_like(p) for p in self.parameters]
        for point, advantage in zip(points, advantages, strict=True):
            for i, option in enumerate(point):
                p = self.policy(point[:i])
                log_p = np.log(np.maximum(p, 1e-300))
                by_logit = advantage * (np.eye(len(p))[option] - p) - self.entropy * p * (log_p - (p * log_p).sum())
                gradients[i] += np.outer(self.state(point[:i]), by_logit) / len(points)
        return gradients

    def tell(self, points, costs, violations=None):
        violations = [0.0] * len(points) if violations is None else violations
        valid = [cost is not None and not violation for cost, violation in zip(costs, violations, strict=True)]
        self._costs += [tuple(cost) for cost, good in zip(costs, valid, strict=True) if good]
        if not self._costs:
            return
        known = np.array(self._costs, "float64")
        centre, spread = known.mean(axis=0), np.maximum(known.std(axis=0), 1e-12)
        worst = known.max(axis=0)
        rows = np.array([cost if good else worst for cost, good in zip(costs, valid, strict=True)], "float64")
        # The baseline moves with the raw costs: their centre and spread change as the search goes on.
        mean = rows.mean(axis=0)
        self._baseline = mean if self._baseline is None else self._baseline
        rewards, baseline = (-((each - centre) / spread).mean(axis=-1) for each in (rows, self._baseline))
        drawn = [i for i, point in enumerate(points) if tuple(point) not in self._leads]
        if drawn:
            self._ascend(self.gradient([points[i] for i in drawn], rewards[drawn] - baseline))
        if self._leads:
            self._begin_at(points, rewards, valid)
        self._baseline = self.decay * self._baseline + (1 - self.decay) * mean

    def _begin_at(self, points, rewards, valid):
        """Remember the best of the points that the search starts with, and begin there once all of them are known."""
        for point, reward, good in zip(points, rewards, valid, strict=True):
            if good and tuple(point) in self._leads and (self._lead is None or reward > self._lead[0]):
                self._lead = reward, tuple(point)
        if not self._initial:
            self._leads = set()
            for i, option in enumerate(self._lead[1] if self._lead else ()):
                choice = self.space.choices[i]
                steps = [choice.steps(option, other) for other in range(len(choice.options))]
                self.parameters[i][-1] -= np.square(steps) / 2

    def _ascend(self, gradients):
        # Adam (Kingma & Ba 2015), as in the paper.
        self._steps += 1
        for parameter, (first, second), gradient in zip(self.parameters, self._moments, gradients, strict=True):
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            scale = np.sqrt(second / (1 - 0.999**self._steps)) + 1e-8
            parameter += self.learning_rate * first / (1 - 0.9**self._steps) / scale


def get(identifier):
    """Return the searcher that `identifier` stands for: a `Searcher`, or `"random"`, `"evolution"`, `"reinforce"`.

    Example:

    >>> import keras_sparse as ks
    >>> type(ks.search.searchers.get("evolution")).__name__
    'Evolution'
    """
    return SEARCHERS.get(identifier, Searcher)
