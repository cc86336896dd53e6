"""Flags: what is refused and with which words, recipes, defaults, and what is settled from data and processes."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, metrics

import train_vqgan


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """parse(*flags) -> namespace, from a working directory that is not the repository."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda *flags: train_vqgan.parse_args(["--output_dir", str(tmp_path / "run"), *map(str, flags)])


@pytest.fixture
def refused(parse, capsys):
    """refused(*flags) -> the message; asserts exit status 2 and exactly one line, on stderr."""

    def run(*flags):
        with pytest.raises(SystemExit) as stop:
            parse(*flags)
        said = capsys.readouterr()
        assert stop.value.code == 2 and said.out == ""
        assert said.err.startswith("train_vqgan.py: error: ") and said.err.endswith("\n") and said.err.count("\n") == 1
        return said.err.removeprefix("train_vqgan.py: error: ").rstrip()

    return run


# ---- Flags of the upstream script ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, advice",
    [
        (["--prediction_type", "epsilon"], "leave it out"),
        (["--prediction_type=epsilon"], "leave it out"),
        (["--non_ema_revision", "main"], "--revision"),
        (["--local_rank", "0"], "accelerate launch"),
        (["--local_rank", "-1"], "accelerate launch"),
        (["--timm_model_offset", "0"], "--timm_model_layers"),
        (["--enable_xformers_memory_efficient_attention"], "leave it out"),
        (["--log_grad_norm_steps", "500"], "--log_steps"),
    ],
)
def test_removed_flag_says_what_to_use(refused, flags, advice):
    """Red when one of them leaves REMOVED_FLAGS: the advice is then missing."""
    message = refused(*flags)
    assert message.startswith(flags[0].split("=")[0]) and advice in message


def test_every_other_upstream_flag_is_known(parse, photos):
    """Spellings are those of diffusers' examples/vqgan. Red when a flag is renamed."""
    args = parse(
        *(
            "--log_steps",
            1,
            "--validation_steps",
            1,
            "--vae_loss",
            "l2",
            "--timm_model_layers",
            "features.3|features.8",
        ),
        *("--timm_model_backend", "vgg19", "--pretrained_model_name_or_path", "owner/model", "--revision", "main"),
        *("--discriminator_config_name_or_path", "owner/name", "--dataset_config_name", "plain", "--cache_dir", "c"),
        *("--train_data_dir", photos, "--image_column", "img", "--max_train_samples", 5, "--seed", 1),
        *("--validation_images", photos / "0.png", photos / "1.png", "--resolution", 64, "--center_crop"),
        *("--random_flip", "--train_batch_size", 2, "--num_train_epochs", 3, "--max_train_steps", 4, "--scale_lr"),
        *("--gradient_accumulation_steps", 2, "--gradient_checkpointing", "--learning_rate", 1e-4),
        *("--discr_learning_rate", 1e-4, "--lr_scheduler", "cosine", "--discr_lr_scheduler", "constant"),
        *("--lr_warmup_steps", 0, "--allow_tf32", "--use_ema", "--ema_decay", 0.99, "--dataloader_num_workers", 0),
        *("--adam_beta1", 0.9, "--adam_beta2", 0.99, "--adam_weight_decay", 0, "--adam_epsilon", 1e-8),
        *("--max_grad_norm", 1, "--push_to_hub", "--hub_token", "t", "--hub_model_id", "a/b", "--logging_dir", "l"),
        *("--mixed_precision", "bf16", "--report_to", "wandb", "--checkpointing_steps", 5),
        *("--checkpoints_total_limit", 2, "--resume_from_checkpoint", "latest", "--tracker_project_name", "p"),
    )
    assert args.max_train_samples == 5 and args.image_column == "img" and len(args.validation_images) == 2


def test_upstream_layer_head_is_refused(refused):
    message = refused("--timm_model_layers", "head")
    assert message.startswith("--timm_model_layers") and "leave it out" in message


