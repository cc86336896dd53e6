"""Data: the order of the images, their pixels, what is skipped, and every place images come from."""

import io
import itertools
import json
import logging
import math
import os
import random
import time
import tracemalloc
from types import SimpleNamespace

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, metrics
from diffusers.image_processor import VaeImageProcessor

import train_vqgan
from train_vqgan import UserError, permute, to_rgb, to_signed, to_square, to_uint8


def options(**changes):
    """The flags that the data section reads; a plain namespace, so that nothing is checked or written."""
    defaults = {"seed": 0, "resolution": 16, "center_crop": False, "random_flip": False, "train_batch_size": 2}
    defaults |= {"dataset_name": None, "dataset_config_name": None, "train_data_dir": None, "image_column": "image"}
    defaults |= {"streaming": False, "cache_dir": None, "max_train_samples": None, "dataloader_num_workers": 0}
    defaults |= {"validation_fraction": 0, "validation_data_dir": None, "validation_split": None, "eval_only": False}
    return SimpleNamespace(**(defaults | {"validation_images": []} | changes))


def load_items(args):
    """The training images."""
    return train_vqgan.load_data(args)[0]


def process(rank=0, world=1):
    return SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu"))


def batches(items, args, start, n, rank=0, world=1):
    """The first `n` micro-batches of one process, concatenated."""
    stream = train_vqgan.training_batches(items, args, start, process(rank, world))
    return torch.cat(list(itertools.islice(stream, n)))


def plain(shade, size=(20, 16)):
    return PIL.Image.new("RGB", size, (shade, 0, 0))


def shades(x):
    """Which plain images these are."""
    return x[:, 0, 0, 0].tolist()


@pytest.fixture(scope="module")
def plains(tmp_path_factory):
    """Seven images of one colour each, 10, 20, ... 70: a pixel tells which image it is from."""
    folder = tmp_path_factory.mktemp("plains")
    for i in range(7):
        plain(10 * (i + 1)).save(folder / f"{i}.png")
    return folder


SHADES = [10 * (i + 1) for i in range(7)]


# ---- Order ---------------------------------------------------------------------------------------------------------


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
    stream = train_vqgan.SampleStream(range(10**8), options())
    tracemalloc.start()
    start = time.perf_counter()
    found = [stream.index(10**10 + i) for i in range(100)]
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(found)) == 100 and max(found) < 10**8 and max(found) - min(found) > 10**7
    assert seconds < 0.5 and peak < 1 << 20


@pytest.mark.parametrize("start", [0, 1, 12, 1003])
@pytest.mark.parametrize("world, batch_size, accumulation", [(1, 12, 1), (2, 6, 1), (3, 4, 1), (4, 3, 1), (2, 3, 2)])
def test_processes_share_every_step(monkeypatch, start, world, batch_size, accumulation):
    """A step sees the same samples however many processes share it. Red when ranks overlap or leave gaps.

    For example `start + rank * batch_size` in place of `start + rank`, or a count without its `world` stride.
    """
    monkeypatch.setattr(
        train_vqgan, "SampleStream", lambda *ignored: type("Numbers", (), {"__getitem__": lambda _, g: g})()
    )
    args = options(train_batch_size=batch_size)
    streams = [train_vqgan.training_batches([], args, start, process(rank, world)) for rank in range(world)]
    for step in range(5):
        seen = [next(stream).tolist() for stream in streams for _ in range(accumulation)]
        assert {len(batch) for batch in seen} == {batch_size}
        first = start + 12 * step
        assert sorted(itertools.chain(*seen)) == list(range(first, first + 12))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_processes_share_every_step_in_pixels(photos, world):
    """The same, through the loader. Red when the crop is drawn from a generator that differs between processes."""
    args = options(train_data_dir=str(photos), random_flip=True, train_batch_size=12 // world)
    items = load_items(args)
    together = torch.cat(
        [batches(items, args, 5, 2, rank, world).unflatten(0, (2, -1)) for rank in range(world)], dim=1
    )
    alone = batches(items, options(**vars(args) | {"train_batch_size": 12}), 5, 2).unflatten(0, (2, -1))
    for step in range(2):
        assert sorted(x.numpy().tobytes() for x in together[step]) == sorted(x.numpy().tobytes() for x in alone[step])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 3, 16])
def test_same_pixels_whatever_the_workers_and_the_start(photos, workers, start):
    """Red when the augmentation is drawn from the process's own random numbers."""
    args = options(train_data_dir=str(photos), random_flip=True)
    items = load_items(args)
    whole = batches(items, args, 0, 15)
    assert len(torch.unique(whole, dim=0)) > 20, "the samples differ from each other"
    args.dataloader_num_workers = workers
    random.seed(start)
    assert torch.equal(batches(items, args, start, 7), whole[start : start + 14])


def test_every_image_once_per_epoch(plains):
    """With batches that cross epochs. Red when the epoch's seed is changed in the middle, or `% N` is off by one."""
    args = options(train_data_dir=str(plains))
    seen = shades(batches(load_items(args), args, 0, 35))
    epochs = [seen[i : i + 7] for i in range(0, 70, 7)]
    assert all(sorted(epoch) == SHADES for epoch in epochs)


