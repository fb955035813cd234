"""2,000 steps on several devices: masks of all replicas, one device for comparison, and a SIGKILL in the midst.

Ways, each in processes of its own, with virtual devices of this CPU:

* `mirrored`: `tf.distribute.MirroredStrategy` on 2 logical devices.
* `data`: `keras.distribution.DataParallel` on 8 devices of JAX.
* `model`: `keras.distribution.ModelParallel` on those: hidden kernels in 4 parts, batches in 2.
* `ddp`: torch's `DistributedDataParallel` in 2 gloo processes, in a loop of one's own as the guide has it.

Each trains a small network with `Pruning` (in the loop: `ks.update_masks`) every 50 steps. After each update the masks
and the weights of all replicas are compared, and in shards the layout of a mask with its weight's. The same batches on
one device give the masks to compare with; only sums over replicas are in another order. Then the run is done again,
ended by SIGKILL (all its processes) after a random step, and started again: it resumes from `BackupAndRestore`, or from
the file that the loop writes every 100 steps. All its weights, state of the optimizer and masks must be those of the
uninterrupted run, bit for bit.

What a step costs is measured by `step_time.py --devices`.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import result
import step_time

BACKENDS = {**step_time.DEVICES, "ddp": "torch"}
EPOCH, BATCH, FREQUENCY, SPARSITY = 100, 64, 50, 0.9  # Steps of an epoch, samples of a step, steps between updates.


def network():
    """Return a compiled network, the same each time, and batches for an epoch."""
    import keras

    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(64, activation="relu", name=f"hidden_{number}") for number in (1, 2)]
    model = keras.Sequential([keras.Input((16,)), *layers, keras.layers.Dense(8, activation="softmax")])
    model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy", jit_compile=False)
    x = np.random.default_rng(0).normal(size=(EPOCH * BATCH, 16)).astype("float32")
    return model, x, x[:, :8].argmax(axis=1)


def replicas(variable):
    """Return the copies that devices hold of the same part of a variable, as a list of lists of arrays."""
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        strategy = getattr(variable.value, "distribute_strategy", None) or tf.distribute.get_strategy()
        return [[copy.numpy() for copy in strategy.experimental_local_results(variable.value)]]
    if keras.backend.backend() == "jax":
        parts = {}
        for shard in variable.value.addressable_shards:
            parts.setdefault(str(shard.index), []).append(np.asarray(shard.data))
        return list(parts.values())
    import torch.distributed as dist

    copies = [None] * dist.get_world_size()
    dist.all_gather_object(copies, variable.numpy())
    return [copies]


class Watch:
    """Looks at the masks after each update, keeps them, and ends all processes after step `kill`."""

    def __init__(self, folder, copies, kill):
        self.folder, self.copies, self.kill = folder, copies, kill
        self.masks = {}

    def after(self, step, optimizer):
        if step % FREQUENCY == 0:
            for number, (weight, mask) in enumerate(optimizer.masks):
                for variable in (weight, mask):
                    parts = replicas(variable)
                    counted = sum(map(len, parts))
                    if counted != self.copies:
                        raise AssertionError(f"{variable.path}: {counted} copies on {self.copies} devices")
                    for first, *others in parts:
                        if not all(np.array_equal(first, other) for other in others):
                            raise AssertionError(f"{variable.path}: replicas differ after step {step}")
                layouts = [getattr(variable.value, "sharding", None) for variable in (weight, mask)]
                if layouts[0] is not None and not layouts[0].is_equivalent_to(layouts[1], weight.ndim):
                    raise AssertionError(f"{mask.path} lies as {layouts[1]}, its weight as {layouts[0]}")
                value, keeps = weight.numpy(), np.asarray(mask.numpy())
                if np.any(value[~keeps]):
                    raise AssertionError(f"{weight.path}: a pruned weight is not zero after step {step}")
                self.masks[f"{step:06d}_{number}"] = keeps
        if step == self.kill:
            os.killpg(0, signal.SIGKILL)

    def write(self, model):
        arrays = [np.asarray(variable.numpy()) for variable in [*model.weights, *model.optimizer.variables]]
        np.savez(self.folder / "state.npz", *arrays)
        np.savez(self.folder / "masks.npz", **self.masks)


def fit(way, folder, steps, criterion, watch):
    """Train by `model.fit`."""
    import keras

    import keras_sparse as ks

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
    with step_time.several(way):
        model, x, y = network()

    class Watching(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.done = epoch * EPOCH

        def on_train_batch_end(self, batch, logs=None):
            step = self.done + batch + 1
            if step % FREQUENCY == 0 or step == watch.kill:
                watch.after(step, ks.optimizers.find(self.model))

    backup = keras.callbacks.BackupAndRestore(folder / "backup", double_checkpoint=True)
    callbacks = [ks.callbacks.Pruning(SPARSITY, criterion, frequency=FREQUENCY), Watching(), backup]
    model.fit(x, y, epochs=steps // EPOCH, batch_size=BATCH, shuffle=False, verbose=0, callbacks=callbacks)
    watch.write(model)


def loop(folder, steps, watch):
    """Train in a loop of one's own, in one of several processes of torch."""
    import keras
    import torch
    import torch.distributed as dist

    import keras_sparse as ks

    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    model, x, y = network()
    model.compile(ks.optimizers.SparseOptimizer(model.optimizer), model.loss)
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    backup = folder / "backup.weights.h5"
    if backup.exists():
        model.load_weights(backup)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    loss_fn, schedule = keras.losses.SparseCategoricalCrossentropy(), ks.schedules.get("polynomial")
    for step in range(int(optimizer.iterations), steps):
        start = step % EPOCH * BATCH
        batch = slice(start + rank, start + BATCH, processes)
        model.zero_grad()
        loss_fn(y[batch], parallel(x[batch])).backward()
        with torch.no_grad():
            optimizer.apply([v.value.grad for v in model.trainable_variables], model.trainable_variables)
        if (step + 1) % FREQUENCY == 0:
            progress = min(1.0, (step + 1) / (0.75 * steps))
            ks.update_masks(model, SPARSITY * schedule(progress), optimizer=optimizer)
        if (step + 1) % EPOCH == 0 and rank == 0:
            model.save_weights(folder / "new.weights.h5")
            os.replace(folder / "new.weights.h5", backup)  # A kill in the midst of writing leaves the one before.
        watch.after(step + 1, optimizer)
    if rank == 0:
        watch.write(model)


