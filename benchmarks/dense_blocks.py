"""Dense layers in blocks: a 784-1024-1024-10 network whose zeros form blocks of one output by four inputs.

Latency does not depend on the values of the weights, so the network is not trained: it is pruned in one shot. Each
ratio is to the dense encoding of the same network, run in turns with it (`ks.tflite.benchmark`); on ARM64 it is exact.
Runtimes that are not installed are left out.

`--layers 1` prunes the second layer alone, `--integers` takes int8 and blocks of 1x16, and `--force` runs sparse
kernels where `export` would not, since other layers lose by it: how its thresholds were found.
"""

import argparse
import contextlib
import pathlib
import statistics
import tempfile
from unittest import mock

import keras
import numpy as np
import result  # first: it keeps TensorFlow quiet
from keras import layers

import keras_sparse as ks
from keras_sparse.tflite import encoding

BARS = {0.9: 0.60, 0.95: 0.40}  # native


def export(sparsity, folder, args):
    """Write the network with sparse and with dense weights; return both paths."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((784,)), *(layers.Dense(n, activation="relu") for n in (1024, 1024))])
    model.add(layers.Dense(10))
    kernels = [model.layers[i].kernel for i in args.layers]
    pattern, options = "block_1x4", {}
    if args.integers:
        data = np.random.default_rng(0).normal(size=(32, 784)).astype("float32")
        pattern, options = "block_1x16", {"quantize": "int8", "representative_data": data}
    ks.prune(model, sparsity, pattern=pattern, filters=lambda variable: any(variable is kernel for kernel in kernels))
    paths = [pathlib.Path(folder) / f"{name}_{sparsity}.tflite" for name in ("sparse", "dense")]
    thresholds = {"_WORTH": {4: 0.5, 16: 0.5}, "_LOSS": {}} if args.force else {}
    with contextlib.ExitStack() as stack:
        for name, value in thresholds.items():
            stack.enter_context(mock.patch.object(encoding, name, value))
        for path, sparse in zip(paths, (True, False), strict=True):
            exported = ks.tflite.export(model, path, target="xnnpack", sparse=sparse, **options)
            assert exported.encoding == ("sparse" if sparse else "dense")
    return paths


def measure(sparse, dense, runtime, threads, args):
    """Return the cells of a table row: medians of both, the ratio, its range over the launches."""
    launches = 1 if runtime == "arm64" else args.launches
    reports = [
        ks.tflite.benchmark(sparse, baseline=dense, runtime=runtime, threads=threads, seconds=args.seconds)
        for _ in range(launches)
    ]
    ratios = [report.rows[1]["ratio"] for report in reports]
    if runtime == "arm64":
        numbers = [f"{row['instructions']:,d}" for row in reports[0].rows]
        return [*numbers, f"**{ratios[0]:.3f}**", "exact"]
    medians = [statistics.median(report.rows[i]["median"] for report in reports) for i in (0, 1)]
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    return [*(f"{median:.4f} ms" for median in medians), f"**{statistics.median(ratios):.3f}**", spread]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--launches", type=int, default=5, help="of the processes, for each ratio")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring each file in a launch")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2], help="that are pruned")
    parser.add_argument("--integers", action="store_true")
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    load = result.load()
    runtimes = [("native", 1), ("native", 2), ("wasm", 1), ("arm64", 1)]
    missing = {name: reason for name, reason in ks.tflite.runtimes.available().items() if reason}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for sparsity in args.sparsities:
            sparse, dense = export(sparsity, folder, args)
            for runtime, threads in runtimes:
                if runtime in missing:
                    continue
                asked = (runtime, threads) == ("native", 1) and len(args.layers) == 3 and not args.integers
                bar = f"at most {BARS[sparsity]:.2f}" if asked and sparsity in BARS else "-"
                cells = measure(sparse, dense, runtime, threads, args)
                sizes = f"{sparse.stat().st_size / dense.stat().st_size:.3f}"
                rows.append([f"{100 * sparsity:g} %", runtime, str(threads), *cells, sizes, bar])
    columns = ["zeros", "runtime", "threads", "dense", "sparse", "ratio", "range of ratios", "file, ratio", "asked for"]
    result.show(
        f"784-1024-1024-10 in blocks of {'1x16, int8' if args.integers else '1x4'}, {args.launches} launches",
        columns,
        rows,
        missing.values(),
        load_before=load,
    )


if __name__ == "__main__":
    main()
