"""train_vqgan.py on one thread, with a record of what each process was given and what came of it.

    spy.py RECORD flags...    writes RECORD-0.json, RECORD-1.json, ... at the end, one for each process

DTYPE is the precision, float64 unless told otherwise. FAULTS, such as {"3": "image", "5": "worker"}, says what goes wrong
in the last process at which step: a NaN in an image, an infinite loss with finite gradients, a NaN in a gradient, or the
death of its data workers.
"""

import functools
import json
import math
import multiprocessing
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_vqgan  # noqa: E402

RANK = int(os.environ.get("RANK", 0))
LAST = int(os.environ.get("WORLD_SIZE", 1)) - 1
FAULTS = json.loads(os.environ.get("FAULTS", "{}")) if RANK == LAST else {}
# lists: in the order in which it happened
record = {"drawn": [], "trained_on": [], "held_out": [], "counts": [], "ratios": [], "verified": [], "gradients": {}}
fault = None  # of the step that is being taken


def spies(function):
    """train_vqgan's function of this name is replaced; it gets the original as its first argument."""
    original = getattr(train_vqgan, function.__name__)
    setattr(train_vqgan, function.__name__, functools.partial(function, original))
    return function


@spies
def start_accelerator(original, args):
    accelerator = original(args)
    torch.set_num_threads(1)
    record["world"] = accelerator.num_processes
    return accelerator


@spies
def find_fault(original, checkpoint, *rest, **options):
    record["verified"].append(checkpoint.name)
    return original(checkpoint, *rest, **options)


@spies
def random_numbers_of_sample(original, g, seed):
    record["drawn"].append(g)
    return original(g, seed)


@spies
def augment(original, item, *rest):
    record["trained_on"].append(str(item))
    return original(item, *rest)


@spies
def held_out_batches(original, items, *rest):
    for numbers, images, faults in original(items, *rest):
        record["held_out"] += [str(items[i]) for i in numbers]
        yield numbers, images, faults


@spies
def codebook_use(original, counts):
    record["counts"].append(counts.tolist())
    return original(counts)


@spies
def adaptively_weighted(original, *arguments):
    ratio, objective = original(*arguments)
    record["ratios"].append(ratio.item())
    return ratio, objective


@spies
def clip_and_step(original, accelerator, network, *rest):
    name = "generator" if hasattr(accelerator.unwrap_model(network), "quantize") else "discriminator"
    if name not in record["gradients"]:  # of the first step only
        record["gradients"][name] = torch.cat([p.grad.flatten() for p in network.parameters()]).tolist()
    return original(accelerator, network, *rest)


@spies
def generator_loss(original, *arguments):
    terms = original(*arguments)
    if fault == "loss":
        terms["pixel"] = terms["pixel"]._replace(value=terms["pixel"].value + math.inf)
    return terms


@spies
def generator_step(original, run, micro_batches, lam):
    global fault
    fault, hook = FAULTS.get(str(run.state.step + 1)), None
    if fault == "image":
        micro_batches[0][0, 0, 0, 0] = math.nan
    if fault == "gradient":
        hook = run.state.generator.quant_conv.weight.register_hook(lambda gradient: gradient * math.nan)
    if fault == "worker":
        for worker in multiprocessing.active_children():
            worker.kill()
    pairs = original(run, micro_batches, lam)
    if hook:
        hook.remove()
    return pairs


@spies
def train_loop(original, run, batches):
    original(run, batches)
    state = run.state
    moved = [*state.generator.parameters(), *state.discriminator.parameters()]
    moved += state.ema.shadow_params if state.ema else []
    record["weights"] = torch.cat([weight.detach().flatten() for weight in moved]).tolist()
    record["lecam"] = state.lecam_anchors.tolist()
    record["compiled"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]


if __name__ == "__main__":
    torch.set_default_dtype(getattr(torch, os.environ.get("DTYPE", "float64")))
    out = sys.argv.pop(1)
    status = train_vqgan.main()
    Path(f"{out}-{RANK}.json").write_text(json.dumps(record))
    sys.exit(status)
