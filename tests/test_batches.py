"""Batches of inputs; the forms of data and the errors are tested in test_neurons.py, through their user."""

import keras
import numpy as np
import pytest

import keras_sparse as ks
from keras_sparse import batches
from keras_sparse.search.evaluation import arrays as search_arrays
from keras_sparse.tflite.samples import representative_batches
from keras_sparse.tflite.signatures import signature


def test_structures_are_sliced_alike_and_float64_becomes_floatx():
    data = {"a": np.arange(10.0).reshape(5, 2), "b": [np.arange(5), np.array(list("vwxyz"))]}
    batches.check(data)
    parts = list(batches.of(data, batch_size=3))
    assert [part["a"].shape for part in parts] == [(3, 2), (2, 2)]
    assert [part["a"].dtype for part in parts] == ["float32"] * 2
    np.testing.assert_array_equal(parts[1]["a"], data["a"][3:])
    np.testing.assert_array_equal(parts[1]["b"][0], [3, 4])
    assert parts[0]["b"][1].tolist() == ["v", "w", "x"]


def test_targets_are_left_out():
    x, y = np.ones((2, 3)), np.zeros(2)
    parts = list(batches.of(iter([(x, y), (x, y, y), (x,), x, ({"a": x}, y)])))
    assert [part.shape for part in parts[:4]] == [(2, 3)] * 4
    assert parts[4]["a"].shape == (2, 3)


def test_table_of_pandas():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(np.arange(6.0).reshape(3, 2))
    batches.check(frame)
    assert [part.tolist() for part in batches.of(frame, batch_size=2)] == [[[0, 1], [2, 3]], [[4, 5]]]


X = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, 64)
WEIGHT = np.ones(64, "float32")


class Batches(keras.utils.PyDataset):
    def __init__(self, *arrays):
        super().__init__()
        self.arrays = arrays

    def __len__(self):
        return 2

    def __getitem__(self, index):
        found = tuple(array[32 * index : 32 * index + 32] for array in self.arrays)
        return found if len(found) > 1 else found[0]


def tensorflow(*arrays):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(arrays if len(arrays) > 1 else arrays[0]).batch(32)


def torch(*arrays):
    data = pytest.importorskip("torch.utils.data")
    return data.DataLoader(list(zip(*arrays, strict=True)) if len(arrays) > 1 else arrays[0], batch_size=32)


WITH_TARGETS = {
    "tuple": lambda: (X, Y),
    "weighted": lambda: (X, Y, WEIGHT),
    "list of inputs": lambda: ([X], Y),
    "dict of inputs": lambda: ({"x": X}, Y),
    "dataset": lambda: tensorflow(X, Y),
    "weighted dataset": lambda: tensorflow(X, Y, WEIGHT),
    "PyDataset": lambda: Batches(X, Y),
    "loader": lambda: torch(X, Y),
    "generator": lambda: (Batches(X, Y)[i] for i in range(2)),
    "function": lambda: lambda: (Batches(X, Y)[i] for i in range(2)),
    "function of arrays": lambda: lambda: (X, Y),
}
WITHOUT = {
    "array": lambda: X,
    "list": lambda: [X],
    "dict": lambda: {"x": X},
    "tensor": lambda: keras.ops.convert_to_tensor(X),
    "dataset of x": lambda: tensorflow(X),
    "PyDataset of x": lambda: Batches(X),
    "generator of x": lambda: (X[i : i + 32] for i in (0, 32)),
    "function of x": lambda: lambda: (X[i : i + 32] for i in (0, 32)),
}


def model():
    layers = [keras.layers.Dense(5, "relu"), keras.layers.BatchNormalization(), keras.layers.Dense(3, "softmax")]
    made = keras.Sequential([keras.Input((6,), name="x"), *layers])
    made.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"], jit_compile=False)
    return made


def pruned_by_inputs(data):
    made = model()
    ks.prune(made, 0.5, criterion="obs", data=data, batch_size=32)
    return made.get_weights()


def pruned_by_gradients(data):
    made = model()
    ks.prune(made, 0.5, criterion="snip", data=data)
    return made.layers[0].get_weights()


def pruned_by_gradients_and_repaired(data):
    made = model()
    ks.prune(made, 0.5, criterion="taylor", data=data, repair=True)
    return made.layers[0].get_weights()


def with_new_statistics(data):
    made = model()
    ks.reestimate_batch_norm(made, data, batch_size=32)
    return made.get_weights()


def sensitive(data):
    return [ks.sensitivity(model(), data, levels=(0.5,), batch_size=32).losses]


def inactive(data):
    return [ks.neuron_sparsity(model(), data).totals["inactive"]]


def compared(data):
    return [ks.compare({"m": model()}, data, seconds=0).rows[0]["accuracy"]]


def searched(data):
    return search_arrays(data)[:2]


def represented(data):
    (x,) = zip(*representative_batches(data, signature(model())), strict=True)
    return [np.concatenate(x)]


# Keras says so of a list or dict for the one input of a Sequential model, and takes it.
in_any_structure = pytest.mark.filterwarnings("ignore:.*structure of `inputs`")


def check_same(ask, make, expected):
    keras.utils.set_random_seed(3)
    found = [keras.tree.flatten(part)[0] for part in ask(make())]
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)


@in_any_structure
@pytest.mark.lengthy(1)
@pytest.mark.parametrize("form", [*WITHOUT, *WITH_TARGETS])
def test_functions_that_look_at_inputs_take_all_forms_of_data(form):
    make = (WITHOUT | WITH_TARGETS)[form]
    for ask in (pruned_by_inputs, with_new_statistics, inactive, represented):
        keras.utils.set_random_seed(3)
        check_same(ask, make, ask(X))


@in_any_structure
@pytest.mark.lengthy(1)
@pytest.mark.parametrize("form", WITH_TARGETS)
def test_functions_that_look_at_targets_take_all_forms_of_data(form):
    for ask in (pruned_by_gradients, pruned_by_gradients_and_repaired, sensitive, compared, searched):
        keras.utils.set_random_seed(3)
        check_same(ask, WITH_TARGETS[form], ask((X, Y)))


@in_any_structure
@pytest.mark.lengthy(1)
@pytest.mark.parametrize("form", WITHOUT)
def test_targets_are_missed(form):
    for ask in (pruned_by_gradients, pruned_by_gradients_and_repaired, searched):
        with pytest.raises(ValueError, match=r"targets|\(x, y\)"):
            ask(WITHOUT[form]())
    keras.utils.set_random_seed(3)
    check_same(sensitive, WITHOUT[form], sensitive(X))


def test_tensors_of_torch_that_want_a_gradient():
    torch = pytest.importorskip("torch")
    found = list(batches.of(torch.ones(3, 2, requires_grad=True), batch_size=2))
    assert [type(batch) for batch in found] == [np.ndarray] * 2 and found[1].shape == (1, 2)
