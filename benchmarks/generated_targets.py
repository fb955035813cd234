"""Networks drawn at random, exported for a target in each format, and run where that target is proven, on new inputs.

Each seed is a recipe of stem, blocks, head, size and sparsity (tflite_graphs.py). `ks.tflite.export` verifies
each file, as for a user. Wrong is a file whose outputs on a runtime of its target are not the Keras model's for
inputs that export has not seen, while those of the dense file of the same format are, natively; so is an export that
fails in another way than by an `ExportError`. `ks.tflite.check` is asked about float32. It agrees if what it calls
refused is refused, what is said to run in part on the CPU does, and weights run sparse if it says so: on a CPU
without AVX, by the bits of the outputs or else the instructions of ARM64.
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
from keras_sparse.tflite.inputs import random_batches
from keras_sparse.tflite.parity import Reference
from keras_sparse.tflite.runtimes import available
from keras_sparse.tflite.signatures import signature
from keras_sparse.tflite.targets import get
from keras_sparse.tflite.trial import DENSE, PARTLY, REFUSED

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "support"))
import tflite_graphs

FORMATS = ("float32", "float16", "dynamic", "int8")
PROOFS = {"xnnpack": ("native", "x86-no-avx"), "xnnpack-wasm": ("wasm",), "gpu": ("gpu-cpu",), "micro": ("micro",)}
COLUMNS = ("networks", "sparse", "dense", "refused", "not taken", "wrong", "check asked", "check agrees")


def drawn(model, called, count, seed):
    """An array for each input of `count` batches, in the order and of the size that a seed draws."""
    rng = np.random.default_rng(seed)
    batches = [random_batches(model, called)[-1] for _ in range(count)]
    arrays = [np.concatenate(parts) for parts in zip(*batches, strict=True)]
    order = rng.permutation(len(arrays[0]))
    return [array[order] * rng.uniform(0.5, 1.5) if array.dtype.kind == "f" else array[order] for array in arrays]


def said(words, target):
    """What `ks.tflite.check` says of a network: the verdict, and whether weights with zeros will run sparse."""
    in_blocks = float(words[-1]) > 0.9  # only then has the network Dense layers in the blocks that are asked for
    taken = ("CONV_2D", "FULLY_CONNECTED") if in_blocks else ("CONV_2D",)
    try:
        report = ks.tflite.check(tflite_graphs.build(words), target, float(words[-1]))
    except ks.tflite.ExportError:
        return REFUSED, False
    return report.verdict, any(row["operator"] in taken and row["runs"] == "sparse" for row in report.rows)


def one(words, target, mode, runtimes, says, counts):
    """Export one network for a target in a format, and count what becomes of it. Returns what is wrong."""
    quantize = None if mode == "float32" else mode
    if get(target).quantize and quantize not in get(target).quantize:
        counts["not taken"] += 1
        return ""
    counts["networks"] += 1
    model = tflite_graphs.build(words)
    called = signature(model)
    step = called.inputs[0].shape[0] or 1
    options = {"quantize": quantize, "batch_size": step}
    if quantize == "int8":
        names = [leaf.name for leaf in called.inputs]
        options["representative_data"] = dict(zip(names, drawn(model, called, 4, 0), strict=True))
    with tempfile.TemporaryDirectory() as folder:

        def dense():
            ks.tflite.export(model, f"{folder}/d.tflite", sparse=False, **options)
            return pathlib.Path(f"{folder}/d.tflite").read_bytes()

        try:
            report = ks.tflite.export(model, f"{folder}/m.tflite", target=target, **options)
        except ks.tflite.ExportError as error:
            counts["refused"] += 1
            return "" if quantize else judged(counts, says, REFUSED, str(error)[:160])
        except Exception as error:  # no answer at all
            counts["wrong"] += 1
            return f"export fails: {type(error).__name__}: {error}"
        counts[report.encoding] += 1
        content = pathlib.Path(report.path).read_bytes()
        batch = [array[:step] for array in drawn(model, called, 1, 1)]
        reference = Reference(model, called.with_batch(step), [batch])
        told, accelerated = [], None
        for runtime in runtimes:
            try:
                parity = reference.compare_on(runtime, content)
            except ValueError as error:
                told.append(f"{runtime}: {str(error)[-160:]}")
                continue
            if not parity.relative <= verification.TOLERANCE[mode]:  # NaN is wrong, too
                told.append(f"{runtime}: differs by {parity.relative:.2g}")
            accelerated = parity.accelerated if accelerated is None else accelerated
        if told:
            with contextlib.suppress(ValueError):  # a dense file that this machine cannot run may be right there
                if reference.compare_on("native", dense()).relative > verification.TOLERANCE[mode]:
                    return ""  # then it is no fault of the file for the target
            counts["wrong"] += 1
            return "; ".join(told)
        if quantize is not None:
            return ""
        found = (PARTLY if accelerated is False else DENSE), False
        if get(target).form is not None and report.encoding == "sparse":
            feed = dict(zip([leaf.name for leaf in called.inputs], batch, strict=True))
            found = DENSE, None
            with contextlib.suppress(ValueError):  # the dense file may be one that cannot be run there
                found = DENSE, tflite_graphs.engages_sparse(content, dense(), feed, says[1])
        return judged(counts, says, *found)


def judged(counts, says, verdict, engages):
    """Count whether what `check` says came true, and say so if not."""
    told, sparse = says
    agrees = (told == REFUSED) == (verdict == REFUSED) and (told == PARTLY) == (verdict == PARTLY)
    agrees = agrees and (verdict == REFUSED or engages in (None, sparse))
    counts["check asked"] += 1
    counts["check agrees"] += agrees
    return "" if agrees else f"check says {says}, found {(verdict, engages)}"


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
            says = said(words, target)
            for mode in args.quantize:
                fault = one(words, target, mode, runtimes, says, counts[target, mode])
                if fault:
                    print(f"seed {seed}, {target}, {mode}: {fault}: {words}", flush=True)
    rows = [[target, mode, *(str(found[name]) for name in COLUMNS)] for (target, mode), found in counts.items()]
    result.show(
        f"Generated networks by target, seeds {args.first} to {args.first + args.graphs - 1}",
        ["target", "weights", *COLUMNS],
        rows,
        [f"{(time.perf_counter() - started) / 60:.0f} minutes."],
        load,
    )


if __name__ == "__main__":
    main()
