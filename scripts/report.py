# Copyright 2026 the contributors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""One page about one or several runs: pictures, metrics, curves, configs, commands. It opens from disk, offline.

python scripts/report.py demo another_run --output report.html
"""

import base64
import itertools
import json
import math
import re
import sys
from html import escape
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import PIL.Image
import torch

import train_vqgan
from train_vqgan import UserError, number, require, user_error

COLOURS = ["#4269d0", "#ff725c", "#3ca951", "#a463f2", "#efb118", "#6cc5b0", "#ff8ab7", "#9c6b4e"]
DASHED = {"disc/fake": "disc/real", "val/codebook_bound": "val/codebook_used"}  # drawn in the other one's chart
CODEBOOK = re.compile("code|perplexity|quantization")
STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #222 }
figure { display: inline-grid; grid-template-columns: auto auto; gap: 2px; margin: 0 1em 1em 0 }
figcaption { grid-column: 1 / 3; font-size: 13px } input { width: 100%; margin: 0 }
.view { display: block; width: var(--side); height: var(--side); image-rendering: pixelated;
  background-image: var(--strip); background-size: calc(3 * var(--side)) auto;
  background-position: calc(-1 * var(--part) * var(--side)) calc(-1 * var(--row) * var(--side)) }
.pair { position: relative } .reconstruction { --part: 1 } .difference { --part: 2 }
.original { --part: 0; position: absolute; top: 0; left: 0; width: var(--cut) }
svg { margin: 0 1em 1em 0; font-size: 12px } polyline { fill: none; stroke-width: 1.5 }
td, th { border-bottom: 1px solid #ddd; padding: 2px 10px; text-align: left; vertical-align: top }
.differs { background: #fff3c4 } pre { background: #f4f4f4; padding: 1em; white-space: pre-wrap }
"""
FIGURE = """
<figure style="--row: {i}"><div class="pair" style="--cut: 50%"><i class="view reconstruction"></i><i class="view original"></i>
<input type="range" oninput="this.parentNode.style.setProperty('--cut', this.value + '%')"></div>
<i class="view difference"></i><figcaption>{caption}</figcaption></figure>"""


def read_run(folder, colour):
    """What is known of a run: its metrics as `lines`, the last held-out ones, pictures {step: file}, flags, configs.

    Flags, command and configs are those of the newest export and its model card. UserError where none is.
    """
    run = SimpleNamespace(output_dir=folder, name=folder.resolve().name, colour=colour, configs={})
    exports = [folder, *reversed(train_vqgan.checkpoints(folder))] if folder.is_dir() else []
    newest = next((export for export in exports if (export / "vqmodel").is_dir()), None)
    require(newest, f"{folder}: no output_dir of a training run that has saved something")
    with user_error(f"{folder}: cannot be read", (OSError, ValueError)):
        run.lines = train_vqgan.read_metrics(run)
        run.held_out = next((line for line in reversed(run.lines) if "protocol" in line), {})
        run.strips = {int(path.stem.removeprefix("step-")): path for path in folder.glob("validation/step-*.png")}
        card = (newest / "README.md").read_text(encoding="utf-8")
        run.flags = dict(re.findall(r"^([\w/]+): (.*)$", card.rpartition("\nFlags")[2], re.M))
        run.command = "".join(re.findall(r"```bash\n(.*?)\n```", card, re.S))
        for network in ("vqmodel", "discriminator"):
            config = json.loads((newest / network / "config.json").read_text())
            run.configs |= {f"{network} {key}": value for key, value in config.items() if not key.startswith("_")}
    return run


def label(run):
    return f'<span style="color: {run.colour}">&#9644;</span> {escape(run.name)}'


def pictures(run, n_steps):
    """Of some validations, the last among them: image and reconstruction under a slider, and their difference."""
    steps, made = sorted(run.strips), []
    names = [Path(name).name for name in run.flags.get("validation_images", "").split()]
    for place in np.linspace(len(steps) - 1, 0, min(n_steps, len(steps))).round().astype(int):
        strip = run.strips[steps[place]]
        with PIL.Image.open(strip) as image:
            side = image.width // 3
            rows = torch.from_numpy(np.array(image)).unflatten(0, (-1, side)) / 255  # [n, side, 3 * side, 3]
        decibels = train_vqgan.psnr(rows[:, :, side : 2 * side], rows[:, :, :side]).tolist()
        named = names if len(names) == len(rows) else [f"image {i + 1}" for i in range(len(rows))]
        captions = [f"{escape(name)}, {decibel:.1f} dB" for name, decibel in zip(named, decibels)]
        figures = "".join(FIGURE.format(i=i, caption=caption) for i, caption in enumerate(captions))
        data = base64.b64encode(strip.read_bytes()).decode()
        style = f"--side: {side * math.ceil(160 / side)}px; --strip: url(data:image/png;base64,{data})"
        shown = "open" if steps[place] == steps[-1] else ""
        made.append(f'<details {shown} style="{style}"><summary>step {steps[place]}</summary>{figures}</details>')
    return f"<h3>{label(run)}</h3>{''.join(made) or 'No --validation_images.'}"


