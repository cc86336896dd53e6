"""scripts/tokenize_dataset.py: images to codes and back."""

import errno
import importlib.util
import json
import os
import re
import shlex
import shutil

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
import torch
from conftest import REPOSITORY, TINY_MODEL, launch
from diffusers import VQModel
from diffusers.image_processor import VaeImageProcessor

import train_vqgan

README = (REPOSITORY / "README.md").read_text()
SCRIPT = REPOSITORY / "scripts" / "tokenize_dataset.py"
spec = importlib.util.spec_from_file_location("tokenize_dataset", SCRIPT)
tokenize_dataset = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tokenize_dataset)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A directory as a training run leaves it; the codes are as far apart as the latents, so that many are used."""
    folder = tmp_path_factory.mktemp("run")
    save_model(folder)
    return folder


def save_model(folder, **config):
    torch.manual_seed(0)
    plain = VQModel.from_config(TINY_MODEL | config)
    with torch.no_grad():
        plain.encoder.conv_out.weight.mul_(20)
        plain.quantize.embedding.weight.normal_()
    plain.save_pretrained(folder / "vqmodel")
    VaeImageProcessor(vae_scale_factor=2).save_config(folder / "image_processor")


@pytest.fixture
def tokens(model, tmp_path, capsys):
    """tokens(*flags) -> (the line of JSON, the rows as `datasets` loads them); asserts that the run succeeded."""

    def run(*flags, output=tmp_path / "codes"):
        capsys.readouterr()
        always = ["--pretrained_model_name_or_path", model, "--resolution", "16", "--output_dir", output]
        assert tokenize_dataset.main([*map(str, always), *map(str, flags)]) == 0
        return json.loads(capsys.readouterr().out), loaded(output)

    return run


def loaded(folder):
    return datasets.load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train").with_format("numpy")


def plain_codes(model, folder, batch_size):
    """What diffusers' own VQModel gives for the sorted images of a folder, [images, height, width]."""
    plain, args = VQModel.from_pretrained(model / "vqmodel"), train_vqgan.parse_args(["--resolution", "16"])
    paths = sorted(path for path in folder.iterdir() if path.suffix == ".png")
    images = [train_vqgan.to_square(PIL.Image.open(path).convert("RGB"), args.resolution) for path in paths]
    found = []
    with torch.no_grad():
        for batch in torch.stack(images).split(batch_size):
            z = plain.encode(batch / 127.5 - 1).latents
            found.append(plain.quantize(z)[2][2].reshape(len(batch), *z.shape[2:]))
    return torch.cat(found).numpy()


def as_dataset(folder, target):
    """The images of a folder as a parquet data set with a column of labels."""
    paths = sorted(folder.iterdir())
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["a", "b"]),
        "note": datasets.Value("string"),
    }
    columns = {"image": [{"bytes": path.read_bytes(), "path": None} for path in paths]}
    columns |= {"label": [i % 2 for i in range(len(paths))], "note": [path.name for path in paths]}
    features["copy"], columns["copy"] = features["image"], columns["image"]
    features["source"], columns["source"] = features["note"], columns["note"]
    target.mkdir()
    datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(target / "train.parquet")
    return target


@pytest.mark.parametrize("kind", ["folder", "data set", "stream"])
def test_codes_are_those_of_a_plain_vqmodel(tokens, model, photos, tmp_path, kind):
    """All images in order, whichever way they are read, in shards of three.

    Red when the latents are not permuted before the search, or images go in as 0 to 255; when stop or start of a shard
    are off by one; when a stream's shard is what is left of its batches.
    """
    flags = ["--train_data_dir", photos]
    if kind != "folder":
        flags = ["--dataset_name", as_dataset(photos, tmp_path / "set"), *["--streaming"] * (kind == "stream")]
    line, rows = tokens(*flags, "--shard_size", "3", "--batch_size", "2")
    assert line == {"images": 7, "unreadable": 0, "shards": 3, "num_codes": 32, "height": 8, "width": 8}
    assert rows.features["codes"] == datasets.Array2D((8, 8), "uint8")
    plain = plain_codes(model, photos, 2)
    assert len(np.unique(plain)) > 8
    assert (rows["codes"][:] == plain).all()
    names = [f"{i}.png" for i in range(7)]
    assert list(rows["source"][:]) == (names if kind == "folder" else list(range(7)))


