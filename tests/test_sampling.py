"""The order of the images, how processes and workers share it, and what is drawn for each sample."""

import itertools
import math
import random
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch

import train_vqgan
from train_vqgan import permute

SHADES = [10, 20, 30, 40, 50, 60, 70]


def parsed(*flags):
    common = ("--resolution", "16", "--train_batch_size", "2", "--dataloader_num_workers", "0")
    return train_vqgan.parse_args([*common, "--validation_fraction", "0", *map(str, flags)])


def batches(args, start, n, rank=0, world=1, seed=0):
    """The first `n` micro-batches of one process, concatenated."""
    items = train_vqgan.load_data(args, seed)[0]
    process = SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"))
    stream = train_vqgan.training_batches(items, args, seed, start, process, train_vqgan.Watch(), {})
    return torch.cat([images for images, _ in itertools.islice(stream, n)])


@pytest.fixture(scope="module")
def plains(tmp_path_factory):
    """Seven images of one colour each, SHADES: a pixel tells which image it is from."""
    folder = tmp_path_factory.mktemp("plains")
    for shade in SHADES:
        PIL.Image.new("RGB", (20, 16), (shade, 0, 0)).save(folder / f"{shade}.png")
    return folder


def epochs(args, n=10, seed=0):
    """Which of the seven images were seen in each of the first epochs."""
    seen = batches(args, 0, math.ceil(7 * n / 2), seed=seed)[:, 0, 0, 0].tolist()
    return [tuple(seen[i : i + 7]) for i in range(0, 7 * n, 7)]


# ---- The permutation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 64, 65, 1000])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**70])
def test_permute_is_a_permutation(n, seed):
    """Red when the walk stops outside (`if i <= n`)."""
    assert sorted(permute(i, n, seed) for i in range(n)) == list(range(n))


@pytest.mark.parametrize("n", [64, 1000])
def test_permute_depends_on_the_seed(n):
    """Red when the seed is left out of the hash, or the network leaves the identity."""
    orders = {tuple(permute(i, n, seed) for i in range(n)) for seed in [*range(20), 1_000_003]}
    assert len(orders) == 21 and tuple(range(n)) not in orders


