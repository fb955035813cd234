"""Cycles on an Ethos-U NPU: what `ks.tflite.check` says before training, and what Arm's compiler makes of the files.

Each network is looked at dense and with 95 % zeros. Said: `report.cycles`, from the model without data. Found: the
model is pruned in one shot, exported as int8 with data, and compiled by Vela. The bars: within 15 % of Vela's on all
networks; of 784-512-256-10 at 95 %, at most 0.08 of the dense network's encoded weights and 0.35 of its cycles.
Cycles are estimates by Vela, the same on each machine.
"""

import argparse
import pathlib
import tempfile

import result  # isort: skip - sets the environment that TensorFlow reads

import keras
import numpy as np
from accelerators import NETWORKS, randomised
from keras import layers

import keras_sparse as ks
from keras_sparse.tflite.runtimes import Worker
from keras_sparse.tflite.targets import get


def mlp():
    """Return 784-512-256-10."""
    return keras.Sequential([keras.Input((784,)), *(layers.Dense(n, "relu") for n in (512, 256)), layers.Dense(10)])


BUILD = {"784-512-256-10": mlp, **{name: build for name, build in NETWORKS.items() if name != "LSTM"}}


def made(model, target, x, path):
    """What Vela makes of a model, exported as int8: cycles, and bytes of encoded weights."""
    ks.tflite.export(model, path, target=target, quantize="int8", representative_data=x, batch_size=1)
    with Worker(path, "ethos-u") as worker:
        return worker.compile(get(target).npu)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(BUILD), choices=list(BUILD))
    parser.add_argument("--resnet8", help="path of MLPerf Tiny's resnet8_cifar10.h5")
    parser.add_argument("--target", default="ethos-u85", choices=["ethos-u55", "ethos-u65", "ethos-u85"])
    parser.add_argument("--sparsity", type=float, default=0.95)
    args = parser.parse_args()
    load, rows, build = result.load(), [], {name: BUILD[name] for name in args.networks}
    if args.resnet8:
        build["ResNet-8"] = lambda: keras.models.load_model(args.resnet8, compile=False)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.tflite"
        for name, function in build.items():
            keras.utils.set_random_seed(0)
            model, rng = function(), np.random.default_rng(0)
            x = rng.normal(size=(64, *model.input_shape[1:])).astype("float32")
            model = model if name == "ResNet-8" else randomised(model, x)
            said = ks.tflite.check(model, args.target, sparsity=args.sparsity).cycles
            try:
                dense = made(model, args.target, x, path)
                ks.prune(model, args.sparsity)
                zeros = made(model, args.target, x, path)
            except ks.tflite.ExportError as error:
                print(f"{name}: no file: {str(error)[:200]}", flush=True)
                continue
            row = [name]
            for predicted, found in zip(said, (dense, zeros), strict=True):
                row += [f"{predicted:,d}", f"{found['cycles']:,d}", f"{predicted / found['cycles'] - 1:+.1%}"]
            row += [f"{zeros[key] / dense[key]:.3f}" for key in ("cycles", "bytes_encoded")]
            rows.append(row)
            print(" | ".join(row), flush=True)
    columns = [f"{what}, {of}" for what in ("dense", "zeros") for of in ("said", "found", "apart")]
    title = f"{args.sparsity:.0%} zeros on {get(args.target).title}, {get(args.target).npu}"
    result.show(title, ["network", *columns, "cycles, of dense", "encoded weights, of dense"], rows, load_before=load)


if __name__ == "__main__":
    main()
