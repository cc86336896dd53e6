"""scripts/report.py: the page, as a browser shows it."""

import html
import importlib.util
import json
import re
import shutil
import subprocess

import numpy as np
import PIL.Image
import pytest
from conftest import REPOSITORY

import train_vqgan

spec = importlib.util.spec_from_file_location("report", REPOSITORY / "scripts" / "report.py")
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)
RED, BLUE, GREEN = (220, 10, 10), (10, 10, 220), (10, 220, 10)


@pytest.fixture
def run(train, photos):
    """The output directory of a run with two validations."""
    images = ["--validation_images", str(photos / "0.png"), str(photos / "3.png"), "--validation_fraction", "0.3"]
    more = ["--learning_rate", "0.002", "--no-gradient_checkpointing"]
    return train(*images, "--validation_steps", "1", "--log_steps", "1", *more)


def made(*arguments):
    """The page that the script writes."""
    assert report.main([*map(str, arguments)]) == 0
    arguments = [*map(str, arguments)]
    at = arguments.index("--output") if "--output" in arguments else None
    return (report.Path(arguments[at + 1]) if at else report.Path(arguments[0]) / "report.html").read_text()


def test_page_of_one_run(run):
    """Everything is in it, and nothing comes from elsewhere. Red when a section or the protocol is left out."""
    page = made(run)
    assert not re.search(r"""(src|href)=|https?://|@import|url\((?!data:)""", page)
    assert page.count("data:image/png;base64,") == 2 and page.count("<figure") == 4
    assert "0.png, " in page and "3.png, " in page and ">step 1<" in page and ">step 2<" in page
    lines = train_vqgan.read_metrics(report.SimpleNamespace(output_dir=run))
    held_out = next(line for line in reversed(lines) if "protocol" in line)
    assert held_out["step"] == 2
    for name, value in held_out.items():
        if name.startswith("val/"):
            assert f"<td>{name}</td><td>{value:.5g}</td>" in page, name
    assert f"<td>crop</td><td>{held_out['protocol']['crop']}</td>" in page
    assert "<td>vqmodel num_vq_embeddings</td><td>32</td>" in page and "<td>learning_rate</td><td>0.002</td>" in page
    drawn = {line.split(", ")[0].split(";")[0] for line in re.findall(r'text-anchor="start">([^<]*)<', page)}
    assert {"loss/pixel", "codebook/used", "codebook/perplexity", "opt/grad_norm", "val/psnr_n2"} <= drawn
    assert "<pre>accelerate launch " in page


def test_the_last_validations_are_shown(run, capsys):
    """The newest first. Red when one alone is the first of all, or their order is that of time."""
    assert re.findall(r"<summary>step (\d+)<", made(run)) == ["2", "1"]
    assert re.findall(r"<summary>step (\d+)<", made(run, "--validations", 1)) == ["2"]
    with pytest.raises(SystemExit):
        report.main([str(run), "--validations", "0"])
    assert "argument --validations: must be" in capsys.readouterr().err


def test_command_is_that_of_the_card(run):
    """Red when it is not read, or not escaped."""
    card = run / "README.md"
    card.write_text(card.read_text().replace("--learning_rate 0.002", "--learning_rate 0.002 --hub_model_id '<a> & b'"))
    (command,) = re.findall(r"<pre>(.*?)</pre>", made(run), re.S)
    assert "&lt;a&gt; &amp; b" in command, "nothing to escape, or not escaped"
    assert f"```bash\n{html.unescape(command)}\n```" in (run / "README.md").read_text()
    assert "--no-gradient_checkpointing" in command and "--learning_rate 0.002" in command


def test_two_runs_side_by_side(run, tmp_path):
    """Rows that differ are marked, others are not; both are in each chart. Red when rows are compared by key only."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    for path in (other / "README.md", other / "vqmodel" / "config.json"):
        text = path.read_text()
        assert "learning_rate: 0.002" in text or '"act_fn": "silu"' in text
        path.write_text(text.replace("learning_rate: 0.002", "learning_rate: 0.05").replace('"silu"', '"relu"'))
    page = made(run, other, "--output", tmp_path / "both.html")
    marked = re.findall(r'<tr><td class="differs">(.*?)</td>', page)
    assert {"vqmodel act_fn", "learning_rate"} <= set(marked) and "vqmodel in_channels" not in marked
    assert not [name for name in marked if name.startswith("val/")]
    svgs = re.findall(r"<svg.*?</svg>", page, re.S)
    assert svgs and all(set(report.COLOURS[:2]) <= set(re.findall(r'stroke="(#\w+)"', svg)) for svg in svgs)


def test_names_are_escaped(run, tmp_path):
    """The run's, and those of its images. Red without one of the escape()."""
    odd = tmp_path / "<b>odd & run"
    shutil.copytree(run, odd)
    text = (odd / "README.md").read_text()
    (odd / "README.md").write_text(text.replace(" 0.png", " <b>0.png"))
    page = made(odd)
    assert "<b>" not in page and "&lt;b&gt;odd &amp; run" in page
    assert page.count("&lt;b&gt;0.png") == 4, "under two pictures, in the table of flags, in the command"


