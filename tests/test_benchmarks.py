"""The benchmarks' own machinery: what is timed is what was asked for, and what is held out is never trained on."""

import argparse
import json
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from conftest import REPOSITORY, without

sys.path.append(str(REPOSITORY / "benchmarks"))

import adversary  # noqa: E402
import throughput  # noqa: E402

import recipes  # noqa: E402
import train_vqgan  # noqa: E402


def test_held_out_photographs_are_not_trained_on(tmp_path, monkeypatch):
    """Ten photographs in two crops each: both crops of two of them are held out. Red when every fifth file is."""
    photos, opened, real = tmp_path / "photos", [], PIL.Image.open
    photos.mkdir()
    for i in range(10):
        for crop in (1, 2):
            PIL.Image.new("RGB", (96, 80), (20 * i, 0, 0)).save(photos / f"{chr(97 + i)}_{crop:02d}.jpg")
    monkeypatch.setattr(PIL.Image, "open", lambda path: opened.append(Path(path).stem) or real(path))
    sides = {}
    for fifth in ("without", "only", None):
        options = argparse.Namespace(photos=photos, out=tmp_path / str(fifth), number=3, smallest=0.8, fifth=fifth)
        recipes.cut(options)
        sides[fifth], opened[:] = set(opened), []
        assert [real(path).size for path in sorted(options.out.iterdir())] == [(64, 64)] * 3
    assert sides["only"] == {"e_01", "e_02", "j_01", "j_02"}
    assert not sides["only"] & sides["without"] and len(sides["without"]) == 16
    assert sides[None] == sides["only"] | sides["without"]


def test_flags_of_the_throughput_benchmark_are_flags(tmp_path):
    """In a folder with a space, too; the photographs make an even number of whole batches."""
    options = argparse.Namespace(model=None, resolution=64, train_batch_size=6, mixed_precision="no")
    folder = tmp_path / "a folder"
    folder.mkdir()
    words = throughput.flags(throughput.OURS, options, folder, flags="--use_ema", codes=2048)
    args = train_vqgan.parse_args(words)
    assert args.use_ema and args.discriminator_start == 0
    assert json.loads((folder / "model.json").read_text())["num_vq_embeddings"] == 2048
    found = len(train_vqgan.list_images("--train_data_dir", args.train_data_dir, args))
    assert found >= 4000 and found % 12 == 0


def test_prediction_counts_operators_bytes_and_flops():
    """A product, a copy and views, in numbers of four bytes, at 1 GFLOP/s and 2 GB/s.

    Red when views count, when an expanded tensor counts as if it were written out, and when the faster side decides.
    """
    a, b = torch.zeros(64, 32), torch.zeros(32, 16)
    product = throughput.counted(lambda: (a @ b).T[:4], 1e9, 2e9)
    assert (product.operators, product.flops) == (1, 2 * 64 * 32 * 16)
    assert product.bytes == 4 * (64 * 32 + 32 * 16 + 64 * 16)
    assert product.seconds == pytest.approx(product.flops / 1e9)
    row = torch.zeros(1, 32)
    copy = throughput.counted(lambda: row.expand(64, 32).clone(), 1e9, 2e9)
    assert (copy.operators, copy.flops, copy.bytes) == (1, 0, 4 * (32 + 64 * 32))
    assert copy.seconds == pytest.approx(copy.bytes / 2e9)


@pytest.mark.parametrize("variant", adversary.VARIANTS)
def test_flags_of_the_adversary_benchmark_are_flags(variant, tmp_path):
    """All variants differ in the adversary and the quantiser only. Red when a flag or a config is gone."""
    options = argparse.Namespace(steps=1500, train=tmp_path, judged=tmp_path, flags="")
    (tmp_path / "run.json").write_text(json.dumps(adversary.MODEL_8X))
    args = train_vqgan.parse_args(adversary.flags_of(variant, 1, tmp_path / "run", options))
    assert (args.adversarial_weight != 0) == (variant in ("patch", "features"))
    model = train_vqgan.build_generator(args)
    assert 2 ** (len(model.config.block_out_channels) - 1) == 8