def test_order_differs_between_epochs_and_seeds(plains):
    """Red when the epoch, or the seed, is left out of the permutation's key."""
    orders = {}
    for seed in (0, 1, 2):
        args = options(train_data_dir=str(plains), seed=seed)
        seen = shades(batches(load_items(args), args, 0, 35))
        orders[seed] = [tuple(seen[i : i + 7]) for i in range(0, 70, 7)]
        assert len(set(orders[seed])) >= 9  # of 10, out of 5040
    assert orders[0] != orders[1] != orders[2]


# ---- Augmentation --------------------------------------------------------------------------------------------------


@pytest.fixture
def ramp(tmp_path):
    """One wide image whose red rises from left to right: where a crop is from, and whether it is mirrored, shows."""
    row = np.linspace(0, 255, 64).round().astype(np.uint8)
    image = np.zeros((16, 64, 3), np.uint8)
    image[..., 0] = row
    (tmp_path / "ramp").mkdir()
    PIL.Image.fromarray(image).save(tmp_path / "ramp" / "ramp.png")
    return str(tmp_path / "ramp")


def crops(folder, **changes):
    """Mean red and direction of 200 epochs of one image."""
    args = options(train_data_dir=folder, **changes)
    red = batches(load_items(args), args, 0, 100)[:, 0].float()
    return red.mean((1, 2)), red[:, 8, -1] > red[:, 8, 0]


def test_random_crop_goes_everywhere(ramp):
    """48 columns of room. Red when the crop is drawn from the image's number instead of the sample's."""
    where, rising = crops(ramp)
    assert rising.all() and len(where.unique()) > 40
    expected = np.array([np.linspace(0, 255, 64)[left : left + 16].mean() for left in range(49)])
    assert abs(where.min() - expected.min()) < 1 and abs(where.max() - expected.max()) < 1
    assert abs(where.mean() - expected.mean()) < 4 * expected.std() / math.sqrt(200)


def test_random_flip_mirrors_half(ramp):
    """Red when the flip is always, never, or tied to the image."""
    where, rising = crops(ramp, random_flip=True, center_crop=True)
    assert 70 < rising.sum() < 130  # 100 +- 4 standard deviations
    assert where.max() - where.min() < 0.01


def test_flip_and_crop_are_independent(ramp):
    """Red when both are read off the same random number."""
    where, rising = crops(ramp, random_flip=True)
    left = where < where.median()
    assert all(25 < n < 75 for n in ((left & rising).sum(), (left & ~rising).sum(), (~left & ~rising).sum()))


def test_crop_differs_between_seeds(ramp):
    assert not torch.equal(crops(ramp, seed=1)[0], crops(ramp, seed=2)[0])


def test_center_crop_is_the_same_for_ever(ramp):
    """And really is the centre. Red when --center_crop still hands over `rng`."""
    where, rising = crops(ramp, center_crop=True)
    assert rising.all() and where.min() == where.max()
    assert abs(where[0] - np.linspace(0, 255, 64)[24:40].mean()) < 0.5


# ---- Any image to RGB ----------------------------------------------------------------------------------------------


def saved(image, suffix="png", **how):
    """The image as a file gives it back."""
    file = io.BytesIO()
    image.save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix), **how)
    return PIL.Image.open(io.BytesIO(file.getvalue()))


def pixels(image):
    """Through `to_rgb`: [height, width, 3]."""
    result = to_rgb(image)
    assert result.mode == "RGB"
    return np.asarray(result)


def test_rgba_on_white():
    """Transparent pixels hide any colour. Red when RGBA is converted without compositing."""
    values = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128], [255, 255, 255, 7]]], np.uint8)
    image = saved(PIL.Image.fromarray(values, "RGBA"))
    assert image.mode == "RGBA"
    alpha = values[..., 3:] / 255
    expected = values[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(image) - expected).max() <= 1
    assert pixels(image)[0, 1].tolist() == [255, 255, 255]


def test_grey_with_alpha_on_white():
    """Red when only RGBA is composited."""
    image = saved(PIL.Image.fromarray(np.array([[[10, 255], [10, 0], [0, 128]]], np.uint8), "LA"))
    assert image.mode == "LA"
    assert np.abs(pixels(image)[0] - np.array([[10] * 3, [255] * 3, [127] * 3])).max() <= 1


def test_grey():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert (pixels(saved(PIL.Image.fromarray(values))) == values[..., None]).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_of_16_bits(suffix):
    """Scaled, not clipped: Pillow's own convert clips. Red without the division, or with `// 256` in its place."""
    values = np.array([[65535, 32768, 257, 0, 128, 129, 65406, 1000]], np.uint16)
    image = saved(PIL.Image.fromarray(values), suffix)
    assert image.mode.startswith("I")
    got = pixels(image)[0, :, 0]
    assert got.tolist() == [255, 128, 1, 0, 0, 1, 254, 4]
    assert (got == np.round(values[0] / 65535 * 255)).all()