@pytest.mark.parametrize("codes, smallest", [(256, "uint8"), (257, "uint16")])
def test_smallest_integer_type(tokens, photos, tmp_path, codes, smallest):
    """Red when the number of codes is taken for the largest one."""
    save_model(tmp_path / "model", num_vq_embeddings=codes)
    _, rows = tokens("--train_data_dir", photos, "--pretrained_model_name_or_path", tmp_path / "model")
    assert rows.features["codes"].dtype == smallest
    column = pyarrow.parquet.ParquetFile(tmp_path / "codes" / "codes-00000.parquet").schema.column(0)
    assert f"bitWidth={smallest[4:]}, isSigned=false" in str(column.logical_type)


def test_the_readmes_way_back_gives_validations_reconstructions(tokens, model, photos, tmp_path, monkeypatch, capsys):
    """Bit for bit at the same batch size. Red when the README's lines permute otherwise."""
    flags = ["--eval_only", "--pretrained_model_name_or_path", model, "--validation_data_dir", photos]
    flags += ["--resolution", "16", "--train_batch_size", "7", "--save_reconstructions", tmp_path / "saved"]
    assert train_vqgan.main([*map(str, flags), "--perceptual_weight", "0", "--lpips_weights", "none"]) == 0
    (tmp_path / "demo").symlink_to(model)
    tokens("--train_data_dir", photos, "--batch_size", "7", output=tmp_path / "demo" / "codes")
    (way_back,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "load_dataset" in block]
    monkeypatch.chdir(tmp_path)
    processor = VaeImageProcessor.from_config(VaeImageProcessor.load_config(model / "image_processor"))
    scope = {"model": VQModel.from_pretrained(model / "vqmodel"), "processor": processor, "torch": torch}
    exec(way_back, scope)
    saved = sorted((tmp_path / "saved" / "reconstruction").iterdir())
    assert len(scope["images"]) == len(saved) == 7
    for image, path in zip(scope["images"], saved):
        assert (np.array(image) == np.array(PIL.Image.open(path))).all(), path.name


def test_the_readmes_command_parses(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    (command,) = re.findall(r"^accelerate launch scripts/tokenize_dataset.py (.*)$", README, re.M)
    assert tokenize_dataset.parse_args(shlex.split(command)).output_dir == "demo/codes"


def test_what_cannot_be_read_is_left_out_and_counted(tokens, photos, tmp_path, capsys):
    """Named once; nothing takes its place; grey, deep, transparent and odd ones are read; an empty shard loads.

    Red when faults are not counted, or a shard without rows is written with a group of none.
    """
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "0.png").write_bytes(b"no image")
    (folder / "1.png").write_bytes((photos / "1.png").read_bytes()[:60])
    PIL.Image.new("L", (17, 31), 77).save(folder / "2.png")
    PIL.Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100).save(folder / "3.png")
    PIL.Image.new("RGBA", (1, 40), (0, 200, 0, 90)).save(folder / "4.png")
    shutil.copy(photos / "5.png", folder / "5.png")
    (folder / "6.png").touch()
    line, rows = tokens("--train_data_dir", folder, "--shard_size", "2", "--batch_size", "2")
    assert (line["images"], line["unreadable"], line["shards"]) == (4, 3, 4)
    assert list(rows["source"][:]) == ["2.png", "3.png", "4.png", "5.png"]
    assert len(np.unique(rows["codes"][0])) < len(np.unique(rows["codes"][3])), "grey is plain"
    line, rows = tokens("--train_data_dir", folder, "--shard_size", "2", "--batch_size", "2")
    assert line["unreadable"] == 3, "also of shards that were there"


def test_kept_columns(tokens, photos, tmp_path):
    """With their types; a picture keeps its bytes, of files, too. Red when they are decoded on the way, or not embedded."""
    (tmp_path / "jpegs").mkdir()
    for path in photos.iterdir():
        PIL.Image.open(path).save(tmp_path / "jpegs" / f"{path.stem}.jpg", quality=60)
    folder = as_dataset(tmp_path / "jpegs", tmp_path / "set")
    _, rows = tokens("--dataset_name", folder, "--keep_columns", "label", "copy", "--shard_size", "4")
    assert rows.column_names == ["codes", "source", "label", "copy"]
    assert rows.features["label"].names == ["a", "b"] and list(rows["label"][:]) == [0, 1, 0, 1, 0, 1, 0]
    _, of_files = tokens("--dataset_name", tmp_path / "jpegs", "--keep_columns", "image", output=tmp_path / "of-files")
    for kept, column in ((rows, "copy"), (of_files, "image")):
        kept = kept.with_format(None).cast_column(column, datasets.Image(decode=False))[column]
        assert [image["bytes"] for image in kept] == [(tmp_path / "jpegs" / f"{i}.jpg").read_bytes() for i in range(7)]


