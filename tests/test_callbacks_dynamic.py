"""Dynamic sparse training (RigL, SET, static masks) in real `fit` calls."""

import keras
import pytest
from test_callbacks import dense_model, fit

import keras_sparse as ks

GROW = ["gradient", "random", "static"]


def dynamic(sparsity=0.7, **arguments):
    return ks.callbacks.DynamicSparseTraining(sparsity, **({"frequency": 3} | arguments))


class Masks(keras.callbacks.Callback):
    """Records weights, masks and slots after every step."""

    def __init__(self):
        super().__init__()
        self.masks, self.weights = [], []

    def on_train_batch_end(self, batch, logs=None):
        pairs = ks.optimizers.find(self.model).masks
        self.masks.append([ks.selection.as_array(mask) for _, mask in pairs])
        self.weights.append([ks.selection.as_array(variable) for variable, _ in pairs])

    @property
    def live(self):
        return [[int(mask.sum()) for mask in masks] for masks in self.masks]

    @property
    def moved(self):
        """Steps after which the masks are others than before."""
        pairs = zip(self.masks, self.masks[1:], strict=False)
        return [i + 2 for i, (a, b) in enumerate(pairs) if any((x != y).any() for x, y in zip(a, b, strict=True))]


@pytest.mark.parametrize("grow", GROW)
@pytest.mark.parametrize("allocation", ["erk", "uniform"])
def test_live_positions_are_constant_at_every_step(grow, allocation):
    model, record = dense_model(), Masks()
    fit(model, dynamic(grow=grow, allocation=allocation), record, epochs=4)
    erk = ks.pruning.erk_counts([(12, 10), (10, 3)], [120, 30], 0.7)
    counts = [120 - erk[0], 30 - erk[1]] if allocation == "erk" else [36, 9]
    assert sum(counts) == 45
    assert record.live == [counts] * 24
    assert record.moved == ([] if grow == "static" else [3, 6, 9, 12, 15])
    for masks, weights in zip(record.masks, record.weights, strict=True):
        assert all((weight[~mask] == 0).all() for mask, weight in zip(masks, weights, strict=True))
    assert isinstance(model.optimizer, keras.optimizers.Adam)