def test_float_image():
    values = np.array([[0.0, 0.25, 1.0]], np.float32)
    assert pixels(saved(PIL.Image.fromarray(values), "tif"))[0, :, 0].tolist() == [0, 64, 255]


@pytest.mark.parametrize("transparent", [True, False])
def test_palette(transparent):
    """Red when a palette's transparency, which is no band, is overlooked."""
    image = PIL.Image.new("P", (3, 1))
    image.putpalette([200, 0, 0, 0, 100, 0, 0, 0, 50])
    image.putdata([0, 1, 2])
    image = saved(image, **({"transparency": 1} if transparent else {}))
    assert image.mode == "P" and ("transparency" in image.info) == transparent
    assert pixels(image)[0].tolist() == [[200, 0, 0], [255, 255, 255] if transparent else [0, 100, 0], [0, 0, 50]]


def test_one_bit():
    image = saved(PIL.Image.fromarray(np.array([[True, False]])))
    assert image.mode == "1" and pixels(image)[0].tolist() == [[255] * 3, [0] * 3]


def test_cmyk():
    image = PIL.Image.new("CMYK", (4, 1))
    image.putdata([(0, 0, 0, 0), (0, 0, 0, 255), (255, 0, 0, 0), (0, 255, 255, 0)])
    image = saved(image, "tif")
    assert image.mode == "CMYK"
    assert pixels(image)[0].tolist() == [[255] * 3, [0] * 3, [0, 255, 255], [255, 0, 0]]


@pytest.mark.parametrize(
    "orientation, turned",
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_exif_orientation(orientation, turned):
    """Red when exif_transpose is left out."""
    values = noise(3, 5)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    image = saved(PIL.Image.fromarray(values), exif=exif)
    assert image.getexif().get(0x0112) == orientation
    assert (pixels(image) == turned(values)).all()


# ---- To a square ---------------------------------------------------------------------------------------------------


def difference(got, values, left=None, top=None):
    """|got - expected|, [3, resolution, resolution], for an image [height, width, 3]: cropped and resized by Pillow.

    left, top: of the crop, in pixels of the result; the centre without them.
    """
    height, width, _ = values.shape
    resolution, side = got.shape[-1], min(height, width)
    left = (width - side) // 2 if left is None else left * side // resolution
    top = (height - side) // 2 if top is None else top * side // resolution
    crop = PIL.Image.fromarray(values[top : top + side, left : left + side])
    expected = np.asarray(crop.resize((resolution, resolution), PIL.Image.Resampling.BICUBIC), dtype=float)
    assert expected.std() > 10, "something is left to compare"
    return (torch.tensor(expected).permute(2, 0, 1) - got).abs()


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("height, width", [(64, 96), (96, 64), (64, 64), (192, 96), (16, 24), (32, 32), (128, 640)])
def test_crop_and_resize(height, width):
    """Noise shows every slip: within one grey level of Pillow's antialiased bicubic resize. Red with bilinear."""
    values = noise(height, width)
    got = to_square(PIL.Image.fromarray(values), 32)
    assert difference(got, values).max() <= 1 and difference(got, values).mean() < 0.01
    aliased = F.interpolate(torch.tensor(values).permute(2, 0, 1)[None], 32).double()
    assert min(height, width) <= 32 or aliased.std() - got.double().std() > 5, "without antialiasing it would differ"


@pytest.mark.parametrize("height, width", [(67, 100), (101, 67), (333, 250), (47, 53)])
def test_crop_and_resize_by_uneven_scales(height, width):
    """On a ramp a pixel tells where it is from. Red when the crop is not the centre, or the scale is not even.

    The room beside the crop is a whole number of pixels, so the centre may be a quarter of one off.
    """
    y, x = np.mgrid[:height, :width]
    values = np.stack([x * 255 / width, y * 255 / height, 0 * x], -1).round().astype(np.uint8)
    got = to_square(PIL.Image.fromarray(values), 32).double().numpy()
    scale = min(height, width) / 32
    for seen, side in ((got[0, 16], width), (got[1, :, 16], height)):
        expected = ((side - 1) / 2 + (np.arange(32) - 15.5) * scale) * 255 / side  # where the output's pixels are from
        slope, offset = np.polyfit(expected[2:-2] - 127.5, seen[2:-2] - 127.5, 1)
        assert abs(slope - 1) < 0.005 and abs(offset) < 0.25 * scale * 255 / side + 0.6, (slope, offset)


def test_drawn_crop_is_where_it_was_drawn():
    """Red when the crop is cut at the wrong scale, or left and top are exchanged."""
    wide = noise(64, 96)
    tall = wide.transpose(1, 0, 2).copy()
    for at in (0, 3, 16):
        drawn = SimpleNamespace(randint=lambda low, high, at=at: min(at, high))
        assert difference(to_square(PIL.Image.fromarray(wide), 32, drawn), wide, left=at).mean() < 0.01
        assert difference(to_square(PIL.Image.fromarray(tall), 32, drawn), tall, top=at).mean() < 0.01


@pytest.mark.parametrize("kind", ["as it is", "turned", "progressive", "gray", "CMYK"])
@pytest.mark.parametrize("name", ["bird", "car", "dog", "frog"])
def test_large_jpegs_are_decoded_small(monkeypatch, tmp_path, name, kind):
    """Photographs five times the size: a fourth of the pixels are decoded, and the image stays the same to 45 dB.

    Red without draft, and with a draft of the resolution itself instead of twice that.
    """
    photo, seen, to_rgb = tmp_path / "photo.jpg", [], train_vqgan.to_rgb
    exif = PIL.Image.Exif()
    exif[0x0112] = 6 if kind == "turned" else 1
    with PIL.Image.open(REPOSITORY / "images" / f"{name}.jpg") as image:
        mode = {"gray": "L", "CMYK": "CMYK"}.get(kind, "RGB")
        image.convert(mode).save(photo, quality=95, progressive=kind == "progressive", exif=exif)
    args = SimpleNamespace(seed=0, resolution=64, center_crop=True, random_flip=False)
    monkeypatch.setattr(train_vqgan, "to_rgb", lambda image: seen.append(image.size) or to_rgb(image))
    got = train_vqgan.augment(str(photo), 0, args)
    whole = to_square(PIL.Image.open(photo), 64)
    assert seen == [(160, 160), (320, 320)]
    error = (got.double() - whole.double()).square().mean()
    assert 0 < error and 10 * torch.log10(255**2 / error) > 45


def test_flip_is_the_mirror_image():
    image = PIL.Image.fromarray(noise(64, 96))
    mirrored = to_square(image, 32, flip=True)
    assert torch.equal(mirrored, to_square(image, 32).flip(2)) and not torch.equal(mirrored, to_square(image, 32))


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (3, 1000), (1000, 7), (17, 16), (15, 16), (48, 80)])
@pytest.mark.parametrize("rng", [None, random.Random(0), SimpleNamespace(randint=lambda low, high: high)])
def test_shape_is_exact_for_extreme_images(size, rng):
    """Up to the last column. Red when the box is not kept inside the image (a side of 26.67 is rounded up to 27)."""
    image = PIL.Image.fromarray(np.full((size[1], size[0], 3), 77, np.uint8))
    for _ in range(5):
        x = to_square(image, 16, rng)
        assert x.shape == (3, 16, 16) and x.dtype == torch.uint8 and (x == 77).all()


