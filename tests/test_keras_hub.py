"""Backbones of KerasHub, at test size: some families for each feature; `benchmarks/keras_hub_backbones.py` has all.

KerasHub brings tensorflow-text, tokenizers and kagglehub with it, so that it is in no extra: `pip install keras-hub`.
"""

import keras
import keras_hub_models
import numpy as np
import pytest

import keras_sparse as ks

keras_hub = pytest.importorskip("keras_hub")

# The classes and converters of others warn of this and that.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.mark.parametrize("family", ["BERT", "Llama", "XLNet", "T5", "ViT", "MobileNet"])
def test_kernels_are_chosen_and_nothing_else(family):
    model = keras_hub_models.backbone(family)
    report = ks.prune(model, 0.5)
    wrong, right = keras_hub_models.miscounted(model, 0.5)
    chosen = [weight for weight in ks.selection.weights(model) if weight.skipped is None]
    assert (wrong, right) == ([], len(chosen))
    assert report.totals["zeros"] == sum(round(0.5 * weight.size) for weight in chosen)


@pytest.mark.parametrize("family", ["BERT", "Qwen", "XLNet", "ResNet"])
def test_kernels_are_pruned_by_what_they_multiply(family):
    model = keras_hub_models.backbone(family)
    ks.prune(model, 0.5, criterion="obs", data=keras_hub_models.inputs(model, 16))
    wrong, right = keras_hub_models.miscounted(model, 0.5)
    chosen = [weight for weight in ks.selection.weights(model) if weight.skipped is None]
    assert (wrong, right) == ([], len(chosen))


@pytest.mark.parametrize("family", ["BERT", "Gemma", "VGG"])
def test_zeros_after_training(family):
    model = keras_hub_models.with_head(keras_hub_models.backbone(family))
    model.compile("adam", "mse", jit_compile=False)
    x, y = keras_hub_models.inputs(model, 8), np.zeros((8, 1), "float32")
    model.fit(x, y, batch_size=4, epochs=2, callbacks=[ks.callbacks.Pruning(0.5)], verbose=0)
    wrong, right = keras_hub_models.miscounted(model, 0.5)
    assert wrong == []
    assert right == sum(weight.skipped is None for weight in ks.selection.weights(model))


@pytest.mark.parametrize(
    ("family", "goes"),
    [
        ("BERT", {"self_attention_layer": 18, "feedforward_intermediate_dense": 24}),
        ("GPT-2", {"feedforward_intermediate_dense": 24}),
        ("Llama", {"feedforward_gate_dense": 24}),
        ("GPT-NeoX", {"feedforward_intermediate_dense": 24}),
        ("Gemma", {"ffw_gating": 12}),
        ("ViT", {"mha": 18, "dense_1": 24}),
        ("MobileNet", {"block_1_0_conv1": 20, "block_2_0_se_conv_reduce": 8}),
    ],
)
def test_channels_leave_and_outputs_stay(family, goes, tmp_path):
    model = keras_hub_models.backbone(family)
    x = keras_hub_models.inputs(model)
    ks.prune(model, 0.5, pattern="channel")
    small, report = ks.shrink(model, verbose=0, return_report=True)
    expected = keras_hub_models.outputs(model, x)
    assert keras_hub_models.difference(expected, keras_hub_models.outputs(small, x)) < 1e-5
    assert small.count_params() == report.totals["parameters_left"] < model.count_params()
    if keras.backend.backend() != "jax":  # there, keys and values are as wide as each other
        found = {}
        for row in report.rows:
            found[row["group"]] = found.get(row["group"], 0) + row["removable"]
        assert {name: found.get(name.split("/")[0]) for name in goes} == goes
    assert all(row["reason"] for row in report.rows if row["dead"] > row["removable"])
    if not any("cannot be read" in note for note in report.notes):
        small.save(tmp_path / "small.keras")
        again = keras.saving.load_model(tmp_path / "small.keras")
        assert keras_hub_models.difference(expected, keras_hub_models.outputs(again, x)) < 1e-5


def test_a_budget_is_met():
    model = keras_hub_models.backbone("BERT")
    macs = ks.channel_groups(model).totals["macs"]
    ks.prune(model, ks.Budget(macs=0.7), pattern="channel")
    small = ks.shrink(model, verbose=0)
    assert ks.channel_groups(small).totals["macs"] <= 0.7 * macs


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="one conversion will do")
def test_a_small_backbone_becomes_a_file(tmp_path):
    model = keras_hub_models.backbone("ResNet")
    ks.prune(model, 0.5, pattern="channel")
    result = ks.tflite.export(ks.shrink(model, verbose=0), tmp_path / "small.tflite")
    assert (tmp_path / "small.tflite").stat().st_size == result.totals["bytes_file"]
