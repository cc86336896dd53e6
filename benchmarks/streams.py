# Copyright 2026 the contributors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""How a stream of many shards is shared by many readers, without reading a pixel. Prints the table of docs/scale.md.

    python benchmarks/streams.py                          # 256 processes x 8 data workers, 10,000 shards
    python benchmarks/streams.py --processes 2 --workers 2 --shards 16 --passes 10

Every reader of every process is asked, one after the other, what it would read: the shards are names in a list, each
of one sample.
"""

import argparse
import resource
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_vqgan


def listed(shards):
    for shard in shards:
        yield {"image": shard}


def streams(processes, workers, shards):
    """The stream of each process over the same listed shards."""
    features = datasets.Features({"image": datasets.Value("int64")})
    names = {"shards": [*range(shards)]}
    items = datasets.IterableDataset.from_generator(listed, features=features, gen_kwargs=names)
    args = train_vqgan.parse_args(["--dataset_name", "listed", "--streaming", "--max_train_steps", "1"])
    positions = dict.fromkeys(range(workers), (0, None, 0))
    ranks = [SimpleNamespace(process_index=rank, num_processes=processes) for rank in range(processes)]
    return [train_vqgan.ShardStream(items, args, 0, 0, rank, positions) for rank in ranks]


def readers(found, workers):
    """(rank, worker, stream, reader) of all processes."""
    return [(s.rank, w, s, w * s.world + s.rank) for s in found for w in range(workers)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=256)
    parser.add_argument("--workers", type=int, default=8, help="data workers of each process")
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--passes", type=int, default=100)
    parser.add_argument("--asked", type=int, help="readers that are asked for their whole list (default: all)")
    options = parser.parse_args(argv)
    begun = time.perf_counter()
    found = streams(options.processes, options.workers, options.shards)
    rows = [("streams of all processes made, seconds", f"{time.perf_counter() - begun:.2f}")]

    everyone, read, seconds = readers(found, options.workers), Counter(), []
    for _, _, stream, reader in everyone[: options.asked]:  # a whole pass, sample by sample
        begun = time.perf_counter()
        read.update(sample for sample, _ in stream.one_pass(reader, 0, None, 0))
        seconds.append(time.perf_counter() - begun)
    once = set(read.values()) == {1} and (options.asked or len(read) == options.shards)
    rows.append(
        (
            "no sample twice in a pass, and none left out" if not options.asked else "no sample twice",
            "yes" if once else "NO",
        )
    )
    rows.append(("seconds of a reader for its list of a pass, median and most", spread(seconds)))

    totals, uneven = Counter(), 0
    for number in range(options.passes):
        by_rank = Counter()
        for rank, _, stream, reader in everyone:
            by_rank[rank] += shards_of(stream, reader, number)
        uneven = max(uneven, max(by_rank.values()) - min(by_rank.values()))
        totals.update(by_rank)
    for _, _, stream, reader in everyone[:: len(everyone) // 4]:
        assert all(shards_of(stream, reader, n) == stream.share(reader, n).num_shards for n in (0, 1, 7))
    rows.append(("shards of one process in a pass, most less fewest", uneven))
    apart = max(totals.values()) / min(totals.values()) - 1
    rows.append((f"the same over {options.passes} passes, as a share", f"{apart:.3%}"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows.append(("memory of the simulating process at its peak, MiB", f"{peak:.0f}"))
    print(f"{options.processes} processes x {options.workers} data workers, {options.shards:,} shards:\n")
    print("\n".join(f"| {name} | {value} |" for name, value in [("", ""), ("---", "---"), *rows]))
    even = uneven <= 1 and max(totals.values()) - min(totals.values()) <= 1
    return 0 if once and even else 1


def shards_of(stream, reader, number):
    """As `share` deals them, without building the data set."""
    place = (reader - number * stream.items.num_shards) % stream.readers
    return len(range(place, stream.items.num_shards, stream.readers))


def spread(values):
    return f"{statistics.median(values):.3f}, {max(values):.3f}"


if __name__ == "__main__":
    sys.exit(main())
