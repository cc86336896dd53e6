"""Flags: what is refused and with which words, what needs or excludes another, and defaults."""

import os
import tomllib

import pytest
import torch
from conftest import REPOSITORY

import train_vqgan
from train_vqgan import EXCLUDES, NEEDS


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


@pytest.mark.parametrize("flags", [["--resol", "64"], ["--max_train_step", "4"], ["--no_such_flag", "1"], ["stray"]])
def test_unknown_and_abbreviated_flags(refused, flags):
    """Red when allow_abbrev is True."""
    assert flags[0] in refused(*flags)


# ---- Ranges --------------------------------------------------------------------------------------------------------

POSITIVE = ["max_train_samples", "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "log_steps"]
POSITIVE += ["checkpoints_total_limit"]
COUNTS = ["dataloader_num_workers", "codebook_restart_steps", "lr_warmup_steps", "validation_steps", "seed"]
COUNTS += ["checkpointing_steps", "shuffle_buffer", "shuffle_buffer_mb"]
WEIGHTS = ["pixel_weight", "perceptual_weight", "codebook_weight", "commitment_weight", "adversarial_weight"]
WEIGHTS += ["learning_rate", "discr_learning_rate", "adam_weight_decay", "max_grad_norm"]


@pytest.mark.parametrize(
    "flag, bad",
    [(flag, bad) for flag in POSITIVE for bad in ("0", "-1", "nan", "1.5", "many")]
    + [(flag, bad) for flag in COUNTS for bad in ("-1", "nan", "1.5")]
    + [(flag, bad) for flag in WEIGHTS for bad in ("-1", "nan", "inf", "much")]
    + [("resolution", bad) for bad in ("0", "-1", "nan", "64.5")]
    + [("push_every", bad) for bad in ("0", "-1", "1.5")]
    + [("num_train_epochs", bad) for bad in ("0", "-1", "nan", "inf")]
    + [("adam_epsilon", bad) for bad in ("0", "-1", "nan")]
    + [("ema_decay", bad) for bad in ("1.5", "-0.1", "nan")]
    + [(flag, bad) for flag in ("adam_beta1", "adam_beta2") for bad in ("2", "1", "-0.1", "nan")]
    + [(f"discriminator_{when}", bad) for when in ("start", "warmup") for bad in ("1.5", "-3", "-0.1", "nan", "soon")]
    + [("seed", str(2**32)), ("seed", str(10**30))],
)
def test_value_out_of_range(refused, flag, bad):
    """Red when `number` forgets isfinite (inf), or either bound."""
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


# ---- Errors before anything is loaded ------------------------------------------------------------------------------


def test_other_ranks_fail_silently(parse, flags, capsys, monkeypatch):
    """One line per machine, not one per process. Red when `Parser.error`, or `main`, does not look at LOCAL_RANK."""

    def fails(args):
        raise train_vqgan.UserError("--flag: wrong")

    monkeypatch.setattr(train_vqgan, "train", fails)
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        for wrong in (["--resolution", "0"], ["--local_rank", "1"], ["--streaming"]):
            with pytest.raises(SystemExit) as stop:
                train_vqgan.parse_args(wrong)
            assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == lines
        assert train_vqgan.main(flags) == 2
        assert capsys.readouterr().err.count("error") == lines


def test_verbose_shows_where_an_error_came_from(error, flags, capsys, tmp_path):
    """Without it there is one line. Red when the cause is lost on the way, or always printed."""
    (tmp_path / "bad.json").write_text("{,}")
    wrong = ["--model_config_name_or_path", str(tmp_path / "bad.json")]
    assert train_vqgan.main([*flags, *wrong]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert train_vqgan.main([*flags, *wrong, "--verbose"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and "JSONDecodeError" in said
    assert said.splitlines()[-1].startswith("train_vqgan.py: error: --model_config_name_or_path: ")


def test_error_of_the_program_is_no_error_line(flags, monkeypatch):
    """Red when `main` takes every exception for something that the user can mend."""
    monkeypatch.setattr(train_vqgan, "train", lambda args: {}["missing"])
    with pytest.raises(KeyError):
        train_vqgan.main(flags)


PATHS = {
    "--train_data_dir": ["no/folder", "a-file", ""],
    "--validation_data_dir": ["no/folder", "a-file", ""],
    "--validation_images": ["no.jpg", "."],
    "--fid_weights": ["no.pth", "."],
    "--model_config_name_or_path": ["no.json"],
    "--discriminator_config_name_or_path": ["no.json"],
    "--pretrained_model_name_or_path": ["a-file"],
    "--pretrained_discriminator_name_or_path": ["a-file"],
}


@pytest.mark.parametrize("flag, path", [(flag, path) for flag in PATHS for path in PATHS[flag]])
def test_path_that_is_not_there(refused, tmp_path, flag, path):
    """Red when the flag has no `accepted` type, or another one, or a file of weights gets no hint."""
    (tmp_path / "a-file").touch()
    message = refused(flag, path)
    kind = "folder" if flag.endswith("_dir") else "file"
    expected = f"{path} is a single file" if "pretrained" in flag else f"no such {kind}: {path}"
    expected = {"": "is empty", "a-file": f"{path} is a "}.get(path, expected)
    assert message.startswith(f"argument {flag}: {expected}")
    assert ("scripts/convert_to_diffusers.py makes" in message) == ("pretrained" in flag and path == "a-file")


@pytest.mark.parametrize(
    "flag, value",
    [
        *[(flag, name) for flag in PATHS if "name_or_path" in flag for name in ("owner/name", "a-folder")],
        *[(flag, "a.json") for flag in PATHS if "config" in flag],
        *[(flag, "a-folder") for flag in PATHS if "_dir" in flag],
        *[(flag, "a.json") for flag in ("--validation_images", "--timm_model_weights")],
    ],
)
def test_path_that_is_there(parse, tmp_path, flag, value):
    """Red when a type refuses Hub ids, or configs that are directories."""
    (tmp_path / "a-folder").mkdir()
    (tmp_path / "a.json").touch()
    found = getattr(parse(flag, value), flag[2:])
    assert found == ([value] if flag == "--validation_images" else value)


def test_upstream_layer_head_is_refused(refused):
    message = refused("--timm_model_layers", "head")
    assert "--timm_model_layers" in message and "leave it out" in message


@pytest.mark.parametrize("low, high", [(1, 0), (5, 5), ("nan", 1), (0, "inf"), ("low", 1)])
def test_value_range_that_is_none(refused, low, high):
    """Red when equal ends are taken, which would divide by zero, or ends that are not finite."""
    assert "--value_range" in refused("--value_range", low, high)


# ---- Flags that need or exclude each other -------------------------------------------------------------------------


def given(name, photos):
    """The flag with a value, and what else it needs."""
    values = {"validation_fraction": "0.5", "max_train_samples": "5", "train_only": "decoder", "push_every": "2"}
    values |= {
        "shuffle_buffer": "7",
        "train_data_dir": str(photos),
        "validation_data_dir": str(photos),
        "fid_weights": str(photos / "0.png"),
    }
    words = [f"--{name}"]
    if name not in ("streaming", "push_to_hub", "hub_private", "fid", "eval_only"):
        words.append(values.get(name, "owner/name"))
    words += {"streaming": ["--max_train_steps", "5"], "eval_only": ["--seed", "0"]}.get(name, [])
    return words + [word for needed, names in NEEDS.items() if name in names for word in given(needed, photos)]


@pytest.mark.parametrize("needed, name", [(needed, name) for needed, names in NEEDS.items() for name in names])
def test_flag_that_needs_another(parse, refused, photos, needed, name):
    """Red when `check_args` leaves a row out, or the message repeats the flag's value, which may be a token."""
    words = given(name, photos)
    parse(*words)
    own = words[: len(words) - len(given(needed, photos))]
    assert refused(*own) == f"--{name}: needs --{needed}"


@pytest.mark.parametrize("name, other, why", EXCLUDES, ids=lambda value: value.split(":")[0])
def test_flags_that_exclude_each_other(parse, refused, photos, name, other, why):
    """Red when `check_args` leaves a row out, or refuses one of them alone."""
    for alone in (name, other):
        assert getattr(parse(*given(alone, photos)), alone)
    assert refused(*given(name, photos), *given(other, photos)) == f"--{name} and --{other}: give one of them{why}"


@pytest.mark.parametrize("flag", ["validation_data_dir", "validation_split", "streaming"])
def test_no_part_of_the_training_images_is_held_out(parse, photos, flag):
    """0 is no choice of a fraction, and the default where held-out images are given. Red when it counts as one."""
    assert parse(*given(flag, photos)).validation_fraction == 0
    assert parse(*given(flag, photos), "--validation_fraction", 0).validation_fraction == 0
    assert parse().validation_fraction == 0.01 and parse("--validation_fraction", 0).validation_fraction == 0


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--streaming", "--dataset_name", "a/b"], ["--streaming", "--max_train_steps"]),
        (["--codebook_init", "keep"], ["--codebook_init", "--pretrained_model_name_or_path"]),
        (["--short_side", "64", "--resolution", "128"], ["--short_side", "64", "--resolution", "128"]),
        (["--random_scale", "0.9", "1.25"], ["--random_scale", "0.9 times", "--resolution", "256"]),
        (["--random_scale", "2", "1"], ["--random_scale", "got 2 1"]),
        (["--push_to_hub", "--push_every", "2", "--checkpointing_steps", "0"], ["--push_every: needs --checkpointing"]),
    ],
)
def test_what_cannot_work_is_refused(refused, flags, words):
    """Red when the check is left out of `check_args`."""
    message = refused(*flags)
    assert all(word in message for word in words)


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
    without = lambda name, *more: None if name == "bitsandbytes" else find(name, *more)  # noqa: E731
    monkeypatch.setattr(train_vqgan.importlib.util, "find_spec", without)
    message = refused("--use_8bit_adam")
    assert "--use_8bit_adam" in message and "pip install bitsandbytes" in message


# ---- The output directory ------------------------------------------------------------------------------------------


def test_parsing_writes_nothing(parse, tmp_path, photos):
    """Red when a check of `parse_args` makes output_dir or tries to write there."""
    parse("--train_data_dir", photos, "--resume_from_checkpoint", "latest", "--push_to_hub", "--fid")
    parse("--output_dir", "/proc/no/such/place")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["a-file", "a-file/below"])
def test_output_dir_that_cannot_be_made(error, tmp_path, output):
    """Red when the check is left out of `claimed_output_dir`."""
    (tmp_path / "a-file").touch()
    message = error("--output_dir", str(tmp_path / output))
    assert f"--output_dir: cannot write to {tmp_path / output}" in message


@pytest.mark.parametrize(
    "trace, said",
    [
        ("checkpoint-5/progress.json", "already holds a run; --resume_from_checkpoint latest goes on with it"),
        ("metrics.jsonl", "holds results of a run, but no checkpoint to go on from; move it away"),
    ],
)
def test_output_dir_that_holds_a_run(flags, tmp_path, capsys, trace, said):
    """Without --resume_from_checkpoint nothing is overwritten. Red when the check is left out of `find_checkpoint`."""
    (tmp_path / "run" / trace).parent.mkdir(parents=True)
    (tmp_path / "run" / trace).write_text('{"step": 1}')
    assert train_vqgan.main(flags) == 2
    errors = capsys.readouterr().err
    assert errors.count("error:") == 1 and f"--output_dir: {tmp_path / 'run'} {said}" in errors
    assert {path.name for path in (tmp_path / "run").iterdir()} == {trace.split("/")[0]}, "a trace was left"


@pytest.mark.parametrize("name", ["metrics.jsonl/", "README.md/", "discriminator", "image_processor"])
def test_output_dir_where_a_name_is_taken(error, tmp_path, name):
    """A folder in a file's place, or a file in a folder's: said before anything is trained, and left as it is.

    Red when the name is left out of `claimed_output_dir`.
    """
    taken = tmp_path / "taken" / name
    taken.parent.mkdir()
    taken.mkdir() if name.endswith("/") else taken.touch()
    message = error("--output_dir", str(tmp_path / "taken"))
    assert f"--output_dir: {tmp_path / 'taken'} holds another {taken.name}; choose another directory" in message
    assert [path.name for path in (tmp_path / "taken").iterdir()] == [taken.name]


def test_output_dir_with_something_else_in_it(train, tmp_path):
    """Notes of the user's own are no run, and stay."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    train("--max_train_steps", "1", "--checkpointing_steps", "0")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"notes.txt", "metrics.jsonl", "vqmodel", "discriminator", "image_processor", "README.md"}
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_resume_from_something_that_is_no_whole_checkpoint(parse, tmp_path):
    """Red when `find_fault` looks only at the name, or only at the manifest, or the format is not compared."""
    for name in ("checkpoint-10", "checkpoint-9", "unfinished-checkpoint-20", "checkpoint-x", "checkpoint-7"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "progress.json").write_text('{"files": {}, "format": 3}')
    (tmp_path / "run/checkpoint-7/progress.json").unlink()
    (tmp_path / "run/checkpoint-9/progress.json").write_text('{"files": {}, "format": 1}')

    def found(name):
        return train_vqgan.find_checkpoint(parse("--resume_from_checkpoint", tmp_path / name))

    whole = [str(tmp_path / "run" / name) for name in ("checkpoint-7", "checkpoint-9", "checkpoint-10")]
    for name in ("run/checkpoint-7", "run/unfinished-checkpoint-20", "run/checkpoint-x", "run/checkpoint-99", "newest"):
        with pytest.raises(train_vqgan.UserError) as caught:
            found(name)
        assert str(caught.value).startswith(f"--resume_from_checkpoint: {tmp_path / name} is no whole checkpoint")
        assert str(caught.value).endswith(f"found: {', '.join(whole)}")
    with pytest.raises(train_vqgan.UserError, match="checkpoint-9 is of another version"):
        found("run/checkpoint-9")
    assert found("run/checkpoint-10") == (tmp_path / "run/checkpoint-10", {"files": {}, "format": 3})


def test_fixed_flags():
    """What decides which pixels sample g has, and what is trained. Red when a mark is taken from the table."""
    parser = train_vqgan.build_parser()
    groups = {group.title: {action.dest for action in group._group_actions} for group in parser._action_groups}
    told_by_its_files = {"dataset_name", "dataset_config_name", "train_data_dir"}
    free = {"cache_dir", "dataloader_num_workers", "max_bad_fraction", "shuffle_buffer", "shuffle_buffer_mb"}
    data = groups["data"] - told_by_its_files - free
    others = {"train_only", "codebook_norm", "use_8bit_adam", "seed", "validation_fraction"}
    assert set(parser.fixed_flags()) == data | others


# ---- Defaults ------------------------------------------------------------------------------------------------------

DESIGN = {  # from published runs
    "vae_loss": "l2",
    "pixel_weight": 1.0,
    "perceptual_weight": 1.0,
    "codebook_weight": 1.0,
    "commitment_weight": 0.25,
    "adversarial_weight": None,  # of the discriminator's config, 0.1 unless that says otherwise
    "discriminator_start": None,  # 10 %, at most 20,000
    "discriminator_warmup": None,  # 2 %, at least as long as its learning rate warms up
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


# ---- On a GPU ------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_cuda(monkeypatch):
    """start_accelerator believes in a GPU; afterwards the switches of precision are as they were."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    monkeypatch.setattr(train_vqgan.Accelerator, "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    yield
    torch.backends.fp32_precision = torch.backends.cudnn.fp32_precision = "none"
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[1:]


def precision():
    """Of products and convolutions, and whether kernels are tried out; the old switches raise where the new differ."""
    assert torch.backends.cudnn.allow_tf32 == (torch.backends.cudnn.conv.fp32_precision == "tf32")
    assert torch.backends.cuda.matmul.allow_tf32 == (torch.backends.cuda.matmul.fp32_precision == "tf32")
    kinds = torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision
    return *kinds, torch.backends.cudnn.benchmark


@pytest.mark.parametrize("everywhere", ["none", "tf32", "ieee"])
@pytest.mark.parametrize("flag, trained", [([], ("high", "tf32")), (["--no-allow_tf32"], ("highest", "ieee"))])
def test_tf32_is_the_networks_alone(flags, on_cuda, flag, trained, everywhere):
    """On an NVIDIA GPU: as the flag says in training, never in exact_fp32, even when that raises, whatever the process
    has set for all of torch.

    Red when either place leaves cudnn.fp32_precision as it is, and when kernels are tried out in exact_fp32.
    """
    torch.backends.fp32_precision = everywhere
    train_vqgan.start_accelerator(train_vqgan.parse_args([*flags, *flag]))
    assert precision() == (*trained, True)
    with pytest.raises(ZeroDivisionError), train_vqgan.exact_fp32():
        assert precision() == ("highest", "ieee", False)
        raise ZeroDivisionError
    assert precision() == (*trained, True)


@pytest.mark.parametrize("kind, said", [("no", False), ("fp16", False), ("bf16", True)])
def test_gpu_that_only_emulates_bf16(flags, on_cuda, caplog, kind, said):
    """Red without the warning, and when it asks whether bf16 works at all."""
    train_vqgan.start_accelerator(train_vqgan.parse_args([*flags, "--mixed_precision", kind]))
    assert any("use fp16" in record.message for record in caplog.records) == said


@pytest.mark.parametrize("kind", ["pipe", "byte order mark"])
def test_recipe_from_elsewhere(tmp_path, kind):
    """Red when the recipe is read twice, of which a pipe gives nothing, or when an editor's mark is part of a flag."""
    recipe = b"--max_train_steps 3 --train_batch_size 4\n"
    (tmp_path / "r.args").write_bytes(b"\xef\xbb\xbf" + recipe)
    path, (read, write) = tmp_path / "r.args", os.pipe()
    if kind == "pipe":
        os.write(write, recipe)
        path = f"/dev/fd/{read}"
    os.close(write)
    args = train_vqgan.parse_args([f"@{path}"])
    os.close(read)
    assert (args.max_train_steps, args.train_batch_size) == (3, 4)


@pytest.mark.parametrize("content", [b"--seed 1  # caf\xe9\n", b"@SELF\n"])
def test_recipe_that_cannot_be_read(refused, tmp_path, content):
    """Red when UnicodeDecodeError or RecursionError gets through."""
    path = tmp_path / "r.args"
    path.write_bytes(content.replace(b"SELF", str(path).encode()))
    assert "recipe" in refused(f"@{path}")


@pytest.mark.parametrize(
    "flag", ["--dataset_name", "--output_dir", "--cache_dir", "--timm_model_weights", "--hub_token"]
)
@pytest.mark.parametrize("value", ["", " "])
def test_empty_value(refused, flag, value):
    """--train_data_dir "$UNSET" trained on the bundled photographs. Red when a flag of text has no type."""
    assert f"argument {flag}: is empty" in refused(flag, value)


@pytest.mark.parametrize("flag", ["--train_data_dir", "--output_dir", "--timm_model_weights"])
def test_home_directory(monkeypatch, tmp_path, flag):
    """Also after `=`, where no shell expands it. Red when the value is taken as it is."""
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    args = train_vqgan.parse_args([f"{flag}=~/data"])
    assert getattr(args, flag.removeprefix("--")) == str(tmp_path / "data")


def test_uv_installs_what_pip_does():
    """Red when a requirement is changed in one place only."""
    lines = (REPOSITORY / "train_vqgan.py").read_text().splitlines()
    block = lines[lines.index("# /// script") + 1 : lines.index("# ///")]
    metadata = tomllib.loads("\n".join(line.removeprefix("#") for line in block))
    requirements, _, rest = (REPOSITORY / "requirements.txt").read_text().partition("# tests only")
    wanted = [line.partition("#")[0].strip() for line in requirements.splitlines()]
    assert rest and metadata["dependencies"] == [line for line in wanted if line]
    assert metadata["requires-python"] == ">=3.11"  # of hashlib.file_digest
