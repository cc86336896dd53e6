"""The README and docs: their commands parse, their JSON is JSON, their links lead somewhere, their flags exist."""

import re
import shlex

import pytest
from conftest import REPOSITORY

import train_vqgan

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if "train_vqgan.py" in line
]


def test_there_are_commands():
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, monkeypatch, photos):
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(command, comments=True)
    argv = words[words.index("train_vqgan.py") + 1 :]
    train_vqgan.parse_args([word.replace("path/to/photos", str(photos)) for word in argv])


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
        assert re.search(rf"`{re.escape(stem)}(_\d+)?\.jpg`", text), path.name


def test_resume_table_is_that_of_the_flags():
    """The row of what resuming refuses names the fixed flags and no other. Red when a mark is set or lost."""
    fixed = {f"--{name}" for name in train_vqgan.build_parser().fixed_flags()}
    rows = dict(re.findall(r"^\| (may change|refuses)[^|]*\|(.*)\|$", TEXT, re.M))
    rows = {name: set(re.findall(r"`(--\w+)`", row)) for name, row in rows.items()}
    assert rows["refuses"] == fixed and not rows["may change"] & fixed