def test_range_is_kept_at_hard_edges():
    """Bicubic overshoots: it must clip, not wrap around."""
    values = np.zeros((24, 24, 3), np.uint8)
    values[8:16, 8:16] = 255
    x = to_square(PIL.Image.fromarray(values), 64)
    assert x.min() == 0 and x.max() == 255
    assert (x[:, 24:40, 24:40] > 200).all() and (x[:, :16, :16] < 50).all()


# ---- Pixel ranges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixel_ranges_are_inverse(dtype, request):
    """All 256 values. Red when 127.5 becomes 128 or 255, or the result is not rounded."""
    if dtype == torch.float64:
        request.getfixturevalue("float64")
    values = torch.arange(256, dtype=torch.uint8)
    signed = to_signed(values, torch.device("cpu"))
    assert signed.dtype == dtype and signed.min() == -1 and signed.max() == 1
    assert torch.allclose(signed.double(), values.double() / 255 * 2 - 1, atol=1e-6)
    assert to_uint8(signed).dtype == torch.uint8 and torch.equal(to_uint8(signed), values)


def test_to_uint8_is_what_diffusers_does():
    """Beyond the range and halfway between grey levels too. Red when the value is cut off instead of rounded."""
    grid = torch.linspace(-1.2, 1.2, 3 * 64 * 64)
    halves = (torch.arange(256) + 0.5) / 127.5 - 1
    x = torch.cat([grid, *[halves] * 3])[-3 * 64 * 64 :].reshape(1, 3, 64, 64)
    assert x.min() < -1 and x.max() > 1
    image = VaeImageProcessor().postprocess(x, output_type="pil")[0]
    assert torch.equal(to_uint8(x)[0].permute(1, 2, 0), torch.from_numpy(np.array(image)))


# ---- Unreadable images ---------------------------------------------------------------------------------------------


