"""Dense layers in blocks: a 784-1024-1024-10 network whose zeros form blocks of one output by four inputs.

Latency does not depend on the values of the weights, so the network is not trained: it is pruned in one shot. Each
ratio is to the dense encoding of the same network, run in turns with it (`ks.tflite.benchmark`); on ARM64 it is exact.
Runtimes that are not installed are left out.
"""

import argparse
import pathlib
import statistics
import tempfile

import keras
import result  # first: it keeps TensorFlow quiet
from keras import layers

import keras_sparse as ks

BARS = {0.9: 0.60, 0.95: 0.40}  # native


def export(sparsity, folder):
    """Write the network with sparse and with dense weights; return both paths."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((784,)), *(layers.Dense(n, activation="relu") for n in (1024, 1024))])
    model.add(layers.Dense(10))
    ks.prune(model, sparsity, pattern="block_1x4")
    paths = [pathlib.Path(folder) / f"{name}_{sparsity}.tflite" for name in ("sparse", "dense")]
    for path, sparse in zip(paths, (True, False), strict=True):
        exported = ks.tflite.export(model, path, sparse=sparse)
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
    args = parser.parse_args()
    load = result.load()
    runtimes = [("native", 1), ("native", 2), ("wasm", 1), ("arm64", 1)]
    missing = {name: reason for name, reason in ks.tflite.runtimes.available().items() if reason}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for sparsity in args.sparsities:
            sparse, dense = export(sparsity, folder)
            for runtime, threads in runtimes:
                if runtime in missing:
                    continue
                bar = (
                    f"at most {BARS[sparsity]:.2f}" if (runtime, threads) == ("native", 1) and sparsity in BARS else "-"
                )
                cells = measure(sparse, dense, runtime, threads, args)
                sizes = f"{sparse.stat().st_size / dense.stat().st_size:.3f}"
                rows.append([f"{100 * sparsity:g} %", runtime, str(threads), *cells, sizes, bar])
    columns = ["zeros", "runtime", "threads", "dense", "sparse", "ratio", "range of ratios", "file, ratio", "asked for"]
    result.show(
        f"784-1024-1024-10 in blocks of 1x4, {args.launches} launches",
        columns,
        rows,
        missing.values(),
        load_before=load,
    )


if __name__ == "__main__":
    main()
