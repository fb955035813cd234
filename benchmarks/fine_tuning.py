"""Pruning while fine-tuning: LeNet-300-100 learns the digits 0-4 of MNIST, then 5-9 while it is pruned.

The question is Sanh et al.'s, "Movement pruning" (https://arxiv.org/abs/2005.07683): a trained weight is large because
the first task made it so; do criteria that follow the gradient of the second task choose better? All weights are
ranked together (`allocation="global"`). Both tasks use Adam with a cosine decay of the learning rate to 0, batch 128,
pixels in [0, 1]. The error is that of the last epoch on the test images of 5-9.
"""

import argparse
import statistics
import time

import result  # isort: skip - sets the environment that TensorFlow reads

import keras
import numpy as np

import keras_sparse as ks

CRITERIA = ("magnitude", "movement", "taylor")


def digits(first):
    """Return `(x, y, x_test, y_test)` of the five digits from `first` on, with labels 0-4."""
    found = []
    for x, y in keras.datasets.mnist.load_data():
        chosen = (y >= first) & (y < first + 5)
        found += [x[chosen].reshape(-1, 784).astype("float32") / 255, y[chosen] - first]
    return found


def fit(model, data, rate, epochs, *callbacks):
    """Train `model` with a new optimizer."""
    x, y, *_ = data
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, epochs * -(-len(x) // 128))),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=keras.backend.backend() != "tensorflow",  # JAX runs op by op without
    )
    model.fit(x, y, batch_size=128, epochs=epochs, verbose=0, callbacks=list(callbacks))


def error(model, data):
    """Error in percent on the test images."""
    return 100 * (1 - model.evaluate(*data[2:], batch_size=1000, verbose=0)[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criteria", nargs="+", default=CRITERIA)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.8, 0.9, 0.95, 0.97, 0.98])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, nargs=2, default=[5, 10], help="on 0-4, on 5-9")
    parser.add_argument("--learning-rates", type=float, nargs=2, default=[0.001, 0.001], help="on 0-4, on 5-9")
    args = parser.parse_args()
    load, old, new = result.load(), digits(0), digits(5)
    errors = {(criterion, s): [] for criterion in args.criteria for s in args.sparsities}
    dense, started = [], time.perf_counter()
    for seed in args.seeds:
        keras.utils.set_random_seed(seed)
        layers = [keras.layers.Dense(n, activation="relu") for n in (300, 100)]
        model = keras.Sequential([keras.Input((784,)), *layers, keras.layers.Dense(5)])
        fit(model, old, args.learning_rates[0], args.epochs[0])
        weights = model.get_weights()
        fit(model, new, args.learning_rates[1], args.epochs[1])
        dense.append(error(model, new))
        for (criterion, sparsity), found in errors.items():
            model.set_weights(weights)
            keras.utils.set_random_seed(seed)
            callback = ks.callbacks.Pruning(sparsity, criterion, allocation="global", begin=0.1, end=0.7)
            fit(model, new, args.learning_rates[1], args.epochs[1], callback)
            assert np.isclose(ks.report(model).totals["sparsity"], sparsity, atol=1e-4)
            found.append(error(model, new))
            print(f"seed {seed}, {criterion} {sparsity:.0%}: {found[-1]:.2f} %, {time.perf_counter() - started:.0f} s")
    rows = [
        [criterion, *(f"{statistics.mean(errors[criterion, s]):.2f} %" for s in args.sparsities)]
        for criterion in args.criteria
    ]
    each = "; ".join(
        f"{criterion} {s:.0%}: {' '.join(f'{e:.2f}' for e in found)}" for (criterion, s), found in errors.items()
    )
    result.show(
        f"Fine-tuning from 0-4 to 5-9, error on {len(new[2])} test images, mean over seeds {args.seeds}",
        ["criterion", *(f"{sparsity:.0%}" for sparsity in args.sparsities)],
        rows,
        [f"Dense: {' '.join(f'{e:.2f}' for e in dense)}.", f"Each seed: {each}."],
        load,
    )


if __name__ == "__main__":
    main()
