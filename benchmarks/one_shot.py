"""Pruning in one shot: test accuracy without a training step, by criterion, on 1,024 unlabelled training samples.

Models: LeNet-300-100 and LeNet-5 (Caffe's: 20 and 50 filters of 5x5, 500 units) on MNIST, trained here with Adam
(0.001, batch 128), one for each seed; a small transformer on the last 120 words of IMDB's reviews; with `--resnet8` and
`--cifar10` the trained ResNet-8 of MLPerf Tiny on CIFAR-10, whose seeds are those of the samples; with `--channels`, it
loses channels. `--time` measures what `ks.prune` takes in a process of its own, for 1,024 images of MNIST, or 128 of
noise at 224 pixels for MobileNetV2.

`"obs"` and repair see the samples and no labels; `"magnitude"` alone sees nothing. `erk` allocates by shape.
"""

import argparse
import multiprocessing
import pathlib
import resource
import time

import result  # isort: skip - sets the environment that TensorFlow reads

import keras
import numpy as np

import keras_sparse as ks

# Name of a row: what `ks.prune` is told beside the sparsity, and whether it gets data.
METHODS = {
    "magnitude, global": ({"allocation": "global"}, False),
    "magnitude, erk": ({"allocation": "erk"}, False),
    "magnitude, erk, repair": ({"allocation": "erk", "repair": True}, True),
    "wanda, uniform": ({"criterion": "wanda"}, True),
    "obs, uniform": ({"criterion": "obs"}, True),
    "obs, global": ({"criterion": "obs", "allocation": "global"}, True),
    "obs, erk": ({"criterion": "obs", "allocation": "erk"}, True),
    "obs, dynamic": ({"criterion": "obs", "allocation": "dynamic"}, True),
}
TWO_OF_FOUR = {
    "magnitude, 2:4": ({"pattern": "2:4"}, False),
    "obs, 2:4": ({"pattern": "2:4", "criterion": "obs"}, True),
}

WORDS, LENGTH = 5000, 120  # of IMDB's vocabulary, and of a review

CHANNELS = {
    "magnitude": ({"pattern": "channel"}, False),
    "magnitude, repair": ({"pattern": "channel", "repair": True}, True),
    "magnitude, global, repair": ({"pattern": "channel", "allocation": "global", "repair": True}, True),
}
# A quarter of the inner channels of each block of ResNet-8, half of all multiplications.
INNER = {"conv2d_1/|conv2d_3/|conv2d_6/": 0.25}
TARGETS = {"a quarter of the inner channels": INNER, "half of the MACs": ks.Budget(macs=0.5)}


def mnist():
    """Return `(x, y, x_test, y_test)`, images in [0, 1] with a channel."""
    (x, y), (x_test, y_test) = keras.datasets.mnist.load_data()
    return x[..., None].astype("float32") / 255, y, x_test[..., None].astype("float32") / 255, y_test


def lenet_300_100():
    layers = keras.layers
    dense = [layers.Dense(300, activation="relu"), layers.Dense(100, activation="relu"), layers.Dense(10)]
    return keras.Sequential([keras.Input((28, 28, 1)), layers.Flatten(), *dense])


def lenet_5():
    layers = keras.layers
    body = [layers.Conv2D(20, 5), layers.MaxPooling2D(), layers.Conv2D(50, 5), layers.MaxPooling2D()]
    head = [layers.Flatten(), layers.Dense(500, activation="relu"), layers.Dense(10)]
    return keras.Sequential([keras.Input((28, 28, 1)), *body, *head])


def imdb():
    """Return `(x, y, x_test, y_test)`, reviews as the numbers of their last words."""
    (x, y), (x_test, y_test) = keras.datasets.imdb.load_data(num_words=WORDS)
    x, x_test = (keras.utils.pad_sequences(part, LENGTH) for part in (x, x_test))
    return x, y, x_test, y_test


def transformer():
    """An encoder of one block, whose attention, feed-forward and output kernels are pruned."""
    layers, width = keras.layers, 64
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(WORDS, width)(inputs)
    x = x + layers.Embedding(LENGTH, width)(keras.ops.arange(LENGTH))
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, width // 4)(x, x))
    x = layers.LayerNormalization()(x + layers.Dense(width)(layers.Dense(2 * width, activation="relu")(x)))
    x = layers.Dense(width, activation="relu")(layers.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, layers.Dense(2)(x))


def trained(build, seed, epochs, data):
    keras.utils.set_random_seed(seed)
    model = build()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, jit_compile=keras.backend.backend() != "tensorflow")  # JAX runs op by op without
    model.fit(*data[:2], batch_size=128, epochs=epochs, verbose=0)
    return model