@pytest.mark.parametrize("flags", [["--resol", "64"], ["--max_train_step", "4"], ["--no_such_flag", "1"], ["stray"]])
def test_unknown_and_abbreviated_flags(refused, flags):
    """Red when allow_abbrev is True."""
    assert flags[0] in refused(*flags)


# ---- Ranges --------------------------------------------------------------------------------------------------------

POSITIVE = ["max_train_samples", "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "log_steps"]
POSITIVE += ["checkpoints_total_limit"]
COUNTS = ["dataloader_num_workers", "codebook_restart_steps", "lr_warmup_steps", "validation_steps", "seed"]
COUNTS += ["checkpointing_steps"]
WEIGHTS = ["pixel_weight", "perceptual_weight", "codebook_weight", "commitment_weight", "adversarial_weight"]
WEIGHTS += ["learning_rate", "discr_learning_rate", "adam_weight_decay", "max_grad_norm"]


@pytest.mark.parametrize(
    "flag, bad",
    [(flag, bad) for flag in POSITIVE for bad in ("0", "-1", "nan", "1.5", "many")]
    + [(flag, bad) for flag in COUNTS for bad in ("-1", "nan", "1.5")]
    + [(flag, bad) for flag in WEIGHTS for bad in ("-1", "nan", "inf", "much")]
    + [("resolution", bad) for bad in ("0", "-1", "nan", "64.5")]
    + [("num_train_epochs", bad) for bad in ("0", "-1", "nan", "inf")]
    + [("adam_epsilon", bad) for bad in ("0", "-1", "nan")]
    + [("ema_decay", bad) for bad in ("1.5", "-0.1", "nan")]
    + [(flag, bad) for flag in ("adam_beta1", "adam_beta2") for bad in ("2", "1", "-0.1", "nan")]
    + [
        (f, bad)
        for f in ("discriminator_start", "discriminator_warmup")
        for bad in ("1.5", "-3", "-0.1", "nan", "soon")
    ]
    + [("seed", str(2**32)), ("seed", str(10**30))],
)
def test_value_out_of_range(refused, flag, bad):
    """Red when `number` forgets isfinite (inf), the upper bound, or `value > above`."""
    message = refused(f"--{flag}", bad)
    assert f"--{flag}" in message and bad in message


@pytest.mark.parametrize(
    "flag, good",
    [(flag, 1) for flag in POSITIVE]
    + [(flag, 0) for flag in COUNTS]
    + [(flag, 0.0) for flag in WEIGHTS]
    + [("seed", 2**32 - 1), ("num_train_epochs", 0.5), ("ema_decay", 0.0), ("ema_decay", 1.0), ("adam_beta1", 0.0)],
)
def test_value_at_the_edge_is_taken(parse, flag, good):
    """Red when `low <=` becomes `low <` in `number`."""
    value = getattr(parse(f"--{flag}", good), flag)
    assert value == good and type(value) is type(good)


@pytest.mark.parametrize("flag", ["discriminator_start", "discriminator_warmup"])
@pytest.mark.parametrize(
    "text, value", [("20000", 20000), ("0", 0), ("1", 1), ("0.1", 0.1), ("1.0", 1.0), ("0.0", 0.0)]
)
def test_steps_or_fraction(parse, flag, text, value):
    """`1` is one step and `1.0` the whole run. Red when every text is read as a float."""
    got = getattr(parse(f"--{flag}", text), flag)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "flag",
    ["vae_loss", "pixel_range", "codebook_init", "codebook_norm", "lr_scheduler", "mixed_precision", "report_to"],
)
def test_unknown_choice_lists_the_choices(refused, flag):
    message = refused(f"--{flag}", "nonsense")
    assert f"--{flag}" in message and "nonsense" in message and "choose from" in message


# ---- Recipes -------------------------------------------------------------------------------------------------------


def recipe(tmp_path, text):
    (tmp_path / "x.args").write_text(text)
    return f"@{tmp_path / 'x.args'}"


