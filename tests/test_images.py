"""Pixels: any image to RGB and to a square, the two ranges, what is skipped as unreadable, and validation images."""

import contextlib
import io
import random
import struct
import sys
import tracemalloc
import warnings
import zlib
from types import SimpleNamespace

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.PngImagePlugin
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, metrics
from diffusers.image_processor import VaeImageProcessor

import train_vqgan
from train_vqgan import to_rgb, to_signed, to_square, to_uint8


def parsed(*flags):
    return train_vqgan.parse_args(["--resolution", "16", *map(str, flags)])


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


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


WHITE = (255, 255, 255)


@pytest.mark.parametrize(
    "mode, suffix, row, expected",
    [
        ("L", "png", range(256), [(v, v, v) for v in range(256)]),
        ("1", "png", [255, 0], [WHITE, (0, 0, 0)]),
        ("F", "tif", [0.0, 0.25, 1.0], [(0, 0, 0), (64, 64, 64), WHITE]),
        (
            *("CMYK", "tif", [(0, 0, 0, 0), (0, 0, 0, 255), (255, 0, 0, 0), (0, 255, 255, 0)]),
            [WHITE, (0, 0, 0), (0, 255, 255), (255, 0, 0)],
        ),
        (
            *("RGBA", "png", [(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 128), (255, 255, 255, 7)]),
            [(10, 20, 30), WHITE, (127, 127, 127), WHITE],
        ),
        ("LA", "png", [(10, 255), (10, 0), (0, 128)], [(10, 10, 10), WHITE, (127, 127, 127)]),
    ],
)
def test_modes(mode, suffix, row, expected):
    """Transparent pixels hide any colour. Red when only RGBA is composited on white, or nothing is."""
    image = PIL.Image.new(mode, (len(row), 1))
    image.putdata(list(row))
    image = saved(image, suffix)
    assert image.mode == mode
    assert pixels(image)[0].tolist() == [list(color) for color in expected]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_of_16_bits(suffix):
    """Scaled, not clipped: Pillow's own convert clips. Red without the division, or with `// 256` in its place."""
    values = np.array([[65535, 32768, 257, 0, 128, 129, 65406, 1000]], np.uint16)
    image = saved(PIL.Image.fromarray(values), suffix)
    assert image.mode.startswith("I")
    got = pixels(image)[0, :, 0]
    assert got.tolist() == [255, 128, 1, 0, 0, 1, 254, 4]
    assert (got == np.round(values[0] / 65535 * 255)).all()


