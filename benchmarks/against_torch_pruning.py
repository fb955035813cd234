"""Channels removed by `ks.prune` and by Torch-Pruning, from the same trained weights, to the same MACs, on CIFAR-10.

Networks like ResNet-20 and like MobileNetV2 of width 0.5, at 32 pixels, their first convolution with a stride of 2, are
trained once in Keras (SGD with Nesterov momentum, from 0.1 with a cosine decay to 0, weight decay 0.0005, batch 128,
shifts and flips). The same network in torch gets the weights (equal outputs, to 1e-4), Torch-Pruning removes channels
there, and what is left goes back to Keras (equal again). So both pruned networks are measured and fine-tuned by the
same code on the same batches, and only the choice of channels differs. MACs of both are counted by one counter, in
torch.

Torch-Pruning prunes in small steps until the MACs are met, as its own benchmark on CIFAR-10 does: `tp global` ranks all
groups by their norms over the largest of the group (`GroupNormPruner`, as there), `tp isomorphic` like with like, over
the mean, `tp uniform`, its default, takes the same share of each.

`--data` names a folder with arrays x_train, y_train, x_test, y_test in `cifar10.npz`; else Keras downloads CIFAR-10.
`--folder` keeps trained weights and results: what is there is not done again, and a run that was ended goes on.
Needs `pip install torch==2.13.0 torch-pruning`.
"""

import argparse
import json
import pathlib
import statistics
import time

import result  # isort: skip - sets the environment that TensorFlow reads

import cifar_allocation
import keras
import numpy as np
import torch
import torch_pruning

import keras_sparse as ks

torch.set_num_threads(1)  # of two libraries' threads each would wait for the other's

# Name of a row: the importance's normalizer, the pruner and its arguments, or what `ks.prune` is told.
THEIRS = {
    "tp uniform": ("mean", torch_pruning.pruner.BasePruner, {}),
    "tp global": ("max", torch_pruning.pruner.GroupNormPruner, {"global_pruning": True}),
    "tp isomorphic": ("mean", torch_pruning.pruner.BasePruner, {"global_pruning": True, "isomorphic": True}),
}
OURS = {
    f"{allocation}{', repair' * repair}": {"allocation": allocation, "repair": repair}
    for allocation in ("uniform", "global", "isomorphic")
    for repair in (False, True)
}
BATCH = 128


def convolved(x, filters, size, strides=1, activation="relu", name=None):
    """A convolution without a bias and its normalization; `filters=None`: a depthwise one."""
    layers = keras.layers
    if size > 1:  # Keras's "same" is not torch's where a stride is 2.
        x = layers.ZeroPadding2D(1, name=f"{name}_padding")(x)
    if filters is None:
        x = layers.DepthwiseConv2D(size, strides, use_bias=False, name=name)(x)
    else:
        x = layers.Conv2D(filters, size, strides, use_bias=False, name=name)(x)
    x = layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_norm")(x)
    return layers.Activation(activation, name=f"{name}_activation")(x) if activation else x


def resnet_20():
    """Three stages of three blocks of two 3x3 convolutions: 16, 32 and 64 channels (He et al. 2016, section 4.2)."""
    inputs = keras.Input((32, 32, 3))
    x = convolved(inputs, 16, 3, 2, name="stem")
    for stage, filters in enumerate((16, 32, 64)):
        for block in range(3):
            name, strides = f"block{stage}{block}", 2 if stage and not block else 1
            y = convolved(x, filters, 3, strides, name=f"{name}_a")
            y = convolved(y, filters, 3, activation=None, name=f"{name}_b")
            if strides == 2:
                x = convolved(x, filters, 1, 2, None, name=f"{name}_shortcut")
            x = keras.layers.Activation("relu", name=f"{name}_relu")(keras.layers.Add(name=f"{name}_add")([x, y]))
    return headed(inputs, x)