def test_recipe_lines_and_comments(parse, tmp_path):
    """Red when comments=True is dropped, or a line is not split."""
    text = """# a comment; it's ignored, --seed 9 too
--resolution 64 --random_flip   # and so is this: --seed 8

--tracker_project_name 'two words'
    --timm_model_layers "0, 1" --seed=7
"""
    args = parse(recipe(tmp_path, text))
    assert (args.resolution, args.random_flip, args.seed) == (64, True, 7)
    assert (args.tracker_project_name, args.timm_model_layers) == ("two words", "0, 1")


def test_recipe_paths_are_relative_to_the_repository(parse, tmp_path):
    """From another working directory. Red when `convert_arg_line_to_args` returns the words as they are."""
    text = "--model_config_name_or_path configs/tiny_4x.json --validation_images images/bird.jpg images/dog.jpg\n"
    args = parse(recipe(tmp_path, text + f"--cache_dir {tmp_path / 'a/b'} --hub_model_id owner/name --push_to_hub"))
    assert args.model_config_name_or_path == str(REPOSITORY / "configs/tiny_4x.json")
    assert args.validation_images == [str(REPOSITORY / "images" / name) for name in ("bird.jpg", "dog.jpg")]
    assert args.cache_dir == str(tmp_path / "a/b") and args.hub_model_id == "owner/name"


def test_paths_outside_a_recipe_are_not(refused, tmp_path):
    assert not (tmp_path / "configs").exists()
    assert "configs/tiny_4x.json" in refused("--model_config_name_or_path", "configs/tiny_4x.json")


def test_recipe_path_after_an_equals_sign(parse, tmp_path):
    """Red when only whole words are taken for paths."""
    args = parse(recipe(tmp_path, "--model_config_name_or_path=configs/tiny_4x.json"))
    assert args.model_config_name_or_path == str(REPOSITORY / "configs/tiny_4x.json")


def test_missing_recipe(refused):
    assert "nowhere.args" in refused("@nowhere.args")


def test_recipe_with_an_open_quote(refused, tmp_path):
    """Red when shlex's ValueError gets through."""
    assert "quot" in refused(recipe(tmp_path, "--tracker_project_name 'open"))


def test_error_in_a_recipe_is_one_line(refused, tmp_path):
    assert "--resol" in refused(recipe(tmp_path, "--seed 1\n--resol 64\n"))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes").glob("*.args")), ids=lambda path: path.name)
def test_every_recipe_parses_and_later_flags_win(parse, path, tmp_path):
    """Red when a recipe names a flag or file that is gone."""
    alone = parse(f"@{path}")
    assert alone.resolution != 48
    args = parse(f"@{path}", "--resolution", 48, "--output_dir", tmp_path / "other")
    assert args.resolution == 48 and args.output_dir == str(tmp_path / "other")
    assert parse("--resolution", 48, f"@{path}").resolution == alone.resolution


