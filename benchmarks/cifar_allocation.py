"""Allocations on a convolutional network: `Pruning` at 90 % with uniform, ERK and global sparsity, on CIFAR-10.

Six 3x3 convolutions with batch normalization (32-32, 64-64, 128-128, the first of each pair with stride 2), global
average pooling, a dense layer: 288,000 weights that are pruned. Adam with a cosine decay of the learning rate to 0,
batch 128, shifts and flips as augmentation, pruning over the first half. The error is that of the last epoch.

`--data` names a folder with arrays x_train, y_train, x_test, y_test in `cifar10.npz`; else Keras downloads CIFAR-10.
"""

import argparse
import pathlib
import time

import result  # isort: skip - sets the environment that TensorFlow reads

import keras
import numpy as np

import keras_sparse as ks

METHODS = ("dense", "uniform", "erk", "global")


def cifar10(folder):
    """Return `(x, y, x_test, y_test)` with images as float32 of mean 0."""
    if folder is None:
        (x, y), (x_test, y_test) = keras.datasets.cifar10.load_data()
    else:
        with np.load(pathlib.Path(folder) / "cifar10.npz") as file:
            x, y, x_test, y_test = (file[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    return (*((a - 120.0).astype("float32") / 64 if a.ndim > 2 else a.reshape(-1) for a in (x, y, x_test, y_test)),)


class Shifted(keras.utils.PyDataset):
    """Batches of images in a new order each epoch, each shifted by up to 4 pixels and mirrored at random."""

    def __init__(self, x, y, seed):
        super().__init__()
        self.x, self.y = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0))), y
        self.rng = np.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self):
        return -(-len(self.x) // 128)

    def __getitem__(self, index):
        chosen = self.order[128 * index : 128 * index + 128]
        row, column, mirrored = *self.rng.integers(0, 9, 2), self.rng.random() < 0.5
        images = self.x[chosen, row : row + 32, column : column + 32]
        return images[:, :, ::-1] if mirrored else images, self.y[chosen]

    def on_epoch_end(self):
        self.order = self.rng.permutation(len(self.x))


def build(rate, steps):
    """Return the compiled network."""
    layers, body = keras.layers, []
    for filters in (32, 64, 128):
        for strides in (2, 1):
            body += [layers.Conv2D(filters, 3, strides, padding="same", use_bias=False), layers.BatchNormalization()]
            body += [layers.ReLU()]
    body += [layers.GlobalAveragePooling2D(), layers.Dense(10)]
    model = keras.Sequential([layers.Input((32, 32, 3)), *body])
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=keras.backend.backend() != "tensorflow",  # JAX runs op by op without
    )
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of cifar10.npz")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=0.004)
    args = parser.parse_args()
    load, (x, y, x_test, y_test), rows = result.load(), cifar10(args.data), []
    errors, layers = {method: [] for method in args.methods}, {}
    started = time.perf_counter()
    for seed in args.seeds:
        for method in args.methods:
            keras.utils.set_random_seed(seed)
            data = Shifted(x, y, seed)
            model = build(args.learning_rate, args.epochs * len(data))
            callback = ks.callbacks.Pruning(args.sparsity, allocation=method, end=0.5) if method != "dense" else None
            model.fit(data, epochs=args.epochs, verbose=0, callbacks=[callback] if callback else [])
            errors[method].append(100 * (1 - model.evaluate(x_test, y_test, batch_size=500, verbose=0)[1]))
            kernels = [w for w in model.get_weights() if w.ndim > 1]
            layers[method] = " ".join(f"{np.mean(kernel == 0):.0%}" for kernel in kernels)
            print(
                seed, method, errors[method][-1], f"{time.perf_counter() - started:.0f} s", layers[method], flush=True
            )
    for method, found in errors.items():
        each = " ".join(f"{error:.2f}" for error in found)
        rows.append([method, result.mean_and_spread(found), each, layers[method]])
    result.show(
        f"CIFAR-10 at {args.sparsity:.0%}, {args.epochs} epochs, seeds {' '.join(map(str, args.seeds))}",
        ["allocation", "error", "each seed", "zeros of each kernel, last seed"],
        rows,
        [f"Data: {args.data or 'keras.datasets'}."],
        load,
    )


if __name__ == "__main__":
    main()
