"""Networks drawn at random, exported for a target in each format, and run where that target is proven, on new inputs.

Each seed is a recipe of stem, blocks, head, size and sparsity (tflite_graphs.py). `ks.tflite.export` verifies
each file, as for a user. Wrong is a file whose outputs on a runtime of its target are not the Keras model's for
inputs that export has not seen, while those of the dense file of the same format are, natively. `ks.tflite.check`
agrees if the file that it calls refused is refused, and one that is said to run in part on the CPU does.
"""

import argparse
import collections
import contextlib
import pathlib
import sys
import tempfile
import time

import numpy as np
import result

import keras_sparse as ks
from keras_sparse.tflite import verification
from keras_sparse.tflite.parity import Reference, random_batches
from keras_sparse.tflite.runtimes import available
from keras_sparse.tflite.signatures import signature
from keras_sparse.tflite.targets import get

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "support"))
import tflite_graphs

FORMATS = ("float32", "float16", "dynamic", "int8")
PROOFS = {"xnnpack": ("native", "x86-no-avx"), "xnnpack-wasm": ("wasm",), "gpu": ("gpu-cpu",), "micro": ("micro",)}
COLUMNS = ("sparse", "dense", "refused", "not taken", "wrong", "check asked", "check agrees")


def drawn(model, called, count, seed):
    """An array for each input of `count` batches, in the order and of the size that a seed draws."""
    rng = np.random.default_rng(seed)
    batches = [random_batches(model, called)[-1] for _ in range(count)]
    arrays = [np.concatenate(parts) for parts in zip(*batches, strict=True)]
    order = rng.permutation(len(arrays[0]))
    return [array[order] * rng.uniform(0.5, 1.5) if array.dtype.kind == "f" else array[order] for array in arrays]


def one(words, target, mode, runtimes, said, counts):
    """Export one network for a target in a format, and count what becomes of it. Returns what is wrong."""
    quantize = None if mode == "float32" else mode
    if get(target).quantize and quantize not in get(target).quantize:
        counts["not taken"] += 1
        return ""
    model = tflite_graphs.build(words)
    called = signature(model)
    step = called.inputs[0].shape[0] or 1
    calibration = {}
    if quantize == "int8":
        names = [leaf.name for leaf in called.inputs]
        calibration["representative_data"] = dict(zip(names, drawn(model, called, 4, 0), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        path, plain = f"{folder}/m.tflite", f"{folder}/d.tflite"
        options = {"quantize": quantize, "batch_size": step, **calibration}
        try:
            report = ks.tflite.export(model, path, target=target, **options)
        except ks.tflite.ExportError as error:
            counts["refused"] += 1
            agrees = said == "refused" or quantize is not None
            counts["check asked"] += quantize is None
            counts["check agrees"] += quantize is None and agrees
            return "" if agrees else f"export refuses, check says {said!r}: {str(error)[:160]}"
        counts[report.encoding] += 1
        ks.tflite.export(model, plain, sparse=False, **options)
        content, dense = (pathlib.Path(one).read_bytes() for one in (path, plain))
    batch = [array[:step] for array in drawn(model, called, 1, 1)]
    reference = Reference(model, called.with_batch(step), [batch])
    allowed, told = verification.TOLERANCE[mode], []
    with contextlib.suppress(ValueError):  # a dense file that this machine cannot run may be right on the target
        if reference.compare_on("native", dense).relative > allowed:
            return ""  # then it is no fault of the file for the target
    for runtime in runtimes:
        try:
            parity = reference.compare_on(runtime, content)
        except ValueError as error:
            told.append(f"{runtime}: {str(error)[-160:]}")
            continue
        if not parity.relative <= allowed:  # NaN is wrong, too
            told.append(f"{runtime}: differs by {parity.relative:.2g}")
        if parity.accelerated is not None and quantize is None:
            agrees = (said == "in part on the CPU") != parity.accelerated
            counts["check asked"] += 1
            counts["check agrees"] += agrees
            if not agrees:
                print(f"check says {said!r}, accelerated: {parity.accelerated}: {words}", flush=True)
    counts["wrong"] += bool(told)
    return "; ".join(told)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--targets", nargs="+", default=["xnnpack", "gpu", "micro"], choices=list(PROOFS))
    parser.add_argument("--quantize", nargs="+", default=list(FORMATS), choices=FORMATS)
    args = parser.parse_args()
    load, started, missing = result.load(), time.perf_counter(), available()
    counts = {(target, mode): collections.Counter() for target in args.targets for mode in args.quantize}
    for seed in range(args.first, args.first + args.graphs):
        words = tflite_graphs.recipe(seed)
        for target in args.targets:
            runtimes = [name for name in PROOFS[target] if missing[name] is None]
            try:
                said = ks.tflite.check(tflite_graphs.build(words), target).verdict
            except ks.tflite.ExportError:
                said = "refused"
            for mode in args.quantize:
                fault = one(words, target, mode, runtimes, said, counts[target, mode])
                if fault:
                    print(f"seed {seed}, {target}, {mode}: {fault}: {words}", flush=True)
    rows = [
        [target, mode, str(args.graphs), *(str(found[name]) for name in COLUMNS)]
        for (target, mode), found in counts.items()
    ]
    result.show(
        f"Generated networks by target, seeds {args.first} to {args.first + args.graphs - 1}",
        ["target", "weights", "networks", *COLUMNS],
        rows,
        [f"{(time.perf_counter() - started) / 60:.0f} minutes."],
        load,
    )


if __name__ == "__main__":
    main()
