"""A listing of a model's channels: which can only be removed together, which are dead, and what each of them costs."""

from keras_sparse import graph, selection
from keras_sparse.channels.tracing import functional
from keras_sparse.reports import Report

__all__ = ["channel_groups", "listing"]


def channel_groups(model):
    """List the groups of channels of a model: what can only be removed together.

    A channel of the one layer may be bound to channels of others: those that it is added to, normalized or gated with,
    and all weights that read it. They are removed at once or not at all. How many can be removed without a trace, and
    why not, is what `ks.shrink` does; with `pattern="channel"` pruning chooses such channels.

    Fang et al., "DepGraph: towards any structural pruning" (2023), section 3.2, calls it dependency.

    Args:
        model: A built functional or Sequential model, or a subclassed one whose `call` works on symbolic inputs.

    Returns:
        A `Report`. Rows: `group` (the first layer of it), `layers` (all of them), `channels` (how many), `dead` (those
        that are zero in all weights that make them, or that nothing reads), `removable` (those that `ks.shrink`
        removes), `reason` (why others stay), `macs` and `parameters` (what one channel costs in the model as it is;
        MACs are multiplications by weights for one sample). Totals: `channels`, `dead`, `removable`, `parameters`,
        `macs`, and the same after shrinking, `parameters_left` and `macs_left`.

    Raises:
        ValueError: If the model is not built, or its graph cannot be seen.
        TypeError: If it is not a Keras 3 model.

    Example:

    The two layers that are added have their channels in common:

    >>> import keras, keras_sparse as ks
    >>> x = keras.Input((4,))
    >>> a, b = keras.layers.Dense(8, name="a")(x), keras.layers.Dense(8, name="b")(x)
    >>> model = keras.Model(x, keras.layers.Dense(2, name="head")(keras.layers.add([a, b])))
    >>> row = ks.channel_groups(model).rows[1]
    >>> row["layers"], row["channels"], row["parameters"]
    (['a', 'b', 'head'], 8, 12)
    """
    model = functional(model)
    return listing(graph.Channels(model), f"Channel groups of {model.name}")


def listing(channels, title):
    """The `Report` of a `ks.graph.Channels`.

    Example:

    >>> import keras, keras_sparse as ks
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])
    >>> ks.channels.listing.listing(ks.graph.Channels(model), "All").totals["channels"]
    9
    """
    rows = []
    whole = channels.whole_cost
    for group in channels.groups:
        cost = channels.channel_cost(group)
        rows.append(
            {
                "group": group.layers[0],
                "layers": group.layers,
                "channels": len(group.channels),
                "dead": int(group.dead.sum()),
                "removable": int(group.removable.sum()),
                "macs": cost["macs"],
                "parameters": cost["parameters"],
                "reason": "; ".join(group.reasons),
            }
        )
    left = channels.cost()
    totals = {name: sum(row[name] for row in rows) for name in ("channels", "dead", "removable")}
    for name in ("parameters", "macs"):
        totals |= {name: whole[name], f"{name}_left": left[name]}
    formats = dict.fromkeys(("macs", "parameters", "macs_left", "parameters_left", "channels"), ",d")
    columns = dict.fromkeys(("group", "layers", "channels", "dead", "removable", "macs", "parameters", "reason"))
    columns["layers"] = lambda row: (
        f"{len(row['layers'])} layers" if len(row["layers"]) > 3 else ", ".join(row["layers"])
    )
    notes = []
    gated = [x.name for x in selection.layers(channels.labelled.model) if getattr(x, "has_gates", False)]
    if gated:
        notes.append(f"{gated[0]} has gates: `ks.bake` the model first.")
    elif not rows:
        kinds = sorted({type(layer).__name__ for layer in selection.layers(channels.labelled.model)})
        notes.append(f"There are no channels that could be told apart: no layer of {kinds} is known.")
    elif not totals["dead"]:
        notes.append('No channel is dead. `ks.prune(model, 0.5, pattern="channel")` chooses channels.')
    elif totals["dead"] > totals["removable"]:
        notes.append(f"{totals['dead'] - totals['removable']} dead channels must stay: see their reasons.")
    return Report(title, rows, totals, notes, formats, columns)
