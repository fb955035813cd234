"""`AccuracyBudget` next to fixed sparsities: as sparse as one point of accuracy allows, on CIFAR-10 and spoken digits.

A dense network is trained. From its weights, `Pruning` trains to each fixed sparsity in `--epochs` epochs, and
`AccuracyBudget` trains for at most 1.5 times as many, steered by a part of the training data that nobody trains on: it
may lose one point there. `Pruning` has Adam with a cosine decay of the learning rate to 0, the budget, which judges
each epoch, Adam at a low and constant one; both have `"global"` allocation. What counts is the accuracy on the test
data, of the last epoch, or of the epoch that the budget kept.

`cifar` is the network of `cifar_allocation.py`, `--data` a folder with its `cifar10.npz`; `keywords` that of
`keyword_spotting.py`, whose 1x1 convolutions are pruned, and `--data` its `fsdd.npz`. `--folder` keeps dense weights
and results: a run that was interrupted goes on from there, and `--methods` may be run one after another.
"""

import argparse
import json
import pathlib
import statistics
import time

import result  # isort: skip - sets the environment that TensorFlow reads

import cifar_allocation
import keras
import keyword_spotting
import numpy as np

import keras_sparse as ks

DROP = 0.01
FIXED = (0.8, 0.85, 0.9, 0.95)


class Cifar:
    """A small convolutional network on CIFAR-10."""

    dense_epochs, epochs, rate, filters = 10, 8, 0.002, None

    def __init__(self, args):
        x, y, self.x_test, self.y_test = cifar_allocation.cifar10(args.data)
        images = args.images or 15_000
        self.train, self.val = (x[:images], y[:images]), (x[-10_000:], y[-10_000:])

    def build(self, rate, steps):
        return cifar_allocation.build(rate, steps)

    def batches(self, seed):
        return cifar_allocation.Shifted(*self.train, seed)


class Keywords:
    """A small convolutional network on spoken digits."""

    dense_epochs, epochs, rate, filters = 20, 16, 0.002, staticmethod(keyword_spotting.pointwise)

    def __init__(self, args):
        x, y, self.x_test, self.y_test = keyword_spotting.spectrograms(args.data)
        order = np.random.default_rng(0).permutation(len(x))
        held, used = order[:600], order[600:][: args.images]
        self.train, self.val = (x[used], y[used]), (x[held], y[held])

    def build(self, rate, steps):
        model, schedule = keyword_spotting.build(), keras.optimizers.schedules.CosineDecay(rate, steps)
        model.compile(keras.optimizers.Adam(schedule), "sparse_categorical_crossentropy", metrics=["accuracy"])
        return model

    def batches(self, seed):
        return keyword_spotting.Shifted(*self.train, seed)


def trained(task, seed, epochs, rate, weights=None, callbacks=(), constant=False, **arguments):
    """Train a model, from given weights if there are any, and return it with the number of epochs that it took."""
    keras.utils.set_random_seed(seed)
    batches = task.batches(seed)
    model = task.build(rate, epochs * len(batches) if not constant else 10**9)
    if weights is not None:
        model.set_weights(weights)
    history = model.fit(batches, epochs=epochs, verbose=0, callbacks=list(callbacks), **arguments)
    return model, len(history.epoch)


def accuracy(model, x, y):
    return model.evaluate(x, y, batch_size=500, verbose=0, return_dict=True)["accuracy"]


def dense(task, seed, args, folder):
    """Return the weights of a dense network, its accuracies and the epochs it took."""
    path = folder / f"{args.task}-{seed}-{args.dense_epochs or task.dense_epochs}-{len(task.train[0])}.npz"
    epochs = args.dense_epochs or task.dense_epochs
    if path.exists():
        model = task.build(task.rate, 1)
        with np.load(path) as file:
            model.set_weights([file[str(i)] for i in range(len(file.files))])
    else:
        model, _ = trained(task, seed, epochs, 2 * task.rate)
        np.savez(path, **{str(i): value for i, value in enumerate(model.get_weights())})
    return model.get_weights(), accuracy(model, *task.val), epochs, accuracy(model, task.x_test, task.y_test)


