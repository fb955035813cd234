"""Training on several devices: the snippets of the page, and masks that equal those of one device."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import types

import keras
import numpy as np
import pytest

import keras_sparse as ks

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="starts the other backends itself")

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs/guides/many_devices.md").read_text(encoding="utf-8")
SETUP = re.search(r"<!-- setup\n(.*?)-->", PAGE, re.S)[1]


def snippet(heading, number=0):
    """The Python below a heading of the page."""
    section = re.search(rf"^## {heading}.*?(?=^## )", PAGE, re.S | re.M)[0]
    return re.findall(r"^```python\n(.*?)^```", section, re.S | re.M)[number]


def start(arguments, backend, group=None, folder=None, **environment):
    """Start Python in a process of its own, without accelerators."""
    environment = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu", "KERAS_BACKEND": backend, **environment}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, env=os.environ | environment, cwd=folder, process_group=group, **streams)


def ended(process, code=0):
    """Wait for a program's end and return what it printed."""
    output = process.communicate(timeout=600)[0]
    assert process.returncode == code, output[-3000:]
    return output


def started_in_processes(program, processes, folder):
    """Start a program of torch in several processes of one group, which know of each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    where["OMP_NUM_THREADS"] = "1"  # Threads of torch spin while they wait.
    started = []
    for rank in range(processes):
        group = started[0].pid if started else 0
        started.append(start(["-c", program, str(folder)], "torch", group, folder, RANK=str(rank), **where))
    return started


CALLBACKS = {
    "taylor": lambda: ks.callbacks.Pruning(0.8, criterion="taylor", begin=1, frequency=2),
    "magnitude": lambda: ks.callbacks.Pruning(0.8, frequency=2),
    "global": lambda: ks.callbacks.Pruning(0.8, allocation="global", frequency=2),
    "channel": lambda: ks.callbacks.Pruning(0.5, pattern="channel", frequency=2),
    "dynamic": lambda: ks.callbacks.DynamicSparseTraining(0.8, frequency=2),
    "proximal": lambda: ks.callbacks.ProximalL1(1e-2),
}


def trained(page, callback, scope):
    with scope:
        model = page["build"]()
        model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", jit_compile=False)
    model.fit(page["x"], page["y"], epochs=2, batch_size=64, shuffle=False, verbose=0, callbacks=[callback])
    return model


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.thorough(1)
@pytest.mark.lengthy(0)
def test_two_replicas_equal_one_device(name, two_replicas):
    page = {}
    exec(SETUP, page)
    one = trained(page, CALLBACKS[name](), contextlib.nullcontext())
    two = trained(page, CALLBACKS[name](), two_replicas.scope())
    for alone, mirrored in zip(one.weights, two.weights, strict=True):
        replicas = [replica.numpy() for replica in two_replicas.experimental_local_results(mirrored.value)]
        np.testing.assert_array_equal(*replicas)
        np.testing.assert_array_equal(replicas[0] == 0, alone.numpy() == 0)
        np.testing.assert_allclose(replicas[0], alone.numpy(), atol=1e-4)


OPTIMIZERS = ["Adam", "SGD", "Nadam", "Adamax", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Ftrl", "Lion", "Lamb"]
OPTIMIZERS += ["Muon", "Adafactor", "ScheduleFreeAdamW"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.thorough(1)
@pytest.mark.lengthy(0)
def test_compiled_updates_of_two_replicas_are_those_of_plain_operations(name, two_replicas):
    """The kernel is so large that its update is compiled; an optimizer of a class of one's own is not."""
    kind, weights, keys = getattr(keras.optimizers, name), [], []

    class Own(kind):
        pass

    class Look(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            compiled = ks.optimizers.find(self.model).sparse_parts.compiled
            keys.append([key[1] for key in compiled if key[0] == "update"])

    x = np.random.default_rng(0).normal(size=(48, 512)).astype("float32")
    for optimizer in (kind, Own):
        keras.utils.set_random_seed(0)
        with two_replicas.scope():
            layers = [keras.layers.Dense(256, "relu", name="large"), keras.layers.Dense(8)]
            model = keras.Sequential([keras.Input((512,)), *layers])
            model.compile(optimizer(0.01, clipnorm=1.0), "mse", jit_compile=False)
        callbacks = [Look(), ks.callbacks.Pruning(0.8, frequency=2)]
        model.fit(x, x[:, :8], epochs=3, batch_size=16, shuffle=False, verbose=0, callbacks=callbacks)
        for weight in model.weights:
            replicas = [replica.numpy() for replica in two_replicas.experimental_local_results(weight.value)]
            np.testing.assert_array_equal(*replicas)
        weights.append(model.get_weights())
    assert [len(set(devices)) for devices in keys] == [2, 0]
    for compiled, plain in zip(*weights, strict=True):
        np.testing.assert_array_equal(compiled == 0, plain == 0)
        np.testing.assert_allclose(compiled, plain, atol=1e-4)


@pytest.mark.slow
def test_mirrored_snippet(two_replicas):
    page, made = {"two_replicas": two_replicas}, "tf.distribute.MirroredStrategy()"
    assert made in snippet("TensorFlow")
    exec(SETUP + snippet("TensorFlow").replace(made, "two_replicas"), page)
    assert ks.report(page["model"]).totals["sparsity"] == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("kind", ["ParameterServerStrategy", "MultiWorkerMirroredStrategy"])
def test_strategies_of_several_machines_are_refused(kind):
    import tensorflow as tf

    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": ["localhost:1", "localhost:2"]})
    )
    strategy = object.__new__(getattr(tf.distribute, kind))  # Real ones wait for the other machines.
    strategy._extended = types.SimpleNamespace(_cluster_resolver=resolver)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile("adam", "mse")
    model._distribute_strategy = strategy
    kernel = model.layers[0].kernel.numpy()
    with pytest.raises(ValueError, match=rf"keras\.distribution(.|\n)*Received: {kind}"):
        ks.callbacks.Pruning(0.5).set_model(model)
    np.testing.assert_array_equal(model.layers[0].kernel.numpy(), kernel)
    assert ks.optimizers.find(model) is None


