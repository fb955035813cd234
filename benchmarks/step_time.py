"""Step time: what `ks.callbacks.Pruning` adds to a training step inside `model.fit`, next to tfmot.

Each way of training is one long `model.fit` in its own process. An epoch is a block of steps; before it begins, the
process waits for its turn, so that blocks of all ways alternate and only one process computes at a time. A round gives
each way one block, in random order, and yields one ratio to the dense block of the same framework. Epoch hooks are
inside the block: mask updates every 100 steps, logging, tfmot's masking. Ways:

* `dense`: plain Keras 3, no callback with batch hooks (Keras dispatches the others asynchronously then).
* `dense again`: the same once more. Its ratio should be 1: what it shows is the noise of the method.
* `Pruning`: dense plus `ks.callbacks.Pruning(0.9, frequency=100)`, whose schedule spans the whole measurement.
* `tf_keras dense`, `tfmot`: the same model in tf_keras, without and with `prune_low_magnitude`, same schedule.

With `--also`, more ways: `taylor` and `movement` (Pruning with that criterion), `2:4` and `block_1x4` (with that
pattern), `rigl` (`ks.callbacks.DynamicSparseTraining(0.9, frequency=100)`), `L0 unit` and `L0 weight`
(`ks.add_l0`), `proximal` (`ks.callbacks.ProximalL1(1e-5)`).

With `--devices`, the same fits on several devices: `mirrored` is `tf.distribute.MirroredStrategy` on 2 logical CPUs;
`data` and `model` are `keras.distribution.DataParallel` and `ModelParallel` (hidden kernels in 4 parts, batches in 2)
on 8 virtual CPUs of JAX.

With `--parts`, two ways that show where the time goes: `batch hook` (dense plus a callback with an empty batch hook,
which makes Keras wait for each step's logs) and `masks` (Pruning whose masks are never updated).

Everything is launched several times, since a process keeps its memory layout for life; the confidence interval comes
from a bootstrap over launches, then rounds. The ratio of CPU times is printed as a check: unlike the ratio of wall
times it hardly moves when others load the machine.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import statistics
import time

import numpy as np
import result

BATCH = 128
FREQUENCY = 100
SPARSITY = 0.9
DEVICES = {"mirrored": "tensorflow", "data": "jax", "model": "jax"}
BASE = {
    "dense again": "dense",
    "Pruning": "dense",
    "batch hook": "dense",
    "masks": "dense",
    "taylor": "dense",
    "L0 unit": "dense",
    "L0 weight": "dense",
    "proximal": "dense",
    "movement": "dense",
    "2:4": "dense",
    "rigl": "dense",
    "block_1x4": "dense",
    "tfmot": "tf_keras dense",
}


def architecture(name, layers):
    """Return the layers of the MLP or the CNN and the shape of its input."""
    if name == "mlp":
        return (784,), [
            layers.Dense(1024, activation="relu", name="hidden_1"),
            layers.Dense(1024, activation="relu", name="hidden_2"),
            layers.Dense(10),
        ]
    return (28, 28, 1), [
        layers.Conv2D(32, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Conv2D(64, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(128, activation="relu", name="hidden"),
        layers.Dense(10),
    ]


def batches(shape, count, seed):
    """Return an endless dataset of `count` random batches.

    Endless, so that all epochs share one iterator: for a finite dataset Keras makes a new one at the start of each
    epoch, which now and then waits for seconds until the old one's threads have ended (seen with TensorFlow 2.21).
    """
    import tensorflow as tf

    rng = np.random.default_rng(seed)
    x = rng.random((count, BATCH, *shape), "float32")
    y = rng.integers(0, 10, (count, BATCH)).astype("int32")
    return tf.data.Dataset.from_tensor_slices((x, y)).repeat().prefetch(2)


def clocks(framework, connection):
    """Return a callback to put first, which waits for the turn, and one to put last, which reports the block's time."""

    class First(framework.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            connection.send("ready")
            connection.recv()
            self.started = time.perf_counter(), time.process_time()

    class Last(framework.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            wall, cpu = first.started
            connection.send((time.perf_counter() - wall, time.process_time() - cpu))

    first = First()
    return first, Last()


def keras_callbacks(way, total):
    """Return what `way` adds to the callbacks of a Keras 3 fit of `total` steps."""
    import keras

    import keras_sparse as ks

    class BatchHook(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            pass

    def pruning(sparsity=SPARSITY, **arguments):
        return [ks.callbacks.Pruning(sparsity, begin=0, end=total, frequency=FREQUENCY, **arguments)]

    return {
        "dense": list,
        "dense again": list,
        "L0 unit": list,
        "L0 weight": list,
        "proximal": lambda: [ks.callbacks.ProximalL1(1e-5)],
        "batch hook": lambda: [BatchHook()],
        "masks": lambda: [ks.callbacks.Pruning(SPARSITY, begin=total - 1, end=total, schedule="one_shot")],
        "Pruning": pruning,
        "taylor": lambda: pruning(criterion="taylor"),
        "movement": lambda: pruning(criterion="movement"),
        "rigl": lambda: [ks.callbacks.DynamicSparseTraining(SPARSITY, frequency=FREQUENCY, end=total)],
        "2:4": lambda: pruning(None, pattern="2:4"),
        "block_1x4": lambda: pruning(pattern="block_1x4"),
    }[way]()


def several(devices):
    """Set the distribution of JAX, or return the scope of TensorFlow's strategy."""
    if devices == "mirrored":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope()
    import keras

    if devices == "data":
        keras.distribution.set_distribution(keras.distribution.DataParallel())
    if devices == "model":
        mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"], keras.distribution.list_devices())
        layouts = keras.distribution.LayoutMap(mesh)
        layouts[".*hidden.*/kernel"] = (None, "model")
        layouts[".*hidden.*/bias"] = ("model",)
        parallel = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
        keras.distribution.set_distribution(parallel)
    return contextlib.nullcontext()


def work(way, model_name, devices, blocks, steps, seed, connection):
    """Train in this process, one block per turn."""
    legacy = BASE.get(way, way) == "tf_keras dense"
    if legacy:
        import tf_keras as framework
    else:
        import keras as framework
    framework.utils.set_random_seed(seed)
    total = blocks * steps
    with several(devices):
        shape, layers = architecture(model_name, framework.layers)
        model = framework.Sequential([framework.layers.Input(shape), *layers])
        if not legacy:
            callbacks = keras_callbacks(way, total)
            if way.startswith("L0"):
                import keras_sparse as ks

                model = ks.add_l0(model, 1e-6, way.removeprefix("L0 "))
        elif way == "tfmot":
            from tensorflow_model_optimization.sparsity import keras as tfmot

            schedule = tfmot.PolynomialDecay(0.0, SPARSITY, 0, total, frequency=FREQUENCY)
            model = tfmot.prune_low_magnitude(model, schedule)
            callbacks = [tfmot.UpdatePruningStep()]
        else:
            callbacks = []
        model.compile(
            framework.optimizers.Adam(1e-4),
            framework.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    first, last = clocks(framework, connection)
    model.fit(
        batches(shape, steps, seed),
        steps_per_epoch=steps,
        epochs=blocks,
        verbose=0,
        callbacks=[first, *callbacks, last],
    )
    connection.close()


def launch(ways, model_name, devices, rounds, warmup, steps, seed):
    """Start a process for each way and give them their turns; return `{way: [[wall, CPU seconds] of each block]}`."""
    context = multiprocessing.get_context("spawn")
    shuffle = random.Random(seed).shuffle
    processes, connections = {}, {}
    try:
        for way in ways:
            connections[way], theirs = context.Pipe()
            processes[way] = context.Process(
                target=work, args=(way, model_name, devices, warmup + rounds, steps, seed, theirs), daemon=True
            )
            processes[way].start()
            theirs.close()
        for way in ways:
            connections[way].recv()
        times = {way: [] for way in ways}
        for turn in range(warmup + rounds):
            order = list(ways)
            shuffle(order)
            for way in order:
                connections[way].send("go")
                times[way].append(connections[way].recv())
                if turn + 1 < warmup + rounds:
                    connections[way].recv()  # The next epoch is prepared: nobody else computes.
        for way in ways:
            processes[way].join()
        return {way: np.array(values[warmup:]) for way, values in times.items()}
    finally:
        for process in processes.values():
            process.terminate()


def measure(model_name, ways, args):
    """Return rows of the table for one model."""
    launches = [
        launch(ways, model_name, args.devices, args.rounds, args.warmup, args.steps, args.seed + number)
        for number in range(args.launches)
    ]
    rows = []
    for way in ways:
        per_step = 1000 * statistics.median(np.concatenate([times[way][:, 0] for times in launches])) / args.steps
        row = [model_name, way, f"{per_step:.2f} ms"]
        if way in BASE:
            wall, cpu = zip(*((times[way] / times[BASE[way]]).T for times in launches), strict=True)
            median, low, high = result.bootstrap_median(wall)
            by_launch = " ".join(f"{np.median(group):.3f}" for group in wall)
            row += [f"{median:.3f}", f"{low:.3f} to {high:.3f}", by_launch, f"{np.median(np.concatenate(cpu)):.3f}"]
        else:
            row += ["1", "-", "-", "1"]
        rows.append(row)
        print(" ".join(row), flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="tensorflow", choices=["tensorflow", "jax", "torch"])
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn"], choices=["mlp", "cnn"])
    parser.add_argument("--parts", action="store_true", help="also time what the overhead is made of")
    parser.add_argument("--also", nargs="+", default=[], choices=list(BASE), help="more ways to time")
    parser.add_argument("--devices", default="one", choices=["one", *DEVICES], help="on how many, and how")
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=12, help="rounds per launch")
    parser.add_argument("--warmup", type=int, default=2, help="rounds per launch that do not count")
    parser.add_argument("--steps", type=int, default=100, help="steps per block")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.devices != "one" and args.backend != DEVICES[args.devices]:
        parser.error(f"--devices {args.devices} is for --backend {DEVICES[args.devices]}")
    os.environ["KERAS_BACKEND"] = args.backend
    if args.devices in ("data", "model"):
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
        os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"  # Else steps wait for each other, as in many_devices.py.
    ways = ["dense", "dense again", "Pruning"]
    ways += args.also
    if args.parts:
        ways += ["batch hook", "masks"]
    if args.backend == "tensorflow" and args.devices == "one" and not args.also:
        ways += ["tf_keras dense", "tfmot"]
    load, started = result.load(), time.perf_counter()
    rows = [row for model_name in args.models for row in measure(model_name, ways, args)]
    result.show(
        f"Training step, {args.backend} backend, devices: {args.devices}, batch {BATCH}, {args.launches} launches x "
        f"{args.rounds} rounds of {args.steps} steps",
        [
            "model",
            "way",
            "step, median",
            "ratio to dense, median",
            "95 % interval",
            "median of each launch",
            "CPU time, ratio",
        ],
        rows,
        [
            "Bar for `Pruning` on several devices: 1.05; on one, TensorFlow: median at most 1.03, upper end of the "
            "interval at most 1.06; patterns at most 1.03, `taylor` and `movement` at most 1.10.",
            f"Seed {args.seed}; took {time.perf_counter() - started:.0f} s.",
        ],
        load,
    )


if __name__ == "__main__":
    main()