def test_unfinished_and_bare_runs(run):
    """Without the final export the newest checkpoint's; numbers that are no numbers and a cut line are passed over.

    Red when the oldest checkpoint is taken, or numbers are drawn that are not finite.
    """
    (newest,) = train_vqgan.checkpoints(run)
    shutil.copytree(newest, run / "checkpoint-1")
    older = run / "checkpoint-1" / "vqmodel" / "config.json"
    assert '"num_vq_embeddings": 32' in older.read_text() and newest.name == "checkpoint-2"
    older.write_text(older.read_text().replace('"num_vq_embeddings": 32', '"num_vq_embeddings": 31'))
    for name in ("vqmodel", "discriminator"):
        shutil.rmtree(run / name)
    shutil.rmtree(run / "validation")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss/pixel": NaN, "loss/perceptual": Infinity}\n{"step": 4, "loss/pi')
    page = made(run)
    assert "No --validation_images." in page and "<td>vqmodel num_vq_embeddings</td><td>32</td>" in page
    assert "nan" not in re.sub("base64,[^)]*", "", page) and "loss/pixel" in page


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_one_line_where_there_is_no_run(tmp_path, capsys, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path / folder)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert said.startswith("report.py: error: ") and "no output_dir of a training run" in said


@pytest.fixture
def browse(tmp_path):
    """browse(page, script) -> (a picture of the page after the script, what the script left as the page's title)."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium: apt-get install chromium")

    def run(page, script):
        path, shot = tmp_path / "page.html", tmp_path / "shot.png"
        path.write_text(page.replace("</body>", f"<script>{script}</script></body>"))
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--hide-scrollbars"]
        options += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
        options += ["--window-size=1100,900"]
        for more in ([f"--screenshot={shot}"], ["--dump-dom"]):
            done = subprocess.run(
                [chromium, *options, *more, path.as_uri()], capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr[-2000:]
        title = re.search(r"<head>.*?<title>(.*?)</title>", done.stdout, re.S)
        return np.array(PIL.Image.open(shot).convert("RGB")), title[1]

    return run


@pytest.mark.slow
def test_slider_in_a_browser(run, browse):
    """Originals are red, reconstructions blue, differences green: the slider says how much is seen of the first two.

    Red when a part of the strip is shown at another's place, the slider moves nothing, or a picture does not load.
    """
    for strip in (run / "validation").iterdir():
        row = np.repeat(np.array([RED, BLUE, GREEN], np.uint8)[None], 16, axis=1)
        PIL.Image.fromarray(np.repeat(row, 32, axis=0)).save(strip)
    page = made(run)
    script = """
        const moved = document.querySelectorAll('details[open] input')
        for (const slider of moved) { slider.value = VALUE; slider.dispatchEvent(new Event('input')) }
        const curves = [...document.querySelectorAll('polyline')]
        const inside = curves.every(c => { const b = c.getBBox(), s = c.ownerSVGElement
            return b.x >= 0 && b.y >= 0 && b.x + b.width <= s.width.baseVal.value && b.y + b.height <= s.height.baseVal.value })
        const fetched = performance.getEntriesByType('resource').filter(entry => !entry.name.startsWith('data:'))
        document.title = JSON.stringify([moved.length, curves.length, inside, fetched.length])
    """
    seen = {}
    for value in (0, 50, 100):
        shot, title = browse(page, script.replace("VALUE", str(value)))
        sliders, curves, inside, fetched = json.loads(title)
        assert sliders == 2 and curves > 10 and inside and fetched == 0
        seen[value] = [int((shot == colour).all(2).sum()) for colour in (RED, BLUE, GREEN)]
    area = 2 * 160 * 160
    assert seen[0] == [0, area, area] and seen[100] == [area, 0, area]
    assert seen[50] == pytest.approx([area / 2, area / 2, area], rel=0.02)
