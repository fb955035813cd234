"""Quantized and sparse: MobileNetV2 at 224 pixels, 1x1 convolutions and classifier pruned, in every number format.

Size and latency do not depend on the values of the weights, so the network is not trained: its weights are random, its
normalizations have seen random images, it is adapted (`ks.tflite.adapt`) and pruned in one shot. `export` verifies each
file (`verify="strict"`) before it is measured. Time and instructions are those of the sparse file relative to the dense
file of the same format, and to the dense float32 file, run in turns. Runtimes that are not installed are left out.
"""

import argparse
import pathlib
import tempfile

import keras
import result  # first: it keeps TensorFlow quiet
from keras import layers

import keras_sparse as ks

BARS = {"float16": 0.16, "int8": 0.15}  # bytes, relative to the dense float32 file
POINTWISE = [r"expand/kernel", r"project/kernel", r"Conv_1/kernel", r"predictions/kernel"]


def pruned(size, sparsity, images):
    """The network, adapted and pruned, with the statistics of `images` in its normalizations."""
    keras.utils.set_random_seed(0)
    model = keras.applications.MobileNetV2((size, size, 3), weights=None, classifier_activation=None)
    model = ks.tflite.adapt(model, verbose=0)
    ks.prune(model, sparsity, filters=POINTWISE)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0
    model(images, training=True)
    return model


def ratio(file, baseline, runtime, seconds):
    """Time of a file, or its instructions on ARM64, relative to a baseline's."""
    report = ks.tflite.benchmark(file, baseline=baseline, runtime=runtime, seconds=seconds)
    return f"{report.rows[1]['ratio']:.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--quantize", nargs="+", default=["none", "float16", "dynamic", "int8"])
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring each file")
    parser.add_argument("--verify", choices=["auto", "strict"], default="strict")
    args = parser.parse_args()
    load = result.load()
    missing = {name: reason for name, reason in ks.tflite.runtimes.available().items() if reason}
    runtimes = [name for name in ("wasm", "arm64", "native") if name not in missing]
    images = keras.ops.convert_to_numpy(keras.random.normal((16, args.size, args.size, 3), seed=0))
    model = pruned(args.size, args.sparsity, images)
    rows, notes = [], []
    with tempfile.TemporaryDirectory() as folder:
        reference = pathlib.Path(folder) / "dense_float32.tflite"
        ks.tflite.export(model, reference, sparse=False)
        for name in args.quantize:
            options = {"quantize": None if name == "none" else name, "representative_data": images}
            sparse, dense = (pathlib.Path(folder) / f"{kind}_{name}.tflite" for kind in ("sparse", "dense"))
            exported = ks.tflite.export(model, sparse, verify=args.verify, **options)
            ks.tflite.export(model, dense, sparse=False, **options)
            share = exported.bytes_file / reference.stat().st_size
            bar = f"at most {BARS[name]:.2f}" if name in BARS else "-"
            cells = [
                "float32" if name == "none" else name,
                f"{exported.bytes_file:,d}",
                f"**{share:.3f}**",
                bar,
                f"{exported.bytes_file / exported.bytes_dense:.3f}",
                f"{exported.parity_relative:.1e}",
                f"{len(exported.runs_sparse)}",
            ]
            for runtime in runtimes:
                cells += [ratio(sparse, baseline, runtime, args.seconds) for baseline in (dense, reference)]
            rows.append(cells)
            notes += [f"{name}: {note}" for note in exported.notes]
            notes.append(f"{name}: verified on {', '.join(exported.verified_on)}")
    columns = ["`quantize`", "bytes", "to dense float32", "asked for", "to dense", "parity", "weights that run sparse"]
    for runtime in runtimes:
        columns += [f"{runtime}, to dense", f"{runtime}, to dense float32"]
    title = f"MobileNetV2 at {args.size}, {100 * args.sparsity:g} % zeros, quantized"
    result.show(title, columns, rows, [*notes, *missing.values()], load_before=load)


if __name__ == "__main__":
    main()
