"""The schedule that follows from flags, data and processes, and what trackers get of both."""

import math
from types import SimpleNamespace

import pytest
from conftest import metrics

import train_vqgan


def parse(*flags):
    return train_vqgan.parse_args([str(flag) for flag in flags])


def scheduled(args, images=7, processes=1, earlier=None):
    images_per_step = args.train_batch_size * args.gradient_accumulation_steps * processes
    return train_vqgan.Schedule(args, images_per_step, images, earlier and {"schedule": earlier})


@pytest.mark.parametrize(
    "images, epochs, batch, accumulation, processes, steps",
    [
        (7, 1, 2, 1, 1, 4),  # the last batch crosses into the second epoch: no image is left out
        (7, 100, 2, 1, 1, 350),  # not 100 x 4
        (7, 3, 2, 2, 1, 6),  # 21 images in steps of 4
        (7, 3, 2, 2, 2, 3),  # 21 images in steps of 8
        (1001, 2.5, 16, 1, 3, 53),  # 2502.5 in steps of 48
        (1, 0.5, 64, 1, 1, 1),
    ],
)
def test_steps_from_epochs(images, epochs, batch, accumulation, processes, steps):
    """Red when the division is by micro-batches instead of steps, or rounds down, or rounds every epoch up."""
    seen = steps * batch * accumulation * processes
    assert seen >= images * epochs > seen - batch * accumulation * processes, "the expectation itself"
    flags = ("--num_train_epochs", epochs, "--train_batch_size", batch, "--gradient_accumulation_steps", accumulation)
    assert scheduled(parse(*flags), images, processes).steps == steps


def test_steps_given_win_over_epochs():
    assert scheduled(parse("--max_train_steps", 11, "--num_train_epochs", 3)).steps == 11


@pytest.mark.parametrize("batch, accumulation, processes", [(2, 1, 1), (2, 3, 1), (1, 1, 4), (2, 3, 4)])
def test_scale_lr(batch, accumulation, processes):
    """Red when a factor of the product is left out, or only the generator's rate is scaled."""
    flags = ("--train_batch_size", batch, "--gradient_accumulation_steps", accumulation)
    flags += ("--learning_rate", "1e-4", "--discr_learning_rate", "3e-4")
    plain, scaled = scheduled(parse(*flags), 7, processes), scheduled(parse(*flags, "--scale_lr"), 7, processes)
    assert (plain.learning_rate, plain.discr_learning_rate) == (1e-4, 3e-4)
    assert math.isclose(scaled.learning_rate, 1e-4 * batch * accumulation * processes)
    assert math.isclose(scaled.discr_learning_rate, 3e-4 * batch * accumulation * processes)


def test_scale_lr_reaches_the_optimisers(train):
    """Upstream scales the rates after its optimisers are built. Red when they get those of the flags."""
    flags = ("--gradient_accumulation_steps", "3", "--lr_scheduler", "constant", "--discr_lr_scheduler", "constant")
    flags += ("--learning_rate", "1e-5", "--discr_learning_rate", "3e-5", "--discriminator_start", "0")
    output = train(*flags, "--log_steps", "1", "--max_train_steps", "1", "--checkpointing_steps", "0", "--scale_lr")
    line = metrics(output)[0]
    assert math.isclose(line["opt/lr"], 6e-5) and math.isclose(line["opt/discriminator_lr"], 18e-5)


@pytest.mark.parametrize(
    "flags, steps, start, warmup",
    [
        ([], 1000, 100, 500),  # the warm-up of the learning rate
        (["--lr_warmup_steps", "5"], 1000, 100, 20),
        (["--discr_lr_scheduler", "constant"], 1000, 100, 20),  # has no warm-up
        ([], 200_000, 20_000, 4000),
        ([], 1_000_000, 20_000, 20_000),  # 10 %, but at most 20,000 steps
        ([], 5, 0, 500),
        (["--discriminator_start", "0.3"], 1_000_000, 300_000, 20_000),  # the bound is on the default only
        (["--discriminator_start", "0.6", "--discriminator_warmup", "0.5"], 1000, 600, 500),
        (["--discriminator_start", "900", "--discriminator_warmup", "3000"], 1000, 900, 3000),
        (["--discriminator_start", "1", "--discriminator_warmup", "1"], 1000, 1, 1),  # one step
        (["--discriminator_start", "0.99", "--discriminator_warmup", "1.0"], 1000, 990, 1000),  # the whole run
        (["--discriminator_start", "0"], 1000, 0, 500),
        (["--discriminator_warmup", "0.02"], 1000, 100, 20),  # taken as it is
    ],
)
def test_fractions_of_the_run(flags, steps, start, warmup):
    """Red when min(..., 20000) is dropped or moved to given values, or whole numbers are multiplied too, or the default
    ramp is shorter than the warm-up of the discriminator's learning rate."""
    schedule = scheduled(parse("--max_train_steps", steps, *flags))
    assert (schedule.discriminator_start, schedule.discriminator_warmup) == (start, warmup)
    assert type(schedule.discriminator_start) is type(schedule.discriminator_warmup) is int


