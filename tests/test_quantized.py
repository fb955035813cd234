"""What Keras's own `quantize` and `enable_lora` do to zeros, and what reports and KeepSparsity make of it."""

import warnings

import keras
import numpy as np
import pytest

import keras_sparse as ks

MODES = ["int8", "int4", "int4 per channel", "float8", "gptq", "awq"]
KEEPS = {"int8", "int4", "int4 per channel", "float8", "awq"}  # What the table of the guide says; GPTQ may.


class Block(keras.layers.Layer):
    """What GPTQ and AWQ quantize: a block that maps its input's shape to itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.up, self.down = keras.layers.Dense(12, name="up"), keras.layers.Dense(8, name="down")

    def build(self, shape):
        self.up.build(shape)
        self.down.build((*shape[:-1], 12))
        super().build(shape)

    def call(self, x):
        return x + self.down(self.up(x))


def pruned_model():
    """A small language model at sparsity 0.75, with biases, and its block."""
    tokens, block = keras.Input((6,), dtype="int32"), Block(name="block")
    embedding = keras.layers.Embedding(20, 8, name="embedding")
    model = keras.Model(tokens, keras.layers.Dense(4, name="head")(block(embedding(tokens))))
    rng = np.random.default_rng(0)  # Features go together, as those of real models do: GPTQ shifts errors among them.
    embedding.embeddings.assign(rng.normal(size=(20, 8)) + 3 * rng.normal(size=(20, 1)))
    for layer in (block.up, block.down, model.get_layer("head")):
        layer.bias.assign(rng.normal(size=layer.bias.shape))
    ks.prune(model, 0.75)
    return model, block


def quantize(model, block, mode):
    if mode in ("gptq", "awq"):
        structure = {"pre_block_layers": [model.get_layer("embedding")], "sequential_blocks": [block]}
        options = {"dataset": [np.arange(60) % 20], "tokenizer": object(), "num_samples": 4, "sequence_length": 6}
        kind = keras.quantizers.GPTQConfig if mode == "gptq" else keras.quantizers.AWQConfig
        config = kind(**options, group_size=-1, quantization_layer_structure=structure)
    elif mode == "int4 per channel":
        config = keras.quantizers.Int4QuantizationConfig(block_size=-1)
    else:
        config = None
    with warnings.catch_warnings():  # Keras says of each layer that it cannot quantize that it cannot.
        warnings.simplefilter("ignore")
        model.quantize(mode.partition(" ")[0], **({} if config is None else {"config": config}))


def kernel_in_use(layer):
    """What a Dense layer without activation multiplies with: the oracle."""
    eye = np.eye(layer.input_spec.axes[-1], dtype="float32")
    outputs = keras.ops.convert_to_numpy(layer(eye)) - keras.ops.convert_to_numpy(layer(np.zeros_like(eye)))
    return np.where(np.abs(outputs) < 1e-6, 0, outputs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.lengthy(0)
def test_zeros_by_value(mode):
    model, block = pruned_model()
    before = {layer.name: kernel_in_use(layer) for layer in (block.up, block.down)}
    quantize(model, block, mode)
    rows = {row["path"]: row for row in ks.report(model).rows}
    kept = []
    for layer in (block.up, block.down):
        now = kernel_in_use(layer)
        np.testing.assert_allclose(now, before[layer.name], atol=0.4)
        kept.append(bool((now[before[layer.name] == 0] == 0).all()))
        row = rows[f"block/{layer.name}/kernel"]
        assert (row["zeros"], row["size"]) == ((now == 0).sum(), now.size)
        assert row["shape"] == list(now.shape)
    assert all(kept) or mode not in KEEPS


@pytest.mark.lengthy(0)
def test_a_quantized_model_has_its_zeros_in_totals_and_keep_sparsity_has_nothing_to_say():
    model, block = pruned_model()
    before = ks.report(model).totals
    quantize(model, block, "int8")
    after = ks.report(model).totals
    assert after["size"] == before["size"]
    assert after["sparsity"] == pytest.approx(before["sparsity"], abs=0.02)
    kernel = np.asarray(keras.ops.convert_to_numpy(block.up.kernel))
    model.compile("sgd", "mse")
    x, y = np.zeros((4, 6), "int32"), np.ones((4, 6, 4), "float32")
    model.fit(x, y, verbose=0, callbacks=[ks.callbacks.KeepSparsity()])
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(block.up.kernel), kernel)
    with pytest.raises(ValueError, match="int8, not floating point"):
        ks.prune(model, 0.9)


def test_lora_leaves_its_kernel_out_and_zeros_come_back_when_pruned_after_the_merge(tmp_path):
    model, block = pruned_model()
    block.up.enable_lora(2)
    chosen = [weight.path for weight in ks.selection.select(model).chosen]
    assert chosen == ["block/down/kernel", "head/kernel"]
    block.up.lora_kernel_b.assign(np.ones((2, 12)))
    row = next(row for row in ks.report(model).rows if row["path"] == "block/up/kernel")
    assert row["sparsity"] < 0.1
    model.save(tmp_path / "merged.keras")
    merged = keras.models.load_model(tmp_path / "merged.keras", custom_objects={"Block": Block})
    dense = next(layer for layer in merged.layers if layer.name == "block").up
    assert not dense.lora_enabled
    np.testing.assert_allclose(kernel_in_use(dense), kernel_in_use(block.up), atol=1e-5)
    ks.prune(merged, 0.75)
    assert np.mean(keras.ops.convert_to_numpy(dense.kernel) == 0) == 0.75
