"""Scripts as people write them for tf_keras and tfmot run on Keras 3 with two lines changed: the imports."""

import keras
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="the scripts use TensorFlow")

HEAD = """
import tempfile

import numpy as np
import tensorflow as tf
import tf_keras as keras
import tensorflow_model_optimization as tfmot

x_train = np.random.default_rng(0).normal(size=(64, 12)).astype("float32")
y_train = np.random.default_rng(1).integers(0, 4, 64)
"""
CHANGED = {
    "import tf_keras as keras": "import keras",
    "import tensorflow_model_optimization as tfmot": "from keras_sparse.compat import tfmot",
}
WHOLE = """
model = keras.Sequential([
    keras.layers.InputLayer((12,)),
    keras.layers.Dense(16, activation="relu"),
    keras.layers.Dense(4),
])
prune_low_magnitude = tfmot.sparsity.keras.prune_low_magnitude
batch_size, epochs = 16, 2
end_step = np.ceil(len(x_train) / batch_size).astype(np.int32) * epochs
pruning_params = {
    "pruning_schedule": tfmot.sparsity.keras.PolynomialDecay(
        initial_sparsity=0.50, final_sparsity=0.80, begin_step=0, end_step=end_step, frequency=2
    )
}
model_for_pruning = prune_low_magnitude(model, **pruning_params)
model_for_pruning.compile(
    optimizer="adam",
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
callbacks = [
    tfmot.sparsity.keras.UpdatePruningStep(),
    tfmot.sparsity.keras.PruningSummaries(log_dir=tempfile.mkdtemp()),
]
model_for_pruning.fit(
    x_train, y_train, batch_size=batch_size, epochs=epochs, validation_split=0.1, verbose=0, callbacks=callbacks
)
model_for_export = tfmot.sparsity.keras.strip_pruning(model_for_pruning)
_, keras_file = tempfile.mkstemp(".h5")
keras.models.save_model(model_for_export, keras_file, include_optimizer=False)
"""
SOME_LAYERS = """
base_model = keras.Sequential([
    keras.layers.InputLayer((12,)),
    keras.layers.Dense(16, activation="relu"),
    keras.layers.BatchNormalization(),
    keras.layers.Dense(4),
])


def apply_pruning_to_dense(layer):
    if isinstance(layer, keras.layers.Dense):
        schedule = tfmot.sparsity.keras.ConstantSparsity(0.75, 0, frequency=1)
        return tfmot.sparsity.keras.prune_low_magnitude(layer, pruning_schedule=schedule)
    return layer


model_for_pruning = keras.models.clone_model(base_model, clone_function=apply_pruning_to_dense)
model_for_pruning.summary(print_fn=lambda line, **_: None)
model_for_pruning.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
model_for_pruning.fit(x_train, y_train, verbose=0, callbacks=[tfmot.sparsity.keras.UpdatePruningStep()])
model_for_export = tfmot.sparsity.keras.strip_pruning(model_for_pruning)
"""
OWN_LOOP = """
i = keras.Input((12,))
schedule = tfmot.sparsity.keras.ConstantSparsity(0.5, begin_step=0, frequency=5)
x = tfmot.sparsity.keras.prune_low_magnitude(keras.layers.Dense(10, activation="relu"), schedule)(i)
o = keras.layers.Dense(4)(x)
model_for_pruning = keras.Model(inputs=i, outputs=o)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
optimizer = keras.optimizers.Adam()
unused_arg = -1
model_for_pruning.optimizer = optimizer
step_callback = tfmot.sparsity.keras.UpdatePruningStep()
step_callback.set_model(model_for_pruning)
step_callback.on_train_begin()
for _ in range(3):
    for first in range(0, 64, 16):
        step_callback.on_train_batch_begin(batch=unused_arg)
        with tf.GradientTape() as tape:
            logits = model_for_pruning(x_train[first : first + 16], training=True)
            loss_value = loss(y_train[first : first + 16], logits)
        grads = tape.gradient(loss_value, model_for_pruning.trainable_variables)
        optimizer.apply_gradients(zip(grads, model_for_pruning.trainable_variables))
    step_callback.on_epoch_end(batch=unused_arg)
model_for_export = tfmot.sparsity.keras.strip_pruning(model_for_pruning)
"""
TWO_OF_FOUR = """
model = keras.Sequential([
    keras.layers.InputLayer((12,)),
    keras.layers.Dense(16, activation="relu"),
    keras.layers.Dense(4),
])
model = tfmot.sparsity.keras.prune_low_magnitude(model, sparsity_m_by_n=(2, 4))
model.compile(optimizer=keras.optimizers.RMSprop(), loss="mse")
model.fit(x_train, np.eye(4)[y_train], epochs=1, verbose=0, callbacks=tfmot.sparsity.keras.UpdatePruningStep())
model_for_export = tfmot.sparsity.keras.strip_pruning(model)
"""
CHECKPOINTS = """
from functools import partial

x = inputs = keras.Input((12,))
x = keras.layers.Dense(16, activation="relu", name="hidden")(x)
model = keras.Model(inputs, keras.layers.Dense(8, name="logits")(x))
schedule = tfmot.sparsity.keras.PolynomialDecay(0.0, 0.5, begin_step=1, end_step=6, frequency=1)
prune = partial(tfmot.sparsity.keras.prune_low_magnitude, pruning_schedule=schedule, block_size=(1, 4))
model = prune(model)
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
folder = tempfile.mkdtemp()
model.fit(
    x_train,
    y_train,
    epochs=4,
    verbose=0,
    callbacks=[
        tfmot.sparsity.keras.UpdatePruningStep(),
        keras.callbacks.ModelCheckpoint(folder + "/best.weights.h5", save_weights_only=True),
        keras.callbacks.EarlyStopping(monitor="loss", patience=9),
    ],
)
model.load_weights(folder + "/best.weights.h5")
model_for_export = tfmot.sparsity.keras.strip_pruning(model)
"""
LOADED = """
class ThreeTimes(tfmot.sparsity.keras.PruningSchedule):
    def __init__(self, target_sparsity, frequency):
        self._validate_sparsity(target_sparsity, "target_sparsity")
        self._validate_step(0, 3 * frequency, frequency, False)
        self.target_sparsity, self.frequency = target_sparsity, frequency

    def __call__(self, step):
        due = self._should_prune_in_step(step, self.frequency, 3 * self.frequency, self.frequency)
        return due, tf.constant(self.target_sparsity, dtype=tf.float32)

    def get_config(self):
        config = {"target_sparsity": self.target_sparsity, "frequency": self.frequency}
        return {"class_name": "ThreeTimes", "config": config}


class Mixed(keras.layers.Dense, tfmot.sparsity.keras.PrunableLayer):
    def get_prunable_weights(self):
        return [self.kernel, self.bias]


model = keras.Sequential([keras.layers.InputLayer((12,)), keras.layers.Dense(16), Mixed(4, name="mixed")])
model = tfmot.sparsity.keras.prune_low_magnitude(model, pruning_schedule=ThreeTimes(0.5, frequency=2))
model.compile("adam", keras.losses.MeanSquaredError())
y_train = np.eye(4)[y_train]
model.fit(x_train, y_train, batch_size=16, epochs=2, verbose=0, callbacks=[tfmot.sparsity.keras.UpdatePruningStep()])
_, keras_model_file = tempfile.mkstemp(".h5")
model.save(keras_model_file, include_optimizer=True)
with tfmot.sparsity.keras.prune_scope(), keras.utils.custom_object_scope({"Mixed": Mixed}):
    loaded_model = keras.models.load_model(keras_model_file)
model_for_export = tfmot.sparsity.keras.strip_pruning(loaded_model)
"""
SCRIPTS = {
    "whole model": (WHOLE, [0.8, 0.8]),
    "some layers": (SOME_LAYERS, [0.75, 0.75]),
    "a loop of one's own": (OWN_LOOP, [0.5, 0.0]),
    "two of four": (TWO_OF_FOUR, [0.5, 0.5]),
    "blocks and checkpoints": (CHECKPOINTS, [0.5, 0.5]),
    "a file in prune_scope": (LOADED, [0.5, 0.5]),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_changed_lines(name):
    body, sparsities = SCRIPTS[name]
    lines = [CHANGED.get(line, line) for line in (HEAD + body).splitlines()]
    assert sum(old != new for old, new in zip((HEAD + body).splitlines(), lines, strict=True)) == 2
    keras.utils.set_random_seed(0)
    names = {}
    exec(compile("\n".join(lines), name, "exec"), names)
    model = names["model_for_export"]
    kernels = [layer.get_weights()[0] for layer in model.layers if isinstance(layer, keras.layers.Dense)]
    np.testing.assert_allclose([(kernel == 0).mean() for kernel in kernels], sparsities, atol=0.01)
    assert type(model.optimizer) is getattr(keras.optimizers, type(model.optimizer).__name__)
    model.predict(names["x_train"], verbose=0)
