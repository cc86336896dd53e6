# Copyright 2026 the contributors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Draw the curves of runs over each other, from their metrics.jsonl; needs matplotlib.

    python benchmarks/curves.py --out images/curves.png healthy=runs/a "strong discriminator=runs/b" collapse=runs/c

The picture in the README: three runs of the demo as it was before it cropped at native scale (`train_vqgan.py
@recipes/demo.args --model_config_name_or_path configs/model/tiny_4x.json --discriminator_config_name_or_path
configs/discriminator/patchgan_tiny.json --short_side 64 --perceptual_weight 0.227 --adversarial_weight 0.005
--timm_model_layers blocks.0,blocks.1,blocks.2,blocks.4,blocks.6
--discr_learning_rate 1e-4 --max_train_steps 600 --log_steps 10 --validation_steps 50 --discriminator_start 0.4
--discriminator_warmup 0.05`), as it is, with `--adversarial_weight 1
--discr_learning_rate 2e-3`, and with `--codebook_init uniform --codebook_norm none --codebook_restart_steps 0`.
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

PANELS = ["loss/pixel", "loss/perceptual", "val/psnr", "disc/real, disc/fake", "disc/accuracy", "codebook/used"]


def series(run, name):
    """Steps and values of a metric; the _nN of held-out ones may be left out."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line[key]) for line in lines for key in line if key == name or key.startswith(name + "_n")]
    return zip(*found) if found else ((), ())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="LABEL=OUTPUT_DIR")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    figure, axes = plt.subplots(2, 3, figsize=(11, 5), sharex=True, layout="constrained")
    for axis, panel in zip(axes.flat, PANELS):
        for number, run in enumerate(options.runs):
            label, folder = run.split("=", 1)
            for name, style in zip(panel.split(", "), ("-", "--")):
                axis.plot(*series(folder, name), style, color=f"C{number}", label=label, linewidth=1.2)
        axis.set_title(panel, fontsize=10)
        axis.set_yscale("log" if panel.startswith("loss") else "linear")
        axis.grid(alpha=0.3)
    handles = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(options.out, dpi=90)


if __name__ == "__main__":
    main()