def test_color_difference(tmp_path):
    """In units of CIEDE2000. Red when images or reconstructions are scaled otherwise."""
    config = adversary.MODEL_8X | {"num_vq_embeddings": 4}
    model = adversary.VQModel.from_config(config)
    for weight in model.decoder.conv_out.parameters():
        weight.data.zero_()  # it reconstructs mid-grey
    model.save_pretrained(tmp_path / "model")
    for name, value in (("grey", 128), ("white", 255)):
        PIL.Image.new("RGB", (80, 64), (value,) * 3).save(tmp_path / f"{name}.png")
    grey, white = (
        adversary.color_difference(tmp_path / "model", [tmp_path / f"{n}.png"], 64) for n in ("grey", "white")
    )
    assert grey < 0.5 and white == pytest.approx(33.4, abs=1), "white is 46 in lightness above it"


def test_every_part_of_a_step_runs(flags):
    """Red when what the benchmark takes from the script is gone, or a part leaves gradients for the next."""
    args = train_vqgan.parse_args([*flags, "--use_ema"])
    run = train_vqgan.Run(args, train_vqgan.start_accelerator(args))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    for name, call in throughput.parts_of_a_step(run, x).items():
        call()
        learned = [p.grad for p in run.state.discriminator.parameters() if p.grad is not None]
        assert not learned, name
    assert run.state.step == 2


def test_every_way_to_decode_runs(tmp_path):
    PIL.Image.new("RGB", (96, 80), (200, 0, 0)).save(tmp_path / "a.jpg")
    speeds = throughput.decoding([tmp_path / "a.jpg"], 32)
    assert len(speeds) == 4 and all(speed > 0 for found in speeds.values() for speed in found)


def test_tables_have_their_places(tmp_path, monkeypatch):
    """On a GPU they are made at the end of the page. Red when a second table is put beside the first one there."""
    page = (REPOSITORY / "benchmarks" / "README.md").read_text()
    for table in (set(throughput.PARTS) - {"largest"}) | {"codebook", "large", "adversarial", "upstream"}:
        assert f"<!-- {table} -->" in page
    monkeypatch.setattr(throughput, "HERE", tmp_path)
    (tmp_path / "README.md").write_text(page)
    for text in ("| first |", "| second |"):
        throughput.place("parts, GPU", text)
    after = (tmp_path / "README.md").read_text()
    assert after.startswith(page) and "first" not in after.removeprefix(page) and after.count("| second |") == 1


@pytest.mark.slow
def test_a_turn_is_a_number_of_steps(flags):
    """Steps are logged as they are taken; red when the discriminator's backward pass counts as a step of its own."""
    more = [*without(flags, "--max_train_steps"), "--max_train_steps", "100", "--log_steps", "1"]
    training = throughput.Training(REPOSITORY / "train_vqgan.py", [*more, "--discriminator_start", "0"])
    log, taken = Path(flags[-1]) / "metrics.jsonl", []
    for steps in (1, 3, 5):
        seconds, memory = training.turn(steps)
        assert seconds > 0 and memory > 100 << 20
        taken.append(len(log.read_text().splitlines()))
    training.end()
    assert taken == [1, 4, 9]


@pytest.mark.slow
def test_a_run_that_ends_says_why(flags):
    with pytest.raises(throughput.Ended, match="no such folder"):
        throughput.Training(REPOSITORY / "train_vqgan.py", [*flags, "--train_data_dir", "/nowhere"])


def test_shards_are_shared_evenly(capsys):
    """By five processes with three data workers each, in a pass and over seven. Red when a pass is not dealt on."""
    import streams

    assert streams.main(["--processes", "5", "--workers", "3", "--shards", "49", "--passes", "7"]) == 0
    assert "no sample twice in a pass, and none left out | yes" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_server_of_shards(kind):
    """Two processes x two data workers, killed and resumed. Red when a reader's state is not loaded."""
    import streams

    assert streams.table(streams.served(kind, shards=4, per_shard=32, batch=4)) == 0