def measure(task, method, seed, args, folder):
    """Return a row: the sparsity, the accuracies before and after, and the epochs."""
    weights, val, _, test = dense(task, seed, args, folder)
    epochs, rate, started = args.epochs or task.epochs, task.rate, time.perf_counter()
    how = {"allocation": "global", "filters": task.filters}
    if method == "budget":
        callback = ks.callbacks.AccuracyBudget(DROP, baseline=val, **how)
        epochs, rate = int(1.5 * epochs), args.budget_rate
        arguments = {"validation_data": task.val, "validation_batch_size": 500, "constant": True}
    else:
        callback, arguments = ks.callbacks.Pruning(float(method), end=0.5, **how), {}
    model, took = trained(task, seed, epochs, rate, weights, [callback], **arguments)
    goals = ks.pruning.Plan(model, 0.5, filters=task.filters).goals
    kernels = [goal.weight.numpy() for goal in goals]
    row = {
        "sparsity": float(sum(np.sum(k == 0) for k in kernels) / sum(k.size for k in kernels)),
        "dense": test,
        "test": accuracy(model, task.x_test, task.y_test),
        "val drop": val - accuracy(model, *task.val),
        "epochs": took,
        "seconds": time.perf_counter() - started,
    }
    if method == "budget":
        row["front"] = [[round(r["sparsity"], 4), round(r["val_accuracy"], 4)] for r in callback.front().rows]
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["cifar", "keywords"])
    parser.add_argument("--data", help="folder of cifar10.npz, or path of fsdd.npz")
    parser.add_argument("--methods", nargs="+", default=[*map(str, FIXED), "budget"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dense-epochs", type=int)
    parser.add_argument("--epochs", type=int, help="of one run of `Pruning`")
    parser.add_argument("--budget-rate", type=float, default=3e-4, help="learning rate of the budget's fit")
    parser.add_argument("--images", type=int, help="to train on: 15,000 of CIFAR-10, all recordings that are left")
    parser.add_argument("--folder", default="accuracy_budget", help="of dense weights and results")
    args = parser.parse_args()
    load, folder, rows = result.load(), pathlib.Path(args.folder), []
    folder.mkdir(parents=True, exist_ok=True)
    task = {"cifar": Cifar, "keywords": Keywords}[args.task](args)
    epochs, dense_epochs = args.epochs or task.epochs, args.dense_epochs or task.dense_epochs
    for method in args.methods:
        found = []
        for seed in args.seeds:
            name = f"{args.task}-{method}-{seed}-{dense_epochs}-{epochs}-{len(task.train[0])}.json"
            if method == "budget":
                name = f"{args.budget_rate:g}-{name}"
            if not (folder / name).exists():
                row = measure(task, method, seed, args, folder)
                (folder / name).write_text(json.dumps(row))
                print(method, seed, row, flush=True)
            found.append(json.loads((folder / name).read_text()))
        drops = [100 * (row["dense"] - row["test"]) for row in found]
        rows.append(
            [
                method,
                " ".join(f"{row['sparsity']:.1%}" for row in found),
                result.mean_and_spread([100 * row["test"] for row in found]),
                f"{statistics.mean(drops):+.2f}",
                " ".join(f"{drop:+.2f}" for drop in drops),
                " ".join(f"{100 * row['val drop']:+.2f}" for row in found),
                " ".join(str(row["epochs"]) for row in found),
                f"{statistics.mean(row['seconds'] for row in found):.0f}",
            ]
        )
    each = " ".join(f"{100 * row['dense']:.2f}" for row in found)
    result.show(
        f"A budget of one point, {args.task}",
        ["method", "sparsity", "test accuracy", "points lost", "each seed", "on validation data", "epochs", "s"],
        rows,
        [
            f"{len(task.train[0])} samples to train on, {len(task.val[0])} to validate, {len(task.x_test)} to test. "
            f"Dense: {dense_epochs} epochs, test accuracy {each} %."
        ],
        load,
    )


if __name__ == "__main__":
    main()
