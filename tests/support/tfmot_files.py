"""Files as tf_keras and tfmot write them, of many kinds. Run as a program: `python tfmot_files.py FOLDER`.

Beside each `.h5` file comes an `.npz` of inputs and of the outputs that its source computes. With `folders` and names
after FOLDER, these come as SavedModel folders. `trained` and `names` after it write other things.
"""

import inspect
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

KINDS = {}


def kind(function):
    KINDS[function.__name__] = function
    return function


def in_their_environment(tmp_path, *arguments):
    """Run this file as a program."""
    pytest.importorskip("tf_keras")
    pytest.importorskip("tensorflow_model_optimization")
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("KERAS_BACKEND", None)
    command = [sys.executable, __file__, str(tmp_path), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "failed:" not in result.stdout, result.stdout


def main(folder, names):
    global tf, tk, layers, tfmot, sparsity
    import tensorflow as tf
    import tensorflow_model_optimization as tfmot
    import tf_keras as tk

    layers, sparsity = tk.layers, tfmot.sparsity.keras
    rng = np.random.default_rng(0)
    if names == ["trained"]:
        return train(pathlib.Path(folder), rng)
    if names == ["names"]:
        return list_names(pathlib.Path(folder))
    folders = names[:1] == ["folders"]
    for name in names[folders:] or KINDS:
        try:
            write(pathlib.Path(folder), name, rng, folders)
        except Exception as error:  # What tf_keras cannot save is none of our business, but is to be seen.
            print("failed:", name, repr(error)[:300])


def write(folder, name, rng, as_folder):
    tk.utils.set_random_seed(len(name))
    tk.backend.clear_session()
    made = KINDS[name]()
    model, reference = made if isinstance(made, tuple) else (made, made)
    randomize(reference, rng)
    if reference is not model:
        copy_weights(reference, model)
    inputs = []
    for tensor in model.inputs:
        shape = [3 if size is None else size for size in tensor.shape]
        shape[0] = 4 if tensor.shape[0] is None else tensor.shape[0]
        whole = tensor.dtype.is_integer
        inputs.append(rng.integers(0, 7, shape) if whole else rng.normal(size=shape).astype("float32"))
    outputs = reference.predict(inputs if len(inputs) > 1 else inputs[0], verbose=0, batch_size=inputs[0].shape[0])
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    arrays = {f"in{i}": x for i, x in enumerate(inputs)} | {f"out{i}": y for i, y in enumerate(outputs)}
    masks = [np.mean(w.numpy() == 0) for w in model.weights if "mask" in w.name]
    np.savez(folder / f"{name}.npz", masks=masks, **arrays)
    if as_folder:
        model.save(folder / name, save_format="tf")
    else:
        model.save(folder / f"{name}.h5")


def train(folder, rng):
    """Write the weights before and the masks after a few steps of training under tfmot."""
    x, y = rng.normal(size=(64, 10)).astype("float32"), rng.normal(size=(64, 8)).astype("float32")
    cases = {
        "constant": (sparsity.ConstantSparsity(0.6, 3), (1, 1), ()),
        "blocks": (sparsity.ConstantSparsity(0.5, 2), (4, 3), ()),
        "m_by_n": (sparsity.ConstantSparsity(0.5, 4), (1, 1), (2, 4)),
        "polynomial": (sparsity.PolynomialDecay(0.1, 0.8, 1, 7, frequency=2), (1, 1), ()),
    }
    for name, (schedule, block, m_by_n) in cases.items():
        tk.utils.set_random_seed(0)
        model = tk.Sequential([layers.Dense(16, "relu", input_shape=(10,)), layers.Dense(8)])
        before = {f"w{i}": value for i, value in enumerate(model.get_weights())}
        model = prune(model, pruning_schedule=schedule, block_size=block, sparsity_m_by_n=m_by_n or None)
        model.compile(tk.optimizers.SGD(0.01), "mse")
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[sparsity.UpdatePruningStep()])
        masks = {f"mask{i}": layer.pruning_vars[0][1].numpy() for i, layer in enumerate(model.layers)}
        config = json.dumps(schedule.get_config())
        np.savez(folder / f"{name}.npz", x=x, y=y, config=config, block=block, m_by_n=m_by_n, **before, **masks)