def test_unreadable_image_is_skipped_and_its_neighbour_taken(tmp_path, caplog):
    """Red when the warning is left out, or the neighbour is the same item again."""
    for i in range(5):
        plain(10 * (i + 1)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_text("no image")
    args = options(train_data_dir=str(tmp_path))
    with caplog.at_level(logging.WARNING, "train_vqgan"):
        seen = shades(batches(load_items(args), args, 0, 5))
    assert sorted(seen[:5]) == sorted(seen[5:]) == [10, 20, 40, 40, 50]
    assert len(caplog.records) == 2 and all(str(tmp_path / "2.png") in record.message for record in caplog.records)


def broken_files(folder):
    """Ways in which real files are broken."""
    good = io.BytesIO()
    PIL.Image.fromarray(noise(64, 64)).save(good, "PNG")
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes(good.getvalue()[:4000])
    (folder / "header.png").write_bytes(good.getvalue()[:20])
    (folder / "text.jpg").write_text("<html>not found</html>")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    return sorted(folder.iterdir())


def test_broken_files_of_every_kind(tmp_path, caplog):
    """Red when one of Pillow's exceptions is not in UNREADABLE."""
    (tmp_path / "broken").mkdir()
    plain(99).save(tmp_path / "good.png")
    for path in broken_files(tmp_path / "broken"):
        items = [path, tmp_path / "good.png"]
        stream = train_vqgan.SampleStream(items, options())
        if stream.index(0) == 1:
            items.reverse()
        with caplog.at_level(logging.WARNING, "train_vqgan"):
            assert stream[0][0, 0, 0] == 99
        assert path.name in caplog.records[-1].message
    assert len(caplog.records) == 5


def broken_exif(tag):
    """A JPEG with a text in its EXIF under a tag of numbers; it shows well in any viewer."""
    exif = PIL.Image.Exif()
    exif[0x010E], exif[0x0112] = "a description", 6
    file = io.BytesIO()
    plain(99).save(file, "JPEG", exif=exif)
    data = bytearray(file.getvalue())
    tiff = max(data.find(b"MM\x00*"), data.find(b"II*\x00"))
    assert data[tiff + 10 : tiff + 12] == b"\x01\x0e", "the description's tag"
    data[tiff + 10 : tiff + 12] = tag.to_bytes(2, "big")
    return bytes(data)


@pytest.mark.parametrize("tag", [0x0103, 0x011A])
def test_broken_exif_does_not_end_the_run(tmp_path, tag):
    """exif_transpose writes the EXIF anew. Red when its errors are not caught."""
    assert np.abs(np.asarray(PIL.Image.open(io.BytesIO(broken_exif(tag))))[..., 0] - 99.0).max() < 5, "a good image"
    (tmp_path / "a.jpg").write_bytes(broken_exif(tag))
    plain(99).save(tmp_path / "b.png")
    args = options(train_data_dir=str(tmp_path))
    assert all(abs(shade - 99) < 5 for shade in shades(batches(load_items(args), args, 0, 2)))


@pytest.mark.parametrize("workers", ["0", "1"])
def test_ten_unreadable_in_a_row(error, tmp_path, workers):
    """One line from a worker too. Red when `__getitem__` goes on for ever or raises Pillow's error."""
    (tmp_path / "broken").mkdir()
    for i in range(12):
        (tmp_path / "broken" / f"{i}.png").write_text("no image")
    message = error("--train_data_dir", str(tmp_path / "broken"), "--dataloader_num_workers", workers)
    assert message.startswith("train_vqgan.py: error: ten training images in a row")
    assert str(tmp_path / "broken") in message


def test_nine_unreadable_in_a_row(tmp_path):
    """Red when fewer attempts are made."""
    for i in range(9):
        (tmp_path / f"{i}.png").write_text("no image")
    plain(50).save(tmp_path / "9.png")
    args = options(train_data_dir=str(tmp_path))
    assert set(shades(batches(load_items(args), args, 0, 5))) == {50}


# ---- A folder of images --------------------------------------------------------------------------------------------


def test_folder_with_subfolders_and_links(tmp_path):
    """No metadata needed; other files are left alone. Red when links are not followed, or suffixes keep their case."""
    inside, outside = tmp_path / "photos", tmp_path / "elsewhere"
    for folder in (inside / "a" / "b", outside):
        folder.mkdir(parents=True)
    for path in (inside / "1.png", inside / "a/2.JPG", inside / "a/b/3.jpeg", outside / "4.webp", tmp_path / "5.bmp"):
        plain(1).save(path)
    (inside / "notes.txt").touch()
    (inside / "folder.png").mkdir()
    (inside / "linked").symlink_to(outside)
    (inside / "5.bmp").symlink_to(tmp_path / "5.bmp")
    found = [str(path.relative_to(inside)) for path in load_items(options(train_data_dir=str(inside)))]
    assert found == sorted(["1.png", "5.bmp", "a/2.JPG", "a/b/3.jpeg", "linked/4.webp"])


def test_folder_linked_into_itself(tmp_path):
    """Red when links are followed until the system refuses: 41 copies of each image."""
    plain(1).save(tmp_path / "1.png")
    (tmp_path / "again").symlink_to(tmp_path)
    assert len(load_items(options(train_data_dir=str(tmp_path)))) == 1


def test_empty_folder(error, tmp_path):
    """Red when the check is left out: an empty folder would end in a division by zero."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    message = error("--train_data_dir", str(tmp_path / "empty"))
    assert "--train_data_dir" in message and str(tmp_path / "empty") in message and ".png" in message


def test_bundled_photographs():
    """Neither --train_data_dir nor --dataset_name."""
    items = load_items(options())
    assert len(items) >= 10 and all(path.is_relative_to(train_vqgan.REPOSITORY / "images/train") for path in items)


# ---- Data sets -----------------------------------------------------------------------------------------------------

IMAGES = [plain(shade) for shade in SHADES]


def make_dataset(column="image"):
    features = datasets.Features({column: datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    data = {column: IMAGES, "label": [i % 2 for i in range(7)]}
    return datasets.Dataset.from_dict(data, features=features)


def kinds(tmp_path):
    """Every kind of local data set, by name: (path, image column)."""
    make_dataset().save_to_disk(tmp_path / "dataset")
    datasets.DatasetDict(train=make_dataset(), test=make_dataset().select([0])).save_to_disk(tmp_path / "dict")
    for split in ("train", "test"):  # as CIFAR-10 is on the Hub
        part = make_dataset("img") if split == "train" else make_dataset("img").select([0, 1])
        (tmp_path / "parquet" / "plain_text").mkdir(parents=True, exist_ok=True)
        part.to_parquet(tmp_path / "parquet" / "plain_text" / f"{split}-00000-of-00001.parquet")
    for i, image in enumerate(IMAGES):
        folder = tmp_path / "imagefolder" / "train" / ("dog" if i % 2 else "cat")
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i}.png")
    return {
        "dataset": (tmp_path / "dataset", "image"),
        "dict": (tmp_path / "dict", "image"),
        "parquet": (tmp_path / "parquet", "img"),
        "imagefolder": (tmp_path / "imagefolder", "image"),
    }


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """local(kind, **options) -> options for that data set."""
    root = tmp_path_factory.mktemp("datasets")
    paths = kinds(root)

    def make(kind, **changes):
        path, column = paths[kind]
        flags = {"dataset_name": str(path), "image_column": column, "cache_dir": str(root / "cache")}
        return options(**(flags | changes))

    return make


KINDS = ["dataset", "dict", "parquet", "imagefolder"]


@pytest.mark.parametrize("kind", KINDS)
def test_local_dataset(local, kind):
    """Each item once, from the train split. Red when another split is read, or the column is not cast."""
    args = local(kind)
    items = load_items(args)
    assert len(items) == 7
    assert sorted(shades(batches(items, args, 0, 7))[:7]) == SHADES


@pytest.fixture
def no_folder(flags):
    """`train` and `error` without --train_data_dir."""
    at = flags.index("--train_data_dir")
    del flags[at : at + 2]


def test_dataset_through_main(no_folder, train, local):
    """--dataset_name with --image_column, as the docstring's CIFAR-10 command has it."""
    args = local("parquet")
    flags = ("--dataset_name", args.dataset_name, "--image_column", "img", "--cache_dir", args.cache_dir)
    output = train(*flags, "--max_train_steps", "1", "--log_steps", "1", "--checkpointing_steps", "0")
    assert (output / "vqmodel" / "config.json").is_file() and len(metrics(output)) == 1


def run_error(args, *more):
    with pytest.raises(UserError) as caught:
        load_items(options(**(vars(args) | dict(more))))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["dict", "parquet"])