def test_the_same_command_goes_on(tokens, model, photos, tmp_path, monkeypatch):
    """Stopped amid its second shard: what is there is whole, stays, and the rest is added. Red without the rename."""
    flags = ["--train_data_dir", photos, "--shard_size", "2", "--batch_size", "2"]
    _, whole = tokens(*flags, output=tmp_path / "whole")
    original = train_vqgan.sync

    def stop(path):
        if "00001" in path.name:
            path.write_bytes(path.read_bytes()[:50])
            raise KeyboardInterrupt
        original(path)

    monkeypatch.setattr(train_vqgan, "sync", stop)
    with pytest.raises(KeyboardInterrupt):
        tokens(*flags)
    monkeypatch.setattr(train_vqgan, "sync", original)
    assert [path.name for path in (tmp_path / "codes").glob("*.parquet")] == ["codes-00000.parquet"]
    first = (tmp_path / "codes" / "codes-00000.parquet").stat().st_mtime_ns
    line, rows = tokens(*flags)
    assert line["images"] == 7 and line["shards"] == 4
    assert (tmp_path / "codes" / "codes-00000.parquet").stat().st_mtime_ns == first
    assert (rows["codes"][:] == whole["codes"][:]).all() and list(rows["source"]) == list(whole["source"])
    assert sorted(os.listdir(tmp_path / "codes")) == [f"codes-0000{i}.parquet" for i in range(4)]


@pytest.fixture
def error(model, tmp_path, capsys):
    """error(*flags) -> the one line on stderr of a run that must fail with status 2."""

    def run(*flags):
        always = ["--pretrained_model_name_or_path", model, "--resolution", "16", "--output_dir", tmp_path / "codes"]
        try:
            status = tokenize_dataset.main([*map(str, always), *map(str, flags)])
        except SystemExit as stop:
            status = stop.code
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert status == 2 and len(lines) == 1, lines
        return lines[0].removeprefix("tokenize_dataset.py: error: ")

    return run


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--train_data_dir", "nowhere"], "argument --train_data_dir: no such folder: nowhere"),
        (
            ["--train_data_dir", "PHOTOS", "--split", "test"],
            "--split, --streaming and --keep_columns: need --dataset_name",
        ),
        (
            ["--train_data_dir", "PHOTOS", "--dataset_name", "SET"],
            "--dataset_name and --train_data_dir: give one of them",
        ),
        (["--dataset_name", "SET", "--split", "test"], "--split: cannot read the test split of"),
        (["--dataset_name", "SET", "--keep_columns", "colour"], "--keep_columns: not among image, label, note"),
        (["--dataset_name", "SET", "--keep_columns", "colour", "--streaming"], "--keep_columns: not among image"),
        (["--dataset_name", "SET", "--keep_columns", "source"], "--keep_columns: not among image, label, note"),
        (["--dataset_name", "SET", "--image_column", "img"], "--image_column: 'img' is no column of images"),
        (["--train_data_dir", "PHOTOS", "--resolution", "17"], "--resolution: 17 is not divisible"),
        (["--train_data_dir", "EMPTY"], "--train_data_dir: no images in"),
        (["--train_data_dir", "BROKEN"], "none of the images can be read"),
        (
            ["--train_data_dir", "PHOTOS", "--pretrained_model_name_or_path", "EMPTY"],
            "--pretrained_model_name_or_path: ",
        ),
    ],
)
def test_one_line_says_what_is_wrong(error, photos, tmp_path, flags, said):
    for name in ("EMPTY", "BROKEN"):
        (tmp_path / name).mkdir()
    (tmp_path / "BROKEN" / "0.png").touch()
    places = {"PHOTOS": photos, "SET": as_dataset(photos, tmp_path / "SET")}
    places |= {name: tmp_path / name for name in ("EMPTY", "BROKEN")}
    assert error(*[places.get(flag, flag) for flag in flags]).startswith(said)