def list_names(folder):
    """Write the public names of tfmot (under "") and those of `sparsity.keras`, each with its arguments."""
    found = {name: list(inspect.signature(getattr(sparsity, name)).parameters) for name in public(sparsity)}
    (folder / "names.json").write_text(json.dumps({"": public(tfmot), **found}))


def public(module):
    of_python = ("absolute_import", "division", "print_function")
    return [name for name in dir(module) if name[0] != "_" and name not in of_python]


def randomize(model, rng):
    """Give every weight a random value, and a third of each mask zeros."""
    if any("cluster" in layer.name for layer in model.layers):
        return
    for weight in model.weights:
        name, shape = weight.name.split("/")[-1], weight.shape
        if name.startswith("mask"):
            weight.assign(rng.random(shape) > 0.3)
        elif weight.dtype.is_floating and shape.rank:
            low = 0.5 if "variance" in name or "gamma" in name else -0.6
            weight.assign(rng.uniform(low, 0.9, shape))
    for layer in model.layers:
        if isinstance(layer, layers.Normalization):
            layer.finalize_state()


def copy_weights(source, target):
    values = {w.name: w for w in source.weights}
    for weight in target.weights:
        name = weight.name.replace("quant_", "")
        if name in values:
            weight.assign(values[name])


def prune(model, **options):
    options.setdefault("pruning_schedule", sparsity.ConstantSparsity(0.5, 0))
    return sparsity.prune_low_magnitude(model, **options)


def mlp():
    first = layers.Dense(8, activation="relu", input_shape=(6,), kernel_regularizer="l2")
    return tk.Sequential([first, layers.BatchNormalization(), layers.Dropout(0.2), layers.Dense(3, "softmax")])


def cnn():
    x = inputs = tk.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same", activation="relu")(x)
    x = layers.DepthwiseConv2D(3, strides=2)(x)
    x = layers.BatchNormalization()(x)
    x = layers.ReLU(6.0)(x)
    x = layers.SeparableConv2D(5, 2)(x)
    x = layers.Conv2DTranspose(3, 2)(x)
    x = layers.LeakyReLU(0.1)(x)
    x = layers.GlobalAveragePooling2D()(x)
    return tk.Model(inputs, layers.Dense(2)(x))


@kind
def plain_sequential():
    model = mlp()
    model.compile("adam", "mse")
    model.fit(np.ones((4, 6)), np.ones((4, 3)), verbose=0)
    return model


@kind
def plain_functional():
    return cnn()


@kind
def pruned_sequential():
    model = prune(mlp())
    model.compile("adam", "mse")
    model.fit(np.ones((4, 6)), np.ones((4, 3)), verbose=0, callbacks=[sparsity.UpdatePruningStep()])
    return model


@kind
def pruned_polynomial():
    return prune(mlp(), pruning_schedule=sparsity.PolynomialDecay(0.1, 0.8, 0, 100))


@kind
def pruned_functional():
    return prune(cnn())


@kind
def pruned_some_layers():
    return tk.models.clone_model(cnn(), clone_function=lambda x: prune(x) if isinstance(x, layers.Conv2D) else x)


@kind
def pruned_in_list():
    return tk.Sequential([tk.Input((5,)), prune(layers.Dense(8, "tanh")), prune(layers.Dense(2), block_size=(2, 2))])


@kind
def pruned_2_4():
    return prune(tk.Sequential([layers.Dense(8, input_shape=(16,)), layers.Dense(4)]), sparsity_m_by_n=(2, 4))


@kind
def stripped():
    return sparsity.strip_pruning(prune(mlp()))


@kind
def nested():
    x = inputs = tk.Input((6,))
    inner = tk.Sequential([layers.Dense(7, "relu", input_shape=(6,)), layers.BatchNormalization(), layers.Dense(5)])
    return tk.Model(inputs, layers.Dense(2)(layers.LayerNormalization()(inner(x))))


@kind
def pruned_nested():
    return prune(nested())


@kind
def nested_functional_shared():
    a, b = tk.Input((6,), name="left"), tk.Input((6,), name="right")
    x = tk.Input((6,))
    twin = tk.Model(x, layers.BatchNormalization()(layers.Dense(4, "relu")(x)), name="twin")
    return tk.Model([a, b], layers.Dense(1)(layers.Subtract()([twin(a), twin(b)])))


@kind
def pruned_shared():
    a, b = tk.Input((6,)), tk.Input((6,))
    shared = prune(layers.Dense(4, "relu", name="shared"))
    return tk.Model([a, b], layers.Dense(1)(layers.Concatenate()([shared(a), shared(b)])))


