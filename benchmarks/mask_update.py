"""Mask update: time and memory of recomputing the mask of one weight tensor, next to tfmot.

Ways that are timed in turn, in random order, on the same kind of tensor (normal deviates):

* `Plan.update`: what `ks.callbacks.Pruning` calls: scores, mask, assignment to the mask variable, zeroing the weight;
  from a dense tensor to 90 %, and from 60 % to 61 %, as in the middle of training.
* `Pattern.mask`: the mask alone, from given scores, 90 %.
* tfmot's `conditional_mask_update`: what a model wrapped by `prune_low_magnitude` runs in its training step when an
  update is due, compiled by `tf.function` as there, 90 %. It masks the weight in a separate op, which is not counted.

The second table shows `Plan.update`, from 60 % to 61 %, over tensors from 1 to 100 million weights.
"""

import argparse
import statistics
import time

import result  # isort: skip - sets the environment that TensorFlow reads

import keras
import numpy as np
import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.sparsity import keras as tfmot

import keras_sparse as ks

TFMOT = "tfmot `conditional_mask_update`"


def ours(rows, columns, before, after, seed):
    """Return `(reset, update, mask bytes per weight)`.

    `reset()` gives the weight fresh values of which the share `before` is masked; `update()` runs the update that
    `Pruning` would, to the share `after`.
    """
    model = keras.Sequential([keras.Input((rows,)), keras.layers.Dense(columns, use_bias=False)])
    optimizer = ks.optimizers.SparseOptimizer(keras.optimizers.SGD())
    optimizer.build(model.trainable_variables)
    plan = ks.pruning.Plan(model, after)
    plan.attach(optimizer.sparse_parts)
    kernel = model.trainable_variables[0]
    mask = optimizer.mask_of(kernel)
    values = np.random.default_rng(seed).standard_normal((rows, columns), "float32")
    kept = ks.patterns.Unstructured().mask(np.abs(values), before)
    values[~kept] = 0.0

    def reset():
        kernel.assign(values)
        mask.assign(kept)

    return reset, lambda: plan.update(optimizer.sparse_parts), mask.numpy().nbytes / values.size


def theirs(rows, columns, sparsity, seed):
    """Return the same for tfmot, whose update does not depend on the mask before."""
    layer = tf_keras.layers.Dense(columns, use_bias=False)
    schedule = tfmot.ConstantSparsity(sparsity, begin_step=0, frequency=1)
    model = tf_keras.Sequential([tf_keras.layers.Input((rows,)), tfmot.prune_low_magnitude(layer, schedule)])
    wrapper = model.layers[0]
    wrapper.pruning_step.assign(1)
    values = np.random.default_rng(seed).standard_normal((rows, columns), "float32")
    weight, mask, _ = wrapper.pruning_vars[0]
    update = tf.function(wrapper.pruning_obj.conditional_mask_update)

    def check():
        update()
        zeros = 1 - float(tf.reduce_mean(mask))
        if abs(zeros - sparsity) > 0.01:
            raise RuntimeError(f"tfmot did not update its mask: {zeros:.3f} zeros instead of {sparsity}")

    weight.assign(values)
    check()
    return lambda: weight.assign(values), update, mask.numpy().nbytes / values.size


def seconds(reset, update):
    reset()
    started = time.perf_counter()
    update()
    return time.perf_counter() - started


def against_tfmot(args):
    """Time all ways in turn; return rows of the table."""
    side = round(args.size**0.5)
    scores = np.abs(np.random.default_rng(args.seed).standard_normal((side, side), "float32"))
    pattern = ks.patterns.Unstructured()
    ways = {
        "`Plan.update`, dense to 90 %": ours(side, side, 0.0, 0.9, args.seed),
        "`Plan.update`, 60 % to 61 %": ours(side, side, 0.6, 0.61, args.seed),
        "`Pattern.mask` alone": (lambda: None, lambda: pattern.mask(scores, 0.9), None),
        TFMOT: theirs(side, side, 0.9, args.seed),
    }
    times = {name: [] for name in ways}
    rng = np.random.default_rng(args.seed)
    for way in ways.values():
        seconds(*way[:2])
    for _ in range(args.rounds):
        for name in rng.permutation(list(ways)):
            times[name].append(seconds(*ways[name][:2]))
    return [
        [
            name,
            f"{statistics.median(values):.3f} s",
            f"{min(values):.3f} to {max(values):.3f} s",
            f"{statistics.median(a / b for a, b in zip(values, times[TFMOT], strict=True)):.3f}",
            "-" if ways[name][2] is None else f"{ways[name][2]:g}",
        ]
        for name, values in times.items()
    ]


def growth(args):
    """Time `Plan.update` over sizes; return rows of the table."""
    rows = []
    for millions in args.millions:
        reset, update, bytes_per_weight = ours(1000 * millions, 1000, 0.6, 0.61, args.seed)
        seconds(reset, update)
        median = statistics.median(seconds(reset, update) for _ in range(args.rounds))
        rows.append(
            [f"{millions} million", f"{median:.3f} s", f"{median / millions * 1000:.1f} ns", f"{bytes_per_weight:g}"]
        )
        del reset, update  # They hold the tensor.
        keras.backend.clear_session()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=25_000_000, help="weights of the tensor in the first table")
    parser.add_argument("--millions", nargs="+", type=int, default=[1, 3, 10, 25, 50, 100])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    load = result.load()
    result.show(
        f"Mask update of {args.size:,} weights, {args.rounds} interleaved rounds",
        ["what", "median", "range", "ratio to tfmot, median", "mask bytes per weight"],
        against_tfmot(args),
        ["Bar: at most a tenth of tfmot, 1 byte per weight."],
        load,
    )
    result.show(
        f"`Plan.update` over tensor sizes, 60 % to 61 %, median of {args.rounds}",
        ["weights", "time", "per weight", "mask bytes per weight"],
        growth(args),
    )


if __name__ == "__main__":
    main()
