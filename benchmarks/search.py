"""Search against fixed allocations at equal sparsity, on LeNet-5 (caffe) with MNIST and a small CNN with CIFAR-10.

A dense network is trained. Searches then have `--budget` candidates, each trained for an epoch on a few thousand images
by two worker processes and scored by its loss on 2,000 images that nobody trains on. `dynamic` divides by what
`ks.sensitivity` measures on `--samples` of these, with and without labels, and for `"obs"`. Then each allocation, found
or fixed, is trained in full from the same dense weights, in the same way: `Pruning` over the first half, Adam with a
cosine decay. The error is that of the last epoch on the test set.

`--data` names a folder with arrays x_train, y_train, x_test, y_test in `cifar10.npz`; else Keras downloads CIFAR-10.
"""

import argparse
import concurrent.futures
import multiprocessing
import statistics
import time

import result  # isort: skip - sets the environment that TensorFlow reads

import cifar_allocation
import keras
import numpy as np
import regularization_mnist

import keras_sparse as ks

METHODS = ("uniform", "erk", "global", "evolution", "reinforce", "dynamic", "dynamic, labels", "dynamic, obs")
SEARCHERS = {
    "random": ks.search.RandomSearch,
    "evolution": lambda: ks.search.Evolution(population=16, sample=6),
    "reinforce": ks.search.Reinforce,
}
# Arguments of `ks.sensitivity`, whose losses the dynamic programme divides.
MEASURED = {"dynamic": {}, "dynamic, labels": {}, "dynamic, obs": {"criterion": "obs"}}


def mnist():
    """Return `(x, y, x_test, y_test)`, images in [0, 1]."""
    return regularization_mnist.mnist(validate=False, images=True)


def processes(count):
    """A pool of fresh interpreters."""
    return concurrent.futures.ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def train(model, data, rate, epochs, callbacks=()):
    """Train with Adam and a cosine decay of the learning rate to 0."""
    schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * len(data))
    compiled(model, schedule).fit(data, epochs=epochs, verbose=0, callbacks=list(callbacks))


def compiled(model, rate):
    """The model, compiled with Adam."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"], jit_compile=False)
    return model


def find(model, data, method, rate, args, seed):
    """Return the allocation that a search finds, and how long it took."""
    x, y = data
    train, val = (x[: args.images], y[: args.images]), (x[-2000:], y[-2000:])
    started = time.perf_counter()
    with processes(args.workers) as executor:
        results = ks.search.search(
            compiled(model, rate),
            {"train": train, "val": val},
            searcher=SEARCHERS[method](),
            objective="loss",
            constraints={"sparsity": args.sparsity},
            budget=args.budget,
            epochs=1,
            seed=seed,
            executor=executor,
        )
    losses = [candidate.values.get("loss", np.nan) for candidate in results.candidates]
    best = results.best.number
    took = time.perf_counter() - started
    print(
        f"  {method}: loss {losses[0]:.3f} uniform, {losses[best]:.3f} best (candidate {best}), {took:.0f} s",
        flush=True,
    )
    return results.best.allocation, took


def divide(model, data, method, args, rate):
    """Return the allocation that dynamic programming finds, and how long it took."""
    x, y = (part[-args.samples :] for part in data)
    compiled(model, rate)
    started = time.perf_counter()
    found = ks.sensitivity(model, (x, y) if "labels" in method else x, **MEASURED[method]).allocate(args.sparsity)
    return found, time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=["mnist", "cifar"], default="cifar")
    parser.add_argument("--data", help="folder of cifar10.npz")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=[*METHODS, "random"])
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dense-epochs", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=4, help="of training each allocation")
    parser.add_argument("--budget", type=int, default=96, help="candidates of each search")
    parser.add_argument("--images", type=int, default=3000, help="that a candidate is trained on")
    parser.add_argument("--train", type=int, help="images that the networks are trained on, all but 2,000 by default")
    parser.add_argument("--samples", type=int, default=512, help="that dynamic programming measures losses on")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    load = result.load()
    cifar = args.dataset == "cifar"
    x, y, x_test, y_test = cifar_allocation.cifar10(args.data) if cifar else mnist()
    rate = 0.004 if cifar else 0.001
    errors, seconds, layers = {method: [] for method in ["dense", *args.methods]}, {}, {}
    for seed in args.seeds:
        keras.utils.set_random_seed(seed)
        model = cifar_allocation.build(rate, 1) if cifar else regularization_mnist.lenet_5()
        batches = Batches(x[:-2000][: args.train], y[:-2000][: args.train], seed, shifts=cifar)
        train(model, batches, rate, args.dense_epochs)
        dense = model.get_weights()

        def record(method, model=model, seed=seed):
            errors[method].append(100 * (1 - model.evaluate(x_test, y_test, batch_size=500, verbose=0)[1]))
            layers[method] = " ".join(
                f"{np.mean(kernel == 0):.1%}" for kernel in model.get_weights() if kernel.ndim > 1
            )
            print(f"{seed} {method} {errors[method][-1]:.2f} % {layers[method]}", flush=True)

        record("dense")
        for method in args.methods:
            model.set_weights(dense)
            target, options = args.sparsity, {"allocation": method}
            if method in SEARCHERS:
                target, took = find(model, (x, y), method, rate, args, seed)
            elif method in MEASURED:
                target, took = divide(model, (x, y), method, args, rate)
            if target != args.sparsity:
                options = {}
                seconds.setdefault(method, []).append(took)
            keras.utils.set_random_seed(seed)
            batches = Batches(x[:-2000][: args.train], y[:-2000][: args.train], seed, shifts=cifar)
            train(model, batches, rate / 2, args.epochs, [ks.callbacks.Pruning(target, end=0.5, **options)])
            record(method)
    rows = []
    for method, found in errors.items():
        each, took = " ".join(f"{error:.2f}" for error in found), seconds.get(method)
        took = f"{statistics.mean(took):.1f} s" if took else ""
        rows.append([method, result.mean_and_spread(found), each, took, layers[method]])
    result.show(
        f"Search on {args.dataset} at {args.sparsity:.0%}, {args.budget} candidates, {args.epochs} epochs after",
        ["allocation", "error", "each seed", "search", "zeros of each kernel, last seed"],
        rows,
        [f"Seeds {' '.join(map(str, args.seeds))}, {args.workers} workers."],
        load,
    )


class Batches(cifar_allocation.Shifted):
    """Batches of 128 images in a new order each epoch, shifted and mirrored or as they are."""

    def __init__(self, x, y, seed, shifts):
        super().__init__(x, y, seed)
        self.shifts, self.images = shifts, x

    def __getitem__(self, index):
        if self.shifts:
            return super().__getitem__(index)
        chosen = self.order[128 * index : 128 * index + 128]
        return self.images[chosen], self.y[chosen]


if __name__ == "__main__":
    main()
