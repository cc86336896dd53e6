"""What training does on a GPU, checked without one: types under CUDA's autocast, layouts, waits, and copies."""

import itertools
import json
import warnings
from collections import Counter, defaultdict
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_MODEL, exported, metrics, without
from diffusers.models.resnet import ResnetBlock2D
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_vqgan

# ---- Layouts of weights


def strides_of(run):
    """Pairs of strides, of each weight and of a moment or an average that goes with it."""
    for optimizer in run.state.optimizers.values():
        for weight, moments in optimizer.state.items():
            yield from ((weight.stride(), moments[name].stride()) for name in ("exp_avg", "exp_avg_sq"))
    yield from ((w.stride(), s.stride()) for w, s in zip(run.state.generator.parameters(), run.state.ema.shadow_params))


@pytest.mark.slow
@pytest.mark.parametrize("layouts", ["last last", "last first", "first last"])
def test_resume_across_layouts_of_weights(train, tmp_path, float64, monkeypatch, layouts):
    """Two steps with one layout of the convolutions' weights and two with another are four steps, with EMA.

    Red when the moments, or the averages, keep the strides they were saved with: fused steps then mix up numbers.
    """
    more = (
        "--max_train_steps",
        "4",
        "--log_steps",
        "1",
        "--use_ema",
        "--lr_scheduler",
        "constant",
        "--ema_decay",
        "0.5",
    )
    more += ("--discriminator_start", "0", "--discriminator_warmup", "1", "--checkpointing_steps", "2")
    whole = train(*more, "--output_dir", str(tmp_path / "whole"))
    build, load, seen = (train_vqgan.build_generator, train_vqgan.build_discriminator), train_vqgan.load_checkpoint, []
    for layout, steps in zip(layouts.split(), ("2", "4")):
        memory_format = {"last": torch.channels_last, "first": torch.contiguous_format}[layout]

        def loaded(run, *rest, weights=seen):
            load(run, *rest)
            weights += strides_of(run)

        for function in build:
            laid_out = lambda args, build=function, to=memory_format: build(args).to(memory_format=to)  # noqa: E731
            monkeypatch.setattr(train_vqgan, function.__name__, laid_out)
        monkeypatch.setattr(train_vqgan, "load_checkpoint", loaded)
        parts = train(*more, "--max_train_steps", steps, "--resume_from_checkpoint", "latest")
    assert seen and all(weight == other for weight, other in seen)
    four = [weight for weight, _ in seen if len(weight) == 4]
    assert any(stride[1] == 1 < stride[3] for stride in four) == (layouts.split()[1] == "last")
    for one, other in zip(metrics(whole), metrics(parts), strict=True):
        assert other == pytest.approx(one, rel=1e-6, abs=1e-9), one["step"]
    for part in ("vqmodel", "discriminator"):
        one, other = exported(whole, part), exported(parts, part)
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("norms_undo_it", [True, False])
def test_residual_block_mixes_no_layouts(norms_undo_it):
    """Attention gives channels_last, which a GPU's norms undo and a CPU's keep: both operands of the sum are alike.

    Red with x + h, when the shortcut's input stays as it is on a GPU, and when it does not on a CPU.
    """
    block, seen = ResnetBlock2D(in_channels=32, out_channels=64, temb_channels=None), []
    if norms_undo_it:
        block.norm1.register_forward_hook(lambda part, inputs, y: y.contiguous())
    block.conv_shortcut.register_forward_pre_hook(lambda part, inputs: seen.append(inputs[0].is_contiguous()))
    x = torch.randn(2, 32, 4, 4).to(memory_format=torch.channels_last)
    assert train_vqgan.residual_block(block, x).is_contiguous() == norms_undo_it and seen == [norms_undo_it]
    block.conv_shortcut = None
    block.conv2 = torch.nn.Conv2d(64, 32, 3, padding=1)
    assert train_vqgan.residual_block(block, x).is_contiguous() == norms_undo_it


