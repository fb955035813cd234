"""Sparse students: our callbacks in `keras.distillation.Distiller`, which never touch the teacher."""

import keras
import numpy as np
import pytest

import keras_sparse as ks

# Keras hands the inputs of its own feature extractors over as no list.
pytestmark = pytest.mark.filterwarnings("ignore:The structure of `inputs` doesn't match")

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(32, 12)).astype("float32"), RNG.integers(0, 4, 32)


def network(seed):
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(10, "relu", name="hidden"), keras.layers.Dense(4, name="logits")]
    model = keras.Sequential([keras.Input((12,)), *layers])
    for layer in layers:
        layer.bias.assign(RNG.normal(size=layer.bias.shape))
    return model


def distiller(student, teacher):
    losses = [keras.distillation.LogitsDistillation(temperature=2.0)]
    losses.append(keras.distillation.FeatureDistillation("mse", "hidden", "hidden"))
    model = keras.distillation.Distiller(teacher, student, losses)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, run_eagerly=True)
    return model


def share_of_zeros(model):
    kernels = [keras.ops.convert_to_numpy(layer.kernel) for layer in model.layers]
    return sum(np.sum(kernel == 0) for kernel in kernels) / sum(kernel.size for kernel in kernels)


CALLBACKS = {
    "pruning": lambda: ks.callbacks.Pruning(0.8, frequency=2),
    "global": lambda: ks.callbacks.Pruning(0.8, allocation="global", frequency=2),
    "by gradients": lambda: ks.callbacks.Pruning(0.8, "movement", begin=1, frequency=2),
    "sparse training": lambda: ks.callbacks.DynamicSparseTraining(0.8, allocation="uniform", frequency=2),
    "proximal": lambda: ks.callbacks.ProximalL1(target_sparsity=0.8),
    "lottery": lambda: ks.callbacks.LotteryTicket(2, target_sparsity=0.8),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_the_student_is_pruned_and_the_teacher_never(name):
    student, teacher = network(0), network(1)
    ks.prune(teacher, 0.3)  # zeros of its own, which no one counts or moves
    before, start = teacher.get_weights(), student.get_weights()
    model = distiller(student, teacher)
    history = model.fit(X, Y, batch_size=16, epochs=4, verbose=0, callbacks=[CALLBACKS[name]()])
    assert history.history["sparsity"][-1] == pytest.approx(0.8, abs=0.01)
    assert share_of_zeros(student) == pytest.approx(0.8, abs=0.01)
    assert not np.array_equal(student.get_weights()[1], start[1])
    for now, then in zip(teacher.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)
    assert not isinstance(model.optimizer, ks.optimizers.SparseOptimizer)
    if name == "pruning":  # and on, with the zeros kept
        model.fit(X, Y, batch_size=8, epochs=1, verbose=0, callbacks=[ks.callbacks.KeepSparsity()])
        assert share_of_zeros(student) == pytest.approx(0.8, abs=0.01)
        np.testing.assert_array_equal(teacher.get_weights()[0], before[0])


def test_a_teacher_that_is_named_is_not_trainable():
    model = distiller(network(0), network(1))
    teacher = model.teacher.layers[0]
    with pytest.raises(ValueError, match="not trainable"):
        model.fit(X, Y, verbose=0, callbacks=[ks.callbacks.Pruning(0.5, filters=teacher)])
