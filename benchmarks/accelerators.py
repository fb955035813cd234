"""Networks dense, with zeros and without channels, in each format, on every accelerator: right, bytes, and speed.

Each network has random weights, biases and statistics, or is a trained one (`--resnet8`). `ks.tflite.export` makes a
file for each target, at batch size 1. "Right" is its largest difference from the Keras model on the target's runtime,
relative to the largest output, on inputs that export has not seen; `ks.tflite.benchmark` measures what can be measured
here, as a ratio to the dense network's file of the same format. Zeros: 90 % of each kernel, smallest first; channels:
half of the multiplications by `Budget(macs=0.5, round_to=8)`.
"""

import argparse
import pathlib
import tempfile
import time

import result  # isort: skip - sets the environment that TensorFlow reads

import keras
import numpy as np
from keras import layers
from keyword_spotting import build as keyword_network

import keras_sparse as ks
from keras_sparse.tflite.targets import get

TARGETS = ("xnnpack-x86", "xnnpack", "xnnpack-wasm", "gpu", "micro", "ethos-u85")
FORMATS = ("float32", "float16", "dynamic", "int8")
COLUMN = {"instructions": "instructions", "cycles": "cycles"}  # of a benchmark's rows; else the median time


def ds_cnn():
    """Return the DS-CNN of MLPerf Tiny (Zhang et al. 2017, small)."""
    inputs = keras.Input((49, 10, 1))
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(64, (10, 4), 2, padding="same")(inputs)))
    for _ in range(4):
        x = layers.ReLU()(layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same")(x)))
        x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(64, 1)(x)))
    return keras.Model(inputs, layers.Dense(12, activation="softmax")(layers.GlobalAveragePooling2D()(x)))


def recurrent():
    """Return an LSTM on 32 steps of 40 features."""
    stack = [layers.LSTM(64, return_sequences=True), layers.LSTM(64), layers.Dense(12, activation="softmax")]
    return keras.Sequential([keras.Input((32, 40)), *stack])


def transformer():
    """Return a small transformer encoder on 64 steps of 32 features."""
    inputs = keras.Input((64, 32))
    x = layers.Dense(64)(inputs)
    for _ in range(2):
        x = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, 16)(x, x))
        x = layers.LayerNormalization()(x + layers.Dense(64)(layers.Dense(256, activation="relu")(x)))
    return keras.Model(inputs, layers.Dense(12, activation="softmax")(layers.GlobalAveragePooling1D()(x)))


def mobilenet():
    """Return MobileNetV2 0.35 at 96 pixels."""
    return keras.applications.MobileNetV2((96, 96, 3), alpha=0.35, weights=None)


NETWORKS = {
    "MobileNetV2 0.35, 96 px": mobilenet,
    "keyword network": keyword_network,
    "DS-CNN": ds_cnn,
    "LSTM": recurrent,
    "transformer": transformer,
}


def variants(model, adapt):
    """`{name: model}` of a dense network; the one with zeros in the form that sparse kernels take, if there is one."""
    zeros, masked = keras.models.clone_model(model), keras.models.clone_model(model)
    for copy in (zeros, masked):
        copy.set_weights(model.get_weights())
    zeros = ks.tflite.adapt(zeros) if adapt else zeros
    ks.prune(zeros, 0.9)
    ks.prune(masked, ks.Budget(macs=0.5, round_to=8), pattern="channel")
    return {"dense": model, "90 % zeros": zeros, "half the MACs": ks.shrink(masked, verbose=0)}


def randomised(model, x):
    """Give a network biases, and normalizations the statistics of its inputs."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if len(weight.shape) == 1 and weight.dtype == "float32" and "moving" not in weight.path:
            weight.assign(keras.ops.convert_to_numpy(weight) + rng.uniform(-0.1, 0.1, weight.shape))
    ks.reestimate_batch_norm(model, x)
    return model


def measured(path, baseline, target, seconds):
    """`(value, unit, ratio)` of a file, or why there is none."""
    try:
        rows = ks.tflite.benchmark(path, baseline=baseline, target=target, seconds=seconds).rows
    except (ValueError, OSError) as error:
        return None, str(error).splitlines()[0], None
    row = rows[-1] if target != "xnnpack-x86" else next(row for row in rows[::-1] if row["runtime"] == "native")
    column = next((name for name in COLUMN if name in row), "median")
    return row[column], COLUMN.get(column, "ms"), row["ratio"]


def cell(model, target, mode, x, unseen, folder, baselines, seconds):
    """A row of the table for a network, a target and a format; the dense one's file is the base of the ratios."""
    path = folder / f"{len(list(folder.iterdir()))}.tflite"
    quantize = None if mode == "float32" else mode
    options = {"representative_data": x} if mode == "int8" else {}
    try:
        report = ks.tflite.export(model, path, target=target, quantize=quantize, batch_size=1, **options)
    except (ValueError, OSError) as error:
        return ["no file", str(error).splitlines()[0][:100], "-", "-", "-"]
    # An NPU's compiler computes nothing: what it compiles is compared on this machine's CPU.
    names = ("native",) if get(target).npu else get(target).runtimes
    installed = [name for name in names if ks.tflite.runtimes.available()[name] is None]
    checked = [ks.tflite.verify(path, model, accelerator=name, data=unseen).totals for name in installed]
    right = f"{max(totals['parity_relative'] for totals in checked):.1e}" if checked else "not installed"
    whole = {True: "yes", False: "in part"}.get(checked[0]["accelerated"] if checked else None, "-")
    baseline = baselines.setdefault((target, mode), path)
    value, unit, ratio = measured(path, baseline if baseline != path else None, target, seconds)
    speed = "-" if value is None else f"{value:.3f} ms" if unit == "ms" else f"{value:,d} {unit}"
    return [report.encoding, right, whole, f"{report.bytes_file:,d}", speed + (f" ({ratio:.2f})" if ratio else "")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--resnet8", help="path of MLPerf Tiny's resnet8_cifar10.h5")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--seconds", type=float, default=0.5, help="of measuring the time of each file")
    args = parser.parse_args()
    load, started, rows = result.load(), time.perf_counter(), []
    made = {name: NETWORKS[name] for name in args.networks}
    if args.resnet8:
        made["ResNet-8"] = lambda: keras.models.load_model(args.resnet8, compile=False)
    for name, build in made.items():
        keras.utils.set_random_seed(0)
        model, rng = build(), np.random.default_rng(0)
        x, unseen = (rng.normal(size=(64, *model.input_shape[1:])).astype("float32") for _ in range(2))
        model = model if name == "ResNet-8" else randomised(model, x)
        baselines = {}
        with tempfile.TemporaryDirectory() as folder:
            for variant, one in variants(model, adapt=name.startswith("MobileNet")).items():
                for target in args.targets:
                    for mode in args.formats:
                        if get(target).quantize and mode not in get(target).quantize:
                            continue
                        row = cell(one, target, mode, x, unseen[:8], pathlib.Path(folder), baselines, args.seconds)
                        rows.append([name, target, mode, variant, *row])
                        print(" | ".join(rows[-1]), flush=True)
    rows.sort(key=lambda row: [list(made).index(row[0]), TARGETS.index(row[1]), FORMATS.index(row[2])])
    columns = ["network", "target", "weights", "network is", "stored", "differs by", "all on it", "bytes", "speed"]
    notes = [f"Took {(time.perf_counter() - started) / 60:.0f} minutes."]
    result.show("Every accelerator", columns, rows, notes, load)


if __name__ == "__main__":
    main()
