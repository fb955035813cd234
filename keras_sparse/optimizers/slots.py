"""A slot is a variable of an optimizer that belongs to one weight and has its shape, such as Adam's momentum.

Keras has no public list of them. They are found among `optimizer.variables` by the name that Keras gives them: the path
of the weight and the kind of slot (`add_variable_from_reference`, Keras 3.15).
"""

import contextlib

import numpy as np
from keras import ops

__all__ = ["reset_slots", "restart", "slots"]

# Moving averages of the weights, and gradients that wait for more (`gradient_accumulation_steps`), are no slots.
_NOT_SLOTS = ("average", "gradient_accumulator")


def slots(optimizer, variables):
    """List the variables of an optimizer that belong to one weight and have its shape.

    Args:
        optimizer: A built `keras.optimizers.Optimizer`; a `MultiOptimizer` too.
        variables: The trainable variables that it was built with.

    Returns:
        List of `(index into variables, kind, slot)`, such as `(0, "momentum", <Variable ...>)`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> optimizer = keras.optimizers.Adam()
    >>> optimizer.build(model.trainable_variables)
    >>> [(index, kind) for index, kind, _ in ks.optimizers.slots(optimizer, model.trainable_variables)]
    [(0, 'momentum'), (0, 'velocity'), (1, 'momentum'), (1, 'velocity')]
    """
    indices, found, seen = {}, [], {}
    for index, variable in enumerate(variables):
        indices.setdefault(variable.path.replace("/", "_"), []).append(index)
    for state in _own_variables(optimizer):
        # "a_kernel" is the beginning of "a_kernel_scale_momentum" too: the longest path counts.
        end = state.name.rfind("_")
        while end > 0 and state.name[:end] not in indices:
            end = state.name.rfind("_", 0, end)
        if end > 0:
            # Weights of one path follow each other in the order of `variables`.
            turn = seen[state.name] = seen.get(state.name, -1) + 1
            index = indices[state.name[:end]][turn]
            if state.shape == variables[index].shape:
                found.append((index, state.name[end + 1 :], state))
    return found


def reset_slots(optimizer, variables, where):
    """Put slots back to what they are in an optimizer that has made no step.

    Args:
        optimizer: A built `keras.optimizers.Optimizer`; not in a compiled function.
        variables: The trainable variables that it was built with.
        where: Dict from an index into `variables` to a boolean array of its shape: the positions to reset.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    >>> model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    >>> loss = model.train_on_batch(np.ones((4, 2)), np.ones((4, 2)))
    >>> ks.optimizers.reset_slots(model.optimizer, model.trainable_variables, {0: np.eye(2, dtype=bool)})
    >>> [bool(x) for x in np.diag(model.optimizer.variables[2].numpy())]
    [False, False]
    """
    for part in getattr(optimizer, "optimizers", [optimizer]):
        # The accumulators of Adagrad and Ftrl are the only slots that do not start at zero: they are divided by.
        initial = {"accumulator": getattr(part, "initial_accumulator_value", 0.0)}
        for index, kind, slot in slots(part, variables):
            if index in where and kind not in _NOT_SLOTS:
                value = ops.convert_to_tensor(slot)
                slot.assign(ops.where(where[index], ops.full_like(value, initial.get(kind, 0.0)), value))


def restart(optimizer, variables, step=0):
    """Put an optimizer back to where it was before its first step, but for its learning rate.

    Args:
        optimizer: A built `keras.optimizers.Optimizer`; not in a compiled function.
        variables: The trainable variables that it was built with.
        step: The iterations that it counts from now on.

    Example:

    >>> import keras, numpy as np, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    >>> model.compile(keras.optimizers.Adam(0.1), "mse")
    >>> loss = model.train_on_batch(np.ones((4, 2)), np.ones((4, 2)))
    >>> ks.optimizers.restart(model.optimizer, model.trainable_variables)
    >>> int(model.optimizer.iterations), float(abs(model.optimizer.variables[2].numpy()).sum())
    (0, 0.0)
    """
    old = _own_variables(optimizer)
    new = _new_like(optimizer, variables)
    if new is not None and len(new.variables) == len(old):
        for state, fresh in zip(old, new.variables, strict=True):
            state.assign(ops.copy(fresh))  # A copy, since JAX gives the buffers of variables away.
    else:
        reset_slots(optimizer, variables, {i: np.ones(tuple(v.shape), bool) for i, v in enumerate(variables)})
    for state in old:
        if state.name == "iteration":
            state.assign(step * (optimizer.gradient_accumulation_steps or 1))
    for index, kind, state in slots(optimizer, variables):
        if kind == "average":
            state.assign(ops.copy(variables[index]))
        elif kind == "gradient_accumulator":
            state.assign(ops.zeros(state.shape, state.dtype))


def _own_variables(optimizer):
    """The variables of an optimizer without those of its parts, if it is sparse."""
    parts = vars(optimizer).get("sparse_state")
    with contextlib.nullcontext() if parts is None else parts.parts.files():
        return optimizer.variables


def _new_like(optimizer, variables):
    """An optimizer as it was before its first step, or `None` if its class or its schedule has no config."""
    try:
        new = type(optimizer).from_config(optimizer.get_config())
        new.build(variables)
    except Exception:  # Whatever a class of the user's own raises: its slots are known all the same.
        return None
    return new
