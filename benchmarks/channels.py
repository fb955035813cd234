"""Networks of `keras.applications` with channels removed: the .tflite file against the dense one.

Latency does not depend on the values of the weights, so the networks are not trained. `ks.prune` chooses channels until
the MACs are what is asked for, `ks.shrink` removes them, both files are dense and run in turns (`ks.tflite.benchmark`:
milliseconds, on ARM64 millions of instructions). `difference` is that of the outputs of the masked and the shrunk
Keras model, relative to the largest output, with random statistics in the normalizations.

`CPU` is for machines that others use: all files run in turns in this process, one thread, and the ratio is that of the
least CPU time of a run, with that of the dense file.
"""

import argparse
import itertools
import pathlib
import tempfile
import time

import keras
import numpy as np
import result  # first: it keeps TensorFlow quiet

import keras_sparse as ks

BUILD = {name: getattr(keras.applications, name) for name in ("MobileNet", "MobileNetV2", "ResNet50", "EfficientNetB0")}


def randomise(model, rng):
    """Random biases, scales and statistics."""
    for v in model.weights:
        if len(v.shape) == 1:
            v.assign(
                rng.uniform(0.5, 1.5, v.shape)
                if v.name in ("gamma", "moving_variance")
                else rng.normal(0, 0.1, v.shape)
            )


def cpu_milliseconds(files, rounds):
    """The least CPU time of one run of each file, in turns."""
    from ai_edge_litert.interpreter import Interpreter

    runners = [Interpreter(model_path=file, num_threads=1) for file in files]
    times = [[] for _ in files]
    for runner in runners:
        runner.allocate_tensors()
        runner.invoke()
    for _ in range(rounds):
        for own, runner in zip(times, runners, strict=True):
            start = time.thread_time()
            runner.invoke()
            own.append(1000 * (time.thread_time() - start))
    return [min(own) for own in times]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["MobileNetV2", "ResNet50"], choices=BUILD)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--macs", type=float, nargs="+", default=[0.95, 0.5])
    parser.add_argument("--allocation", default="uniform", choices=["uniform", "global", "isomorphic"])
    parser.add_argument("--round-to", type=int, nargs="+", default=[1], help="multiples of channels that a group keeps")
    parser.add_argument("--quantize", default="float32", choices=["float32", "float16", "dynamic", "int8"])
    parser.add_argument("--runtimes", nargs="+", default=["native"], help="on which the files run in turns")
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring each file; 0: CPU times only")
    parser.add_argument("--rounds", type=int, default=100, help="runs of each file for its CPU time")
    args = parser.parse_args()
    load, table, rng = result.load(), [], np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            model = BUILD[name](weights=None, input_shape=(args.size, args.size, 3), classifier_activation=None)
            randomise(model, rng)
            files, rows = [str(pathlib.Path(folder) / f"{name}.tflite")], []
            x = rng.normal(size=(2, args.size, args.size, 3)).astype("float32")
            how = {"quantize": None if args.quantize == "float32" else args.quantize, "representative_data": x}
            ks.tflite.export(model, files[0], sparse=False, batch_size=1, **how)
            weights = model.get_weights()
            for macs, multiple in itertools.product(args.macs, args.round_to):
                model.set_weights(weights)
                budget = ks.Budget(macs=macs, round_to=multiple)
                ks.prune(model, budget, pattern="channel", allocation=args.allocation)
                start = time.perf_counter()
                shrunk, report = ks.shrink(model, verbose=0, return_report=True)
                seconds = time.perf_counter() - start
                one, other = (keras.ops.convert_to_numpy(m(x, training=False)) for m in (model, shrunk))
                files.append(str(pathlib.Path(folder) / f"{name}-{len(files)}.tflite"))
                ks.tflite.export(shrunk, files[-1], sparse=False, batch_size=1, **how)
                totals = report.totals
                rows.append([name, f"{macs:g}", str(multiple), f"{totals['macs_left'] / totals['macs']:.3f}"])
                rows[-1] += [f"{totals['parameters_left'] / totals['parameters']:.3f}"]
                rows[-1] += [f"{np.abs(one - other).max() / np.abs(one).max():.0e}", f"{seconds:.1f}"]
                for runtime in args.runtimes if args.seconds else ():
                    timed = ks.tflite.benchmark(files[-1], baseline=files[0], runtime=runtime, seconds=args.seconds)
                    found = [row["median"] if "median" in row else row["instructions"] / 1e6 for row in timed.rows]
                    rows[-1] += [f"{one:,.1f}" for one in found] + [f"{timed.rows[1]['ratio']:.2f}"]
                print(rows[-1], flush=True)
            dense, *least = cpu_milliseconds(files, args.rounds)
            table += [[*row, f"{dense:.1f}", f"{own / dense:.2f}"] for row, own in zip(rows, least, strict=True)]
    timed = [[f"{name}, dense", f"{name}, small", "ratio"] for name in args.runtimes if args.seconds]
    measured = ["difference", "shrink, s", *itertools.chain(*timed), "dense, CPU ms", "CPU ratio"]
    result.show(
        f"Channels removed, {args.size} px, {args.quantize}, allocation {args.allocation}",
        ["network", "budget", "multiples", "MACs", "parameters", *measured],
        table,
        load_before=load,
    )


if __name__ == "__main__":
    main()
