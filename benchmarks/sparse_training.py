"""Sparse training on MNIST: RigL, SET, static masks, SNIP and lottery tickets next to gradual magnitude pruning.

Two networks, each with one recipe for all methods:

* `lenet5`: LeNet-5 (6-16-120-84) as Evci et al. 2022, "Gradient flow in sparse neural networks and how lottery tickets
  win" (https://arxiv.org/abs/2010.03533), train it: SGD with momentum 0.9 from 0.05, L2 penalty 0.0005, batch 128, 25
  epochs; magnitude pruning, uniform, between steps 3000 and 7000; RigL and SET move masks every 100 steps. Here the
  learning rate decays with a cosine, and the lottery ticket has 5 rounds of 10 epochs. `--rescale` multiplies the
  initial weights of networks that start sparse by 1 / sqrt(density of the kernel), as Liu et al. 2019, "Rethinking the
  value of network pruning" (https://arxiv.org/abs/1810.05270), do; without it many of them never begin to learn, as in
  Evci et al.
* `lenet300`: LeNet-300-100, Adam at 0.01 with a cosine decay to 0, batch 128, 30 epochs. With `--sgd` momentum and the
  L2 penalty of `lenet5`, from 0.1: close to Lee et al. 2019, "SNIP" (https://arxiv.org/abs/1810.02340), who train long.

The accuracy is that of the last epoch, never of the best. `--validate` trains on the first 50,000 training images and
measures on the other 10,000: for choosing hyperparameters.
"""

import argparse
import time

import result  # isort: skip - sets the environment that TensorFlow reads

import keras
import numpy as np

import keras_sparse as ks

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
ROUNDS = 5
DYNAMIC = {"rigl": "gradient", "set": "random", "static": "static"}
METHODS = ("dense", "magnitude", "lottery", "rigl", "set", "static", "snip")


def mnist(validate):
    """Return `(x, y, x_test, y_test)`, images in [0, 1] with a channel."""
    (x, y), test = keras.datasets.mnist.load_data()
    if validate:
        x, y, test = x[:50_000], y[:50_000], (x[50_000:], y[50_000:])
    return (*(a[..., None].astype("float32") / 255 if a.ndim > 1 else a for a in (x, y, *test)),)


def build(network, rate, steps, sgd):
    """Return a compiled network whose learning rate decays over `steps`."""
    layers = keras.layers
    options = {"kernel_regularizer": keras.regularizers.L2(5e-4)} if sgd else {}
    hidden = options | {"activation": "relu"}
    if network == "lenet5":
        body = [
            layers.Conv2D(6, 5, **hidden),
            layers.MaxPooling2D(),
            layers.Conv2D(16, 5, **hidden),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(120, **hidden),
            layers.Dense(84, **hidden),
            layers.Dense(10, **options),
        ]
    else:
        body = [
            layers.Flatten(),
            layers.Dense(300, **hidden),
            layers.Dense(100, **hidden),
            layers.Dense(10, **options),
        ]
    model = keras.Sequential([layers.Input((28, 28, 1)), *body])
    decay = keras.optimizers.schedules.CosineDecay(rate, steps)
    momentum = keras.optimizers.SGD(decay, momentum=0.9)
    # Seven steps in one call, which divide an epoch of 469; masks move at the first call at or past the due step.
    model.compile(
        momentum if sgd else keras.optimizers.Adam(decay),
        LOSS,
        metrics=["accuracy"],
        jit_compile=False,
        steps_per_execution=7,
    )
    return model


def rescale(model, sparsity, allocation):
    """Make up for the inputs that units of a sparse network lack."""
    for goal in ks.pruning.Plan(model, sparsity, allocation=allocation).goals:
        goal.weight.variable.assign(goal.weight.numpy() / np.sqrt(1 - goal.sparsity))


