"""What works on backbones of KerasHub, one family a row: zeros, training, channels, files.

    python benchmarks/keras_hub_backbones.py
    python benchmarks/keras_hub_backbones.py --export BERT ViT

Each backbone is at test size (two layers, 16 channels), with random weights, biases, scales and statistics. Columns:

* `pruned`: `ks.prune(model, 0.5)`: whether each chosen kernel has exactly half zeros, and how many kernels are chosen.
* `obs`: the same with `criterion="obs"` and data; of some kernels nobody knows what they multiply: they stay dense.
* `fit`: `ks.callbacks.Pruning(0.5)` in a short `fit` with a head, zeros counted likewise.
* `parameters`, `left`: of the backbone before and after `ks.prune(model, 0.5, pattern="channel")` and `ks.shrink`.
* `goes`: layers of which channels went. `error`: the largest difference of outputs, relative to the largest output.
* `.keras`: whether the shrunk model is read again with the same outputs. `tflite`: likewise, with `--export`.
* `stays`: the first group of channels of which none could go, of those with dead channels if there are any, and why.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests" / "support"))

import keras
import keras_hub_models
import numpy as np

import keras_sparse as ks

COLUMNS = (
    "family",
    "pruned",
    "obs",
    "fit",
    "parameters",
    "left",
    "error",
    ".keras",
    "tflite",
    "seconds",
    "goes",
    "stays",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help=f"some of: {', '.join(keras_hub_models.FAMILIES)}")
    parser.add_argument("--export", action="store_true", help="convert the shrunk backbone to TFLite, too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|")
    for family in arguments.families or keras_hub_models.FAMILIES:
        start = time.time()
        row = {"family": family, "pruned": attempt(pruned, family), "obs": attempt(pruned, family, "obs")}
        row["fit"] = attempt(trained, family)
        row |= shrunk(family, arguments.export)
        row["seconds"] = round(time.time() - start)
        print("| " + " | ".join(str(row.get(column, "")) for column in COLUMNS) + " |", flush=True)


def attempt(function, *arguments):
    try:
        return function(*arguments)
    except Exception as error:
        return said(error)


def said(error):
    text = " ".join(str(error).split()).replace("|", "/")
    return f"{type(error).__name__}: {text[:160]}"


def pruned(family, criterion="magnitude"):
    model = keras_hub_models.backbone(family)
    data = {} if criterion == "magnitude" else {"criterion": criterion, "data": keras_hub_models.inputs(model, 16)}
    ks.prune(model, 0.5, **data)
    return verdict(model)


def trained(family):
    model = keras_hub_models.with_head(keras_hub_models.backbone(family))
    model.compile("adam", "mse", jit_compile=False)
    model.fit(
        keras_hub_models.inputs(model, 8),
        np.zeros((8, 1), "float32"),
        batch_size=4,
        epochs=2,
        callbacks=[ks.callbacks.Pruning(0.5)],
        verbose=0,
    )
    return verdict(model)


def verdict(model):
    chosen = sum(weight.skipped is None for weight in ks.selection.weights(model))
    wrong, found = keras_hub_models.miscounted(model, 0.5)
    return f"{found} of {chosen} exact" if not wrong else f"{len(wrong)} wrong, such as {wrong[0]}"


def shrunk(family, export):
    model = keras_hub_models.backbone(family)
    x = keras_hub_models.inputs(model)
    row = {"parameters": f"{model.count_params():,}"}
    try:
        ks.prune(model, 0.5, pattern="channel")
        small, report = ks.shrink(model, verbose=0, return_report=True)
    except Exception as error:
        return row | {"stays": said(error)}
    expected = keras_hub_models.outputs(model, x)
    row["left"] = f"{small.count_params():,}"
    row["error"] = f"{keras_hub_models.difference(expected, keras_hub_models.outputs(small, x)):.0e}"
    gone = [row["group"] for row in report.rows if row["removable"]]
    left = [row for row in report.rows if row["channels"] > 1 and row["removable"] == 0]
    stays = [f"{row['group']}: {row['reason']}" for row in sorted(left, key=lambda row: -row["dead"])]
    row["goes"] = ", ".join(dict.fromkeys(gone))
    row["stays"] = stays[0] if stays else ""
    with tempfile.TemporaryDirectory() as folder:
        row[".keras"] = attempt(read_again, small, x, folder)
        row["tflite"] = attempt(exported, small, folder) if export else ""
    return row


def read_again(model, x, folder):
    model.save(f"{folder}/model.keras")
    again = keras.saving.load_model(f"{folder}/model.keras")
    error = keras_hub_models.difference(keras_hub_models.outputs(model, x), keras_hub_models.outputs(again, x))
    return "yes" if error < 1e-5 else f"differs by {error:.0e}"


def exported(model, folder):
    ks.tflite.export(model, f"{folder}/model.tflite", sparse=False)
    return "yes"  # the file was verified against the model


if __name__ == "__main__":
    main()