@kind
def pruned_two_outputs():
    x = inputs = tk.Input((6,))
    x = layers.Dense(8, "relu")(x)
    return prune(tk.Model(inputs, [layers.Dense(2, name="one")(x), layers.Dense(3, name="two")(x)]))


@kind
def frozen():
    x = inputs = tk.Input((6,))
    x = layers.Dense(8, "relu", trainable=False)(x)
    inner = tk.Sequential([layers.Dense(7, input_shape=(8,)), layers.BatchNormalization(), layers.Dense(5)])
    inner.layers[0].trainable = False
    return tk.Model(inputs, layers.Dense(2)(inner(layers.BatchNormalization(trainable=False)(x))))


@kind
def pruned_frozen():
    model = nested()
    model.trainable = False
    return prune(model)


@kind
def stripped_lstm():  # Wrapped, it has two masks of one name, which tf_keras cannot save.
    model = tk.Sequential([layers.LSTM(5, return_sequences=True, input_shape=(4, 5)), layers.LSTM(3)])
    return sparsity.strip_pruning(prune(model))


@kind
def old_gru():
    return tk.Sequential([layers.GRU(5, reset_after=False, input_shape=(4, 3)), prune(layers.Dense(2))])


@kind
def old_hard_sigmoid():
    return tk.Sequential([layers.LSTM(5, recurrent_activation="hard_sigmoid", input_shape=(4, 3)), layers.Dense(2)])


@kind
def bidirectional():
    x = inputs = tk.Input((4, 3))
    x = layers.Bidirectional(layers.GRU(4, return_sequences=True))(x)
    x = layers.TimeDistributed(layers.Dense(3, "elu"))(x)
    return tk.Model(inputs, layers.SimpleRNN(2)(x))


@kind
def pruned_embedding():
    x = inputs = tk.Input((5,), dtype="int32")
    x = layers.Conv1D(4, 2, activation="swish")(layers.Embedding(9, 6)(x))
    return prune(tk.Model(inputs, layers.Dense(2)(layers.GlobalMaxPooling1D()(x))))


@kind
def attention():
    x = inputs = tk.Input((5, 8))
    y = layers.MultiHeadAttention(2, 4)(x, x)
    x = layers.LayerNormalization()(layers.Add()([x, y]))
    return tk.Model(inputs, layers.Dense(2, "gelu")(layers.Flatten()(x)))


@kind
def attention_keywords():
    x, y = tk.Input((5, 8)), tk.Input((3, 8))
    z = layers.MultiHeadAttention(2, 4, name="mha")(query=x, value=y, key=y)
    return tk.Model([x, y], layers.GlobalAveragePooling1D()(z))


@kind
def operators():
    a, b = tk.Input((6,)), tk.Input((6,))
    x = layers.Dense(6)(a) * 0.5 + b - 1.0
    x = 2.0 - tf.nn.relu(x / 3.0) @ tf.ones((6, 6))
    x = tf.concat([x, -a], axis=-1)
    return tk.Model([a, b], layers.Dense(2)(tf.reshape(x, (-1, 3, 4))))


@kind
def more_operators():
    x = inputs = tk.Input((4, 6))
    x = tf.nn.softmax(tf.transpose(x, [0, 2, 1])) + tf.reduce_mean(inputs, axis=[1, 2], keepdims=True)
    x = tf.expand_dims(tf.math.tanh(x), -1)
    x = tf.squeeze(x, axis=-1) + tf.sqrt(tf.abs(x[:, :, :, 0])) + tf.cast(tf.maximum(x, 0.1), tf.float32)[..., 0]
    x = tf.stack([x, tf.clip_by_value(x, -0.5, 0.5)], axis=1)
    return tk.Model(inputs, tf.reduce_sum(x, axis=1))


@kind
def slices():
    x = inputs = tk.Input((4, 6))
    return tk.Model(inputs, layers.Dense(2)(x[:, -1, 1:5:2]) + layers.Dense(2)(x[:, 0, ::-1]))


