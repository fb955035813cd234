"""LeNet-300-100 on MNIST: test error of a dense model, of `ks.callbacks.Pruning` and of tfmot, with one recipe.

The recipe is Adam with a cosine decay of the learning rate to 0, batch 128, pixels in [0, 1], gradual magnitude pruning
that reaches its target half-way. tfmot prunes each layer by itself; ours does so with `allocation="uniform"` and ranks
all weights together with `"global"`. The error is that of the last epoch, never of the best.

`--validate` trains on the first 50,000 training images and measures on the other 10,000: for choosing hyperparameters.

Han et al. 2015 (https://arxiv.org/abs/1506.02626) report 1.59 % test error at 92 % sparsity, 1.64 % dense.
"""

import argparse
import itertools
import time

import result  # isort: skip - sets the environment that TensorFlow reads

import keras
import numpy as np
import tf_keras
from tensorflow_model_optimization.sparsity import keras as tfmot

import keras_sparse as ks

METHODS = ("dense", "global", "uniform", "tfmot")


def mnist(validate):
    """Return `(x, y, x_test, y_test)`, images as vectors in [0, 1]."""
    (x, y), test = keras.datasets.mnist.load_data()
    if validate:
        x, y, test = x[:50_000], y[:50_000], (x[50_000:], y[50_000:])
    return (*(a.reshape(len(a), -1).astype("float32") / 255 if a.ndim > 1 else a for a in (x, y, *test)),)


def build(framework, rate, steps):
    """Return a compiled LeNet-300-100 of `keras` or `tf_keras`, with a learning rate that decays over `steps`."""
    layers = framework.layers
    model = framework.Sequential(
        [
            layers.Input((784,)),
            layers.Dense(300, activation="relu"),
            layers.Dense(100, activation="relu"),
            layers.Dense(10),
        ]
    )
    return model, {
        "optimizer": framework.optimizers.Adam(framework.optimizers.schedules.CosineDecay(rate, steps)),
        "loss": framework.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": ["accuracy"],
    }


def train(method, sparsity, seed, rate, end, epochs, data):
    """Train one model and return `(error in percent, sparsity of its kernels)`."""
    x, y, x_test, y_test = data
    steps = epochs * -(-len(x) // 128)
    frequency = max(1, int(end * steps) // 50)
    framework = tf_keras if method == "tfmot" else keras
    framework.utils.set_random_seed(seed)
    model, recipe = build(framework, rate, steps)
    callbacks = []
    if method == "tfmot":
        schedule = tfmot.PolynomialDecay(0.0, sparsity, 0, int(end * steps), frequency=frequency)
        model = tfmot.prune_low_magnitude(model, schedule)
        callbacks = [tfmot.UpdatePruningStep()]
    elif method != "dense":
        callbacks = [ks.callbacks.Pruning(sparsity, allocation=method, end=end, frequency=frequency)]
    model.compile(**recipe)
    model.fit(x, y, batch_size=128, epochs=epochs, verbose=0, callbacks=callbacks)
    if method == "tfmot":
        model = tfmot.strip_pruning(model)
        model.compile(**recipe)
    _, accuracy = model.evaluate(x_test, y_test, batch_size=1000, verbose=0)
    kernels = [weight for weight in model.get_weights() if weight.ndim == 2]
    zeros = sum(int(np.sum(kernel == 0)) for kernel in kernels) / sum(kernel.size for kernel in kernels)
    return 100 * (1 - accuracy), zeros


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.92, 0.98])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[0.004])
    parser.add_argument("--ends", nargs="+", type=float, default=[0.5], help="fraction of training that prunes")
    parser.add_argument("--validate", action="store_true", help="measure on held-out training images")
    args = parser.parse_args()
    load, data, rows = result.load(), mnist(args.validate), []
    for method, rate in itertools.product(args.methods, args.learning_rates):
        dense = method == "dense"
        for sparsity, end in [(0.0, args.ends[0])] if dense else itertools.product(args.sparsities, args.ends):
            started = time.perf_counter()
            runs = [train(method, sparsity, seed, rate, end, args.epochs, data) for seed in args.seeds]
            errors = [error for error, _ in runs]
            row = {
                "method": {"global": "Pruning, global", "uniform": "Pruning, uniform"}.get(method, method),
                "sparsity": f"{sparsity:.0%}",
                "kernels' zeros": " ".join(sorted({f"{zeros:.3%}" for _, zeros in runs})),
                "learning rate": f"{rate:g}",
                "prunes until": "-" if dense else f"{end:.0%}",
                "error": result.mean_and_spread(errors),
                "each seed": " ".join(f"{error:.2f}" for error in errors),
                "s per run": f"{(time.perf_counter() - started) / len(runs):.0f}",
            }
            rows.append(row)
            print(" ".join(row.values()), flush=True)
    images = "10,000 held-out training images" if args.validate else "10,000 test images"
    seeds = " ".join(str(seed) for seed in args.seeds)
    result.show(
        f"LeNet-300-100 on MNIST, {images}, {args.epochs} epochs, seeds {seeds}",
        list(rows[0]),
        [list(row.values()) for row in rows],
        ["Mean ± sample standard deviation of the last epoch's error."],
        load,
    )


if __name__ == "__main__":
    main()
