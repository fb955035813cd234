"""Networks drawn at random around the edges of the rules of XNNPACK's sparse kernels, exported and run everywhere.

Each seed is a recipe of stem, blocks, head, size and sparsity (tflite_graphs.py). Export is not allowed to verify
on runtimes with sparse kernels, as on a machine that has none: what is tested are its rules. Right is a file whose
outputs are the Keras model's on each runtime, and "will run sparse" if and only if the sparse file's outputs differ in
their last bits from the dense file's on a CPU without AVX, or it takes fewer instructions on ARM64. A network that
fails is made smaller and printed.
"""

import argparse
import collections
import pathlib
import sys
import time

import result

import keras_sparse as ks

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "support"))
import tflite_graphs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--quantize", nargs="+", default=["float32"], choices=["float32", "float16", "dynamic", "int8"])
    args = parser.parse_args()
    load, started, rows = result.load(), time.perf_counter(), []
    missing = ks.tflite.runtimes.available()
    runtimes = [name for name in ("native", "x86-no-avx", "wasm") if missing[name] is None]
    for mode in args.quantize:
        quantize = None if mode == "float32" else mode
        counts = collections.Counter()
        for seed in range(args.first, args.first + args.graphs):
            words = tflite_graphs.recipe(seed)
            try:
                found = tflite_graphs.outcome(words, quantize, runtimes)
            except ks.tflite.ExportError as error:
                counts["refused"] += 1
                print(f"seed {seed}, {mode}: refused: {words} {str(error)[:160]}", flush=True)
                continue
            counts[found["encoding"]] += 1
            counts["agrees"] += found["engages"] in (None, found["says"])
            counts["runs sparse"] += bool(found["engages"])
            if found["engages"] not in (None, found["says"]):
                print(f"seed {seed}, {mode}: says {found['says']}, engages {found['engages']}: {words}", flush=True)
            if found["faults"]:
                counts["wrong"] += 1
                small = tflite_graphs.shrink(words, quantize, tuple(found["faults"]))
                print(f"seed {seed}, {mode}: WRONG {found['faults']}: {words}, smaller: {small}", flush=True)
        columns = ("sparse", "dense", "refused", "runs sparse", "agrees", "wrong")
        rows.append([mode, str(args.graphs), *(str(counts[name]) for name in columns)])
    result.show(
        f"Generated networks, seeds {args.first} to {args.first + args.graphs - 1}",
        ["weights", "networks", "stored sparse", "stored dense", "refused", "run sparse", "as said", "wrong"],
        rows,
        [f"Runtimes: {', '.join(runtimes)}. {(time.perf_counter() - started) / 60:.0f} minutes."],
        load,
    )


if __name__ == "__main__":
    main()
