"""What holds whatever people do to a model between fits and in them: random sequences, each from its seed."""

import os
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest

import keras_sparse as ks

BACKEND = keras.backend.backend()
X = np.random.default_rng(0).normal(size=(32, 12)).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, 32)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(0.01),
    # Keras 3.15 on JAX 0.10: after an average became the weights, every further fit fails, a plain one, too.
    "AdamW": lambda: keras.optimizers.AdamW(0.01, use_ema=BACKEND != "jax", ema_overwrite_frequency=3),
    "RMSprop": lambda: keras.optimizers.RMSprop(0.01, clipnorm=1.0),
}
STEPS = 4  # in an epoch
SEEDS = int(os.environ.get("SEEDS", 12))  # 200 take half an hour


class Interrupt(keras.callbacks.Callback):
    def __init__(self, step, hook):
        super().__init__()
        self.step, self.hook, self.seen = step, hook, 0

    def _count(self, hook):
        self.seen += hook == "batch_end"
        if hook == self.hook and self.seen >= self.step:
            raise KeyboardInterrupt

    def on_train_batch_begin(self, batch, logs=None):
        self._count("batch_begin")

    def on_train_batch_end(self, batch, logs=None):
        self._count("batch_end")

    def on_epoch_end(self, epoch, logs=None):
        self._count("epoch_end")


class Watch(keras.callbacks.Callback):
    """After each step: masked weights are zero. At the start, what must never come back to life is noted."""

    def __init__(self):
        super().__init__()
        self.alive = 0

    def on_train_batch_end(self, batch, logs=None):
        for variable, mask in ks.optimizers.find(self.model).masks:
            self.alive += np.count_nonzero(ks.selection.as_array(variable)[~ks.selection.as_array(mask)])


