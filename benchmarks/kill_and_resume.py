"""Fits that are killed (SIGKILL) at a random moment and resumed, against the same fit uninterrupted: bit for bit.

Each fit runs in a process of its own, forked from one that has only imported, with one of four sparse callbacks and
`BackupAndRestore` before or after it, saving each epoch. Half of the kills come after a random step, half after a
random time, so that they also hit Keras while it writes or the callback while it updates. A fit that is killed is
resumed by a fit with the same arguments in a new process. `BackupAndRestore` writes its file in place: with
`double_checkpoint=True` it keeps the one before, and goes back to it after a kill in the midst of that. A kill in the
first writing leaves a file that plain Keras cannot read either: it is deleted, as a user must, and the fit begins anew.
"""

import argparse
import collections
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import result

CALLBACKS = {
    "Pruning": lambda ks: ks.callbacks.Pruning(0.9, "taylor", frequency=2),
    "RigL": lambda ks: ks.callbacks.DynamicSparseTraining(0.9, "uniform", frequency=2),
    "SET": lambda ks: ks.callbacks.DynamicSparseTraining(0.9, "uniform", grow="random", frequency=2),
    "LotteryTicket": lambda ks: ks.callbacks.LotteryTicket(2, 0.9, rewind_to=3, allocation="uniform"),
}
EPOCHS, STEPS = 6, 6


def train(folder, name, first, kill):
    """Fit in this process; write the weights at the end."""
    import keras

    import keras_sparse as ks

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16 * STEPS, 12)).astype("float32"), rng.integers(0, 3, 16 * STEPS)
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(10, activation="relu"), keras.layers.Dense(3)])
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    class Kill(keras.callbacks.Callback):
        steps = 0

        def on_train_batch_end(self, batch, logs=None):
            if self.steps == 0:
                (folder / "begun").touch()
            self.steps += 1
            if self.steps == kill:
                os.kill(os.getpid(), signal.SIGKILL)

    ours = [CALLBACKS[name](ks), Kill()]
    backup = [keras.callbacks.BackupAndRestore(folder / "backup", save_freq="epoch", double_checkpoint=True)]
    callbacks = backup + ours if first else ours + backup
    model.fit(x, y, epochs=EPOCHS, batch_size=16, shuffle=False, verbose=0, callbacks=callbacks)
    np.savez(folder / "end.npz", *model.get_weights(), *(np.asarray(v) for v in model.optimizer.variables))


def fork(*arguments):
    """Call `train` in a forked process, and return its id."""
    process = os.fork()
    if process:
        return process
    try:
        train(*arguments)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)
    os._exit(0)


def wait(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def is_damaged(backup):
    """Whether the file of Keras's backup is not whole."""
    try:
        h5py.File(backup / "latest.weights.h5").close()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def compare(whole, folder):
    """Return what became of the fit in `folder`."""
    a, b = np.load(whole / "end.npz"), np.load(folder / "end.npz")
    same = a.files == b.files and all(np.array_equal(a[name], b[name]) for name in a.files)
    return "equal" if same else "differs"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="tensorflow", choices=["tensorflow", "jax", "torch"])
    parser.add_argument("--kills", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["KERAS_BACKEND"] = args.backend
    import keras_sparse  # noqa: F401 - its children need not import it again

    rng, root, whole = random.Random(args.seed), Path(tempfile.mkdtemp()), {}
    outcomes = {name: collections.Counter() for name in CALLBACKS}
    for number in range(args.kills):
        name, first = list(CALLBACKS)[number % len(CALLBACKS)], bool(number // len(CALLBACKS) % 2)
        if (name, first) not in whole:
            whole[name, first] = folder = root / f"whole-{name}-{first}"
            folder.mkdir()
            if wait(fork(folder, name, first, 0)):
                raise RuntimeError(f"The uninterrupted fit with {name} failed.")
        folder = root / str(number)
        folder.mkdir()
        if rng.random() < 0.5:
            code = wait(fork(folder, name, first, rng.randint(1, EPOCHS * STEPS)))
        else:
            process = fork(folder, name, first, 0)
            while not (folder / "begun").exists():
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.5))
            os.kill(process, signal.SIGKILL)
            code = wait(process)
        if code == 0:
            outcomes[name]["over before the kill"] += 1
            continue
        if is_damaged(folder / "backup"):
            if (folder / "backup" / "latest.weights.h5.bkp").exists():
                outcomes[name]["of them from the backup before"] += 1
            else:
                outcomes[name]["of them anew"] += 1
                shutil.rmtree(folder / "backup")
        outcomes[name]["failed" if wait(fork(folder, name, first, 0)) else compare(whole[name, first], folder)] += 1
    columns = ["equal", "differs", "failed", "of them from the backup before", "of them anew", "over before the kill"]
    rows = [[name, *(str(outcomes[name][column]) for column in columns)] for name in CALLBACKS]
    result.show(f"Killed and resumed, {args.backend} backend", ["callback", *columns], rows, [f"Seed {args.seed}."])


if __name__ == "__main__":
    main()