LAYOUTS = """
class Layouts(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 3:
            parts = ks.optimizers.find(self.model).sparse_parts
            for part in parts:
                for key in part.claimed:
                    index = key[-1] if isinstance(key, tuple) else key
                    if isinstance(index, int) and index >= 0:
                        mine, weights = part.variables[key].value, parts.trainable[index].value
                        assert mine.sharding.is_equivalent_to(weights.sharding, weights.ndim), (part.name, key)
                        counted.append(part.name)

counted = []
callbacks = {
    "global": lambda: ks.callbacks.Pruning(0.8, allocation="global", frequency=2),
    "taylor": lambda: ks.callbacks.Pruning(0.8, criterion="taylor", begin=1, frequency=2),
    "channel": lambda: ks.callbacks.Pruning(0.5, pattern="channel", frequency=2),
    "dynamic": lambda: ks.callbacks.DynamicSparseTraining(0.8, frequency=2),
    "lottery": lambda: ks.callbacks.LotteryTicket(2, 0.8, rewind_to=2),
    "proximal": lambda: ks.callbacks.ProximalL1(1e-2),
}
parallel = keras.distribution.distribution()
data = keras.distribution.DataParallel()
spec = sharded.get_layer("hidden").kernel.value.sharding.spec
assert tuple(spec) == (None, "model"), spec
for name, callback in callbacks.items():
    found = []
    for distribution in [None, parallel, *([data] if name == "global" else [])]:
        keras.distribution.set_distribution(distribution)
        model = build()
        model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
        more = [] if distribution is None else [Layouts()]
        model.fit(x, y, epochs=2, batch_size=64, shuffle=False, verbose=0, callbacks=[callback(), *more])
        found.append([np.asarray(w) for w in model.get_weights()])
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            np.testing.assert_array_equal(one == 0, other == 0, err_msg=name)
            np.testing.assert_allclose(one, other, atol=1e-4, err_msg=name)
assert {"masks", "statistics", "rewind_point"} <= set(counted), counted
"""


@pytest.mark.slow
def test_jax_snippet_and_layouts():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    printed = ended(start(["-c", SETUP + snippet("JAX") + LAYOUTS + "print('layouts agree')"], "jax", XLA_FLAGS=flags))
    assert "layouts agree" in printed


@pytest.mark.slow
def test_torch_snippet_in_two_processes(tmp_path):
    end = "import sys\nnp.savez(f'{sys.argv[1]}/{processes}_{rank}.npz', *model.get_weights())\n"
    program = SETUP + snippet("Torch") + end
    for processes in (1, 2):
        for process in started_in_processes(program, processes, tmp_path):
            ended(process)
    one, first, second = (np.load(tmp_path / f"{name}.npz") for name in ("1_0", "2_0", "2_1"))
    assert (first["arr_0"] == 0).mean() == pytest.approx(0.8, abs=0.01)
    for name in one.files:
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_array_equal(first[name] == 0, one[name] == 0)
        np.testing.assert_allclose(first[name], one[name], atol=1e-4)


