"""One step: who moves, who does not, and that accumulation and skipping mean what they say."""

import copy
import json

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY_MODEL
from torch.profiler import ProfilerActivity, profile

import train_vqgan
from train_vqgan import SampleStream, TrainingState, adversarial_weight, discriminator_step, generator_step


@pytest.fixture
def game(flags, float64):
    """A prepared tiny game in float64: accelerator, generator, discriminator, state, perceptual, args and images."""
    args = train_vqgan.parse_args([*flags, "--use_ema", "--codebook_init", "sphere", "--max_train_steps", "100"])
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    generator, discriminator = train_vqgan.build_generator(args), train_vqgan.build_discriminator(args)
    items = train_vqgan.load_data(args)[0]
    train_vqgan.settle_flags(accelerator, items, args)
    state = TrainingState(generator, discriminator, args, accelerator.device)
    state.start_ema(args.ema_decay)
    for name, optimizer in state.optimizers.items():
        state.optimizers[name] = accelerator.prepare_optimizer(optimizer)
    perceptual = train_vqgan.PerceptualLoss(args.timm_model_backend, "0", "random", args.resolution)
    stream = SampleStream(items, args)
    images = train_vqgan.to_signed(torch.stack([stream[g] for g in range(4)]), accelerator.device)
    state.step = 1  # the first step also reports gradient shares
    return accelerator, generator, discriminator, state, perceptual, args, images


def weights(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def moved(before, network):
    return [name for name, value in network.state_dict().items() if not torch.equal(before[name], value)]


def test_generator_step_moves_only_the_generator(game):
    """Red when generator_loss is called outside frozen(): the discriminator then holds gradients."""
    accelerator, generator, discriminator, state, perceptual, args, images = game
    g, d = weights(generator), weights(discriminator)
    generator_step(accelerator, generator, state, perceptual, [images], 0.1, args)
    unmoved = set(g) - set(moved(g, generator))
    assert not unmoved, unmoved
    assert not moved(d, discriminator)
    assert all(p.grad is None for p in [*generator.parameters(), *discriminator.parameters(), *perceptual.parameters()])
    assert all(p.requires_grad for p in discriminator.parameters())


def test_discriminator_step_moves_only_the_discriminator(game):
    """Red when x_hat is kept without detach()."""
    accelerator, generator, discriminator, state, perceptual, args, images = game
    kept = generator_step(accelerator, generator, state, perceptual, [images], 0.1, args)
    assert not kept[0][1].requires_grad
    g, d = weights(generator), weights(discriminator)
    discriminator_step(accelerator, discriminator, state, kept, args)
    assert not moved(g, generator)
    unmoved = set(d) - set(moved(d, discriminator))
    assert not unmoved, unmoved
    assert all(p.grad is None for p in generator.parameters())


def test_both_players_see_the_same_images(game):
    accelerator, generator, _, state, perceptual, args, images = game
    kept = generator_step(accelerator, generator, state, perceptual, list(images.split(2)), 0.1, args)
    assert torch.equal(torch.cat([x for x, _ in kept]), images)
    assert [x_hat.shape for _, x_hat in kept] == [(2, 3, 16, 16)] * 2


def test_accumulation_equals_one_large_batch(game):
    """Two micro-batches of two move both networks as one of four. Red without `/ len(micro_batches)`."""
    accelerator, generator, discriminator, state, perceptual, args, images = game
    start, results = copy.deepcopy((generator.state_dict(), discriminator.state_dict())), []
    optimizers = {name: copy.deepcopy(optimizer.state_dict()) for name, optimizer in state.optimizers.items()}
    for split in (4, 2):
        generator.load_state_dict(start[0]), discriminator.load_state_dict(start[1])
        for name, optimizer in state.optimizers.items():
            optimizer.load_state_dict(copy.deepcopy(optimizers[name]))
        kept = generator_step(accelerator, generator, state, perceptual, list(images.split(split)), 0.1, args)
        discriminator_step(accelerator, discriminator, state, kept, args)
        results.append([p.clone() for p in [*generator.parameters(), *discriminator.parameters()]])
        assert len(kept) == 4 // split
    for whole, parts in zip(*results):
        assert whole.dtype == torch.float64
        torch.testing.assert_close(whole, parts, rtol=1e-7, atol=1e-10)


def test_ema_follows_generator_steps_only(game):
    """Red when the discriminator step also calls ema.step."""
    accelerator, generator, discriminator, state, perceptual, args, images = game
    expected = [p.detach().clone() for p in generator.parameters()]
    for taken in range(3):
        kept = generator_step(accelerator, generator, state, perceptual, [images], 0.1, args)
        discriminator_step(accelerator, discriminator, state, kept, args)
        decay = 0.0 if taken == 0 else min(args.ema_decay, (1 + taken) / (10 + taken))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, generator.parameters())]
    for e, shadow in zip(expected, state.ema.shadow_params):
        torch.testing.assert_close(shadow, e)