def chi_square(counts, expected):
    return float(((np.asarray(counts) - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("n, seeds", [(2, 2000), (7, 2800), (64, 12800), (1000, 50000)])
@pytest.mark.parametrize("item", [0, -1])
def test_permute_is_uniform(n, seeds, item):
    """Where an item lands over many seeds; five standard deviations. Red with a single round."""
    landed = np.bincount([permute(item % n, n, seed) for seed in range(seeds)], minlength=n)
    assert landed.sum() == seeds and len(landed) == n
    assert chi_square(landed, seeds / n) < n - 1 + 5 * math.sqrt(2 * (n - 1))


@pytest.mark.parametrize("n", [3, 7, 40])
def test_permute_places_pairs_uniformly(n):
    """Where items 0 and 1 land together. Red with three rounds for n = 40, and with six for n = 7."""
    pairs, seeds = n * (n - 1), 42_000
    landed = np.bincount([permute(0, n, seed) * n + permute(1, n, seed) for seed in range(seeds)], minlength=n * n)
    assert (landed.reshape(n, n).diagonal() == 0).all(), "two items in one place"
    off_diagonal = landed.reshape(n, n)[~np.eye(n, dtype=bool)]
    assert chi_square(off_diagonal, seeds / pairs) < pairs - 1 + 5 * math.sqrt(2 * (pairs - 1))


def test_any_position_of_a_large_stream_costs_nothing():
    """100 million images, sample 10 billion: no stored permutation. Red when one is stored, or epochs are walked."""
    stream = train_vqgan.SampleStream(range(10**8), parsed(), 0)
    tracemalloc.start()
    start = time.perf_counter()
    found = [stream.index(10**10 + i) for i in range(100)]
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(found)) == 100 and max(found) < 10**8 and max(found) - min(found) > 10**7
    assert seconds < 0.5 and peak < 1 << 20


# ---- The stream of samples -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 12, 1003])
@pytest.mark.parametrize("world, batch_size, accumulation", [(1, 12, 1), (2, 6, 1), (3, 4, 1), (4, 3, 1), (2, 3, 2)])
def test_processes_share_every_step(monkeypatch, start, world, batch_size, accumulation):
    """A step sees the same samples however many processes share it. Red when ranks overlap or leave gaps.

    For example `start + rank * batch_size` in place of `start + rank`, or a count without its `world` stride.
    """
    numbers = type("Numbers", (), {"__getitem__": lambda _, g: (torch.tensor(g), None)})()
    monkeypatch.setattr(train_vqgan, "SampleStream", lambda items, args, seed: numbers)
    args, streams = parsed("--train_batch_size", batch_size), []
    for rank in range(world):
        process = SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"))
        streams.append(train_vqgan.training_batches([], args, 0, start, process, train_vqgan.Watch(), {}))
    for step in range(5):
        seen = [next(stream)[0].tolist() for stream in streams for _ in range(accumulation)]
        assert {len(batch) for batch in seen} == {batch_size}
        first = start + 12 * step
        assert sorted(itertools.chain(*seen)) == list(range(first, first + 12))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_processes_share_every_step_in_pixels(photos, world):
    """The same, through the loader. Red when the crop is drawn from a generator that differs between processes."""
    flags = ("--train_data_dir", photos, "--random_flip", "--train_batch_size")
    shared = [batches(parsed(*flags, 12 // world), 5, 2, rank, world).unflatten(0, (2, -1)) for rank in range(world)]
    together, alone = torch.cat(shared, dim=1), batches(parsed(*flags, 12), 5, 2).unflatten(0, (2, -1))
    for step in range(2):
        assert sorted(x.numpy().tobytes() for x in together[step]) == sorted(x.numpy().tobytes() for x in alone[step])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 3, 16])
def test_same_pixels_whatever_the_workers_and_the_start(photos, workers, start):
    """Red when the augmentation is drawn from the process's own random numbers."""
    flags = ("--train_data_dir", photos, "--random_flip")
    whole = batches(parsed(*flags), 0, 15)
    assert len(torch.unique(whole, dim=0)) > 20, "the samples differ from each other"
    random.seed(start)
    assert torch.equal(
        batches(parsed(*flags, "--dataloader_num_workers", workers), start, 7), whole[start : start + 14]
    )


def test_every_image_once_per_epoch(plains):
    """With batches that cross epochs. Red when the epoch's seed is changed in the middle, or `% N` is off by one."""
    assert all(sorted(epoch) == SHADES for epoch in epochs(parsed("--train_data_dir", plains)))


def test_order_differs_between_epochs_and_seeds(plains):
    """Red when the epoch, or the seed, is left out of the permutation's key."""
    orders = [epochs(parsed("--train_data_dir", plains), seed=seed) for seed in (0, 1, 2)]
    assert all(len(set(order)) >= 9 for order in orders)  # of 10, out of 5040
    assert orders[0] != orders[1] != orders[2]


# ---- Augmentation --------------------------------------------------------------------------------------------------


@pytest.fixture
def crops(tmp_path):
    """crops(*flags, seed) -> mean red and direction of 200 epochs of one wide image, whose red rises to the right.

    So it shows where a crop is from, and whether it is mirrored.
    """
    image = np.zeros((16, 64, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, 64).round()
    (tmp_path / "ramp").mkdir()
    PIL.Image.fromarray(image).save(tmp_path / "ramp" / "ramp.png")

    def made(*flags, seed=0):
        red = batches(parsed("--train_data_dir", tmp_path / "ramp", *flags), 0, 100, seed=seed)[:, 0].float()
        return red.mean((1, 2)), red[:, 8, -1] > red[:, 8, 0]

    return made


def test_random_crop_goes_everywhere(crops):
    """48 columns of room. Red when the crop is drawn from the image's number instead of the sample's."""
    where, rising = crops()
    assert rising.all() and len(where.unique()) > 40
    expected = np.array([np.linspace(0, 255, 64)[left : left + 16].mean() for left in range(49)])
    assert abs(where.min() - expected.min()) < 1 and abs(where.max() - expected.max()) < 1
    assert abs(where.mean() - expected.mean()) < 4 * expected.std() / math.sqrt(200)


def test_random_flip_mirrors_half(crops):
    """Red when the flip is always, never, or tied to the image."""
    where, rising = crops("--random_flip", "--center_crop")
    assert 70 < rising.sum() < 130  # 100 +- 4 standard deviations
    assert where.max() - where.min() < 0.01


def test_random_scale_is_uniform_in_its_range(tmp_path):
    """Of a ramp of 64 columns, 16 high: at scale 1 the crop's 16 columns show 16 of them, at scale 2 eight.

    Red when the scale is drawn from the image's number, is the same for all, or comes outside its range.
    """
    image = np.zeros((16, 64, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, 64).round()
    PIL.Image.fromarray(image).save(tmp_path / "ramp.png")
    flags = ("--train_data_dir", tmp_path, "--random_scale", 1, 2, "--center_crop")
    red = batches(parsed(*flags), 0, 100)[:, 0, 8].double()
    scale = (255 / 63) / ((red[:, 13] - red[:, 2]) / 11)
    assert 0.97 < scale.min() < 1.1 and 1.9 < scale.max() < 2.06 and abs(scale.mean() - 1.5) < 0.1
    assert torch.equal(batches(parsed(*flags), 0, 3)[:, 0, 8].double(), red[:6]), "drawn by sample"


def test_flip_and_crop_are_independent(crops):
    """Red when both are read off the same random number."""
    where, rising = crops("--random_flip")
    left = where < where.median()
    assert all(25 < n < 75 for n in ((left & rising).sum(), (left & ~rising).sum(), (~left & ~rising).sum()))


def test_crop_differs_between_seeds(crops):
    """Red when the seed is left out of `random_numbers_of_sample`."""
    assert not torch.equal(crops(seed=1)[0], crops(seed=2)[0])


def test_center_crop_is_the_same_for_ever(crops):
    """And really is the centre. Red when --center_crop still hands over `rng`."""
    where, rising = crops("--center_crop")
    assert rising.all() and where.min() == where.max()
    assert abs(where[0] - np.linspace(0, 255, 64)[24:40].mean()) < 0.5
