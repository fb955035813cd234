"""MNIST: what L0 gates, proximal L1 and the textbook's L1 loss leave of LeNet-300-100 and LeNet-5, and at what error.

Pixels are in [0, 1], batch 128, Adam for L0 (gates with a learning rate of their own, by `MultiOptimizer`) and for
proximal L1. The error is that of the last epoch on the 10,000 test images, never of the best, of the baked model.
"units left" counts inputs of the dense layers (and filters of the convolutions) whose gate is open at test time.

`--validate` trains on the first 50,000 training images and measures on the other 10,000: for choosing hyperparameters.

Published: Louizos et al. 2018 (https://arxiv.org/abs/1712.01312), table 1: LeNet-300-100 219-214-100 at 1.4 %,
266-88-33 at 1.8 %; LeNet-5 9-18-65-25 at 1.0 %. Molchanov et al. 2017: 98.5 % sparse at 1.92 %.
"""

import argparse
import time

import result  # isort: skip - sets the environment that TensorFlow reads

import keras
import numpy as np

import keras_sparse as ks

layers = keras.layers


def mnist(validate, images):
    """Return `(x, y, x_test, y_test)`, pixels in [0, 1], as images or as vectors."""
    (x, y), test = keras.datasets.mnist.load_data()
    if validate:
        x, y, test = x[:50_000], y[:50_000], (x[50_000:], y[50_000:])
    shape = (28, 28, 1) if images else (784,)
    return x.reshape(-1, *shape) / np.float32(255), y, test[0].reshape(-1, *shape) / np.float32(255), test[1]


def lenet_300_100():
    return keras.Sequential(
        [
            keras.Input((784,)),
            layers.Dense(300, activation="relu"),
            layers.Dense(100, activation="relu"),
            layers.Dense(10),
        ]
    )


def lenet_5():
    """The one of Caffe: 20 and 50 filters, 800-500."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(20, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(50, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(500, activation="relu"),
            layers.Dense(10),
        ]
    )


def late_decay(rate, steps):
    """Constant until 70 % of training, then a fifth, and from 90 % on a twenty-fifth."""
    schedules = keras.optimizers.schedules
    return schedules.PiecewiseConstantDecay([int(0.7 * steps), int(0.9 * steps)], [rate, rate / 5, rate / 25])


def compile_with(model, optimizer):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def error_of(model, data):
    compile_with(model, "sgd")
    return 100 * (1 - model.evaluate(data[2], data[3], batch_size=1000, verbose=0)[1])


def train_l0(data, build, lambdas, epochs, gate_rate):
    """Train with unit gates; return the error, the sparsity and what is left."""
    x, y = data[:2]
    plain = build()
    weighted = [layer for layer in plain.layers if layer.weights]
    penalty = {f"{layer.name}/": price / len(x) for layer, price in zip(weighted, lambdas, strict=True)}
    gated = ks.add_l0(plain, penalty, "unit")
    steps = epochs * -(-len(x) // 128)
    adam = keras.optimizers.Adam
    rates = keras.optimizers.OptimizerMap(
        adam(late_decay(0.001, steps)), {".*log_alpha": adam(late_decay(gate_rate, steps))}
    )
    compile_with(gated, keras.optimizers.MultiOptimizer(rates))
    gated.fit(x, y, batch_size=128, epochs=epochs, verbose=0)
    left = [
        int(np.sum(gate > 0)) for layer in gated.layers if isinstance(layer, ks.layers.L0) for gate in layer.gates()
    ]
    baked = ks.bake(gated)
    return error_of(baked, data), ks.report(baked).totals["sparsity"], "-".join(map(str, left))


def train_proximal(data, epochs, target, rate):
    """Train with `ProximalL1` to a target sparsity."""
    x, y = data[:2]
    model = lenet_300_100()
    steps = epochs * -(-len(x) // 128)
    compile_with(model, keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps)))
    model.fit(
        x, y, batch_size=128, epochs=epochs, verbose=0, callbacks=[ks.callbacks.ProximalL1(target_sparsity=target)]
    )
    return error_of(model, data), ks.report(model).totals["sparsity"], "-"


def train_l1(data, epochs, strength, target):
    """The textbook's way: a loss term, and a threshold at the end."""
    x, y = data[:2]
    model = lenet_300_100()
    steps = epochs * -(-len(x) // 128)
    ks.regularize(model, keras.regularizers.L1(strength))
    compile_with(model, keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.001, steps)))
    model.fit(x, y, batch_size=128, epochs=epochs, verbose=0)
    before, dense = ks.report(model).totals["sparsity"], error_of(model, data)
    ks.prune(model, target, allocation="global")
    return error_of(model, data), before, f"before the threshold: {before:.3%} zeros, error {dense:.2f} %"


METHODS = {
    "L0, one lambda": lambda data: train_l0(data, lenet_300_100, (0.1, 0.1, 0.1), 90, 0.003),
    "L0, lambda per layer": lambda data: train_l0(data, lenet_300_100, (0.08, 0.45, 6), 100, 0.003),
    "L0, LeNet-5": lambda data: train_l0(data, lenet_5, (10, 0.5, 0.12, 7), 30, 0.01),
    "proximal L1, 95 %": lambda data: train_proximal(data, 25, 0.95, 0.001),
    "L1 loss, threshold 95 %": lambda data: train_l1(data, 25, 1e-5, 0.95),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--validate", action="store_true", help="measure on held-out training images")
    args = parser.parse_args()
    load, rows = result.load(), []
    for method in args.methods:
        data = mnist(args.validate, images=method.endswith("LeNet-5"))
        runs, started = [], time.perf_counter()
        for seed in args.seeds:
            keras.utils.set_random_seed(seed)
            runs.append(METHODS[method](data))
            print(method, seed, *runs[-1], f"{time.perf_counter() - started:.0f} s", flush=True)
        errors = [run[0] for run in runs]
        rows.append(
            [
                method,
                result.mean_and_spread(errors),
                " ".join(f"{error:.2f}" for error in errors),
                " ".join(f"{run[1]:.1%}" for run in runs),
                "; ".join(run[2] for run in runs),
                f"{(time.perf_counter() - started) / len(runs):.0f}",
            ]
        )
    images = "10,000 held-out training images" if args.validate else "10,000 test images"
    result.show(
        f"Regularization on MNIST, {images}, seeds {' '.join(map(str, args.seeds))}",
        ["method", "error, mean ± std", "each seed", "zeros in the kernels", "units left", "s per run"],
        rows,
        ["Mean ± sample standard deviation of the last epoch's error."],
        load,
    )


if __name__ == "__main__":
    main()