# ---- Errors before anything is loaded ------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--resolution", "0"], ["--local_rank", "1"], ["--timm_model_layers", "head"]])
def test_other_ranks_fail_silently(parse, capsys, monkeypatch, flags):
    """One line per machine, not one per process. Red when `Parser.error` does not look at LOCAL_RANK."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stop:
        parse(*flags)
    assert stop.value.code == 2 and capsys.readouterr() == ("", "")


def test_other_ranks_fail_silently_after_the_flags(flags, capsys, monkeypatch, tmp_path):
    """An error found by `train`. Red when `main` does not look at LOCAL_RANK; on rank 0 the same run prints one line."""

    def fails(args):
        raise train_vqgan.UserError("--flag: wrong")

    monkeypatch.setattr(train_vqgan, "train", fails)
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert train_vqgan.main(flags) == 2
        assert capsys.readouterr().err.count("error") == lines


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--dataset_name", "a/b", "--train_data_dir", "."], ["--dataset_name", "--train_data_dir", "one"]),
        (["--streaming", "--max_train_steps", "5"], ["--streaming", "--dataset_name"]),
        (["--streaming", "--dataset_name", "a/b"], ["--streaming", "--max_train_steps"]),
        (
            ["--streaming", "--dataset_name", "a/b", "--max_train_steps", "5", "--max_train_samples", "5"],
            ["--streaming"],
        ),
        (["--train_data_dir", "no/folder"], ["--train_data_dir", "no/folder"]),
        (["--train_data_dir", "a-file"], ["--train_data_dir", "a-file"]),
        (["--validation_images", "a-file", "no.jpg"], ["--validation_images", "no.jpg"]),
        (["--model_config_name_or_path", "no.json"], ["--model_config_name_or_path", "no.json"]),
        (["--discriminator_config_name_or_path", "no.json"], ["--discriminator_config_name_or_path", "no.json"]),
        (["--model_config_name_or_path", "a", "--pretrained_model_name_or_path", "b"], ["--model_config_name_or_path"]),
        (["--hub_token", "hf_secret"], ["--push_to_hub"]),
        (["--hub_model_id", "a/b"], ["--push_to_hub"]),
        (["--codebook_init", "keep"], ["--codebook_init", "--pretrained_model_name_or_path"]),
        (["--output_dir", "a-file"], ["--output_dir", "a-file"]),
        (["--output_dir", "a-file/below"], ["--output_dir", "a-file/below"]),
    ],
    ids=lambda value: None if "--" in value[0] and len(value) > 2 else " ".join(value[:2]),
)
def test_what_cannot_work_is_refused(refused, tmp_path, flags, words):
    """Red when the check is left out of `check_args`."""
    (tmp_path / "a-file").touch()
    message = refused(*flags)
    assert all(word in message for word in words) and "hf_secret" not in message


@pytest.mark.parametrize("flag", ["--codebook_init=sphere", "--codebook_norm=l2", "--codebook_restart_steps=9"])
def test_codebook_stays_while_the_decoder_alone_is_trained(parse, refused, tmp_path, flag):
    """Red when the flag is left out of the check: codes would not mean what they did."""
    start = ["--pretrained_model_name_or_path", str(tmp_path), "--train_only", "decoder"]
    parse(*start)
    message = refused(*start, flag)
    assert "--train_only" in message and flag.split("=")[0] in message


def test_8bit_adam_without_bitsandbytes(refused, monkeypatch):
    """Red when the check is left out of `check_args`."""
    find = train_vqgan.importlib.util.find_spec
    monkeypatch.setattr(
        train_vqgan.importlib.util, "find_spec", lambda n, *a: n != "bitsandbytes" and find(n, *a) or None
    )
    message = refused("--use_8bit_adam")
    assert "--use_8bit_adam" in message and "pip install bitsandbytes" in message


@pytest.mark.parametrize("trace", ["checkpoint-5/progress.json", "metrics.jsonl"])
def test_output_dir_that_holds_a_run(parse, refused, tmp_path, trace):
    """Without --resume_from_checkpoint nothing is overwritten. Red when the check is left out of `check_args`."""
    (tmp_path / "run" / trace).parent.mkdir(parents=True)
    (tmp_path / "run" / trace).write_text("{}")
    message = refused()
    assert "--output_dir" in message and "--resume_from_checkpoint latest" in message
    parse("--resume_from_checkpoint", "latest")


def test_output_dir_with_something_else_in_it(parse, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    parse()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["notes.txt"], "the probe was left behind"


def test_resume_from_something_that_is_no_finished_checkpoint(parse, refused, tmp_path):
    """Red when `damage` looks only at the name, or only at the manifest."""
    for name in ("checkpoint-10", "unfinished-checkpoint-20", "checkpoint-x", "checkpoint-7"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "progress.json").write_text('{"files": {}}')
    (tmp_path / "run/checkpoint-7/progress.json").unlink()
    for name in ("run/checkpoint-7", "run/unfinished-checkpoint-20", "run/checkpoint-x", "run/checkpoint-99", "newest"):
        message = refused("--resume_from_checkpoint", tmp_path / name)
        assert "--resume_from_checkpoint" in message and "is not a finished checkpoint" in message
        assert message.endswith(f"found: {tmp_path / 'run/checkpoint-7'}, {tmp_path / 'run/checkpoint-10'}")
    assert parse("--resume_from_checkpoint", tmp_path / "run/checkpoint-10").resume_from_checkpoint


# ---- Defaults ------------------------------------------------------------------------------------------------------

DESIGN = {  # section 4 of the design; from published runs
    "vae_loss": "l2",
    "pixel_weight": 1.0,
    "perceptual_weight": 1.0,
    "codebook_weight": 1.0,
    "commitment_weight": 0.25,
    "adversarial_weight": 0.1,
    "discriminator_start": None,  # 10 %, at most 20,000
    "discriminator_warmup": 0.02,
    "timm_model_backend": "vgg19",
    "timm_model_layers": None,
    "timm_model_weights": "hub",
    "codebook_init": "sphere",
    "codebook_norm": "l2",
    "learning_rate": 1e-4,
    "discr_learning_rate": 1e-4,
    "lr_scheduler": "constant_with_warmup",
    "discr_lr_scheduler": "constant_with_warmup",
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "adam_weight_decay": 1e-4,
    "max_grad_norm": 1.0,
    "use_ema": False,
    "ema_decay": 0.999,
    "pixel_range": "signed",
    "seed": None,
}


def test_defaults_of_the_design(parse):
    """A default changes with a measurement at 128 px or more, and this table with it."""
    args = vars(parse())
    assert {name: args[name] for name in DESIGN} == DESIGN


def test_defaults_that_depend_on_a_pretrained_model(parse):
    """What a trained model brings is kept. Red when `pretrained` is taken for False."""
    names = ("codebook_init", "codebook_norm", "codebook_restart_steps")
    values = [getattr(parse(), name) for name in names]
    pretrained = [getattr(parse("--pretrained_model_name_or_path", "a/b"), name) for name in names]
    assert values == ["sphere", "l2", 100] and pretrained == ["keep", "none", 0]
    asked = ("--codebook_init", "sphere", "--codebook_norm", "l2", "--codebook_restart_steps", "7")
    args = parse("--pretrained_model_name_or_path", "a/b", *asked)
    assert [getattr(args, name) for name in names] == ["sphere", "l2", 7]
    assert parse("--codebook_restart_steps", "0").codebook_restart_steps == 0, "0 is a choice, not a missing value"


# ---- Settled from data and processes -------------------------------------------------------------------------------


def settle(args, images=7, processes=1):
    train_vqgan.settle_flags(SimpleNamespace(num_processes=processes), list(range(images)), args)
    return args


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
def test_steps_from_epochs(parse, images, epochs, batch, accumulation, processes, steps):
    """Red when the division is by micro-batches instead of steps, or rounds down, or rounds every epoch up."""
    seen = steps * batch * accumulation * processes
    assert seen >= images * epochs > seen - batch * accumulation * processes, "the expectation itself"
    flags = ("--num_train_epochs", epochs, "--train_batch_size", batch, "--gradient_accumulation_steps", accumulation)
    assert settle(parse(*flags), images, processes).max_train_steps == steps


def test_steps_given_win_over_epochs(parse):
    assert settle(parse("--max_train_steps", 11, "--num_train_epochs", 3)).max_train_steps == 11


@pytest.mark.parametrize("batch, accumulation, processes", [(2, 1, 1), (2, 3, 1), (1, 1, 4), (2, 3, 4)])
def test_scale_lr(parse, batch, accumulation, processes):
    """Red when a factor of the product is left out, or only the generator's rate is scaled."""
    flags = ("--train_batch_size", batch, "--gradient_accumulation_steps", accumulation)
    flags += ("--learning_rate", "1e-4", "--discr_learning_rate", "3e-4")
    plain, scaled = settle(parse(*flags), 7, processes), settle(parse(*flags, "--scale_lr"), 7, processes)
    assert (plain.learning_rate, plain.discr_learning_rate) == (1e-4, 3e-4)
    assert math.isclose(scaled.learning_rate, 1e-4 * batch * accumulation * processes)
    assert math.isclose(scaled.discr_learning_rate, 3e-4 * batch * accumulation * processes)


