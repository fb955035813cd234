"""LeNet-300-100 on MNIST at 95 to 99 %: what more than gradual magnitude pruning gains, with one recipe.

Rows: `ks.callbacks.Pruning` by allocation, as it is, with `live_paths`, and in a `keras.distillation.Distiller` with
a dense teacher of the same epochs (temperature 3, half of the loss is the labels'). The recipe is that of
`lenet_mnist.py` (Adam 0.004 with a cosine decay, batch 128, the target reached half-way), with the error of the last
epoch. "Live" is the share of the weights that are left which lie on a path from an input to an output.
"""

import argparse
import functools
import time

import result  # isort: skip - sets the environment that TensorFlow reads

import keras
import numpy as np

import keras_sparse as ks

ALLOCATIONS = {"uniform": ks.pruning.Uniform, "erk": ks.pruning.ERK, "global": ks.pruning.Global}
VARIANTS = ("", ", live paths", ", distilled")
METHODS = ["dense"] + [f"{name}{variant}" for name in ALLOCATIONS for variant in VARIANTS]
END = 0.5  # fraction of training that prunes


def mnist():
    """Return `(x, y, x_test, y_test)`, images as vectors in [0, 1]."""
    (x, y), (x_test, y_test) = keras.datasets.mnist.load_data()
    return x.reshape(-1, 784).astype("float32") / 255, y, x_test.reshape(-1, 784).astype("float32") / 255, y_test


def build():
    layers = keras.layers
    body = [layers.Dense(300, activation="relu"), layers.Dense(100, activation="relu")]
    return keras.Sequential([keras.Input((784,)), *body, layers.Dense(10)])


def compiled(model, steps):
    """The model with the recipe."""
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.004, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def callbacks_of(method, sparsity):
    if method == "dense":
        return []
    name, _, variant = method.partition(", ")
    return [ks.callbacks.Pruning(sparsity, allocation=ALLOCATIONS[name](live_paths=variant == "live paths"), end=END)]


@functools.cache
def teacher(epochs):
    """A dense model that has learnt by the same recipe, from another seed."""
    keras.utils.set_random_seed(100)
    x, y, x_test, y_test = mnist()
    model = compiled(build(), epochs * -(-len(x) // 128))
    model.fit(x, y, batch_size=128, epochs=epochs, verbose=0)
    print(f"teacher: {100 * (1 - model.evaluate(x_test, y_test, batch_size=1000, verbose=0)[1]):.2f} %", flush=True)
    return model


def train(method, sparsity, seed, epochs, data):
    """Train one model and return `(error in percent, zeros, share of the weights left that are on a live path)`."""
    x, y, x_test, y_test = data
    steps = epochs * -(-len(x) // 128)
    guide = teacher(epochs) if method.endswith("distilled") else None
    keras.utils.set_random_seed(seed)
    model = trained = compiled(build(), steps)
    if guide is not None:
        softened = keras.distillation.LogitsDistillation(temperature=3.0)
        trained = compiled(keras.distillation.Distiller(guide, model, softened), steps)
    trained.fit(x, y, batch_size=128, epochs=epochs, verbose=0, callbacks=callbacks_of(method, sparsity))
    error = 100 * (1 - model.evaluate(x_test, y_test, batch_size=1000, verbose=0)[1])
    kernels = [layer.kernel.numpy() != 0 for layer in model.layers]
    left, live = sum(map(np.sum, kernels)), sum(mask.sum() for mask in ks.graph.Paths(model).alive().values())
    return error, 1 - left / sum(kernel.size for kernel in kernels), live / left


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.95, 0.98, 0.99])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()
    load, data, rows = result.load(), mnist(), []
    for sparsity in args.sparsities:
        for method in args.methods:
            started = time.perf_counter()
            runs = [train(method, sparsity, seed, args.epochs, data) for seed in args.seeds]
            errors, zeros, live = zip(*runs, strict=True)
            row = [
                method,
                f"{sparsity:.0%}",
                result.mean_and_spread(errors),
                " ".join(f"{error:.2f}" for error in errors),
                " ".join(sorted({f"{share:.3%}" for share in zeros})),
                " ".join(f"{share:.1%}" for share in live),
                f"{(time.perf_counter() - started) / len(runs):.0f}",
            ]
            rows.append(row)
            print(" | ".join(row), flush=True)
    result.show(
        f"LeNet-300-100 on MNIST, {args.epochs} epochs, {len(args.seeds)} seeds",
        ["method", "sparsity", "error", "each seed", "zeros", "live", "s"],
        rows,
        load_before=load,
    )


if __name__ == "__main__":
    main()
