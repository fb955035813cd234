"""A loop of short fits with `ks.callbacks.KeepSparsity`, as in active and reinforcement learning, next to plain Keras.

Each of two processes fits one model again and again, one epoch at a time, and waits for its turn before each fit, so
that their fits alternate and only one computes at a time. What `fit` itself sets up is in the time. Memory is the
resident set of the process with the callback after a quarter of the fits and after the last one, next to the same of
the plain process: Keras and the backend keep something for themselves.
"""

import argparse
import gc
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import result


def resident():
    """Return the resident memory of this process in MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def work(sparse, units, steps, fits, warmup, connection):
    """Fit once per turn, and report wall and CPU seconds; at the end, the memory after a quarter and after all."""
    import keras

    import keras_sparse as ks

    keras.utils.set_random_seed(0)
    dense = [keras.layers.Dense(units, activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((64,)), *dense, keras.layers.Dense(10)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    ks.prune(model, 0.9)
    rng = np.random.default_rng(0)
    x, y = rng.random((32 * steps, 64), "float32"), rng.integers(0, 10, 32 * steps)
    memory = []
    for turn in range(fits + warmup):
        connection.send("ready")
        connection.recv()
        wall, cpu = time.perf_counter(), time.process_time()
        callbacks = [ks.callbacks.KeepSparsity()] if sparse else []
        model.fit(x, y, batch_size=32, verbose=0, callbacks=callbacks)
        connection.send((time.perf_counter() - wall, time.process_time() - cpu))
        if turn in (warmup + fits // 4, warmup + fits - 1):
            memory.append(resident())
    zeros = float(np.mean(model.get_weights()[2] == 0))
    connection.send((memory, zeros))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="tensorflow", choices=["tensorflow", "jax", "torch"])
    parser.add_argument("--fits", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=2, help="fits that do not count: they compile")
    parser.add_argument("--steps", type=int, default=30, help="steps of a fit")
    parser.add_argument("--units", type=int, default=256, help="units of each of the two hidden layers")
    args = parser.parse_args()
    os.environ["KERAS_BACKEND"] = args.backend
    load = result.load()
    context = multiprocessing.get_context("spawn")
    connections, processes = [], []
    for sparse in (False, True):
        ours, theirs = context.Pipe()
        rest = (sparse, args.units, args.steps, args.fits, args.warmup, theirs)
        processes.append(context.Process(target=work, args=rest, daemon=True))
        processes[-1].start()
        connections.append(ours)
    times = []
    for turn in range(args.fits + args.warmup):
        for connection in connections:
            connection.recv()
        row = []
        for connection in connections if turn % 2 else connections[::-1]:
            connection.send("go")
            row.append(connection.recv())
        times.append(row if turn % 2 else row[::-1])
    ends = [connection.recv() for connection in connections]
    plain, sparse = np.array(times[args.warmup :]).transpose(1, 2, 0)
    rows = []
    for name, own, (memory, zeros) in zip(("plain", "KeepSparsity"), (plain, sparse), ends, strict=True):
        median, low, high = result.bootstrap_median([list(own[0] / plain[0])])
        rows.append(
            [
                name,
                f"{1000 * np.median(own[0]):.1f} ms",
                f"{median:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{np.median(own[1] / plain[1]):.3f}",
                f"{own[0].sum() / plain[0].sum():.3f}",
                f"{memory[0]:.0f} MiB",
                f"{memory[1] - memory[0]:+.1f} MiB",
                f"{zeros:.3f}",
            ]
        )
    result.show(
        f"{args.fits} fits of one epoch, {args.steps} steps of batch 32, {args.backend} backend, "
        f"64-{args.units}-{args.units}-10",
        [
            "fit",
            "median",
            "ratio of wall times, median",
            "95 % interval",
            "CPU time",
            "all fits",
            "memory after a quarter",
            "growth to the end",
            "zeros",
        ],
        rows,
        ["Bar: at most 1.1, and no growth of memory."],
        load,
    )


if __name__ == "__main__":
    main()