def test_wrong_column_lists_the_columns(local, kind, streaming):
    """Red when the column is not compared with the features."""
    args = local(kind, image_column="picture", streaming=streaming)
    message = run_error(args)
    assert "--image_column" in message and "'picture'" in message and args.dataset_name in message
    assert message.endswith(f"{'img' if kind == 'parquet' else 'image'}, label")


def test_column_without_images_says_which_have_some(local):
    """Red when the feature's type is not looked at."""
    message = run_error(local("dataset", image_column="label"))
    assert "--image_column" in message and "'label'" in message and "ClassLabel" in message
    assert message.endswith("columns with images: image")


def test_no_train_split_says_which_splits_there_are(tmp_path):
    """Red when the missing split ends in a KeyError."""
    datasets.DatasetDict(valid=make_dataset(), test=make_dataset()).save_to_disk(tmp_path / "dict")
    message = run_error(options(dataset_name=str(tmp_path / "dict")))
    assert "--dataset_name" in message and "no train split" in message and message.endswith("valid, test")
    (tmp_path / "parquet").mkdir()
    make_dataset().to_parquet(tmp_path / "parquet" / "test-00000-of-00001.parquet")
    message = run_error(options(dataset_name=str(tmp_path / "parquet"), cache_dir=str(tmp_path / "cache")))
    assert "--dataset_name" in message and "no train split" in message and "'test'" in message


def test_dataset_without_images(tmp_path):
    """Red when the exceptions of `datasets` get through."""
    (tmp_path / "none").mkdir()
    make_dataset().select([]).to_parquet(tmp_path / "none" / "train.parquet")
    message = run_error(options(dataset_name=str(tmp_path / "none"), cache_dir=str(tmp_path / "cache")))
    assert "--dataset_name" in message and str(tmp_path / "none") in message
    (tmp_path / "empty").mkdir()
    message = run_error(options(dataset_name=str(tmp_path / "empty"), cache_dir=str(tmp_path / "cache")))
    assert "--dataset_name" in message and str(tmp_path / "empty") in message and "Hub" not in message


