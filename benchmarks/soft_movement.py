"""Soft movement pruning (Sanh et al. 2020, https://arxiv.org/abs/2005.07683, section 4), next to `fine_tuning.py`.

Each weight has a score. A forward pass sees the weights whose sigmoid(score) is above a threshold; the gradient passes
straight through that step, so that scores of masked weights move, too, and weights come back. A penalty, `--penalties`
times the mean of all sigmoid(score), pulls scores down: it decides how sparse the network becomes, there is no target.
It rises over 10 to 70 % of the steps as the sparsity does in `fine_tuning.py`. Weights and scores take Adam with a
cosine decay of the learning rate to 0; scores start at 0, at the threshold, where nothing is masked.

A loop of its own in JAX, to see what the method is worth: masks that are learnt need the weights under the mask, which
no callback of Keras's keeps. Only pre-training is that of `fine_tuning.py`. Set KERAS_BACKEND=jax.
"""

import argparse

import result  # isort: skip - sets the environment that TensorFlow reads

import fine_tuning
import jax
import keras
import numpy as np
from jax import numpy as jnp

THRESHOLD = 0.5


@jax.custom_vjp
def gate(scores):
    """1 where a score is above the threshold, else 0; its gradient is that of the identity."""
    return (jax.nn.sigmoid(scores) >= THRESHOLD).astype("float32")


gate.defvjp(lambda scores: (gate(scores), None), lambda _, gradient: (gradient,))


def masked(parameters):
    """The kernels as the forward pass sees them."""
    return [kernel * gate(scores) for kernel, scores in zip(parameters["kernels"], parameters["scores"], strict=True)]


def logits(parameters, x):
    for i, (kernel, bias) in enumerate(zip(masked(parameters), parameters["biases"], strict=True)):
        x = (jax.nn.relu(x) if i else x) @ kernel + bias
    return x


def loss(parameters, penalty, x, y):
    right = jnp.take_along_axis(jax.nn.log_softmax(logits(parameters, x)), y[:, None], axis=1)
    scores = jnp.concatenate([scores.reshape(-1) for scores in parameters["scores"]])
    return penalty * jax.nn.sigmoid(scores).mean() - right.mean()


@jax.jit
def step(parameters, means, squares, number, penalty, rates, x, y):
    """One step of Adam."""
    gradients = jax.grad(loss)(parameters, penalty, x, y)
    means = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, means, gradients)
    squares = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, squares, gradients)

    def moved(rate):
        factor = rate * jnp.sqrt(1 - 0.999**number) / (1 - 0.9**number)
        return lambda p, m, v: p - factor * m / (jnp.sqrt(v) + 1e-7)

    new = {name: jax.tree.map(moved(rates[name]), p, means[name], squares[name]) for name, p in parameters.items()}
    return new, means, squares


def train(weights, data, penalty, rates, epochs, seed):
    """Fine-tune and return `(sparsity, error in percent)`."""
    x, y, x_test, y_test = map(jnp.asarray, data)
    weights = [jnp.asarray(value) for value in weights]
    kernels, biases = weights[0::2], weights[1::2]
    parameters = {"kernels": kernels, "biases": biases, "scores": [jnp.zeros(kernel.shape) for kernel in kernels]}
    means = squares = jax.tree.map(jnp.zeros_like, parameters)
    generator, number, steps = np.random.default_rng(seed), 0, epochs * -(-len(x) // 128)
    for _ in range(epochs):
        order = generator.permutation(len(x))
        for first in range(0, len(x), 128):
            batch, progress = order[first : first + 128], number / steps
            decay = (1 + np.cos(np.pi * progress)) / 2
            rise = 1 - (1 - min(1.0, max(0.0, (progress - 0.1) / 0.6))) ** 3
            number += 1
            now = {name: rate * decay for name, rate in rates.items()}
            state = parameters, means, squares, float(number), penalty * rise, now
            parameters, means, squares = step(*state, x[batch], y[batch])
    left = sum(int((kernel != 0).sum()) for kernel in masked(parameters)) / sum(kernel.size for kernel in kernels)
    return 100 * (1 - left), 100 * float((logits(parameters, x_test).argmax(axis=1) != y_test).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--penalties", nargs="+", type=float, default=[3.0, 10.0, 30.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, nargs=2, default=[5, 10], help="on 0-4, on 5-9")
    parser.add_argument("--learning-rate", type=float, default=0.001, help="of the weights, on 5-9")
    parser.add_argument("--score-rate", type=float, default=0.01)
    args = parser.parse_args()
    load, old, new, rows = result.load(), fine_tuning.digits(0), fine_tuning.digits(5), []
    rates = {"kernels": args.learning_rate, "biases": args.learning_rate, "scores": args.score_rate}
    trained = []
    for seed in args.seeds:
        keras.utils.set_random_seed(seed)
        layers = [keras.layers.Dense(n, activation="relu") for n in (300, 100)]
        model = keras.Sequential([keras.Input((784,)), *layers, keras.layers.Dense(5)])
        fine_tuning.fit(model, old, 0.001, args.epochs[0])
        trained.append(model.get_weights())
    for penalty in args.penalties:
        runs = []
        for seed, weights in zip(args.seeds, trained, strict=True):
            runs.append(train(weights, new, penalty, rates, args.epochs[1], seed))
            print(f"{penalty:g}, seed {seed}: {runs[-1][1]:.2f} % at {runs[-1][0]:.2f} %", flush=True)
        sparsities, errors = zip(*runs, strict=True)
        each = [" ".join(f"{value:.2f}" for value in values) for values in (errors, sparsities)]
        rows.append([f"{penalty:g}", result.mean_and_spread(errors), result.mean_and_spread(sparsities), *each])
    result.show(
        f"Soft movement, fine-tuning from 0-4 to 5-9, {len(new[2])} test images",
        ["penalty", "error", "sparsity", "each error", "each sparsity"],
        rows,
        [f"Learning rate {args.learning_rate:g}, of scores {args.score_rate:g}."],
        load,
    )


if __name__ == "__main__":
    main()