@pytest.mark.parametrize("planted", ["image", "gradient"])
def test_non_finite_update_is_skipped(game, planted):
    """A NaN in one image or one gradient leaves weights, moments, EMA and code counts alone; the next step is normal.

    Red when clip_and_step does not set found_inf.
    """
    accelerator, generator, discriminator, state, perceptual, args, images = game
    generator_step(accelerator, generator, state, perceptual, [images], 0.0, args)
    g, counts = weights(generator), state.log_counts.clone()
    shadow = [s.clone() for s in state.ema.shadow_params]
    optimizer = state.optimizers["generator"].optimizer
    moments = [m.clone() for s in optimizer.state.values() for m in s.values()]
    handle = None
    bad = images.clone()
    if planted == "image":
        bad[0, 0, 0, 0] = float("nan")
    else:
        handle = generator.quant_conv.weight.register_hook(lambda gradient: gradient * float("nan"))
    generator_step(accelerator, generator, state, perceptual, [bad], 0.0, args)
    assert not moved(g, generator)
    assert all(torch.equal(a, b) for a, b in zip(moments, [m for s in optimizer.state.values() for m in s.values()]))
    assert torch.equal(counts, state.log_counts)
    # the EMA may move towards the weights, which are good, but stays finite
    assert all(s.isfinite().all() and s.shape == t.shape for s, t in zip(state.ema.shadow_params, shadow))
    assert state.averages.read(accelerator)["opt/skipped"] == 0.5
    if handle:
        handle.remove()
    generator_step(accelerator, generator, state, perceptual, [images], 0.0, args)
    assert moved(g, generator) and all(p.isfinite().all() for p in generator.parameters())


def test_gradient_norm_is_clipped_and_reported_before_clipping(game):
    accelerator, generator, _, state, perceptual, args, images = game
    args.max_grad_norm = 1e-3
    seen = []
    optimizer = state.optimizers["generator"].optimizer
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.stack([p.grad.norm() for p in generator.parameters()]).norm().item())
    )
    generator_step(accelerator, generator, state, perceptual, [images], 0.0, args)
    assert seen == [pytest.approx(1e-3, rel=1e-3)]
    assert state.averages.read(accelerator)["opt/grad_norm"] > 0.01


def test_discriminator_is_not_run_before_its_start(train, monkeypatch):
    """Red when train_steps calls discriminator_step whatever the weight."""
    calls = []
    forward = train_vqgan.Discriminator.forward
    monkeypatch.setattr(train_vqgan.Discriminator, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    train("--max_train_steps", "4", "--discriminator_start", "3", "--discriminator_warmup", "0")
    assert calls == [2, 4]  # one generator pass on x_hat, one concatenated pass on x and x_hat, in the fourth step only


def test_adversarial_weight_ramps_over_the_run(flags):
    args = train_vqgan.parse_args([*flags, "--discriminator_start", "10", "--discriminator_warmup", "4"])
    values = [adversarial_weight(step, args) for step in (0, 9, 10, 11, 13, 14, 1000)]
    assert values == pytest.approx([0, 0, 0.025, 0.05, 0.1, 0.1, 0.1])


@pytest.mark.parametrize("pixel_range", ["signed", "unit"])
def test_adaptive_weight_is_the_double_backward_of_taming(game, pixel_range):
    """Gradients of all parameters against L_G with lambda from two full backward passes, as taming-transformers computes it.

    Red when the ratio is inverted, the codebook terms are left out, or `retain_graph` gradients are added twice.
    """
    accelerator, generator, discriminator, state, perceptual, args, images = game
    args.pixel_range = pixel_range

    def forward():
        x_hat, codes = generator(train_vqgan.to_model(images, args), return_dict=False)
        x_hat = train_vqgan.from_model(x_hat, args)
        return x_hat, train_vqgan.generator_loss(images, x_hat, codes, perceptual, discriminator, args, 0.8)[1]

    last = generator.decoder.conv_out.weight
    x_hat, terms = forward()
    objective, found = train_vqgan.adaptively_weighted(accelerator, terms, x_hat, last)
    objective.backward()
    gradients = [p.grad.clone() for p in generator.parameters()]
    generator.zero_grad()
    x_hat, terms = forward()
    values = {name: weight * term for name, (weight, term) in terms.items()}
    nll, adversarial = values["pixel"] + values["perceptual"], terms["adversarial"][1]
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (nll, adversarial)]
    expected = 0.8 * norms[0] / (norms[1] + 1e-4)
    assert 0.8e-3 < expected < 0.8 * 100 and abs(expected - 0.8) > 0.01  # neither clamped nor a ratio of 1
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    (nll + expected.detach() * adversarial + values["codebook"] + values["commitment"]).backward()
    for p, gradient in zip(generator.parameters(), gradients):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-9, atol=1e-12)