def test_path_that_has_split_in_its_name(tmp_path):
    """Red when any message with `split` in it is taken for a missing split."""
    (tmp_path / "splits").mkdir()
    message = run_error(options(dataset_name=str(tmp_path / "splits"), cache_dir=str(tmp_path / "cache")))
    assert "no train split" not in message and "cannot read" in message


def test_hub_out_of_reach(no_folder, error):
    """HF_HUB_OFFLINE=1. Red when the Hub's exception gets through."""
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    message = error("--dataset_name", "nobody/nothing")
    assert "--dataset_name" in message and "nobody/nothing" in message and "Hub" in message and "network" in message


@pytest.mark.parametrize("kind", ["folder", *KINDS])
def test_max_train_samples(local, plains, kind):
    """That many different images, drawn by seed. Red when the first ones are taken, or the seed is left out."""
    args = options(train_data_dir=str(plains)) if kind == "folder" else local(kind)
    chosen = {}
    for seed in range(6):
        items = load_items(options(**(vars(args) | {"max_train_samples": 3, "seed": seed})))
        with_shades = [np.asarray(train_vqgan.open_image(items[i]))[0, 0, 0] for i in range(len(items))]
        assert len(items) == len(set(with_shades)) == 3
        chosen[seed] = tuple(sorted(int(shade) for shade in with_shades))
    assert len(set(chosen.values())) >= 4 and set(itertools.chain(*chosen.values())) == set(SHADES)
    again = load_items(options(**(vars(args) | {"max_train_samples": 3, "seed": 5})))
    assert len(again) == 3 and [again[i] for i in range(3)] == [items[i] for i in range(3)]
    assert len(load_items(options(**(vars(args) | {"max_train_samples": 100})))) == 7


def with_row(image):
    """A data set whose second image is this."""
    data = {"image": [{"bytes": encoded(plain(10)), "path": None}, image, {"bytes": encoded(plain(30)), "path": None}]}
    return datasets.Dataset.from_dict(data, features=datasets.Features({"image": datasets.Image()}))


def encoded(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_unreadable_row_is_skipped(tmp_path, caplog):
    """Red when a data set's rows are decoded before `open_image`."""
    with_row({"bytes": b"no image", "path": "two.png"}).save_to_disk(tmp_path / "data")
    args = options(dataset_name=str(tmp_path / "data"))
    with caplog.at_level(logging.WARNING, "train_vqgan"):
        seen = shades(batches(load_items(args), args, 0, 3))
    assert sorted(seen[:3]) == [10, 30, 30] and "two.png" in caplog.text


def test_unreadable_row_without_a_path_is_named(tmp_path, caplog):
    """As in CIFAR-10's parquet. Red when the warning gives the path alone."""
    with_row({"bytes": b"no image", "path": None}).save_to_disk(tmp_path / "data")
    args = options(dataset_name=str(tmp_path / "data"))
    with caplog.at_level(logging.WARNING, "train_vqgan"):
        batches(load_items(args), args, 0, 2)
    assert "None" not in caplog.text and "1" in caplog.text.split("image:")[1]


def test_missing_row_is_skipped(tmp_path):
    """Data sets of scraped images have rows without an image. Red when `open_image` hands None to Pillow."""
    with_row(None).save_to_disk(tmp_path / "data")
    args = options(dataset_name=str(tmp_path / "data"))
    assert sorted(shades(batches(load_items(args), args, 0, 3))[:3]) == [10, 30, 30]


# ---- Streaming -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """datasets waits five seconds at the end of every epoch of streamed parquet."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def streamed(local, kind="dataset", **changes):
    args = local(kind, streaming=True, **changes)
    items = load_items(args)
    assert isinstance(items, datasets.IterableDataset)
    return items, args


@pytest.mark.parametrize("kind", KINDS)
def test_stream_is_endless_and_shuffled(local, kind):
    """Every image once per epoch, in another order each time. Red when `set_epoch` or the shuffle is left out."""
    items, args = streamed(local, kind)
    seen = shades(batches(items, args, 0, 21))
    epochs = [tuple(seen[i : i + 7]) for i in range(0, 42, 7)]
    assert all(sorted(epoch) == SHADES for epoch in epochs)
    assert len(set(epochs)) >= 5 and tuple(SHADES) not in epochs[:2]
    assert shades(batches(items, local(kind, streaming=True, seed=1), 0, 21)) != seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 7, 16])
def test_stream_resumes_exactly(photos, tmp_path, workers, start):
    """From any position, in another epoch too. Red when what was seen is not skipped, or augmented as another sample."""
    args = options(dataset_name=str(photos), cache_dir=str(tmp_path), streaming=True, random_flip=True)
    args.dataloader_num_workers = workers
    whole = batches(load_items(args), args, 0, 15)
    assert len(torch.unique(whole, dim=0)) > 20, "the samples differ from each other"
    assert torch.equal(batches(load_items(args), args, start, 7), whole[start : start + 14])


