"""Large models: what pruning costs in time and memory, each measurement in a process of its own.

A transformer encoder of 110 million parameters (12 blocks of 768, as BERT base, on 64 tokens) and a Dense recommender
of 500 million. "fit" trains some steps with Adam, dense and with `Pruning` that raises the sparsity at each step; the
peak memory of the process is that of the fit. "update" is one update of all masks, from 60 to 61 %, by itself. The
other rows are single calls.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import result  # isort: skip - sets the environment that TensorFlow reads

import keras
import numpy as np
from keras import layers

import keras_sparse as ks

TASKS = ("dense fit", "pruned fit", "update", "prune", "report", "save", "export")


def transformer(scale):
    """Return an encoder as large as BERT base, at `scale` 1."""
    width, tokens = int(768 * scale), 64
    x = keras.Input((tokens,), dtype="int32")
    y = layers.Embedding(30522, width)(x)
    for _ in range(12):
        y = layers.LayerNormalization()(y + layers.MultiHeadAttention(12, width // 12)(y, y))
        y = layers.LayerNormalization()(y + layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(y)))
    return keras.Model(x, layers.Dense(2)(layers.GlobalAveragePooling1D()(y)))


def recommender(scale):
    """Return Dense layers on a wide input of 500 million weights, at `scale` 1."""
    widths = [int(n * scale**0.5) for n in (20_000, 16_384, 8_192, 4_096)]
    stack = [layers.Dense(n, activation="relu") for n in widths[1:]]
    return keras.Sequential([keras.Input((widths[0],)), *stack, layers.Dense(2)])


MODELS = {"transformer": transformer, "recommender": recommender}


def data(model, count):
    rng, shape = np.random.default_rng(0), model.input_shape[1:]
    x = rng.integers(0, 30522, (count, *shape)) if len(model.layers) > 10 else rng.normal(size=(count, *shape))
    return x.astype(model.inputs[0].dtype), rng.integers(0, 2, count)


def fitted(model, steps, callbacks=()):
    """Seconds of each step; the first holds the compilation."""
    times = []
    timer = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: times.append(time.perf_counter()))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = data(model, 2 * steps)
    model.fit(x, y, batch_size=2, verbose=0, callbacks=[*callbacks, timer])
    return {"seconds a step": float(np.median(np.diff(times)))}


def updated(model):
    """Seconds of an update of all masks, and the bytes that they take for each weight."""
    optimizer = ks.optimizers.SparseOptimizer(keras.optimizers.SGD())
    optimizer.build(model.trainable_variables)
    plan = ks.pruning.Plan(model, 0.61)
    plan.attach(optimizer.sparse_parts)
    plan.update(optimizer.sparse_parts, 0.6 / 0.61)
    started = time.perf_counter()
    plan.update(optimizer.sparse_parts)
    masked = [(v, optimizer.mask_of(v)) for v in model.trainable_variables if optimizer.mask_of(v) is not None]
    held = sum(keras.ops.convert_to_numpy(mask).nbytes for _, mask in masked)
    return {
        "seconds": time.perf_counter() - started,
        "bytes of masks for each weight": held / sum(int(np.prod(v.shape)) for v, _ in masked),
    }


def measured(task, model, steps):
    started = time.perf_counter()
    if task == "dense fit":
        return fitted(model, steps)
    if task == "pruned fit":
        return fitted(model, steps, [ks.callbacks.Pruning(0.9, begin=0, end=steps, frequency=1)])
    if task == "update":
        return updated(model)
    if task == "prune":
        ks.prune(model, 0.9)
    elif task == "report":
        ks.report(model)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "model.keras" if task == "save" else "model.tflite")
            if task == "save":
                model.save(path)
            else:
                ks.prune(model, 0.9)
                started = time.perf_counter()
                ks.tflite.export(model, path, target="xnnpack")
            return {"seconds": time.perf_counter() - started, "bytes": path.stat().st_size}
    return {"seconds": time.perf_counter() - started}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0], help="of the size")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--one", action="store_true", help="measure here, print JSON")
    args = parser.parse_args()
    if args.one:
        model = MODELS[args.models[0]](args.scales[0])
        base, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        found = {"million": model.count_params() / 1e6, **measured(args.tasks[0], model, args.steps)}
        found |= {"cpu": time.process_time() - cpu, "before": base / 1024**2}
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        print(json.dumps(found | {"peak": peak / 1024**2}))
        return
    load, rows = result.load(), []
    for name in args.models:
        for scale in args.scales:
            for task in args.tasks:
                command = [sys.executable, __file__, "--one", "--models", name, "--scales", str(scale), "--tasks", task]
                command += ["--steps", str(args.steps)]
                done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
                if done.returncode:
                    rows.append([name, f"{scale:g}", task, done.stderr.strip().splitlines()[-1][-160:], "", "", "", ""])
                else:
                    found = json.loads(done.stdout.strip().splitlines()[-1])
                    seconds = found.get("seconds", found.get("seconds a step"))
                    more = "; ".join(f"{v:,.3g} {k}" for k, v in found.items() if k.startswith("bytes"))
                    row = [name, f"{found['million']:.0f}", task, f"{seconds:.2f}", f"{found['cpu']:.0f}"]
                    rows.append([*row, f"{found['before']:.2f}", f"{found['peak']:.2f}", more])
                print(" | ".join(rows[-1]), flush=True)
    columns = ["model", "million weights", "what", "s (fit: a step)", "CPU s, all", "GiB before", "GiB peak", ""]
    result.show("Large models", columns, rows, (), load)


if __name__ == "__main__":
    main()