def test_adaptive_weight_passes_each_judge_once(game):
    """Backward passes through the perceptual backbone, the discriminator and the decoder. Red when one is run twice."""
    accelerator, generator, discriminator, state, perceptual, args, images = game
    args.adaptive_weight, passes = True, {"perceptual": 0, "discriminator": 0, "decoder": 0}
    watched = {
        "perceptual": next(m for m in perceptual.backbone.modules() if isinstance(m, torch.nn.Conv2d)),
        "discriminator": discriminator.layers[0],
        "decoder": generator.decoder.conv_in,
    }
    for name, module in watched.items():

        def count(module, inputs, output, name=name):
            if output.requires_grad:
                output.register_hook(lambda gradient: passes.update({name: passes[name] + 1}))

        module.register_forward_hook(count)
    generator_step(accelerator, generator, state, perceptual, [images], 0.1, args)
    assert passes == {"perceptual": 1, "discriminator": 1, "decoder": 1}
    assert state.averages.read(accelerator)["opt/adversarial_weight"] != pytest.approx(0.1)


def test_adaptive_weight_is_bounded(game):
    """A discriminator that is all but flat would get a weight without end. Red without the clamp."""
    accelerator, generator, discriminator, state, perceptual, args, images = game
    with torch.no_grad():
        discriminator.layers[-1].weight *= 1e-9
    x_hat, codes = generator(images, return_dict=False)
    terms = train_vqgan.generator_loss(images, x_hat, codes, perceptual, discriminator, args, 0.8)[1]
    found = train_vqgan.adaptively_weighted(accelerator, terms, x_hat, generator.decoder.conv_out.weight)[1]
    assert found.item() == pytest.approx(80)


def test_lecam_anchors_follow_the_logits(game):
    """After one step a thousandth of the way from 0 to the mean logits. Red when they stay, or real and fake swap."""
    accelerator, generator, discriminator, state, perceptual, args, images = game
    args.lecam_weight = 1.0
    kept = generator_step(accelerator, generator, state, perceptual, list(images.split(2)), 0.1, args)
    with torch.no_grad():
        real, fake = (discriminator(torch.cat(part)).mean().item() for part in zip(*kept))
    assert abs(real - fake) > 1e-3
    discriminator_step(accelerator, discriminator, state, kept, args)
    assert state.lecam_anchors.tolist() == pytest.approx([real / 1000, fake / 1000], rel=1e-4)


@pytest.mark.parametrize(
    "said, word",
    [
        ({"disc/accuracy": 0.995, "disc/real": 5.0, "disc/fake": -5.0}, "won"),
        ({"disc/accuracy": 0.5, "disc/real": 0.101, "disc/fake": 0.1}, "collapsed"),
        ({"disc/accuracy": 0.8, "disc/real": 0.5, "disc/fake": -0.5}, None),
        ({"disc/accuracy": 0.5, "disc/real": 0.5, "disc/fake": -0.5}, None),
    ],
)
def test_discriminator_that_has_won_or_collapsed_is_said_once(game, caplog, said, word):
    """Not while it ramps up, and never twice. Red when a threshold turns, or `warned` is not set."""
    _, _, _, state, _, args, _ = game
    args.discriminator_start, args.discriminator_warmup = 10, 5
    for step in (12, 100, 200):
        state.step = step
        train_vqgan.warn_of_discriminator(state, said, args)
    lines = [record.message for record in caplog.records]
    assert len(lines) == (word is not None)
    assert word is None or f"has {word}" in lines[0] and "Step 100" in lines[0]


@pytest.mark.parametrize("norm_type", ["group", "spatial"])
def test_gradient_checkpointing_keeps_less_and_convolves_no_more(flags, tmp_path, norm_type):
    """The same gradients to the last bit, less held after the forward pass, and no convolution in the backward pass but the
    1 x 1 ones of spatial norm.

    Red when the flag is ignored, when either kind of residual block, the upsampling or the last spatial norm is left out,
    and when whole blocks are computed again.
    """
    config = TINY_MODEL | {"norm_type": norm_type, "block_out_channels": [32, 32], "layers_per_block": 2}
    (tmp_path / "model.json").write_text(json.dumps(config))
    x, gradients, held, again = torch.rand(2, 3, 64, 64), {}, {}, {}
    for flag in ("--no-gradient_checkpointing", "--gradient_checkpointing"):
        torch.manual_seed(0)
        generator = train_vqgan.build_generator(train_vqgan.parse_args([*flags, flag, "--codebook_init", "sphere"]))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as forward:
            x_hat, _ = generator(x, return_dict=False)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as backward:
            x_hat.square().mean().backward()
        gradients[flag] = {name: p.grad for name, p in generator.named_parameters() if p.grad is not None}
        held[flag] = sum(event.self_cpu_memory_usage for event in forward.key_averages())
        names = {e.name for e in backward.events() if e.name != "aten::_convolution" or e.input_shapes[1][-1] > 1}
        again[flag] = names & {"aten::native_group_norm", "aten::_convolution"}
    none, some = gradients
    assert again == {none: set(), some: {"aten::native_group_norm"}}
    assert held[some] < {"group": 0.41, "spatial": 0.29}[norm_type] * held[none]
    for name, gradient in gradients[none].items():
        assert torch.equal(gradients[some][name], gradient), name