def tiff(values):
    """Grey values [height, width] of any dtype as the bytes of a TIFF, which Pillow itself writes of few dtypes only."""
    height, width = values.shape
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    tags |= {279: values.nbytes, 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = b"II*\0" + struct.pack("<I", 8 + values.nbytes)
    return header + values.tobytes() + struct.pack("<H", len(tags)) + entries + bytes(4)


def greys(values, *flags):
    """What a TIFF of one row of these values becomes."""
    item = {"bytes": tiff(np.asarray(values)[None]), "path": None}
    return np.asarray(train_vqgan.read_image(item, parsed(*flags)))[0, :, 0].tolist()


@pytest.mark.parametrize(
    "dtype, black, white",
    [
        ("uint16", 0, 65535),
        ("int16", -32768, 32767),
        ("uint32", 0, 2**32 - 1),
        ("int32", -(2**31), 2**31 - 1),
        ("float32", 0, 1),
    ],
)
def test_scale_of_deep_images_is_by_format(dtype, black, white):
    """Red when sign or bits are not asked for, unsigned values wrap, or an image's own values decide."""
    values = (np.linspace(0, 1, 5) * (white - black) + black).astype(dtype)
    whole = greys(values)
    assert whole == pytest.approx([0, 64, 127, 191, 255], abs=1)
    for i in range(5):
        assert greys(values[i : i + 1]) == whole[i : i + 1]


@pytest.mark.parametrize(
    "dtype, one, other", [("int32", 250, 260), ("float32", 1.0, 1.01), ("int16", 200, 2000), ("uint16", 255, 256)]
)
def test_neighbours_of_a_peak_have_one_scale(dtype, one, other):
    """Frames of one folder: the factor was 257, 255, 257 and 1. Red when the scale depends on an image's peak."""
    first, second = (greys(np.array([one / 2, peak], dtype)) for peak in (one, other))
    assert first[0] == second[0] and 0 <= second[1] - first[1] <= 8


@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32", "int32", "float32"])
def test_value_range(dtype):
    """In every mode, cut off outside. Red when the flag is not handed on, or when values wrap around."""
    assert greys(np.array([100, 1124, 2148, 4196, 30000], dtype), "--value_range", 100, 4196) == [0, 64, 128, 255, 255]
    if dtype[0] != "u":
        values = np.array([-200, -100, 0, 100], dtype)
        assert greys(values, "--value_range", -100, 100) == [0, 0, 128, 255]


def test_pgm_is_scaled_by_its_own_maximum(tmp_path):
    """The header's, which Pillow scales to 16 bits in mode I. Red when mode I is always one of 32 bits."""
    (tmp_path / "deep.pgm").write_bytes(b"P5 3 1 4095\n" + np.array([0, 1024, 4095], ">u2").tobytes())
    assert np.asarray(train_vqgan.read_image(tmp_path / "deep.pgm", parsed()))[0, :, 0].tolist() == [0, 64, 255]


def test_values_that_are_not_finite():
    """Red when NaN, common where nothing was measured, gets to the conversion to 8 bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert greys(np.array([np.nan, 0.5, np.inf, -np.inf], np.float32)) == [0, 128, 255, 0]


@pytest.mark.parametrize(
    "values, flags, warned",
    [
        ((0, 4095), (), True),
        ((0, 16384), (), False),
        ((0, 4095), ("--value_range", 0, 4095), False),
        ((0.0, 0.1), (), True),
        ((0.0, 255.0), (), True),
        ((0.0, 1.0), (), False),
    ],
)
def test_warning_of_a_deep_image_that_does_not_fit_its_range(caplog, values, flags, warned):
    """Once, for less than an eighth, or for floats that are cut off. Red when every image has a line of its own."""
    train_vqgan.RANGE_WARNED[0] = 0
    for _ in range(3):
        greys(np.array(values, np.uint16 if isinstance(values[1], int) else np.float32), *flags)
    lines = [record.message for record in caplog.records]
    assert len(lines) == warned and all(f"{values[1]:g}" in line and "--value_range" in line for line in lines)


def test_warning_of_a_deep_image_comes_once_a_run(train, tmp_path, capfd):
    """With two data workers and held-out images, and in the next run again. Red when each process keeps its own mark."""
    for i in range(8):
        PIL.Image.fromarray(noise(20, 20)[..., 0].astype(np.uint16)).save(tmp_path / f"{i}.png")
    for run in range(2):
        more = ("--validation_fraction", "0.3", "--output_dir", str(tmp_path / f"run{run}"))
        train("--train_data_dir", str(tmp_path), "--dataloader_num_workers", "2", *more)
        assert capfd.readouterr().err.count("--value_range") == 1


def test_deep_images_take_little_memory():
    """Beside the image and its grey. Red when the whole is converted to float64 at once, which takes 128 MiB here."""
    image = PIL.Image.fromarray(np.zeros((4096, 4096), np.uint16))
    tracemalloc.start()
    to_rgb(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25


@pytest.mark.parametrize("transparent", [True, False])
def test_palette(transparent):
    """Red when a palette's transparency, which is no band, is overlooked."""
    image = PIL.Image.new("P", (3, 1))
    image.putpalette([200, 0, 0, 0, 100, 0, 0, 0, 50])
    image.putdata([0, 1, 2])
    image = saved(image, **({"transparency": 1} if transparent else {}))
    assert image.mode == "P" and ("transparency" in image.info) == transparent
    assert pixels(image)[0].tolist() == [[200, 0, 0], [255, 255, 255] if transparent else [0, 100, 0], [0, 0, 50]]


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
    args = parsed("--resolution", 64, "--center_crop")
    monkeypatch.setattr(train_vqgan, "to_rgb", lambda image, *rest: seen.append(image.size) or to_rgb(image))
    got = train_vqgan.augment(str(photo), train_vqgan.random_numbers_of_sample(0, 0), args)
    whole = to_square(train_vqgan.read_image(str(photo), args), 64)
    assert seen == [(160, 160), (320, 320)]
    error = (got.double() - whole.double()).square().mean()
    assert 0 < error and 10 * torch.log10(255**2 / error) > 45


@pytest.mark.parametrize("height, width, short_side", [(48, 80, 48), (80, 48, 48), (128, 200, 64), (24, 30, 48)])
def test_crop_at_another_scale_than_the_resolution(height, width, short_side):
    """32 pixels of an image whose short side has become 48 or 64, everywhere in it, as Pillow resizes and crops.

    Red when the crop covers the whole short side, or is drawn from the room that this would leave.
    """
    values, got = noise(height, width), []
    size = [side * short_side // min(height, width) for side in (width, height)]
    resized = np.asarray(PIL.Image.fromarray(values).resize(size, PIL.Image.Resampling.BICUBIC), dtype=int)
    for end in (0, 1):
        corner = SimpleNamespace(randint=lambda low, high, end=end: high * end)
        got.append(to_square(PIL.Image.fromarray(values), 32, corner, short_side=short_side).permute(1, 2, 0).int())
    expected = resized[:32, :32], resized[-32:, -32:]
    for crop, there in zip(got, expected):  # borders differ: only the crop is resized
        assert abs(crop.numpy() - there)[4:-4, 4:-4].max() <= 2 and there.std() > 20
    if short_side == min(height, width):
        assert all((crop.numpy() == there).all() for crop, there in zip(got, expected)), "nothing is resampled"


def test_jpegs_keep_what_another_scale_needs(monkeypatch, tmp_path):
    """320 pixels are needed for 160, and 160 for 64. Red when the draft goes by the resolution alone."""
    seen, square = [], train_vqgan.to_square
    sizes = lambda image: image.size if isinstance(image, PIL.Image.Image) else tuple(image.shape[:0:-1])  # noqa: E731
    monkeypatch.setattr(
        train_vqgan, "to_square", lambda image, *rest: seen.append(sizes(image)) or square(image, *rest)
    )
    photo = str(REPOSITORY / "images" / "bird.jpg")
    for short_side in (64, 160):
        args = parsed("--resolution", 64, "--short_side", short_side)
        train_vqgan.augment(photo, train_vqgan.random_numbers_of_sample(0, 0), args)
    assert seen == [(160, 160), (320, 320)]


@pytest.mark.parametrize("kind", ["plain", "progressive", "exif", "turned", "grey", "CMYK", "png", "cut", "cut, ended"])
def test_plain_jpegs_are_decoded_by_torchvision(monkeypatch, tmp_path, kind):
    """To Pillow's pixels, on average within a grey level of 256, and with its verdict on damage.

    Red when a turned image is not left to Pillow, when a damaged one ends the run, or when none is taken.
    """
    photo, exif, taken = tmp_path / "photo", PIL.Image.Exif(), []
    exif[0x0112] = 6 if kind == "turned" else 1
    with PIL.Image.open(REPOSITORY / "images" / "bird.jpg") as image:
        image = image.convert({"grey": "L", "CMYK": "CMYK"}.get(kind, "RGB"))
        how = {"exif": exif} if kind in ("exif", "turned") else {}
        image.save(photo, "PNG" if kind == "png" else "JPEG", progressive=kind == "progressive", **how)
    if kind.startswith("cut"):
        photo.write_bytes(photo.read_bytes()[:5000] + b"\xff\xd9" * kind.endswith("ended"))

    def augmented():
        with contextlib.suppress(train_vqgan.Unreadable):
            args = parsed("--resolution", 256)
            return train_vqgan.augment(str(photo), train_vqgan.random_numbers_of_sample(0, 0), args).double()

    decode = train_vqgan.decode_plain_jpeg
    monkeypatch.setattr(train_vqgan, "decode_plain_jpeg", lambda image: taken.append(decode(image)) or taken[-1])
    got = augmented()
    monkeypatch.setattr(train_vqgan, "decode_plain_jpeg", lambda image: None)
    expected = augmented()
    assert any(x is not None for x in taken) == (kind in ("plain", "progressive", "exif", "cut, ended"))
    assert (got is None) == (expected is None) == (kind == "cut")
    assert kind == "cut" or (got - expected).abs().mean() <= 1


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


def reds(folder, n):
    """The red of the top left pixel of the first `n` training samples."""
    args = parsed("--train_data_dir", folder, "--validation_fraction", "0")
    stream = train_vqgan.SampleStream(train_vqgan.load_data(args, 0)[0], args, 0)
    return [stream[g][0][0, 0, 0].item() for g in range(n)]


def plain(red):
    return PIL.Image.new("RGB", (20, 16), (red, 0, 0))


def test_another_image_takes_the_place_of_an_unreadable_one(tmp_path):
    """The same one again and again, drawn by sample. Red when the fault is not handed over, or nothing is drawn."""
    for i in range(5):
        plain(10 * (i + 1)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_text("no image")
    seen = reds(tmp_path, 200)
    assert seen == reds(tmp_path, 200) and all(seen.count(red) > 40 for red in (10, 20, 40, 50)) and 30 not in seen
    args = parsed("--train_data_dir", tmp_path, "--validation_fraction", "0")
    stream = train_vqgan.SampleStream(train_vqgan.load_data(args, 0)[0], args, 0)
    faults = {fault.split(": ")[0] for _, fault in (stream[g] for g in range(5)) if fault}
    assert faults == {str(tmp_path / "2.png")}


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


def test_broken_files_of_every_kind(tmp_path):
    """Red when one of Pillow's exceptions is not caught."""
    (tmp_path / "broken").mkdir()
    plain(99).save(tmp_path / "good.png")
    for path in broken_files(tmp_path / "broken"):
        items = [path, tmp_path / "good.png"]
        stream = train_vqgan.SampleStream(items, parsed(), 0)
        if stream.index(0) == 1:
            items.reverse()
        image, fault = stream[0]
        assert image[0, 0, 0] == 99 and path.name in fault


def both_ways(path):
    """What training and validation make of an image: "Unreadable", or "pixels"."""

    def outcome(read):
        try:
            return read() is not None and "pixels"
        except train_vqgan.Unreadable:
            return "Unreadable"

    numbers = train_vqgan.random_numbers_of_sample(0, 0)
    ((_, images, faults),) = train_vqgan.held_out_batches([path], 1, parsed("--train_batch_size", 1), 0, 1)
    validation = "Unreadable" if faults else "pixels"
    assert (images is None) == bool(faults)
    return outcome(lambda: train_vqgan.augment(path, numbers, parsed())), validation


@pytest.mark.parametrize("error", [RuntimeError, TypeError, KeyError, NotImplementedError, AssertionError, EOFError])
@pytest.mark.parametrize("where", ["open", "draft", "load"])
def test_whatever_a_decoder_raises_is_the_images_fault(monkeypatch, photos, where, error):
    """AVIF, TIFF, IM, SPIDER and DDS raise these. Red when a list of exceptions is caught in place of all."""

    def broken(*arguments):
        raise error("")

    owner = PIL.Image if where == "open" else PIL.Image.Image if where == "draft" else PIL.ImageFile.ImageFile
    monkeypatch.setattr(owner, where, broken)
    trained, validated = both_ways(photos / "0.png")
    assert trained == "Unreadable" and validated == ("pixels" if where == "draft" else "Unreadable")


@pytest.mark.parametrize("suffix, at, value", [("avif", 290, 0), ("blp", 4, 255)])
def test_damaged_avif_and_blp(tmp_path, suffix, at, value):
    """Red when only what Pillow's older decoders raise is caught."""
    path = tmp_path / f"image.{suffix}"
    PIL.Image.fromarray(noise(24, 24)).convert("P" if suffix == "blp" else "RGB").save(path)
    data = bytearray(path.read_bytes())
    assert both_ways(path) == ("pixels", "pixels")
    data[at] = value
    path.write_bytes(data)
    with pytest.raises((RuntimeError, NotImplementedError)):
        PIL.Image.open(path).load()
    assert both_ways(path) == ("Unreadable", "Unreadable")


def test_error_of_our_conversion_is_ours(monkeypatch, photos):
    """Red when `except Exception` is around `to_rgb`, too."""
    monkeypatch.setattr(train_vqgan, "to_rgb", lambda *arguments: {}["ours"])
    with pytest.raises(KeyError, match="ours"):
        both_ways(photos / "0.png")


@pytest.mark.parametrize("address, package", [("s3://bucket/1.png", "s3fs"), ("gs://bucket/1.png", "gcsfs")])
def test_missing_package_is_not_the_images_fault(monkeypatch, address, package):
    """Red when fsspec's ImportError is taken for a decoder's."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(train_vqgan.UserError, match=f"^--dataset_name: cannot read {address}: .*{package}"):
        both_ways({"bytes": None, "path": address})


def with_size(data, at, width, height):
    """The bytes of a PNG or JPEG with another size in its header."""
    size = (width, height) if data.startswith(b"\x89PNG") else (height, width)
    length = 4 if data.startswith(b"\x89PNG") else 2
    data = data[:at] + b"".join(n.to_bytes(length, "big") for n in size) + data[at + 2 * length :]
    return data[:29] + zlib.crc32(data[12:29]).to_bytes(4, "big") + data[33:] if length == 4 else data


def test_size_is_judged_after_a_jpeg_is_reduced(tmp_path):
    """192 megapixels: as JPEG 3 at an eighth, in training and in validation; as PNG too many, which one line says.

    Red when Pillow's limit is left as it is, or when the size is judged before draft.
    """
    jpeg, png = tmp_path / "large.jpg", tmp_path / "large.png"
    for path in (jpeg, png):
        PIL.Image.fromarray(noise(16, 16)[..., 0]).save(path)
        data = path.read_bytes()
        at = 16 if path is png else data.index(b"\xff\xc0") + 5
        path.write_bytes(with_size(data, at, 16000, 12000))
    assert both_ways(jpeg) == ("pixels", "pixels") and both_ways(png) == ("Unreadable", "Unreadable")
    with pytest.raises(train_vqgan.Unreadable, match="^192 megapixels, at most 179 fit; make it smaller$"):
        train_vqgan.read_image(png, parsed())


def test_long_text_in_a_png(tmp_path):
    """What drawing programs store there. Red with Pillow's MAX_TEXT_CHUNK."""
    text = PIL.PngImagePlugin.PngInfo()
    text.add_text("history", "x" * 1_200_000, zip=True)
    plain(99).save(tmp_path / "drawing.png", pnginfo=text)
    assert both_ways(tmp_path / "drawing.png") == ("pixels", "pixels")


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
    assert all(abs(red - 99) < 5 for red in reds(tmp_path, 4))


@pytest.mark.parametrize("workers", ["0", "1"])
def test_no_readable_image(error, tmp_path, workers):
    """One line from a worker too. Red when `__getitem__` goes on for ever or raises Pillow's error."""
    (tmp_path / "broken").mkdir()
    for i in range(12):
        (tmp_path / "broken" / f"{i}.png").write_text("no image")
    message = error("--train_data_dir", str(tmp_path / "broken"), "--dataloader_num_workers", workers)
    assert message.startswith("train_vqgan.py: error: a hundred training images, drawn at random,")
    assert str(tmp_path / "broken") in message


BLOCKS = {"empty": (15, 100), "pages": (12, 60), "apple": (20, 64)}  # bad ones, at the end, of so many


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_block_of_bad_neighbours(train, flags, capsys, tmp_path, caplog, name):
    """A download that broke off, web pages saved as images: trained to the end, each named once, counted.

    Red when neighbours take the place of bad images (ten in a row ended a run), or --max_bad_fraction is not looked at.
    """
    bad, n = BLOCKS[name]
    (tmp_path / "data").mkdir()
    for i in range(n):
        path = tmp_path / "data" / f"{i:03d}.jpg"
        if i < n - bad:
            plain(i).save(path)
        else:
            path.write_text("" if name == "empty" else "<html>not found</html>")
    more = ["--train_data_dir", str(tmp_path / "data"), "--max_train_steps", str(n), "--log_steps", "10"]
    train(*more, "--checkpointing_steps", "0")
    skipped = [record.message for record in caplog.records if "Skipped an unreadable training image" in record.message]
    assert len(skipped) == len(set(skipped)) == bad
    assert [line["data/skipped"] for line in metrics(tmp_path / "run")][-1] == bad
    assert len([r for r in caplog.records if f"{bad} of {n} training images cannot be read" in r.message]) == 1
    # and with a stricter limit, judged after one pass, it stops; what was trained is in a checkpoint
    again = ["--output_dir", str(tmp_path / "strict"), "--max_bad_fraction", "0.1"]
    assert train_vqgan.main([*flags, *more, *again]) == 2
    said = capsys.readouterr().err
    assert f"error: --max_bad_fraction: {bad} of {n} training images cannot be read" in said and "Traceback" not in said
    (checkpoint,) = train_vqgan.checkpoints(tmp_path / "strict")
    assert n // 2 - 2 <= train_vqgan.step_of(checkpoint) <= n // 2, "batches are fetched two steps ahead"


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
    args = parsed("--validation_images", *[tmp_path / name for name in pictures])
    images = train_vqgan.load_validation_images(args, 4)
    assert images.shape == (6, 3, 16, 16) and images.dtype == torch.uint8
    assert torch.equal(images, train_vqgan.load_validation_images(args, 4))
    assert difference(images[0], values[..., :3]).max() <= 1 and difference(images[1], tall[..., :3]).max() <= 1
    assert torch.equal(images[3], images[4]), "16 bits and 8 bits of the same picture"


def test_validation_images_are_shown_at_the_short_side(tmp_path):
    """Their largest square that the model's downsampling divides. Red when it is the resolution, or not divisible."""
    values = noise(50, 90)
    PIL.Image.fromarray(values).save(tmp_path / "a.png")
    args = parsed("--validation_images", tmp_path / "a.png", "--short_side", 50)
    images = train_vqgan.load_validation_images(args, 4)
    assert torch.equal(images[0].permute(1, 2, 0), torch.tensor(values[1:49, 21:69]))


def test_no_validation_images():
    assert train_vqgan.load_validation_images(parsed(), 4) is None


def test_unreadable_validation_image(error, tmp_path, photos):
    """Red when Pillow's error gets through."""
    (tmp_path / "bad.png").write_text("no image")
    message = error("--validation_images", str(photos / "0.png"), str(tmp_path / "bad.png"))
    assert "--validation_images" in message and str(tmp_path / "bad.png") in message


def test_white_is_zero_in_scans(tmp_path):
    """The same ramp in 8 bits, which Pillow turns, in 16 and in floats. Red when the last two come out as negatives."""
    ramp, found = np.linspace(0, 1, 64 * 64).reshape(64, 64), []
    for values in ((ramp * 255).astype(np.uint8), (ramp * 65535).astype(np.uint16), ramp.astype(np.float32)):
        PIL.Image.fromarray(values).save(tmp_path / "scan.tif", tiffinfo={262: 0})
        with PIL.Image.open(tmp_path / "scan.tif") as image:
            assert image.tag_v2[262] == 0
        found.append(np.asarray(train_vqgan.read_image(tmp_path / "scan.tif", parsed())).astype(int))
    assert found[0][0, 0].tolist() in ([255] * 3, [0] * 3)
    assert all(np.abs(other - found[1]).max() <= 1 for other in found[2:])
    assert found[1][0, 0, 0] == 255 and found[1][-1, -1, 0] == 0


def test_libtiff_does_not_speak_for_itself(tmp_path, capfd):
    """A damaged strip, read three times. Red when its handlers of errors stay: a line on descriptor 2 each time."""
    PIL.Image.fromarray(noise(64, 64)).save(tmp_path / "a.tif", compression="tiff_adobe_deflate")
    content = bytearray((tmp_path / "a.tif").read_bytes())
    for i in range(2000, 2100):
        content[i] ^= 255
    (tmp_path / "a.tif").write_bytes(content)
    for _ in range(3):
        with pytest.raises(train_vqgan.Unreadable):
            train_vqgan.read_image(tmp_path / "a.tif", parsed())
    assert "ZIPDecode" not in capfd.readouterr().err


def test_fault_says_its_reason_once(tmp_path):
    """The cause of Unreadable has the same words. Red when it is added to them."""
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(train_vqgan.Unreadable) as caught:
        train_vqgan.read_image(tmp_path / "a.png", parsed())
    assert caught.value.__cause__ and train_vqgan.one_line(caught.value).count("cannot identify") == 1
    caught.value.__cause__ = OSError("another reason")
    assert train_vqgan.one_line(caught.value).endswith("(another reason)")


def test_jpegs_are_tried_before_formats_without_a_signature():
    """Opening each image would try those first. Red without preinit."""
    names = PIL.Image.ID
    assert names.index("JPEG") < min(names.index(name) for name in names if PIL.Image.OPEN[name][1] is None)


def test_a_cause_that_is_quoted_is_not_said_again():
    """Though only its first line is quoted. Red when the whole cause is looked for in what is said."""
    error = ValueError("no weights; name a file (the Hub said no)")
    error.__cause__ = OSError("the Hub said no\nand more of the same")
    assert train_vqgan.one_line(error) == str(error)
