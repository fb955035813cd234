"""What every test shares: a quiet TensorFlow, a fixed seed, and which files make sense on which backend."""

import atexit
import collections
import gc
import os
import shutil
import tempfile

# Before anything imports TensorFlow.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # It announces itself, and makes sums depend on the CPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of torch and NumPy spin while they wait, and here processes share the cores: most of torch's time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests compile thousands of small functions that run a few times: XLA's optimizations cost more than they save.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
# Exports are compared on this machine's CPU: an emulator takes seconds for what that does in milliseconds.
os.environ["KERAS_SPARSE_VERIFY"] = "native"

if "KERAS_SPARSE_MADE_BY_TESTS" not in os.environ:
    # Files that tests of several processes read are made by the first: see `made_once`.
    made = tempfile.mkdtemp(prefix="keras_sparse-made-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    os.environ["KERAS_SPARSE_MADE_BY_TESTS"] = made

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # JAX compiles the same small training step in hundreds of tests. All processes of a run share what is compiled.
    cache = tempfile.mkdtemp(prefix="keras_sparse-jax-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import keras
import pytest

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    # For `tf.distribute`: a second CPU has to be made before TensorFlow starts.
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )

if keras.backend.backend() == "jax":
    import jax
    import numpy as np

    # JAX compiles a random number generator for each shape of a weight: a third of a second each, and most of the time
    # of the tests. Outside of compiled functions NumPy draws the numbers, from the same key.
    def _drawn_by_numpy(draw, sample):
        def drawn(key, *args, **kwargs):
            if isinstance(key, jax.core.Tracer):
                return draw(key, *args, **kwargs)
            words = np.asarray(jax.random.key_data(key))
            return jax.device_put(np.asarray(sample(np.random.default_rng(words), *args, **kwargs)))

        return drawn

    def _uniform(rng, shape=(), dtype="float32", minval=0.0, maxval=1.0):
        return rng.uniform(minval, maxval, shape).astype(dtype)

    def _normal(rng, shape=(), dtype="float32"):
        return rng.normal(size=shape).astype(dtype)

    def _truncated_normal(rng, lower, upper, shape=(), dtype="float32"):
        values = rng.normal(size=shape)
        while (outside := (values < lower) | (values > upper)).any():
            values = np.where(outside, rng.normal(size=shape), values)
        return values.astype(dtype)

    jax.random.uniform = _drawn_by_numpy(jax.random.uniform, _uniform)
    jax.random.normal = _drawn_by_numpy(jax.random.normal, _normal)
    jax.random.truncated_normal = _drawn_by_numpy(jax.random.truncated_normal, _truncated_normal)

# These test files, conversions, subprocesses and NumPy, not tensors: one backend is enough. Exporting from the JAX and
# torch backends is tested in the run with TensorFlow.
_BACKEND_DOES_NOT_MATTER = [
    "test_architecture.py",
    "test_behaviour.py",
    "test_cli*.py",
    "test_docs.py",
    "test_files.py",
    "test_notebooks.py",
    "test_search_searchers.py",
]
# Models run forwards and NumPy. JAX compiles anew for each shape there is: another backend than TensorFlow's is enough.
_NOT_ON_JAX = ["test_comparison*.py", "test_neurons*.py", "test_patterns.py", "test_reports.py", "test_schedules.py"]
# Here models run forwards, too, but for a few fits, and cases differ in what NumPy does with layers: on JAX one case of
# each test shows that arrays of JAX will do. TensorFlow and torch run them all.
_ONE_CASE_ON_JAX = [
    "test_baking.py",
    "test_batches.py",
    "test_channel_scores.py",
    "test_channels.py",
    "test_channels_contracted.py",
    "test_channels_special.py",
    "test_channels_together.py",
    "test_graph.py",
    "test_graph_composites.py",
    "test_graph_kinds.py",
    "test_graph_paths.py",
    "test_graph_rebuilding.py",
    "test_keras_layers.py",
    "test_layers.py",
    "test_layers_channels.py",
    "test_pruning_calibration.py",
    "test_pruning_channels.py",
    "test_pruning_layerwise.py",
    "test_pruning_on_data.py",
    "test_pruning_operands.py",
    "test_pruning_sensitivities.py",
    "test_quantized.py",
    "test_search.py",
    "test_search_evaluation.py",
    "test_search_journals.py",
    "test_search_space.py",
    "test_selection.py",
    "test_selection_filters.py",
    "test_zeros.py",
]
_TENSORFLOW_ONLY = ["test_tflite_*.py", "test_quickstart.py", "test_end_to_end.py"]

# What these define are fixtures, too.
pytest_plugins = ["command_line", "compared_models"]

collect_ignore_glob = {
    "tensorflow": [],
    "torch": [*_BACKEND_DOES_NOT_MATTER, *_TENSORFLOW_ONLY],
    "jax": [*_BACKEND_DOES_NOT_MATTER, *_TENSORFLOW_ONLY, *_NOT_ON_JAX],
}[keras.backend.backend()]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leave the cases of a test after the first n, by `@pytest.mark.thorough(n)`, to `pytest -m exhaustive`.

    On JAX one case is enough in some files. Cases after the first n by `@pytest.mark.lengthy(n)` are slow with
    TensorFlow, and run as ever with the others.
    """
    backend = keras.backend.backend()
    seen, lengthy = collections.Counter(), collections.Counter()
    for item in items:
        quick = item.get_closest_marker("lengthy")
        if quick and backend == "tensorflow":
            lengthy[item.function] += 1
            if lengthy[item.function] > quick.args[0]:
                item.add_marker(pytest.mark.slow)
        thorough = item.get_closest_marker("thorough")
        cases = thorough.args[0] if thorough else float("inf")
        if backend == "jax" and item.path.name in _ONE_CASE_ON_JAX:
            cases = 1
        seen[item.function] += backend != "jax" or item.get_closest_marker("slow") is None
        if seen[item.function] > cases:
            item.add_marker(pytest.mark.exhaustive)


def pytest_collection_finish():
    """Leave TensorFlow and all that was imported with it out of garbage collections: a fifth of a second each."""
    gc.collect()
    gc.freeze()


def pytest_runtest_logreport(report):
    """Name a failure at once: a run that is stopped, for having taken too long, never comes to its summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:  # What a worker prints is lost.
        crash = getattr(report.longrepr, "reprcrash", None)
        print(f"\n{report.nodeid} failed: {crash.message if crash else report.longrepr}", flush=True)


@pytest.fixture(autouse=True)
def _fixed_seed():
    """Make each test's random numbers its own, whatever ran before; and layer names too."""
    # Not `free_memory`: a garbage collection takes half a second, and there are hundreds of tests.
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def _verified_everywhere(request, monkeypatch):
    """Exports are compared on all runtimes with sparse kernels if a test is about that."""
    if request.node.get_closest_marker("everywhere"):
        monkeypatch.delenv("KERAS_SPARSE_VERIFY")


@pytest.fixture(scope="session")
def two_replicas():
    """The one `MirroredStrategy` of this process: the keys of TensorFlow's collectives collide between two (2.21)."""
    if keras.backend.backend() != "tensorflow":
        pytest.skip("tf.distribute")
    return tf.distribute.MirroredStrategy([device.name for device in tf.config.list_logical_devices("CPU")[:2]])