def mobilenet_v2():
    """MobileNetV2 of width 0.5 for 32 pixels: two strides of the original five are left out (stem, second stage)."""
    inputs = keras.Input((32, 32, 3))
    x = convolved(inputs, 16, 3, 2, "relu6", name="stem")
    stages = [(1, 8, 1, 1), (6, 12, 2, 2), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 1)]
    for stage, (expansion, filters, blocks, first) in enumerate(stages):
        for block in range(blocks):
            name, strides, y = f"block{stage}{block}", 1 if block else first, x
            if expansion > 1:
                y = convolved(y, expansion * y.shape[-1], 1, activation="relu6", name=f"{name}_expand")
            y = convolved(y, None, 3, strides, "relu6", name=f"{name}_depthwise")
            y = convolved(y, filters, 1, activation=None, name=f"{name}_project")
            x = keras.layers.Add(name=f"{name}_add")([x, y]) if block else y
    return headed(inputs, convolved(x, 640, 1, activation="relu6", name="top"))


def headed(inputs, x):
    x = keras.layers.GlobalAveragePooling2D(name="pooling")(x)
    return keras.Model(inputs, keras.layers.Dense(10, name="head")(x))


NETWORKS = {"ResNet-20": resnet_20, "MobileNetV2": mobilenet_v2}


class Sum(torch.nn.Module):
    """What `Add` does."""

    def forward(self, x, y):
        return x + y


class Mean(torch.nn.Module):
    """What `GlobalAveragePooling2D` does."""

    def forward(self, x):
        return x.mean((2, 3))


class Twin(torch.nn.Module):
    """A Keras model of this file in torch: layers of the same names, with the same weights; channels come first."""

    def __init__(self, model):
        super().__init__()
        first, *layers = model.layers
        self.parts = torch.nn.ModuleDict({layer.name: in_torch(layer) for layer in layers})
        names = {id(layer.output): layer.name for layer in model.layers}
        self.first = first.name
        self.calls = [(layer.name, [names[id(x)] for x in keras.tree.flatten(layer.input)]) for layer in layers]

    def forward(self, x):
        values = {self.first: x}
        for name, sources in self.calls:
            values[name] = self.parts[name](*(values[source] for source in sources))
        return values[name]


def in_torch(layer):
    kind, weights = type(layer).__name__, [torch.tensor(np.array(w)) for w in layer.get_weights()]
    if kind in ("Conv2D", "DepthwiseConv2D"):
        (kernel,), apart = weights, kind == "DepthwiseConv2D"
        kernel = kernel.permute(2, 3, 0, 1) if apart else kernel.permute(3, 2, 0, 1)
        (out, read), groups = kernel.shape[:2], len(kernel) if apart else 1
        part = torch.nn.Conv2d(read * groups, out, kernel.shape[2:], layer.strides, groups=groups, bias=False)
        part.weight.data = kernel.contiguous()
    elif kind == "BatchNormalization":
        part = torch.nn.BatchNorm2d(len(weights[0]), eps=layer.epsilon)
        part.weight.data, part.bias.data, part.running_mean, part.running_var = weights
    elif kind == "Dense":
        part = torch.nn.Linear(*weights[0].shape)
        part.weight.data, part.bias.data = weights[0].T.contiguous(), weights[1]
    else:
        found = {
            "ZeroPadding2D": lambda: torch.nn.ZeroPad2d(1),
            "Activation": lambda: {"relu": torch.nn.ReLU, "relu6": torch.nn.ReLU6}[layer.activation.__name__](),
            "Add": Sum,
            "GlobalAveragePooling2D": Mean,
        }
        part = found[kind]()
    return part