def cifar10(folder):
    """Return `(x, y, x_test, y_test)`, images in [0, 255] as ResNet-8 was trained on."""
    with np.load(pathlib.Path(folder) / "cifar10.npz") as file:
        x, y, x_test, y_test = (file[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    return x.astype("float32"), y.reshape(-1), x_test.astype("float32"), y_test.reshape(-1)


def accuracy(model, x, y):
    return 100 * float(np.mean(np.argmax(model.predict(x, batch_size=500, verbose=0), axis=-1) == y))


def measure(title, models, data, sparsities, methods, samples):
    """Print a table of accuracies; `models` has a trained model for each seed."""
    load, rows, weights = result.load(), [], [model.get_weights() for model in models]
    dense = [accuracy(model, *data[2:]) for model in models]
    rows.append(["dense", "-", result.mean_and_spread(dense), "-", "-"])
    for sparsity in sparsities:
        for name, (arguments, needs) in (methods if sparsity is not None else TWO_OF_FOUR).items():
            if isinstance(TARGETS.get(sparsity), dict) and "allocation" in arguments:
                continue  # A dict says itself how much leaves where.
            found, seconds = [], []
            for seed, (model, values) in enumerate(zip(models, weights, strict=True)):
                model.set_weights(values)
                chosen = np.random.default_rng(seed).permutation(len(data[0]))[:samples]
                started = time.perf_counter()
                ks.prune(model, TARGETS.get(sparsity, sparsity), **arguments, data=data[0][chosen] if needs else None)
                seconds.append(time.perf_counter() - started)
                found.append(accuracy(model, *data[2:]))
                model.set_weights(values)
            lost = float(np.mean(dense) - np.mean(found))
            share = "50 %" if sparsity is None else sparsity if sparsity in TARGETS else f"{sparsity:.0%}"
            rows.append([name, share, result.mean_and_spread(found), f"{lost:+.2f}", f"{np.mean(seconds):.1f}"])
            print(" ".join(rows[-1]), flush=True)
    result.show(
        f"{title}, {samples} unlabelled samples, {len(models)} seeds",
        ["method", "sparsity", "accuracy", "points lost", "seconds"],
        rows,
        load_before=load,
    )


# What is timed: a model, a sparsity and an allocation.
TIMED = (
    ("LeNet-300-100", 0.8, "erk"),
    ("LeNet-300-100", 0.95, "erk"),
    ("LeNet-300-100", 0.8, "uniform"),
    ("MobileNetV2", 0.5, "uniform"),
    ("MobileNetV2", 0.8, "erk"),
)


def timed(name, sparsity, allocation):
    """Prune once with `"obs"`: return wall time, CPU time, and the GiB beyond the model and data at the process's peak.

    Above what training the LeNet took before, its pruning does not go.
    """
    if name == "MobileNetV2":
        keras.utils.set_random_seed(0)
        model, batch_size = keras.applications.MobileNetV2(weights=None), 16
        samples = np.random.default_rng(0).normal(size=(128, 224, 224, 3)).astype("float32")
    else:
        data = mnist()
        model, batch_size, samples = trained(lenet_300_100, 0, 1, data), 32, data[0][:1024]
    before = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    cpu, started = time.process_time(), time.perf_counter()
    ks.prune(model, sparsity, criterion="obs", allocation=allocation, data=samples, batch_size=batch_size)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
    return seconds, cpu, (peak - before) / 2**30


def measure_time(models):
    """Print a table of times and memory, each of a process of its own."""
    load, rows = result.load(), []
    for name, sparsity, allocation in TIMED:
        if name.lower() in models:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(timed, (name, sparsity, allocation))
            rows.append([name, f"{sparsity:.0%}", allocation, *(f"{value:.2f}" for value in found)])
            print(" ".join(rows[-1]), flush=True)
    columns = ["model", "sparsity", "allocation", "s, wall", "s, CPU", "GiB above the model at the peak"]
    result.show("Time and memory of `obs` with its repair", columns, rows, load_before=load)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["lenet-300-100", "lenet-5"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--sparsities", nargs="+", type=float)
    parser.add_argument("--resnet8", help="the trained model, an .h5 file")
    parser.add_argument("--cifar10", help="folder of cifar10.npz")
    parser.add_argument("--channels", action="store_true", help="remove channels of ResNet-8")
    parser.add_argument("--time", nargs="*", metavar="MODEL", help="time and memory, of lenet-300-100 and mobilenetv2")
    args = parser.parse_args()
    methods = {name: METHODS[name] for name in args.methods}
    for name, title, build, more in (
        ("lenet-300-100", "LeNet-300-100 on MNIST", lenet_300_100, [None]),
        ("lenet-5", "LeNet-5 (Caffe) on MNIST", lenet_5, []),
    ):
        if name in args.models:
            data = mnist()
            models = [trained(build, seed, args.epochs, data) for seed in range(args.seeds)]
            sparsities = args.sparsities or [0.8, 0.9, 0.95]
            measure(title, models, data, [*sparsities, *more], methods, args.samples)
    if "transformer" in args.models:
        data = imdb()
        models = [trained(transformer, seed, args.epochs, data) for seed in range(args.seeds)]
        sparsities = args.sparsities or [0.5, 0.7]
        measure("A transformer on IMDB", models, data, sparsities, methods, args.samples)
    if args.resnet8:
        models = [keras.models.load_model(args.resnet8, compile=False)] * args.seeds
        measure(
            "ResNet-8 of MLPerf Tiny on CIFAR-10",
            models,
            cifar10(args.cifar10),
            TARGETS if args.channels else args.sparsities or [0.5, 0.7],
            CHANNELS if args.channels else methods,
            args.samples,
        )
    if args.time is not None:
        measure_time(args.time or ["lenet-300-100", "mobilenetv2"])


if __name__ == "__main__":
    main()