def test_scale_lr_reaches_the_optimisers(train):
    """Upstream computes the scaled rates after its optimisers are built. Red when `settle_flags` runs after training."""
    flags = ("--gradient_accumulation_steps", "3", "--lr_scheduler", "constant", "--discr_lr_scheduler", "constant")
    flags += ("--learning_rate", "1e-5", "--discr_learning_rate", "3e-5", "--discriminator_start", "0")
    output = train(*flags, "--log_steps", "1", "--max_train_steps", "1", "--checkpointing_steps", "0", "--scale_lr")
    line = metrics(output)[0]
    assert math.isclose(line["opt/lr"], 6e-5) and math.isclose(line["opt/discriminator_lr"], 18e-5)


@pytest.mark.parametrize(
    "flags, steps, start, warmup",
    [
        ([], 1000, 100, 20),
        ([], 200_000, 20_000, 4000),
        ([], 1_000_000, 20_000, 20_000),  # 10 %, but at most 20,000 steps
        ([], 5, 0, 0),
        (["--discriminator_start", "0.3"], 1_000_000, 300_000, 20_000),  # the bound is on the default only
        (["--discriminator_start", "0.6", "--discriminator_warmup", "0.5"], 1000, 600, 500),
        (["--discriminator_start", "30000", "--discriminator_warmup", "7"], 1000, 30_000, 7),
        (["--discriminator_start", "1", "--discriminator_warmup", "1"], 1000, 1, 1),  # one step
        (["--discriminator_start", "1.0", "--discriminator_warmup", "1.0"], 1000, 1000, 1000),  # the whole run
        (["--discriminator_start", "0"], 1000, 0, 20),
    ],
)
def test_fractions_of_the_run(parse, flags, steps, start, warmup):
    """Red when min(..., 20000) is dropped or moved to given values, or whole numbers are multiplied too."""
    args = settle(parse("--max_train_steps", steps, *flags))
    assert (args.discriminator_start, args.discriminator_warmup) == (start, warmup)
    assert type(args.discriminator_start) is type(args.discriminator_warmup) is int