def test_stream_is_the_same_with_and_without_workers(local):
    """datasets draws another shuffle seed inside a DataLoader's worker. Red when the stream is read in one."""
    items, args = streamed(local)
    alone = shades(batches(items, args, 0, 7))
    args.dataloader_num_workers = 1
    assert shades(batches(items, args, 0, 7)) == alone


def test_stream_is_augmented(ramp, tmp_path):
    """As another sample in every epoch. Red when a sample is augmented by its place in the epoch."""
    args = options(dataset_name=ramp, cache_dir=str(tmp_path / "cache"), streaming=True, random_flip=True)
    x = batches(load_items(args), args, 0, 10)
    assert len(torch.unique(x, dim=0)) > 10
    assert torch.equal(x[6:], batches(load_items(args), args, 6, 7))


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_stream_is_shared_by_processes(photos, tmp_path, world, start):
    """Disjoint, and together what one process would see. Red when every process starts at the same sample."""
    args = options(dataset_name=str(photos), cache_dir=str(tmp_path), streaming=True, train_batch_size=6 // world)
    items = load_items(args)
    together = [batches(items, args, start, 4, rank, world).unflatten(0, (4, -1)) for rank in range(world)]
    args.train_batch_size = 6
    alone = batches(items, args, start, 4).unflatten(0, (4, -1))
    assert len(torch.unique(alone.flatten(0, 1), dim=0)) > 12, "the samples differ from each other"
    for step in range(4):
        seen = [x.numpy().tobytes() for process in together for x in process[step]]
        assert sorted(seen) == sorted(x.numpy().tobytes() for x in alone[step])


def test_unreadable_image_in_a_stream_is_skipped(tmp_path, caplog):
    """Red when UNREADABLE is not caught there."""
    with_row({"bytes": b"no image", "path": "two.png"}).save_to_disk(tmp_path / "data")
    args = options(dataset_name=str(tmp_path / "data"), streaming=True)
    with caplog.at_level(logging.WARNING, "train_vqgan"):
        seen = shades(batches(load_items(args), args, 0, 5))
    assert len(seen) == 10 and set(seen) == {10, 30} and "two.png" in caplog.text


def test_unreadable_image_in_a_stream_of_single_images(tmp_path):
    with_row({"bytes": b"no image", "path": "two.png"}).save_to_disk(tmp_path / "data")
    for start in (0, 1, 2):  # one of them is the unreadable one's place
        args = options(dataset_name=str(tmp_path / "data"), streaming=True, train_batch_size=1)
        assert set(shades(batches(load_items(args), args, start, 9))) == {10, 30}


def test_streaming_through_main(no_folder, train, flags, local, capsys):
    """As far as the export, and not on as a run that does not stream.

    Red when something asks the stream for its length, or when what_is_trained leaves --streaming out.
    """
    data = ("--dataset_name", local("dataset").dataset_name)
    output = train(*data, "--streaming", "--log_steps", "1", "--checkpointing_steps", "2")
    assert (output / "vqmodel" / "config.json").is_file() and len(metrics(output)) == 2
    assert json.loads((output / "checkpoint-2" / "progress.json").read_text())["samples_seen"] == 4
    assert train_vqgan.main([*flags, *data, "--resume_from_checkpoint", "latest", "--max_train_steps", "3"]) == 2
    line = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(line) == 1 and "--resume_from_checkpoint: --streaming" in line[0]


# ---- Validation images ---------------------------------------------------------------------------------------------


def test_validation_images_of_any_shape_and_mode(tmp_path):
    """Centre crops, in the order given, the same every time. Red when they are cropped at random."""
    values = noise(48, 96, 4)
    tall = values.transpose(1, 0, 2).copy()
    pictures = {
        "wide.png": PIL.Image.fromarray(values[..., :3]),
        "tall.png": PIL.Image.fromarray(tall[..., :3]),
        "clear.png": PIL.Image.fromarray(values, "RGBA"),
        "deep.png": PIL.Image.fromarray(values[..., 0].astype(np.uint16) * 257),
        "grey.png": PIL.Image.fromarray(values[..., 0]),
        "small.png": PIL.Image.fromarray(values[:5, :7, :3]),
    }
    for name, image in pictures.items():
        image.save(tmp_path / name)
    args = options(resolution=16, validation_images=[str(tmp_path / name) for name in pictures])
    images = train_vqgan.load_validation_images(args)
    assert images.shape == (6, 3, 16, 16) and images.dtype == torch.uint8
    assert torch.equal(images, train_vqgan.load_validation_images(args))
    assert difference(images[0], values[..., :3]).max() <= 1 and difference(images[1], tall[..., :3]).max() <= 1
    assert torch.equal(images[3], images[4]), "16 bits and 8 bits of the same picture"


def test_no_validation_images():
    assert train_vqgan.load_validation_images(options()) is None


def test_unreadable_validation_image(error, tmp_path, photos):
    """Red when Pillow's error gets through."""
    (tmp_path / "bad.png").write_text("no image")
    message = error("--validation_images", str(photos / "0.png"), str(tmp_path / "bad.png"))
    assert "--validation_images" in message and str(tmp_path / "bad.png") in message
