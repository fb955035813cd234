"""AC/DC (Peste et al. 2021, https://arxiv.org/abs/2106.12379) next to gradual magnitude pruning, at equal epochs.

AC/DC alternates: at the start of each sparse phase the smallest weights are masked at once, at the target sparsity; in
each dense phase all weights are trained again, from zero where they were masked. It ends sparse, and fine-tunes. Here
dense training lasts until `--begin`, `--cycles` pairs of a sparse and a dense phase of equal length until `--end`, the
last sparse phase from there on (fractions of the steps). The paper's ResNet-50 has a tenth of its 100 epochs dense,
then phases of 5 epochs. Gradual pruning reaches its target half-way.

`lenet` is LeNet-300-100 on MNIST, `cifar` the network of `cifar_allocation.py`. Both methods get the same optimizer,
SGD with momentum 0.9 as in the paper or Adam, with a cosine decay of the learning rate to 0, batch 128. The error is
that of the last epoch. `--validate` measures on 10,000 images that are held out of training, for choosing
hyperparameters.
"""

import argparse
import time

import result  # isort: skip - sets the environment that TensorFlow reads

import cifar_allocation
import keras
import lenet_high_sparsity
import numpy as np

import keras_sparse as ks
from keras_sparse.callbacks.scheduled import ScheduledCallback

OPTIMIZERS = {"sgd": (lambda rate: keras.optimizers.SGD(rate, 0.9), 0.1), "adam": (keras.optimizers.Adam, 0.004)}
METHODS = ("gradual", "acdc")


class ACDC(ScheduledCallback):
    """Alternating compressed and decompressed training.

    Args:
        sparsity: That of the sparse phases.
        allocation: As in `ks.callbacks.Pruning`.
        cycles: Pairs of a sparse and a dense phase before the last sparse one.
        begin: When the first sparse phase begins, as a fraction of the fit.
        end: When the last one does.
    """

    def __init__(self, sparsity, allocation, cycles, begin, end):
        super().__init__(begin, end, None, None, 0)
        self.sparsity, self.allocation, self.cycles, self.begin, self.end = sparsity, allocation, cycles, begin, end
        self._sparse = False

    def make_plan(self, run, untrained=()):
        return ks.pruning.Plan(run.model, self.sparsity, allocation=self.allocation, untrained=untrained)

    def update(self, run, progress):
        sparse = progress == 1 or int(2 * self.cycles * progress) % 2 == 0
        if sparse == self._sparse:
            return
        self._sparse = sparse
        if sparse:
            run.plan.update(run.parts)
            return
        for variable, mask in run.parts.masks.pairs:
            mask.assign(np.ones(tuple(variable.shape), bool))


def data_of(args):
    """Return `(x, y, x_test, y_test)`."""
    x, y, *test = lenet_high_sparsity.mnist() if args.network == "lenet" else cifar_allocation.cifar10(args.data)
    return (x[:-10_000], y[:-10_000], x[-10_000:], y[-10_000:]) if args.validate else (x, y, *test)


def train(args, method, allocation, seed, data):
    """Train one network and return its error in percent."""
    x, y, x_test, y_test = data
    make, default = OPTIMIZERS[args.optimizer]
    rate, steps = args.learning_rate or default, args.epochs * -(-len(x) // 128)
    keras.utils.set_random_seed(seed)
    lenet = args.network == "lenet"
    model = lenet_high_sparsity.build() if lenet else cifar_allocation.build(rate, steps)
    model.compile(
        make(keras.optimizers.schedules.CosineDecay(rate, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    if method == "acdc":
        callback = ACDC(args.sparsity, allocation, args.cycles, args.begin, args.end)
    else:
        callback = ks.callbacks.Pruning(args.sparsity, allocation=allocation, end=0.5)
    batches = {"x": x, "y": y, "batch_size": 128} if lenet else {"x": cifar_allocation.Shifted(x, y, seed)}
    model.fit(**batches, epochs=args.epochs, verbose=0, callbacks=[callback])
    assert np.isclose(ks.report(model).totals["sparsity"], args.sparsity, atol=1e-3)
    return 100 * (1 - model.evaluate(x_test, y_test, batch_size=500, verbose=0)[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=["lenet", "cifar"])
    parser.add_argument("--data", help="folder of cifar10.npz, for cifar")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--allocations", nargs="+", default=["uniform", "global"])
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--optimizer", default="sgd", choices=OPTIMIZERS)
    parser.add_argument("--learning-rate", type=float, help="default: 0.1 for SGD, 0.004 for Adam")
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--begin", type=float, default=0.1)
    parser.add_argument("--end", type=float, default=0.75)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--validate", action="store_true", help="measure on held-out training images")
    args = parser.parse_args()
    load, data, rows = result.load(), data_of(args), []
    for allocation in args.allocations:
        for method in args.methods:
            started = time.perf_counter()
            errors = [train(args, method, allocation, seed, data) for seed in args.seeds]
            each = " ".join(f"{error:.2f}" for error in errors)
            seconds = f"{(time.perf_counter() - started) / len(errors):.0f}"
            rows.append([method, allocation, result.mean_and_spread(errors), each, seconds])
            print(" | ".join(rows[-1]), flush=True)
    result.show(
        f"AC/DC, {args.network} at {args.sparsity:.0%}, {args.optimizer}, {args.epochs} epochs",
        ["method", "allocation", "error", "each seed", "s per run"],
        rows,
        [f"Measured on {'held-out training' if args.validate else 'test'} images."],
        load,
    )


if __name__ == "__main__":
    main()