def work(way, folder, devices, args):
    """Train in this process."""
    watch = Watch(folder, devices, args.kill)
    if way == "ddp":
        loop(folder, args.steps, watch)
    else:
        fit("one" if devices == 1 else way, folder, args.steps, args.criterion, watch)


def run(way, folder, devices, args, kill=0):
    """Run a training in processes of their own; return whether it came to its end."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"KERAS_BACKEND": BACKENDS[way]}
    # What takes time is to compile, again in each process.
    cheap = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment["XLA_FLAGS"] = f"{cheap} --xla_force_host_platform_device_count={devices}"
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(folder.parent), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    # Else steps overlap, and on fewer cores than devices their collective operations wait for each other for ever.
    environment["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"
    command = [sys.executable, __file__, "--work", way, str(folder), str(devices), "--kill", str(kill)]
    command += ["--steps", str(args.steps), "--criterion", args.criterion]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    started, count = [], devices if way == "ddp" else 1
    for rank in range(count):
        ranks = environment | {"RANK": str(rank), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
        group = started[0].pid if started else 0
        started.append(subprocess.Popen(command, env=ranks, process_group=group))
    codes = [process.wait() for process in started]
    if (not kill and any(codes)) or (kill and set(codes) != {-signal.SIGKILL}):
        raise RuntimeError(f"{way} on {devices} devices ended with {codes}")


def agreement(one, several):
    """Return at how many updates all masks agree, of how many, and the share of positions that agree at the last."""
    steps = sorted({name.split("_")[0] for name in several.files})
    equal = {step: [several[n] == one[n] for n in several.files if n.startswith(step)] for step in steps}
    shares = [np.concatenate([same.ravel() for same in equal[step]]).mean() for step in steps]
    return sum(share == 1 for share in shares), len(steps), shares[-1]


def measure(way, root, args):
    """Return a row of the table."""
    devices = 8 if BACKENDS[way] == "jax" else 2
    kill = random.Random(f"{args.seed} {way}").randint(EPOCH + 1, args.steps - 1)
    folders = {name: root / f"{way}-{name}" for name in ("one", "whole", "killed")}
    started = time.perf_counter()
    run(way, folders["one"], 1, args)
    run(way, folders["whole"], devices, args)
    run(way, folders["killed"], devices, args, kill)
    run(way, folders["killed"], devices, args)
    one, whole, killed = (np.load(folder / "masks.npz") for folder in folders.values())
    alone, end, resumed = (np.load(folder / "state.npz") for folder in folders.values())
    same = end.files == resumed.files and all(np.array_equal(end[name], resumed[name]) for name in end.files)
    same_masks = all(np.array_equal(whole[name], killed[name]) for name in killed.files)
    fewer = len(killed.files) < len(whole.files)  # Else it has not resumed.
    equal, updates, share = agreement(one, whole)
    zeros = 1 - np.mean(np.concatenate([whole[n].ravel() for n in whole.files if n.startswith(f"{args.steps:06d}")]))
    furthest = max(np.abs(alone[name] - end[name]).max() for name in end.files)
    row = [way, BACKENDS[way], str(devices), f"{zeros:.3f}", f"{updates} of {updates}"]
    row += [f"{equal} of {updates}", f"{share:.2%}", f"{furthest:.1e}", str(kill)]
    row += [("equal" if same and same_masks else "DIFFERS") if fewer else "BEGAN ANEW"]
    row += [f"{time.perf_counter() - started:.0f} s"]
    print(" ".join(row), flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--steps", type=int, default=2000, help=f"a multiple of {EPOCH}")
    parser.add_argument("--criterion", default="magnitude", help="of the fits; the loop has magnitude")
    parser.add_argument("--seed", type=int, default=0, help="of the steps after which processes are killed")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--kill", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        way, folder, devices = args.work
        work(way, Path(folder), int(devices), args)
        return
    load = result.load()
    with tempfile.TemporaryDirectory() as root:
        rows = [measure(way, Path(root), args) for way in args.ways]
    result.show(
        f"{args.steps} steps on several devices, masks updated every {FREQUENCY}, {args.criterion}",
        [
            "way",
            "backend",
            "devices",
            "zeros at the end",
            "updates after which all replicas agree",
            "after which masks are those of one device",
            "positions that agree at the end",
            "state, largest difference to one device",
            "SIGKILL after step",
            "resumed, bit for bit",
            "time of all runs",
        ],
        rows,
        [f"Seed {args.seed}."],
        load,
    )


if __name__ == "__main__":
    main()
