"""Import time: what `import keras_sparse` adds to `import keras`.

Each round starts two fresh processes in random order: one imports keras alone, the other keras, then keras_sparse. The
clock that counts runs inside the second process, from the end of the first import to the end of the second. The
difference of the two processes' total times is printed as a check; it is noisier, since importing keras takes seconds.
"""

import argparse
import random
import statistics
import subprocess
import sys
import time

import result

PROGRAM = """
import time
import keras
middle = time.perf_counter()
{statement}
print(time.perf_counter() - middle)
"""


def run(statement):
    """Return seconds of `statement` after `import keras`, and of the whole process."""
    started = time.perf_counter()
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(statement=statement)], capture_output=True, text=True, check=True
    )
    return float(output.stdout.splitlines()[-1]), time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0, help="seed of the order")
    args = parser.parse_args()
    load = result.load()
    shuffle = random.Random(args.seed).shuffle
    times = {"pass": [], "import keras_sparse": []}
    for statement in times:
        run(statement)  # Byte code and the disk's cache.
    for _ in range(args.rounds):
        order = list(times)
        shuffle(order)
        for statement in order:
            times[statement].append(run(statement))
    added = [1000 * inner for inner, _ in times["import keras_sparse"]]
    totals = [
        1000 * (ours - theirs)
        for (_, ours), (_, theirs) in zip(times["import keras_sparse"], times["pass"], strict=True)
    ]
    keras_alone = statistics.median(total for _, total in times["pass"])
    rows = [
        [
            f"{statistics.median(added):.0f} ms",
            f"{min(added):.0f} to {max(added):.0f} ms",
            f"{statistics.median(totals):.0f} ms",
            f"{keras_alone:.2f} s",
            "100 ms",
        ]
    ]
    columns = ["added, median", "range", "added, from whole processes", "process with keras alone", "bar"]
    result.show(f"`import keras_sparse` after `import keras`, {args.rounds} rounds", columns, rows, load_before=load)


if __name__ == "__main__":
    main()
