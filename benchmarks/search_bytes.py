"""The bytes of the .tflite file as the objective: LeNet-5 (caffe) on MNIST, against uniform sparsity.

A dense network is trained. The uniform one is pruned to `--sparsity` and trained on. A search then looks for networks
with small files: its objectives are the loss on images that nobody trains on, and the bytes; candidates are trained for
an epoch on a few thousand images. Of its front, the smallest file whose candidate has no higher loss than the uniform
one's candidate is trained in full, in the same way as the uniform one.
"""

import argparse
import pathlib
import statistics
import tempfile

import result  # isort: skip - sets the environment that TensorFlow reads

import keras
import regularization_mnist
import search

import keras_sparse as ks


def file_size(model):
    """The bytes of the exported file."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.tflite"
        ks.tflite.export(model, path, target="xnnpack")
        return path.stat().st_size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dense-epochs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--budget", type=int, default=64)
    args = parser.parse_args()
    load, (x, y, x_test, y_test) = result.load(), search.mnist()
    data = {"train": (x[:3000], y[:3000]), "val": (x[-5000:], y[-5000:])}
    rows, ratios = [], []
    for seed in args.seeds:
        keras.utils.set_random_seed(seed)
        model = regularization_mnist.lenet_5()
        batches = search.Batches(x[:-5000], y[:-5000], seed, shifts=False)
        search.train(model, batches, 0.001, args.dense_epochs)
        dense = model.get_weights()
        with search.processes(2) as executor:
            uniform = ks.search.search(
                search.compiled(model, 0.001),
                data,
                ks.search.Space(model, sparsities=args.sparsity),
                objective=["loss", "bytes"],
                epochs=1,
                budget=1,
                executor=executor,
            ).best
            results = ks.search.search(
                model,
                data,
                objective=["loss", "bytes"],
                epochs=1,
                budget=args.budget,
                seed=seed,
                executor=executor,
            )
        good = [one for one in results.front if one.values["loss"] <= uniform.values["loss"]]
        chosen = min(good, key=lambda one: one.values["bytes"])
        found = {}
        for name, target in (("uniform", args.sparsity), ("found", chosen.allocation)):
            model.set_weights(dense)
            keras.utils.set_random_seed(seed)
            batches = search.Batches(x[:-5000], y[:-5000], seed, shifts=False)
            search.train(model, batches, 0.0005, args.epochs, [ks.callbacks.Pruning(target, end=0.5)])
            val, test = (
                model.evaluate(*part, batch_size=500, verbose=0)[1] for part in (data["val"], (x_test, y_test))
            )
            found[name] = val, test, file_size(model)
            rows.append([str(seed), name, f"{val:.2%}", f"{test:.2%}", f"{found[name][2]:,}"])
            print(rows[-1], flush=True)
        ratios.append(found["found"][2] / found["uniform"][2])
        rows[-1].append(f"{ratios[-1]:.3f}")
        rows[-2].append("")
    result.show(
        f"LeNet-5 on MNIST, uniform at {args.sparsity:.0%} against {args.budget} candidates",
        ["seed", "allocation", "validation accuracy", "test accuracy", "bytes", "ratio"],
        rows,
        [f"Mean ratio {statistics.mean(ratios):.3f}."],
        load,
    )


if __name__ == "__main__":
    main()