# ---- Types under CUDA's autocast


@pytest.fixture
def cuda_autocast():
    """Autocast of the CPU takes in fp32 what CUDA's does among our networks' operators."""
    library = torch.library.Library("aten", "IMPL")
    operators = {
        "group_norm": torch.ops.aten.group_norm,
        "upsample_nearest2d.vec": torch.ops.aten.upsample_nearest2d.vec,
        "upsample_nearest2d": torch.ops.aten.upsample_nearest2d.default,
    }

    def in_fp32(operator, *args):
        with torch.autocast("cpu", enabled=False):
            return operator(*(x.float() if isinstance(x, torch.Tensor) else x for x in args))

    for name, operator in operators.items():
        library.impl(name, partial(in_fp32, operator), "AutocastCPU")
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16)
        assert F.group_norm(x, 2).dtype == F.interpolate(x, scale_factor=2.0).dtype == torch.float32
    yield
    library._destroy()


class Operators(TorchDispatchMode):
    """The types of the first floating point tensor that each operator got."""

    def __init__(self):
        super().__init__()
        self.types = defaultdict(set)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        floats = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        self.types[function.overloadpacket.__name__] |= {floats[0].dtype} if floats else set()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm_type", ["group", "spatial"])
def test_norms_and_activations_follow_the_precision(flags, tmp_path, cuda_autocast, norm_type):
    """bf16: norms, activations and upsampling of both networks, forward and back, in bf16 like the convolutions; losses,
    the search for codes and the optimiser in fp32.

    Red when either network is built without keep_type, when keep_type leaves out norms or upsampling, and when a norm's
    or an upsampling's autocast stays on.
    """
    config = TINY_MODEL | {"norm_type": norm_type, "block_out_channels": [32, 32], "mid_block_add_attention": True}
    (tmp_path / "model.json").write_text(json.dumps(config))
    args = train_vqgan.parse_args([*flags, "--mixed_precision", "bf16"])
    run = train_vqgan.Run(args, train_vqgan.start_accelerator(args))
    with Operators() as seen:
        pairs = train_vqgan.generator_step(run, [torch.rand(2, 3, 16, 16)], 0.1)
        train_vqgan.discriminator_step(run, pairs)
    in_16_bits = {"native_group_norm", "silu", "leaky_relu", "native_group_norm_backward", "silu_backward"}
    in_16_bits |= {"leaky_relu_backward"}
    if norm_type == "group":  # spatial norm repeats the codes, a few channels in fp32, too
        in_16_bits |= {"upsample_nearest2d_backward"}
    in_32_bits = {"mse_loss", "argmin", "_fused_adamw_", "relu"}  # relu: of the hinge
    assert in_16_bits | in_32_bits <= set(seen.types)
    assert {name: seen.types[name] for name in in_16_bits} == dict.fromkeys(in_16_bits, {torch.bfloat16})
    assert {name: seen.types[name] for name in in_32_bits} == dict.fromkeys(in_32_bits, {torch.float32})


# ---- Waits and copies


class Device(TorchDispatchMode):
    """The meta device for a GPU: whoever waits for a value there fails. Copies to and fro are noted; the host gets zeros.

    No operator may take tensors of both, but for single numbers.
    """

    def __init__(self):
        super().__init__()
        self.copies = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        target = kwargs.get("device")
        if function is torch.ops.aten._to_copy.default and target is not None and target != args[0].device:
            self.copies[str(args[0].dtype), target.type] += 1
            if target.type == "cpu":
                return torch.zeros(args[0].shape, dtype=args[0].dtype)
        else:
            mixed = {x.device.type for x in tensors if x.dim()}
            assert len(mixed) < 2, f"{function} on {mixed}"
        return function(*args, **kwargs)