def test_a_full_disk_and_a_broken_stream(error, tokens, photos, tmp_path, monkeypatch):
    """One line each, and what was whole before stays. Red when errors of a stream or of writing are not caught."""
    flags = ["--dataset_name", as_dataset(photos, tmp_path / "set"), "--streaming", "--shard_size", "3"]
    original = train_vqgan.sync

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train_vqgan, "sync", full)
    assert re.search("--output_dir: cannot write .*; make room; the same command goes on", error(*flags))
    monkeypatch.setattr(train_vqgan, "sync", original)
    good = (tmp_path / "set" / "train.parquet").read_bytes()
    (tmp_path / "set" / "train.parquet").rename(tmp_path / "set" / "train-0.parquet")
    (tmp_path / "set" / "train-1.parquet").write_bytes(good[:400])
    assert error(*flags).startswith("--streaming: ")
    assert len(loaded(tmp_path / "codes")) == 6


@pytest.mark.parametrize("changed", ["resolution", "data", "model", "damaged"])
def test_shards_of_another_command_are_refused(tokens, error, photos, tmp_path, changed):
    """Red when that setting is not compared, or a file that is no parquet passes."""
    flags = ["--train_data_dir", photos]
    tokens(*flags)
    if changed == "resolution":
        flags += ["--resolution", "32"]
    if changed == "data":
        shutil.copytree(photos, tmp_path / "fewer", ignore=shutil.ignore_patterns("6.png"))
        flags = ["--train_data_dir", tmp_path / "fewer"]
    if changed == "model":
        save_model(tmp_path / "model", num_vq_embeddings=31)
        flags += ["--pretrained_model_name_or_path", tmp_path / "model"]
    if changed == "damaged":
        (tmp_path / "codes" / "codes-00000.parquet").write_bytes(b"PAR1")
    line = error(*flags)
    expected = "cannot read" if changed == "damaged" else f"was made with {changed}"
    assert re.match("--output_dir: .*codes-00000.parquet|--output_dir: cannot read .*", line) and expected in line


KILLED = """
import os, signal, sys
sys.path.insert(0, {scripts!r})
import tokenize_dataset
sync, write = tokenize_dataset.train_vqgan.sync, tokenize_dataset.write_shard

def killed(path):
    if path.name.startswith(os.environ["KILL_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    sync(path)

def noted(path, *rest):
    with open(os.environ["NOTES"], "a") as notes:
        notes.write(f"{{os.environ['RANK']}} of {{os.environ['WORLD_SIZE']}}: {{path.name}}\\n")
    write(path, *rest)

tokenize_dataset.train_vqgan.sync, tokenize_dataset.write_shard = killed, noted
sys.exit(tokenize_dataset.main())
"""


@pytest.mark.slow
def test_a_thousand_images_over_two_processes_killed_and_resumed(model, tmp_path):
    """Each image once, in order, with the plain loop's codes. Red when processes take the same shards, or the second
    run counts shards from those that were missing to only one of them.
    """
    folder, rng = tmp_path / "thousand", np.random.default_rng(0)
    folder.mkdir()
    for i in range(1000):
        coarse = PIL.Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        coarse.resize((16 + i % 5, 16), PIL.Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")
    (tmp_path / "killed.py").write_text(KILLED.format(scripts=str(SCRIPT.parent)))
    command = [tmp_path / "killed.py", "--pretrained_model_name_or_path", model, "--resolution", "16"]
    command += [
        "--train_data_dir",
        folder,
        "--output_dir",
        tmp_path / "codes",
        "--shard_size",
        "100",
        "--batch_size",
        "20",
    ]
    notes = {"NOTES": str(tmp_path / "notes")}
    result = launch(command, 2, KILL_AT=".codes-00005", **notes)
    assert result.returncode != 0 and "Signal 9" in result.stderr, result.stderr[-2000:]
    there = sorted(path.name for path in (tmp_path / "codes").glob("*.parquet"))
    assert {"codes-00001.parquet", "codes-00003.parquet"} <= set(there) and "codes-00005.parquet" not in there
    (tmp_path / "notes").unlink()
    result = launch(command, 2, KILL_AT="never", **notes)
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("{")]
    assert json.loads(line)["images"] == 1000 and json.loads(line)["shards"] == 10
    written = re.findall(r"(\d) of 2: (\S+)", (tmp_path / "notes").read_text())
    assert {rank for rank, _ in written} == {"0", "1"}, "one did it all"
    assert sorted(name for _, name in written) == [
        name for name in (f"codes-{i:05d}.parquet" for i in range(10)) if name not in there
    ]
    rows = loaded(tmp_path / "codes")
    assert list(rows["source"][:]) == [f"{i:04d}.png" for i in range(1000)]
    assert (rows["codes"][:] == plain_codes(model, folder, 20)).all()
