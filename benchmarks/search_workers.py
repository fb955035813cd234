"""How much faster two worker processes are than one, on the same search: LeNet-5 on MNIST, in turns.

Processes are started within the time that is measured, and so is all that the search itself does.
"""

import argparse
import statistics
import time

import result  # isort: skip - sets the environment that TensorFlow reads

import regularization_mnist
import search

import keras_sparse as ks


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8, help="candidates that are asked for at a time")
    args = parser.parse_args()
    load, (x, y, _, _) = result.load(), search.mnist()
    model = search.compiled(regularization_mnist.lenet_5(), 0.001)
    model.fit(x[:20000], y[:20000], batch_size=128, verbose=0)
    data = {"train": (x[:4000], y[:4000]), "val": (x[-2000:], y[-2000:])}
    seconds, found = {1: [], 2: []}, set()
    for _ in range(args.rounds):
        for workers in seconds:
            started = time.perf_counter()
            with search.processes(workers) as executor:
                results = ks.search.search(
                    model,
                    data,
                    searcher=ks.search.Evolution(batch=args.batch),
                    constraints={"sparsity": 0.95},
                    budget=args.budget,
                    epochs=1,
                    executor=executor,
                )
            seconds[workers].append(time.perf_counter() - started)
            found.add(tuple((one.point, *one.values.values()) for one in results.candidates))
            print(workers, f"{seconds[workers][-1]:.1f} s", flush=True)
    medians = {workers: statistics.median(times) for workers, times in seconds.items()}
    rows = [
        [
            str(workers),
            f"{medians[workers]:.1f} s",
            " ".join(f"{t:.1f}" for t in times),
            f"{medians[1] / medians[workers]:.2f}",
        ]
        for workers, times in seconds.items()
    ]
    result.show(
        f"A search of {args.budget} candidates",
        ["workers", "median", "each round", "times as fast"],
        rows,
        [f"All {2 * args.rounds} searches found the same: {len(found) == 1}."],
        load,
    )


if __name__ == "__main__":
    main()