@kind
def mobile():
    x = inputs = tk.Input((16, 16, 3))
    x = layers.Rescaling(1 / 2.0, offset=-0.1)(x)
    x = layers.ZeroPadding2D(((0, 1), (0, 1)))(x)
    x = layers.Conv2D(8, 3, strides=2, use_bias=False)(x)
    x = layers.ReLU(6.0)(layers.BatchNormalization(axis=-1, momentum=0.9)(x))
    y = layers.GlobalAveragePooling2D(keepdims=True)(x)
    y = layers.Conv2D(8, 1, activation="hard_sigmoid")(y)
    x = layers.Multiply()([x, y])
    x = layers.UpSampling2D(2, interpolation="bilinear")(layers.MaxPooling2D(2)(x))
    x = layers.PReLU(shared_axes=[1, 2])(prune(layers.Conv2D(8, 3, groups=2, dilation_rate=2))(x))
    return tk.Model(inputs, prune(layers.Dense(4))(layers.Flatten()(x)))


@kind
def volumes():
    x = inputs = tk.Input((4, 4, 4, 2))
    x = layers.AveragePooling3D()(layers.Conv3D(4, 3, padding="same", activation="selu")(x))
    return tk.Model(inputs, layers.Permute((2, 1, 3))(layers.Reshape((4, 4, 2))(x)))


@kind
def mixed_precision():
    x = inputs = tk.Input((6,))
    x = layers.Dense(8, "relu", dtype="mixed_float16")(x)
    return tk.Model(inputs, layers.Dense(2, dtype="float32")(x))


@kind
def normalization():
    norm = layers.Normalization()
    norm.adapt(np.random.default_rng(1).normal(2, 3, (50, 6)))
    return tk.Sequential([tk.Input((6,)), norm, layers.GaussianNoise(0.1), layers.Dense(2)])


@kind
def objects_in_configs():
    dense = layers.Dense(
        4,
        activation=tk.activations.tanh,
        kernel_initializer=tk.initializers.HeNormal(seed=3),
        kernel_constraint=tk.constraints.MaxNorm(2.0),
        bias_regularizer=tk.regularizers.L1L2(0.1, 0.2),
        input_shape=(6,),
    )
    return tk.Sequential([dense, layers.Activation(tk.activations.softplus), layers.ThresholdedReLU(0.7)])


@kind
def fixed_batch():
    return tk.Sequential([layers.LSTM(4, stateful=True, batch_input_shape=(2, 3, 5)), layers.Dense(1)])


@kind
def dict_outputs():
    x = inputs = tk.Input((6,))
    return tk.Model(inputs, [layers.Dense(2)(layers.Dense(3, name="mask_head")(x))])


@kind
def clustered():
    cluster = tfmot.clustering.keras
    start = cluster.CentroidInitialization.LINEAR
    model = cluster.cluster_weights(mlp(), number_of_clusters=4, cluster_centroids_init=start)
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 6)), np.ones((4, 3)), verbose=0)
    return model


@kind
def clustered_convolution():
    cluster = tfmot.clustering.keras
    start = cluster.CentroidInitialization.DENSITY_BASED
    model = cluster.cluster_weights(
        tk.Sequential([layers.Conv2D(4, 3, input_shape=(6, 6, 2)), layers.Flatten(), layers.Dense(2)]),
        number_of_clusters=5, cluster_centroids_init=start,
    )  # fmt: skip
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 6, 6, 2)), np.ones((4, 2)), verbose=0)
    return model


@kind
def quantized():
    x = inputs = tk.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, activation="relu")(x)
    x = layers.Flatten()(layers.MaxPooling2D()(x))
    model = tk.Model(inputs, layers.Dense(3, "softmax")(x))
    return tfmot.quantization.keras.quantize_model(model), model


@kind
def quantized_sequential():
    model = tk.Sequential([tk.Input((6,)), layers.Dense(8, "relu"), layers.Dense(3)])
    return tfmot.quantization.keras.quantize_model(model), model


@kind
def quantized_batch_norm():
    x = inputs = tk.Input((8, 8, 3))
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(4, 3, use_bias=False)(x)))
    x = layers.ReLU(6.0)(layers.BatchNormalization()(layers.DepthwiseConv2D(3)(x)))
    y = layers.Conv2D(4, 1)(x)
    model = tk.Model(inputs, layers.GlobalAveragePooling2D()(layers.Add()([x, y])))
    return tfmot.quantization.keras.quantize_model(model), model


@kind
def annotated():
    model = tk.Sequential([tk.Input((6,)), layers.Dense(8, "relu"), layers.Dense(3)])
    return tfmot.quantization.keras.quantize_annotate_model(model)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