class Life:
    """A model, and what is done to it.

    Attributes:
        done: What was done, to be read when something does not hold.
    """

    def __init__(self, seed, folder):
        self.rng = np.random.default_rng(seed)
        self.folder = folder
        self.done = []
        keras.utils.set_random_seed(seed)
        parts = [keras.layers.Dense(10, activation="relu", name="a"), keras.layers.Dense(3, name="b")]
        self.model = keras.Sequential([keras.Input((12,)), *parts])
        self.first = self.model.get_weights()
        self.compile()

    def compile(self, name=None):
        self.kind = name or str(self.rng.choice(list(OPTIMIZERS)))
        # XLA takes longer than these fits; now and then a fit is not compiled.
        arguments = {}
        if BACKEND == "tensorflow":
            arguments = {"jit_compile": False, "run_eagerly": bool(self.rng.random() < 0.7)}
        self.model.compile(OPTIMIZERS[self.kind](), LOSS, **arguments)
        return self.kind

    def live(self, length):
        kinds = ["fit", "fit", "fit", "interrupt", "save", "mid_fit_file", "weights", "recompile", "freeze", "look"]
        for kind in [*self.rng.choice([*kinds, "prune", "train"], length), "fit", "save"]:
            self.done.append([str(kind)])
            self.done[-1].append(getattr(self, kind)())
            self.check_plain()

    def check_plain(self):
        optimizer = self.model.optimizer
        assert type(optimizer) is type(OPTIMIZERS[self.kind]()), self.done
        assert "sparse_state" not in vars(optimizer), self.done
        assert "get_compile_config" not in vars(self.model), self.done

    def kernels(self):
        return [w for w in ks.selection.weights(self.model) if w.kernel]

    def has_zeros(self):
        return any((w.numpy() == 0).any() for w in self.kernels() if w.trainable)

    def callback(self):
        """A callback, and how many zeros each trainable kernel must have at least when its fit ends."""
        sparsity = float(self.rng.choice([0.25, 0.5, 0.75]))
        kind = self.rng.choice(["pruning", "dynamic", "lottery", "proximal", "keep"])
        if kind == "keep":
            return ks.callbacks.KeepSparsity(), None
        if kind == "pruning":
            schedule, frequency = self.rng.choice(["linear", "one_shot", "polynomial"]), int(self.rng.integers(1, 4))
            return ks.callbacks.Pruning(sparsity, schedule=str(schedule), frequency=frequency), sparsity
        if kind == "dynamic":
            grow = str(self.rng.choice(["gradient", "random", "static"]))
            return ks.callbacks.DynamicSparseTraining(sparsity, "uniform", grow, frequency=1), sparsity
        if kind == "lottery":
            return ks.callbacks.LotteryTicket(2, sparsity, allocation="uniform"), sparsity
        return ks.callbacks.ProximalL1(target_sparsity=sparsity, frequency=1), None

    def run(self, callback, *others, epochs=2, **arguments):
        watch = Watch()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self.model.fit(
                    X, Y, batch_size=8, epochs=epochs, verbose=0, callbacks=[callback, watch, *others], **arguments
                )
                ended = True
            except KeyboardInterrupt:
                ended = False
        assert not watch.alive, self.done
        return ended, [str(warning.message) for warning in caught if "__array__" not in str(warning.message)]

    # What is done

    def fit(self):
        callback, sparsity = self.callback()
        self.done[-1].append(repr(callback)[:60])
        before = [w.numpy() == 0 for w in self.kernels()]
        _, said = self.run(callback, epochs=int(self.rng.choice([2, 4])))
        self.check(callback, sparsity, before, said)
        return said

    def check(self, callback, sparsity, before, said):
        for weight, was in zip(self.kernels(), before, strict=True):
            zero = weight.numpy() == 0
            if weight.trainable and sparsity is not None:
                # What is sparser already may stay so.
                assert zero.sum() >= round(sparsity * zero.size) or said, self.done
                if isinstance(callback, ks.callbacks.Pruning):
                    assert zero.sum() <= max(round(sparsity * zero.size), was.sum()) + 1, self.done
            keeps = isinstance(callback, (ks.callbacks.KeepSparsity, ks.callbacks.Pruning))
            assert not keeps or zero[was].all() or not weight.trainable, self.done
            if not weight.trainable:
                np.testing.assert_array_equal(zero, was)

    def interrupt(self):
        callback, _ = self.callback()
        hook = str(self.rng.choice(["batch_begin", "batch_end", "epoch_end"]))
        step = int(self.rng.integers(1, 2 * STEPS))
        self.done[-1].append((repr(callback)[:60], hook, step))
        self.run(callback, Interrupt(step, hook))

    def save(self):
        path = self.folder / "model.keras"
        self.model.save(path)
        weights = self.model.get_weights()
        self.model = keras.saving.load_model(path)
        for a, b in zip(weights, self.model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def mid_fit_file(self):
        callback, _ = self.callback()
        self.done[-1].append(repr(callback)[:60])
        self.run(callback, keras.callbacks.ModelCheckpoint(self.folder / "{epoch}.keras"))
        loaded = keras.saving.load_model(self.folder / "1.keras")
        assert type(loaded.optimizer) is type(OPTIMIZERS[self.kind]())
        # `sparse_state` holds what the file brought until a fit has begun.
        self.model = loaded
        weights = loaded.get_weights()
        loaded.fit(X, Y, batch_size=8, verbose=0)
        assert any((a != b).any() for a, b in zip(weights, loaded.get_weights(), strict=True))
        self.run(ks.callbacks.Pruning(0.1))

    def weights(self):
        if self.rng.random() < 0.5:
            self.model.set_weights(self.first)
        else:
            path = self.folder / "first.weights.h5"
            now = self.model.get_weights()
            self.model.set_weights(self.first)
            self.model.save_weights(path)
            self.model.set_weights(now)
            self.model.load_weights(path)

    def recompile(self):
        return self.compile()

    def freeze(self):
        layer = self.model.get_layer(str(self.rng.choice(["a", "b"])))
        for other in self.model.layers:
            other.trainable = True
        layer.trainable = bool(self.rng.random() < 0.4)
        return layer.name, layer.trainable, self.compile()

    def look(self):
        callbacks = [ks.callbacks.Pruning(0.5)] if self.rng.random() < 0.5 else []
        weights = self.model.get_weights()
        self.model.evaluate(X, Y, verbose=0, callbacks=callbacks)
        self.model.predict(X, verbose=0, callbacks=callbacks)
        for a, b in zip(weights, self.model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    def prune(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ks.prune(self.model, float(self.rng.choice([0.25, 0.5, 0.75])))

    def train(self):
        self.model.fit(X, Y, batch_size=8, verbose=0)
        self.model.train_on_batch(X, Y)


# Keras, of a file of a model that was compiled and not trained.
@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.slow] if seed >= 6 else []) for seed in range(SEEDS)]
)
@pytest.mark.lengthy(1)
def test_whatever_is_done_to_a_model_its_zeros_and_its_optimizer_are_in_order(seed, tmp_path):
    life = Life(seed, tmp_path)
    life.live(length=5)
    assert ks.optimizers.find(life.model) is None


@pytest.mark.lengthy(0)
def test_after_all_of_it_a_file_loads_without_us(tmp_path):
    life = Life(3, tmp_path)
    for kind in ("interrupt", "fit", "recompile", "interrupt"):
        life.done.append([kind])
        getattr(life, kind)()
    life.model.save(tmp_path / "model.keras")
    program = (
        "import sys; sys.modules['keras_sparse'] = None\n"
        "import keras\n"
        "print(type(keras.saving.load_model(sys.argv[1]).optimizer).__name__)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "model.keras")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout.strip() == life.kind, run.stderr