def test_fractions_of_a_run_given_in_epochs(parse):
    """Red when the fractions are taken before the steps are known."""
    args = settle(parse("--num_train_epochs", 10, "--train_batch_size", 1, "--discriminator_start", 0.5), images=20)
    assert (args.max_train_steps, args.discriminator_start, args.discriminator_warmup) == (200, 100, 4)


# ---- For trackers --------------------------------------------------------------------------------------------------


def test_public_config(parse, photos):
    """No secrets, and only what TensorBoard takes. Red when "token" is not filtered, or lists and None pass through."""
    images = [str(photos / "0.png"), str(photos / "1.png")]
    args = parse("--push_to_hub", "--hub_token", "hf_secret", "--validation_images", *images, "--seed", 0)
    assert args.hub_token == "hf_secret" and args.cache_dir is None
    config = train_vqgan.public_config(args)
    assert not [name for name in config if "token" in name] and "hf_secret" not in repr(config)
    assert {type(value) for value in config.values()} <= {int, float, str, bool}
    assert all(path in config["validation_images"] for path in images)
    assert config["seed"] == 0 and config["use_ema"] is False and config["learning_rate"] == 1e-4


@pytest.mark.parametrize("flag, matmul", [([], "high"), (["--no-allow_tf32"], "highest")])
def test_tf32_is_the_networks_alone(flags, monkeypatch, flag, matmul):
    """On an NVIDIA GPU: as the flag says in training, never in exact_fp32, even when that raises."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    args = train_vqgan.parse_args([*flags, *flag])
    accelerator = train_vqgan.Accelerator
    monkeypatch.setattr(accelerator, "device", property(lambda self: torch.device("cuda")))
    try:
        train_vqgan.start_accelerator(args)
        during = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        assert during == (matmul, matmul == "high")
        with pytest.raises(ZeroDivisionError), train_vqgan.exact_fp32():
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
            raise ZeroDivisionError
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == during
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[1:]