def in_keras(twin, model):
    """The Keras model with the widths and weights that a network in torch has now."""

    def resized(layer):
        config, part = layer.get_config(), twin.parts[layer.name] if layer.name in twin.parts else None
        if "filters" in config:
            config["filters"] = part.out_channels
        return type(layer).from_config(config)

    small = keras.models.clone_model(model, clone_function=resized)
    for layer in small.layers:
        if layer.weights:
            part = twin.parts[layer.name]
            weight = part.weight.detach()
            if isinstance(part, torch.nn.Conv2d):
                values = [weight.permute(2, 3, 0, 1) if part.groups > 1 else weight.permute(2, 3, 1, 0)]
            elif isinstance(part, torch.nn.BatchNorm2d):
                values = [weight, part.bias.detach(), part.running_mean, part.running_var]
            else:
                values = [weight.T, part.bias.detach()]
            layer.set_weights([value.numpy() for value in values])
    return small


def check_equal(model, twin, x):
    """Raise unless both networks have the same outputs."""
    with torch.no_grad():
        theirs = twin.eval()(torch.tensor(x.transpose(0, 3, 1, 2))).numpy()
    ours = keras.ops.convert_to_numpy(model(x, training=False))
    if not np.abs(ours - theirs).max() <= 1e-4 * max(1, np.abs(ours).max()):
        raise ValueError(f"The networks differ by {np.abs(ours - theirs).max()} of {np.abs(ours).max()}.")


def macs_of(twin):
    """Multiplications by the weights of convolutions and dense layers, for one image."""
    total = []

    def count(part, inputs, output):
        total.append(output.numel() * part.weight[0].numel())

    parts = [part for part in twin.parts.values() if isinstance(part, (torch.nn.Conv2d, torch.nn.Linear))]
    hooks = [part.register_forward_hook(count) for part in parts]
    with torch.no_grad():
        twin.eval()(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return sum(total)


def pruned_by_them(method, model, share, steps):
    """The Keras model without the channels that Torch-Pruning removes, until `share` of the MACs is left."""
    normalizer, pruner, arguments = THEIRS[method]
    twin = Twin(model).eval()
    limit = share * macs_of(twin)
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2, normalizer=normalizer)
    pruning = pruner(
        twin,
        torch.zeros(1, 3, 32, 32),
        importance=importance,
        pruning_ratio=1.0,
        iterative_steps=steps,
        ignored_layers=[twin.parts["head"]],
        **arguments,
    )
    while (left := macs_of(twin)) > limit:
        for group in pruning.step(interactive=True):
            group.prune()
            if left < 1.05 * limit and macs_of(twin) <= limit:
                break
    return in_keras(twin, model), twin


def pruned_by_us(method, model, share, inputs):
    """The Keras model without the channels that `ks.prune` chooses."""
    arguments, copy = OURS[method], keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    data = inputs if arguments["repair"] else None
    ks.prune(copy, ks.Budget(macs=share), pattern="channel", data=data, **arguments)
    return ks.shrink(copy, verbose=0)