FEATURES = {"_class_name": "FeatureDiscriminator", "backbone_weights": "random", "layers": "0", "hidden_channels": 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--gradient_accumulation_steps", "2"],
        ["--adaptive_weight", "--lecam_weight", "0.1", "--adversarial_loss", "non_saturating"],
        ["--codebook_norm", "none", "--gradient_estimator", "rotation", "--vae_loss", "l1"],
        ["--discriminator_config_name_or_path"],
    ],
)
def test_no_wait_and_one_copy_back_in_a_step(flags, tmp_path, monkeypatch, more):
    """Three steps of the loop: images go to the device, one tensor of flags comes back each time, and nobody waits.

    Red when clip_and_step asks `if finite`, when end_of_step makes its counts on the host, when Averages call .item(),
    and when found codes are counted by bincount.
    """
    if len(more) == 1:
        (tmp_path / "features.json").write_text(json.dumps(FEATURES))
        more = [*more, str(tmp_path / "features.json")]
    more = [*more, "--use_ema", "--max_train_steps", "3", "--discriminator_start", "0"]
    args = train_vqgan.parse_args([*flags, *more])
    accelerator, build = train_vqgan.start_accelerator(args), train_vqgan.build_optimizer
    monkeypatch.setattr(train_vqgan.Accelerator, "device", property(lambda self: torch.device("meta")))
    monkeypatch.setattr(torch, "autocast", lambda device, **options: nullcontext())  # it does not know that device

    def fused(*options):
        optimizer = build(*options)
        optimizer.defaults["fused"], optimizer.step = True, lambda closure: None  # torch has none for that device
        return optimizer

    monkeypatch.setattr(train_vqgan, "build_optimizer", fused)
    for name in ("log_gradient_shares", "log_training", "validate", "save_checkpoint"):  # they read values
        monkeypatch.setattr(train_vqgan, name, lambda *args: None)
    run = train_vqgan.Run(args, accelerator)
    micro_batches = [torch.zeros(2, 3, 16, 16, dtype=torch.uint8)] * args.gradient_accumulation_steps
    with Device() as seen:
        train_vqgan.train_loop(run, iter([micro_batches] * 3))
    assert run.state.step == 3 and run.state.codes.since_log.is_meta
    assert seen.copies == {("torch.uint8", "meta"): 3 * len(micro_batches), ("torch.float32", "cpu"): 3}


@pytest.mark.parametrize("source", [["--train_data_dir"], ["--streaming", "--dataset_name"]])
def test_micro_batches_are_pinned(flags, photos, tmp_path, monkeypatch, source):
    """The step gets the very memory that the loader pinned: a copy of other memory to the device would wait.

    Red when streams are not pinned, and when a micro-batch is copied on its way.
    """
    pinned = []

    def pin(x):
        pinned.append(x.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    more = [*source, str(photos), "--cache_dir", str(tmp_path / "cache")]
    args = train_vqgan.parse_args([*without(flags, "--train_data_dir"), *more])
    process = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cuda"))
    (items, *_), positions, watch = train_vqgan.load_data(args, 0), {}, train_vqgan.Watch()
    batches = train_vqgan.training_batches(items, args, 0, 0, process, watch, positions)
    steps = itertools.islice(train_vqgan.step_batches(batches, 2, 2, watch, positions), 2)
    got = [x for micro_batches in steps for x in micro_batches]
    assert len(got) == len(pinned) == 4 and all(x is other for x, other in zip(got, pinned))


@pytest.mark.parametrize("micro_batches, free, said", [(4, 31, True), (4, 29, False), (1, 99, False)])
def test_small_batches_that_memory_would_hold_as_one(flags, monkeypatch, caplog, micro_batches, free, said):
    """One line on a GPU, whose memory says so: 4 times 10 GiB fit in 30 free ones and the 10. None elsewhere.

    Red when memory is not asked, when what the run holds itself counts as taken, without accumulation, and when it comes
    again.
    """
    caplog.set_level("INFO", "train_vqgan")
    args = train_vqgan.parse_args([*flags, "--gradient_accumulation_steps", str(micro_batches)])
    run = train_vqgan.Run(args, train_vqgan.start_accelerator(args))
    sizes = {"memory_reserved": 10, "max_memory_reserved": 10, "max_memory_allocated": 9}
    for name, size in sizes.items():
        monkeypatch.setattr(torch.cuda, name, lambda size=size: size * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * 2**30, 80 * 2**30))
    bar = SimpleNamespace(disable=True, set_postfix_str=lambda text: None)
    for device in ("cpu", "cuda", "cuda"):
        monkeypatch.setattr(type(run.accelerator), "device", property(lambda self, kind=device: torch.device(kind)))
        train_vqgan.log_training(run, train_vqgan.Clock(0), bar)
        lines = [record.message for record in caplog.records if "keep a GPU waiting" in record.message]
        assert len(lines) == (said and device == "cuda")
    assert all("--train_batch_size 8 --gradient_accumulation_steps 1 is the same step" in line for line in lines)