def charts(runs, of_codebook):
    """One for each metric, all runs in it."""
    curves = {}
    for name in dict.fromkeys(name for run in runs for line in run.lines for name in line):
        stem, n, images = name.partition("_n")
        for run in runs:
            points = [(line["step"], line[name]) for line in run.lines if isinstance(line.get(name), (int, float))]
            points = [(step, value) for step, value in points if math.isfinite(value)]
            if points and "/" in name and bool(CODEBOOK.search(name)) == of_codebook:
                curves.setdefault(DASHED.get(stem, stem) + n + images, []).append((run, name, points))
    return "".join(chart(title, drawn) for title, drawn in curves.items())


def chart(title, curves):
    """SVG of curves (run, name, [(step, value)]); those of another name than the title are dashed."""
    steps, values = zip(*(point for _, _, points in curves for point in points))
    left, right, low, high = min(steps), max(steps), min(values), max(values)
    scale = math.log if title.startswith("loss/") and low > 0 else float
    others = {name for _, name, _ in curves} - {title}
    said = escape(title) + ", log scale" * (scale is math.log)
    said += "".join(f"; dashed: {escape(name.split('/')[1])}" for name in others)
    labels = [(0, 14, "start", said), (66, 29, "end", f"{high:.3g}"), (66, 154, "end", f"{low:.3g}")]
    labels += [(70, 166, "start", left), (330, 166, "end", right)]
    drawn = "".join(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>' for x, y, anchor, text in labels)
    for run, name, points in curves:
        place = []
        for step, value in points[:: math.ceil(len(points) / 500)] + points[-1:]:
            x = (step - left) / ((right - left) or 1)
            y = (scale(value) - scale(low)) / ((scale(high) - scale(low)) or 1)
            place.append(f"{70 + 260 * x:.1f},{150 - 125 * y:.1f}")
        dashes = 'stroke-dasharray="4 3"' if name in others else ""
        last = f"<title>{escape(run.name)}: {points[-1][1]:.5g} at step {points[-1][0]}</title>"
        drawn += f'<polyline points="{" ".join(place)}" stroke="{run.colour}" {dashes}>{last}</polyline>'
    return f'<svg width="340" height="170"><path d="M70 25V150H330" fill="none" stroke="#aaa"/>{drawn}</svg>'


def table(runs, columns):
    """columns: a dict for each run. Rows that differ are marked."""
    rows = ["<th></th>" + "".join(f"<th>{label(run)}</th>" for run in runs)]
    for key in dict.fromkeys(key for column in columns for key in column):
        cells = [column.get(key, "") for column in columns]
        cells = [f"{cell:.5g}" if isinstance(cell, float) else re.sub(r"[][{}']", "", str(cell)) for cell in cells]
        differs = ' class="differs"' if len(set(cells)) > 1 else ""
        rows.append("".join(f"<td{differs}>{escape(cell)}</td>" for cell in [key, *cells]))
    return f'<table cellspacing="0">{"".join(f"<tr>{row}</tr>" for row in rows)}</table>'


def page(runs, n_steps):
    """HTML."""
    legend = " ".join(label(run) for run in runs)
    metrics = [{key: value for key, value in run.held_out.items() if key != "protocol"} for run in runs]
    sections = {
        "Original | reconstruction, and their difference": "".join(pictures(run, n_steps) for run in runs),
        "Held-out images, at the end": table(runs, metrics),
        "How that was measured": table(runs, [run.held_out.get("protocol", {}) for run in runs]),
        "Curves": f"<p>{legend}</p>{charts(runs, of_codebook=False)}",
        "Use of the codebook": f"<p>{legend}</p>{charts(runs, of_codebook=True)}",
        "Configs": table(runs, [run.configs for run in runs]),
        "Flags, and after derived what followed from them": table(runs, [run.flags for run in runs]),
        "Commands": "".join(f"<p>{label(run)}</p><pre>{escape(run.command)}</pre>" for run in runs),
    }
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections.items())
    head = f'<meta charset="utf-8"><title>{escape(", ".join(run.name for run in runs))}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'


def main(argv=None):
    """Exit status: 0 done, 2 something to mend, in one line on stderr."""
    parser = train_vqgan.Parser(prog="report.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("output_dirs", nargs="+", type=Path, metavar="OUTPUT_DIR", help="what training runs wrote")
    parser.add_argument("--output", type=Path, help="file to write (default: report.html in the first OUTPUT_DIR)")
    parser.add_argument(
        "--validations", type=number(int, 1), default=4, help="how many to show of each run (default: 4)"
    )
    args = parser.parse_args(argv)
    output = args.output or args.output_dirs[0] / "report.html"
    try:
        runs = [read_run(folder, colour) for folder, colour in zip(args.output_dirs, itertools.cycle(COLOURS))]
        with user_error(f"--output: cannot write {output}", OSError):
            output.write_text(page(runs, args.validations), encoding="utf-8")
    except UserError as error:
        parser.error(str(error))
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