def fitted(model, x, y, seed, epochs, rate):
    """Train with SGD, a cosine decay to 0, shifts and flips."""
    data = cifar_allocation.Shifted(x, y, seed)
    steps = epochs * len(data)
    schedule = keras.optimizers.schedules.CosineDecay(rate / 10, steps, warmup_target=rate, warmup_steps=steps // 10)
    keras.utils.set_random_seed(seed)
    model.compile(
        keras.optimizers.SGD(schedule, 0.9, nesterov=True, weight_decay=5e-4),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    model.fit(data, epochs=epochs, verbose=0)
    return model


def accuracy(model, x, y):
    return 100 * float(np.mean(np.argmax(model.predict(x, batch_size=500, verbose=0), axis=-1) == y))


class Notes:
    """What has been measured, in a file that is read again."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "results.json"
        self.found = json.loads(self.file.read_text()) if self.file.exists() else {}

    def measured(self, key, measure):
        if key not in self.found:
            started = time.perf_counter()
            self.found[key] = measure()
            self.file.write_text(json.dumps(self.found, indent=1))
            print(key, self.found[key], f"{time.perf_counter() - started:.0f} s", flush=True)
        return self.found[key]


def trained(name, seed, args, notes, data):
    """The trained network, from the folder if it is there."""
    keras.utils.set_random_seed(seed)
    model, file = NETWORKS[name](), notes.folder / f"{name}-{seed}.weights.h5"
    if not file.exists():
        fitted(model, *data[:2], seed, args.dense_epochs, 0.1)
        print(f"{name}, {seed} trained", flush=True)
        model.save_weights(file)
    model.load_weights(file)
    return model


def measure(method, share, model, args, seed, data):
    """MACs, and the accuracy before and after fine-tuning."""
    (x, y), (x_test, y_test) = (array[: args.images] for array in data[:2]), data[2:]
    if method in THEIRS:
        small, twin = pruned_by_them(method, model, share, args.steps)
    else:
        small = pruned_by_us(method, model, share, x[np.random.default_rng(seed).permutation(len(x))[:1024]])
        twin = Twin(small)
    check_equal(small, twin, x_test[:64])
    widths = [layer.filters for layer in small.layers if hasattr(layer, "filters")]
    found = {"macs": macs_of(twin), "before": accuracy(small, x_test, y_test), "widths": widths}
    if args.epochs and method in args.fine_tuned:
        found["after"] = accuracy(fitted(small, x, y, seed, args.epochs, args.learning_rate), x_test, y_test)
    return found


def mean_and_error(values):
    """`"1.23 ± 0.04"`, the mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {error:.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of cifar10.npz")
    parser.add_argument("--folder", required=True, help="for trained weights and results")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--methods", nargs="+", default=[*THEIRS, *OURS], choices=[*THEIRS, *OURS])
    parser.add_argument("--fine-tuned", nargs="+", default=[*THEIRS, *OURS], choices=[*THEIRS, *OURS])
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5, 0.25], help="shares that are left")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dense-epochs", type=int, default=3, help="of training on all images")
    parser.add_argument("--images", type=int, default=10_000, help="to fine-tune on")
    parser.add_argument("--test-images", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=3, help="of fine-tuning")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="of fine-tuning")
    parser.add_argument("--steps", type=int, default=400, help="of Torch-Pruning, down to nothing")
    args = parser.parse_args()
    load, notes = result.load(), Notes(args.folder)
    *data, x_test, y_test = cifar_allocation.cifar10(args.data)
    data += [x_test[: args.test_images], y_test[: args.test_images]]
    for seed in args.seeds:
        for name in args.networks:
            model = trained(name, seed, args, notes, data)
            twin = Twin(model)
            check_equal(model, twin, data[2][:64])
            found = lambda model=model, twin=twin: {"macs": macs_of(twin), "before": accuracy(model, *data[2:])}  # noqa: E731
            notes.measured(f"{name}, {seed}", found)
            for share in args.macs:
                for method in args.methods:
                    key = f"{name}, {seed}, {share}, {method}"
                    notes.measured(key, lambda m=method, s=share, n=model, i=seed: measure(m, s, n, args, i, data))
    rows = []
    for name in args.networks:
        dense = [notes.found[f"{name}, {seed}"] for seed in args.seeds]
        rows.append([name, "dense", "1", mean_and_error([one["before"] for one in dense]), "-"])
        for share in args.macs:
            for method in args.methods:
                runs = [notes.found[f"{name}, {seed}, {share}, {method}"] for seed in args.seeds]
                macs = statistics.mean(run["macs"] / whole["macs"] for run, whole in zip(runs, dense, strict=True))
                after = [run["after"] for run in runs if "after" in run]
                rows.append([name, method, f"{macs:.3f}", mean_and_error([run["before"] for run in runs])])
                rows[-1].append(mean_and_error(after) if after else "-")
    result.show(
        f"CIFAR-10, {args.dense_epochs} epochs, then {args.epochs} of fine-tuning on {args.images:,} images",
        ["network", "method", "MACs", "no fine-tuning", "fine-tuned"],
        rows,
        [f"Torch-Pruning {torch_pruning.__version__}. Data: {args.data or 'keras.datasets'}."],
        load,
    )


if __name__ == "__main__":
    main()