def test_fused_only_where_it_skips():
    """The fused AdamW of other devices may overlook found_inf. Red when it is fused everywhere, or nowhere."""
    args = train_vqgan.parse_args([])
    for device, fused in (("cpu", True), ("meta", False)):
        optimizer = train_vqgan.build_optimizer(torch.nn.Linear(2, 2, device=device), 0.1, args)
        assert optimizer.defaults["fused"] is fused


@pytest.mark.parametrize("blur_pool", [False, True])
def test_ddp_is_asked_for_nothing_deprecated(flags, blur_pool):
    """And sends a constant buffer around without harm. Red when it is told broadcast_buffers=False."""
    accelerator = train_vqgan.start_accelerator(train_vqgan.parse_args(flags))
    network = train_vqgan.Discriminator(hidden_channels=8, depth=1, norm_num_groups=4, blur_pool=blur_pool)
    buffers = [buffer.clone() for buffer in network.buffers()]
    assert bool(buffers) == blur_pool
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrapped = torch.nn.parallel.DistributedDataParallel(network, **accelerator.ddp_handler.to_kwargs())
            for _ in range(2):
                wrapped(torch.zeros(2, 3, 16, 16)).mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(before, buffer) for before, buffer in zip(buffers, network.buffers()))


# ---- Graphs


@pytest.mark.slow
@pytest.mark.parametrize("discriminator", ["patches", "features"])
def test_graphs_are_whole_and_made_once(flags, tmp_path, monkeypatch, discriminator):
    """--torch_compile, without the compiler: five graphs, of encoder, decoder, perceptual loss and the discriminator, as
    a judge and in training; none for another weight of the adversary, nor for images of another size in validation.

    PyTorch 2.11 cannot compile a question whether a device knows autocast: it cut every graph at every norm.
    Red when a network asks that, prints, or asks for a value, and when validation is compiled, too.
    """
    monkeypatch.setattr(torch.amp, "is_autocast_available", torch.compiler.disable(torch.amp.is_autocast_available))
    if discriminator == "features":
        (tmp_path / "discriminator.json").write_text(json.dumps(FEATURES))
    real, counters = torch.nn.Module.compile, torch._dynamo.utils.counters
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: real(self, backend="eager", **how))
    torch._dynamo.reset()
    counters.clear()
    args = train_vqgan.parse_args([*flags, "--torch_compile", "--use_ema", "--discriminator_start", "0"])
    run = train_vqgan.Run(args, train_vqgan.start_accelerator(args))
    made, images = [], torch.zeros(2, 3, 16, 16)
    for lam in (0.1, 0.2):
        pairs = train_vqgan.generator_step(run, [images], lam)
        train_vqgan.discriminator_step(run, pairs)
        made.append(counters["stats"]["unique_graphs"])
        with train_vqgan.as_exported(run.state), torch.no_grad(), train_vqgan.exact_fp32():
            train_vqgan.reconstruct(run.state.generator, torch.zeros(1, 3, 24, 32, dtype=torch.uint8), args)
    assert made == [5, 5] and not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 5
    torch._dynamo.reset()
