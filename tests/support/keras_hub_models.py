"""Backbones of KerasHub at test size, with random weights: few layers, narrow, each of a family of its own."""

import keras
import numpy as np

_WORDS, _LENGTH = 40, 10
_TEXT = {"vocabulary_size": _WORDS, "num_layers": 2, "hidden_dim": 16, "intermediate_dim": 24, "dropout": 0.1}
_POSITIONS = {"max_sequence_length": 16}
_GROUPED = {"num_query_heads": 4, "num_key_value_heads": 2}
_IMAGE = {"image_shape": (32, 32, 3)}
_WITHOUT_DROPOUT = {key: value for key, value in _TEXT.items() if key != "dropout"}

# {family: (name of the class in `keras_hub.models`, its arguments)}
FAMILIES = {
    "BERT": ("BertBackbone", _TEXT | _POSITIONS | {"num_heads": 2}),
    "RoBERTa": ("RobertaBackbone", _TEXT | _POSITIONS | {"num_heads": 2}),
    "XLM-R": ("XLMRobertaBackbone", _TEXT | _POSITIONS | {"num_heads": 2}),
    "DistilBERT": ("DistilBertBackbone", _TEXT | _POSITIONS | {"num_heads": 2}),
    "ALBERT": ("AlbertBackbone", _TEXT | _POSITIONS | {"num_heads": 2, "embedding_dim": 8}),
    "DeBERTaV3": ("DebertaV3Backbone", _TEXT | _POSITIONS | {"num_heads": 2, "bucket_size": 4}),
    "ELECTRA": (
        "ElectraBackbone",
        {key: value for key, value in _TEXT.items() if key != "vocabulary_size"}
        | _POSITIONS
        | {"vocab_size": _WORDS, "num_heads": 2, "embedding_dim": 8},
    ),
    "FNet": ("FNetBackbone", _TEXT | _POSITIONS),
    "ESM": ("ESMBackbone", _TEXT | _POSITIONS | {"num_heads": 2}),
    "RoFormerV2": ("RoformerV2Backbone", _TEXT | {"num_heads": 2, "head_size": 8}),
    "XLNet": ("XLNetBackbone", _TEXT | {"num_heads": 2}),
    "GPT-2": ("GPT2Backbone", _TEXT | _POSITIONS | {"num_heads": 2}),
    "GPT-NeoX": ("GPTNeoXBackbone", _TEXT | _POSITIONS | {"num_heads": 2}),
    "OPT": ("OPTBackbone", _TEXT | _POSITIONS | {"num_heads": 2}),
    "BLOOM": ("BloomBackbone", _TEXT | {"num_heads": 2}),
    "Llama": ("LlamaBackbone", _TEXT | _GROUPED),
    "Llama 3": ("Llama3Backbone", _TEXT | _GROUPED),
    "Mistral": ("MistralBackbone", _TEXT | _GROUPED),
    "Mixtral": ("MixtralBackbone", _TEXT | _GROUPED | {"num_experts": 2}),
    "Gemma": ("GemmaBackbone", _TEXT | _GROUPED | {"head_dim": 8}),
    "Gemma 3": ("Gemma3Backbone", _TEXT | _GROUPED | {"head_dim": 8, "image_size": 16}),
    "Phi-3": ("Phi3Backbone", _TEXT | _GROUPED),
    "Qwen": ("QwenBackbone", _TEXT | _GROUPED),
    "Qwen 3": ("Qwen3Backbone", _TEXT | _GROUPED | {"head_dim": 8}),
    "Falcon": ("FalconBackbone", _WITHOUT_DROPOUT | {"num_attention_heads": 2}),
    "T5": ("T5Backbone", _TEXT | {"num_heads": 2}),
    "BART": ("BartBackbone", _TEXT | _POSITIONS | {"num_heads": 2}),
    "Whisper": (
        "WhisperBackbone",
        _TEXT | {"num_heads": 2, "max_encoder_sequence_length": 20, "max_decoder_sequence_length": 16, "num_mels": 8},
    ),
    "ViT": (
        "ViTBackbone",
        _IMAGE | {"patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24},
    ),
    "DeiT": (
        "DeiTBackbone",
        _IMAGE | {"patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 24},
    ),
    "DINOv2": (
        "DINOV2Backbone",
        _IMAGE
        | {"patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 24}
        | {"position_embedding_shape": (32, 32)},
    ),
    "MiT (SegFormer)": (
        "MiTBackbone",
        _IMAGE
        | {"layerwise_depths": [1, 1], "num_layers": 2, "layerwise_num_heads": [1, 2], "layerwise_sr_ratios": [2, 1]}
        | {"max_drop_path_rate": 0.1, "layerwise_patch_sizes": [7, 3], "layerwise_strides": [4, 2]}
        | {"hidden_dims": [8, 16]},
    ),
    "ResNet": (
        "ResNetBackbone",
        _IMAGE
        | {"input_conv_filters": [64], "input_conv_kernel_sizes": [7], "stackwise_num_filters": [64, 64]}
        | {"stackwise_num_blocks": [1, 2], "stackwise_num_strides": [1, 2], "block_type": "basic_block"},
    ),
    "MobileNet": (
        "MobileNetBackbone",
        _IMAGE
        | {"stackwise_expansion": [[40, 56], [64, 72]], "stackwise_num_blocks": [2, 2]}
        | {"stackwise_num_filters": [[16, 16], [24, 24]], "stackwise_kernel_size": [[3, 3], [5, 5]]}
        | {"stackwise_num_strides": [[2, 1], [2, 1]], "stackwise_se_ratio": [[None, None], [0.25, 0.25]]}
        | {"stackwise_activation": [["relu", "relu"], ["hard_swish", "hard_swish"]]}
        | {"stackwise_padding": [[1, 1], [2, 2]], "output_num_filters": 32, "depthwise_filters": 8}
        | {"depthwise_stride": 2, "depthwise_residual": False, "last_layer_filter": 48, "squeeze_and_excite": 0.5},
    ),
    "DenseNet": ("DenseNetBackbone", _IMAGE | {"stackwise_num_repeats": [2, 2], "growth_rate": 8}),
    "CSPDarkNet": (
        "CSPNetBackbone",
        _IMAGE
        | {"stem_filters": 16, "stem_kernel_size": 3, "stem_strides": 1, "stackwise_depth": [1, 2]}
        | {
            "stackwise_strides": [1, 2],
            "stackwise_num_filters": [16, 32],
            "block_type": "dark_block",
            "stage_type": "dark",
        },
    ),
    "EfficientNet": (
        "EfficientNetBackbone",
        {
            "input_shape": (32, 32, 3),
            "stackwise_kernel_sizes": [3, 3],
            "stackwise_num_repeats": [1, 2],
            "stackwise_input_filters": [16, 16],
            "stackwise_output_filters": [16, 24],
            "stackwise_expansion_ratios": [1, 4],
            "stackwise_squeeze_and_excite_ratios": [0.25, 0.25],
            "stackwise_strides": [1, 2],
            "stackwise_block_types": ["v1", "v1"],
            "width_coefficient": 1.0,
            "depth_coefficient": 1.0,
            "num_features": 32,
        },
    ),
    "VGG": ("VGGBackbone", _IMAGE | {"stackwise_num_repeats": [1, 2], "stackwise_num_filters": [16, 32]}),
    "Xception": (
        "XceptionBackbone",
        {"image_shape": (64, 64, 3), "stackwise_conv_filters": [[8, 16], [16, 24]], "stackwise_pooling": [True, False]},
    ),
    "HGNetV2": (
        "HGNetV2Backbone",
        _IMAGE
        | {"depths": [1, 1], "embedding_size": 16, "hidden_sizes": [16, 32], "stem_channels": [3, 8, 16]}
        | {"hidden_act": "relu", "use_learnable_affine_block": False, "apply_downsample": [False, True]}
        | {"stackwise_stage_filters": [[16, 8, 16, 1, 2, 3], [16, 8, 32, 1, 2, 3]]}
        | {"use_lightweight_conv_block": [False, False]},
    ),
    "CLIP": ("CLIPBackbone", {"projection_dim": 16}),
}


def backbone(family, seed=0):
    """A backbone with random weights, biases, scales and statistics.

    Example:

    >>> model = backbone("BERT")  # doctest: +SKIP
    """
    import keras_hub

    keras.utils.set_random_seed(seed)
    name, arguments = FAMILIES[family]
    if family == "CLIP":
        sizes = {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "intermediate_dim": 24}
        vision = keras_hub.models.CLIPVisionEncoder(patch_size=8, image_shape=(32, 32, 3), **sizes)
        text = keras_hub.models.CLIPTextEncoder(
            vocabulary_size=_WORDS, embedding_dim=16, max_sequence_length=_LENGTH, **sizes
        )
        arguments = arguments | {"vision_encoder": vision, "text_encoder": text}
    model = getattr(keras_hub.models, name)(**arguments)
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if "float" in variable.dtype and len(variable.shape) < 2:
            spread = rng.uniform(0.5, 1.5, variable.shape)
            centred = variable.name in ("bias", "beta", "moving_mean")
            variable.assign(spread - 1.0 if centred else spread)
        elif "float" in variable.dtype and not np.any(keras.ops.convert_to_numpy(variable.value)):
            variable.assign(rng.normal(0, 0.5, variable.shape))  # biases of attention, tokens of classes and masks
    return model


def inputs(model, samples=2, seed=0):
    """Random inputs of a backbone, as a dict of arrays or an array."""
    rng = np.random.default_rng(seed)

    def drawn(name, tensor):
        shape = (samples, *(_LENGTH if n is None else n for n in tensor.shape[1:]))
        if "mask" in name:
            return np.ones(shape, "int32")
        if "segment" in name:
            return rng.integers(0, 2, shape).astype("int32")
        if "float" not in keras.backend.standardize_dtype(tensor.dtype):
            return rng.integers(1, _WORDS, shape).astype("int32")
        return rng.normal(size=shape).astype("float32")

    if isinstance(model.input, dict):
        return {name: drawn(name, tensor) for name, tensor in model.input.items()}
    return drawn("", model.inputs[0])


def with_head(model):
    """A model with one number for each sample behind all outputs of the backbone."""

    def pooled(output):
        last = len(output.shape) - 1
        axes = [axis for axis in range(1, last + 1) if axis < last or output.shape[axis] is None]
        return keras.layers.Flatten()(keras.ops.mean(output, axis=axes, keepdims=True)) if axes else output

    found = [pooled(output) for output in keras.tree.flatten(model.output)]
    joined = found[0] if len(found) == 1 else keras.layers.Concatenate()(found)
    return keras.Model(model.input, keras.layers.Dense(1, name="head")(joined))


def outputs(model, x):
    """The outputs of a model in inference, a flat list of arrays."""
    return [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(model(x, training=False))]


def difference(expected, found):
    """The largest difference of outputs, relative to the largest of each."""
    pairs = list(zip(expected, found, strict=True))
    return max(float(np.abs(one - other).max() / max(np.abs(one).max(), 1e-9)) for one, other in pairs)


def miscounted(model, sparsity):
    """The paths of what is pruned wrongly, and how many kernels have their zeros: all that multiply inputs, no others.

    Kernels without a zero do not count: what they multiply may not be known.
    """
    wrong, right = [], 0
    for variable in model.weights:
        value = keras.ops.convert_to_numpy(variable.value)
        zeros, name = int(np.sum(value == 0)), variable.path.split("/")[-1]
        if not (name.endswith("kernel") or "dense" in name) or value.ndim < 2:
            wrong += [variable.path] if "float" in variable.dtype and zeros and value.ndim > 1 else []
        elif zeros == round(sparsity * value.size):
            right += 1
        elif zeros:
            wrong.append(variable.path)
    return wrong, right