def train(method, args, seed, data):
    """Train one model and return `(error in percent, sparsity by mask)`."""
    x, y, x_test, y_test = data
    epochs = args.epochs // ROUNDS * ROUNDS if method == "lottery" else args.epochs
    steps = epochs * -(-len(x) // 128)
    keras.utils.set_random_seed(seed)
    model = build(args.network, args.learning_rate, steps // (ROUNDS if method == "lottery" else 1), args.sgd)
    callbacks = []
    if method == "magnitude":
        begin, end = (3000 / 11719, 7000 / 11719) if args.network == "lenet5" else (0.0, 0.5)
        callbacks = [
            ks.callbacks.Pruning(args.sparsity, allocation=args.pruning_allocation, begin=begin, end=end, frequency=100)
        ]
    elif method == "lottery":
        rate = 1 - (1 - args.sparsity) ** (1 / (ROUNDS - 1))
        callbacks = [ks.callbacks.LotteryTicket(ROUNDS, rate, args.rewind_to, allocation=args.pruning_allocation)]
    elif method in DYNAMIC:
        if args.rescale:
            rescale(model, args.sparsity, args.allocation)
        callbacks = [
            ks.callbacks.DynamicSparseTraining(
                args.sparsity, args.allocation, DYNAMIC[method], args.drop_fraction, end=args.end, seed=seed
            )
        ]
    elif method == "snip":
        ks.prune(model, args.sparsity, criterion="snip", allocation="global", data=(x[: args.snip], y[: args.snip]))
        callbacks = [ks.callbacks.KeepSparsity()]
    model.fit(x, y, batch_size=128, epochs=epochs, verbose=0, callbacks=callbacks)
    _, accuracy = model.evaluate(x_test, y_test, batch_size=1000, verbose=0)
    kernels = [weight for weight in model.get_weights() if weight.ndim > 1]
    zeros = sum(int(np.sum(kernel == 0)) for kernel in kernels) / sum(kernel.size for kernel in kernels)
    return 100 * (1 - accuracy), zeros


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=["lenet5", "lenet300"])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--sparsity", type=float, help="default: 0.95 for lenet5, 0.98 for lenet300")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="default: 25 (50 for the lottery) for lenet5, 30 for lenet300")
    parser.add_argument("--learning-rate", type=float, help="default: 0.05 for lenet5, 0.01 for lenet300, 0.1 by SGD")
    parser.add_argument("--sgd", action="store_true", help="train lenet300 by SGD with momentum and an L2 penalty")
    parser.add_argument("--allocation", default="erk", choices=["erk", "uniform"], help="of rigl, set and static")
    parser.add_argument("--pruning-allocation", default="uniform", help="of magnitude and lottery")
    parser.add_argument("--rescale", action="store_true", help="larger initial weights for rigl, set and static")
    parser.add_argument("--drop-fraction", type=float, default=0.3)
    parser.add_argument("--end", type=float, default=0.75, help="fraction of training that moves masks")
    parser.add_argument("--rewind-to", type=int, default=0)
    parser.add_argument("--snip", type=int, default=1024, help="images that SNIP sees")
    parser.add_argument("--validate", action="store_true", help="measure on held-out training images")
    args = parser.parse_args()
    lenet5 = args.network == "lenet5"
    args.sparsity = args.sparsity or (0.95 if lenet5 else 0.98)
    args.learning_rate = args.learning_rate or (0.05 if lenet5 else 0.1 if args.sgd else 0.01)
    args.sgd |= lenet5
    epochs = args.epochs
    load, data, rows = result.load(), mnist(args.validate), []
    for method in args.methods:
        args.epochs = epochs or (50 if method == "lottery" else 25 if lenet5 else 30)
        started = time.perf_counter()
        errors, zeros = zip(*(train(method, args, seed, data) for seed in args.seeds), strict=True)
        row = {
            "method": method,
            "epochs": str(args.epochs),
            "zeros": " ".join(sorted({f"{share:.2%}" for share in zeros})),
            "error": result.mean_and_spread(errors),
            "each seed": " ".join(f"{error:.2f}" for error in errors),
            "s per run": f"{(time.perf_counter() - started) / len(errors):.0f}",
        }
        rows.append(row)
        print(" ".join(row.values()), flush=True)
    images = "10,000 held-out training images" if args.validate else "10,000 test images"
    result.show(
        f"{args.network} on MNIST at {args.sparsity:.0%}, {images}, seeds {' '.join(map(str, args.seeds))}",
        list(rows[0]),
        [list(row.values()) for row in rows],
        ["Mean ± sample standard deviation of the last epoch's error."],
        load,
    )


if __name__ == "__main__":
    main()