def test_fractions_of_a_run_given_in_epochs():
    """Red when the fractions are taken before the steps are known."""
    args = parse(
        "--num_train_epochs", 10, "--train_batch_size", 1, "--discriminator_start", 0.5, "--discriminator_warmup", 0.02
    )
    schedule = scheduled(args, images=20)
    assert (schedule.steps, schedule.discriminator_start, schedule.discriminator_warmup) == (200, 100, 4)


@pytest.mark.parametrize(
    "before, now, start",
    [
        ([], [], 100),  # the tenth of the first run's 1,000 steps, not of 2,000
        (["--discriminator_start", "0.3"], ["--discriminator_start", "0.3"], 300),
        (["--discriminator_start", "0.3"], ["--discriminator_start", "0.5"], 1000),  # asked for anew
        (["--discriminator_start", "70"], ["--discriminator_start", "80"], 80),
        ([], ["--discriminator_start", "0.1"], 200),
    ],
)
def test_start_of_a_prolonged_run(before, now, start):
    """Red when `earlier` is not looked at, or wins over another flag."""
    earlier = scheduled(parse("--max_train_steps", 1000, *before)).recorded()
    resumed = scheduled(parse("--max_train_steps", 2000, *now), earlier=earlier)
    assert (resumed.steps, resumed.discriminator_start) == (2000, start)


def test_public_config(photos):
    """No secrets, and only what TensorBoard takes. Red when "token" is not filtered, or lists and None pass through."""
    images = [str(photos / "0.png"), str(photos / "1.png")]
    args = parse("--push_to_hub", "--hub_token", "hf_secret", "--validation_images", *images, "--seed", 0)
    assert args.hub_token == "hf_secret" and args.cache_dir is None
    run = SimpleNamespace(args=args, schedule=scheduled(args, images=32), seed=0)
    config = train_vqgan.public_config(run)
    assert not [name for name in config if "token" in name] and "hf_secret" not in repr(config)
    assert {type(value) for value in config.values()} <= {int, float, str, bool}
    assert config["validation_images"] == "0.png 1.png", "local paths mean nothing elsewhere"
    assert config["seed"] == 0 and config["use_ema"] is False and config["learning_rate"] == 1e-4
    assert config["max_train_steps"] == "" and config["derived/steps"] == 200 and config["derived/seed"] == 0


@pytest.mark.parametrize("start", ["1000", "2000", "1.0"])
def test_start_of_the_discriminator_beyond_the_end(start):
    """Red when it is not compared with the steps: the adversary would never be there, without a word."""
    with pytest.raises(train_vqgan.UserError, match="--discriminator_start: step .* is beyond the end"):
        scheduled(parse("--max_train_steps", 1000, "--discriminator_start", start))
    scheduled(parse("--max_train_steps", 1000, "--discriminator_start", start, "--adversarial_weight", 0))


@pytest.mark.parametrize("name", ["constant_with_warmup", "linear", "cosine"])
def test_warm_up_begins_above_zero(name):
    """1 / 10 at first, the whole rate after ten steps. Red when the first step is taken at rate 0."""
    factor = train_vqgan.Schedule.learning_rate_factor(name, 10, 100)
    assert [factor(step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factor(10) == pytest.approx(1, abs=0.01) and (name == "constant_with_warmup" or factor(99) < 0.02)


@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_warm_up_as_long_as_the_run(name):
    """Every step has a rate. Red when the run's own length is given to `get_scheduler`: polynomial divides by zero."""
    factor = train_vqgan.Schedule.learning_rate_factor(name, 10, 10)
    assert all(0 < factor(step) <= 1 for step in range(10))


def test_steps_of_a_resumed_run_in_epochs():
    """40 images of 4 x 20 seen in steps of 4: 40 are left, 5 steps of 8, or 20 of 2; none after all 80."""
    for batch, left in [(8, 5), (2, 20), (4, 10)]:
        args = parse("--num_train_epochs", 4, "--train_batch_size", batch)
        assert train_vqgan.Schedule(args, batch, 20, {"step": 10, "samples_seen": 40}).steps == 10 + left
    assert train_vqgan.Schedule(args, 4, 20, {"step": 20, "samples_seen": 80}).steps == 20