# What is run one after the other in one process: a fit that ends, that is killed, that goes on with a killed one.
RESUMING = """
import contextlib, os, pathlib, signal, sys
import keras_sparse as ks

def scope(way):
    if way == "mirrored":
        import tensorflow as tf

        return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope()
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"], devices)
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*hidden/kernel"] = (None, "model")
    parallel = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    keras.distribution.set_distribution(keras.distribution.DataParallel() if way == "data" else parallel)
    return contextlib.nullcontext()

class Kill(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if not begun:
            print(what, way, "begins at epoch", epoch, flush=True)
        begun.append(epoch)

    def on_train_batch_end(self, batch, logs=None):
        if what == "kill" and begun[-1] == 7 and batch == 2:
            os.kill(os.getpid(), signal.SIGKILL)

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    tf.config.experimental.enable_op_determinism()
folder = pathlib.Path(sys.argv[1])
for task in sys.argv[2:]:
    what, way = task.split("-")
    begun, name = [], f"{'whole' if what == 'whole' else 'killed'}-{way}"
    keras.utils.clear_session()
    (folder / name).mkdir(exist_ok=True)
    os.chdir(folder / name)
    with scope(way):
        model = build()
        model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", jit_compile=False)
    exec(SNIPPET.replace("[ks.callbacks", "[Kill(), ks.callbacks"))
    state = [*model.weights, *model.optimizer.variables]
    np.savez("end.npz", *(np.asarray(keras.ops.convert_to_numpy(variable.value)) for variable in state))
"""
CHAINS = {
    "mirrored": ("tensorflow", [["whole-mirrored", "kill-mirrored"], ["resume-mirrored"]]),
    "jax": ("jax", [["whole-data", "whole-model", "kill-data"], ["resume-data", "kill-model"], ["resume-model"]]),
}


def assert_same_end(whole, killed):
    whole, killed = np.load(whole), np.load(killed)
    assert 0.7 < (whole["arr_0"] == 0).mean() < 0.9
    assert whole.files == killed.files
    for name in whole.files:
        np.testing.assert_array_equal(whole[name], killed[name])


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
def test_killed_fit_resumes_bit_for_bit(chain, tmp_path):
    backend, tasks = CHAINS[chain]
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    program = SETUP + f"SNIPPET = {snippet('Resume')!r}\n" + RESUMING
    for several in tasks:
        process = start(["-c", program, str(tmp_path), *several], backend, XLA_FLAGS=flags)
        printed = ended(process, -signal.SIGKILL if several[-1].startswith("kill") else 0)
        for task in several:
            epoch = 7 if task.startswith("resume") else 0
            assert f"{task.replace('-', ' ')} begins at epoch {epoch}" in printed
    for way in {task.split("-")[1] for several in tasks for task in several}:
        assert_same_end(tmp_path / f"whole-{way}/end.npz", tmp_path / f"killed-{way}/end.npz")


# A step is a call of the model: after so many calls all processes end.
KILLING = """
import os, signal

calls, plain = [], build

def build():
    model = plain()

    def hook(*_):
        calls.append(1)
        if len(calls) == 31:
            os.killpg(0, signal.SIGKILL)

    model.register_forward_pre_hook(hook)
    return model
"""


@pytest.mark.slow
def test_killed_loop_of_two_processes_resumes_bit_for_bit(tmp_path):
    end = "import sys\nstate = [*model.weights, *optimizer.variables, *(mask for _, mask in optimizer.masks)]\n"
    end += "np.savez(f'{sys.argv[1]}/{rank}.npz', *(keras.ops.convert_to_numpy(v) for v in state))\n"
    program = snippet("Resume", 1)
    for name, kill in (("whole", False), ("killed", True), ("killed", False)):
        (tmp_path / name).mkdir(exist_ok=True)
        text = SETUP + KILLING * kill + program + end
        for process in started_in_processes(text, 2, tmp_path / name):
            ended(process, -signal.SIGKILL if kill else 0)
        if kill:
            assert (tmp_path / name / "backup.weights.h5").exists()
    for rank in (0, 1):
        assert_same_end(tmp_path / "whole/0.npz", tmp_path / f"killed/{rank}.npz")
