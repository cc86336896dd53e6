"""One step: who moves, who does not, and that accumulation and skipping mean what they say."""

import copy
import json

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY_MODEL, equal
from diffusers import VQModel
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from torch.profiler import ProfilerActivity, profile

import train_vqgan
from train_vqgan import Run, SampleStream, Term, discriminator_step, generator_step


@pytest.fixture
def game(flags, float64):
    """A tiny run in float64 before its first step, and four images."""
    more = ["--use_ema", "--timm_model_layers", "0", "--max_train_steps", "100"]
    run = Run(train_vqgan.parse_args([*flags, *more]), Accelerator(cpu=True))
    stream = SampleStream(run.items, run.args, run.seed)
    return run, train_vqgan.to_signed(torch.stack([stream[g][0] for g in range(4)]), run.accelerator.device)


def weights(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def moved(before, network):
    return {name for name, value in network.state_dict().items() if not torch.equal(before[name], value)}


def test_generator_step_moves_only_the_generator(game):
    """Red when generator_loss is called outside frozen(): the discriminator then holds gradients."""
    run, images = game
    generator, discriminator = run.state.generator, run.state.discriminator
    g, d = weights(generator), weights(discriminator)
    generator_step(run, [images], 0.1)
    unmoved = set(g) - moved(g, generator)
    assert not unmoved, unmoved
    assert not moved(d, discriminator)
    for network in (generator, discriminator, run.perceptual):
        assert all(p.grad is None for p in network.parameters())
    assert all(p.requires_grad for p in discriminator.parameters())


def test_discriminator_step_moves_only_the_discriminator(game):
    """Red when x_hat is kept without detach()."""
    run, images = game
    generator, discriminator = run.state.generator, run.state.discriminator
    pairs = generator_step(run, [images], 0.1)
    assert not pairs[0][1].requires_grad
    g, d = weights(generator), weights(discriminator)
    discriminator_step(run, pairs)
    assert not moved(g, generator)
    unmoved = set(d) - moved(d, discriminator)
    assert not unmoved, unmoved
    assert all(p.grad is None for p in generator.parameters())


def test_both_players_see_the_same_images(game):
    run, images = game
    pairs = generator_step(run, list(images.split(2)), 0.1)
    assert torch.equal(torch.cat([x for x, _ in pairs]), images)
    assert [x_hat.shape for _, x_hat in pairs] == [(2, 3, 16, 16)] * 2


def test_accumulation_equals_one_large_batch(game):
    """Two micro-batches of two give both networks the gradients of one of four, and so the same weights.

    Red without `/ len(micro_batches)` or `/ len(pairs)`.
    """
    run, images = game
    run.args.max_grad_norm = 0
    networks, results = {"generator": run.state.generator, "discriminator": run.state.discriminator}, []
    start = {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()}
    optimizers = {name: copy.deepcopy(optimizer.state_dict()) for name, optimizer in run.state.optimizers.items()}
    gradients = {name: recorded_gradients(run, name) for name in networks}
    for split in (4, 2):
        for name, network in networks.items():
            network.load_state_dict(start[name])
            run.state.optimizers[name].load_state_dict(copy.deepcopy(optimizers[name]))
        pairs = generator_step(run, list(images.split(split)), 0.1)
        discriminator_step(run, pairs)
        assert len(pairs) == 4 // split
        results.append([p.clone() for network in networks.values() for p in network.parameters()])
        results[-1] += [gradient for recorded in gradients.values() for gradient in recorded.values()]
    assert len(results[0]) == len(results[1]) > len(list(run.state.generator.parameters())) * 2
    for whole, parts in zip(*results):
        assert whole.dtype == torch.float64
        torch.testing.assert_close(whole, parts, rtol=1e-7, atol=1e-10)


def recorded_gradients(run, network="generator"):
    """A dict that this network's optimiser fills with the gradients of its next step."""
    gradients = {}

    def record(*_):
        gradients.update({name: p.grad.clone() for name, p in getattr(run.state, network).named_parameters()})

    run.state.optimizers[network].optimizer.register_step_pre_hook(record)
    return gradients


def test_ema_follows_generator_steps_only(game):
    """Red when the discriminator step also calls ema.step."""
    run, images = game
    parameters = list(run.state.generator.parameters())
    expected = [p.detach().clone() for p in parameters]
    for taken in range(3):
        pairs = generator_step(run, [images], 0.1)
        discriminator_step(run, pairs)
        decay = 0.0 if taken == 0 else min(run.args.ema_decay, (1 + taken) / (10 + taken))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, parameters)]
    for e, shadow in zip(expected, run.state.ema.shadow_params):
        torch.testing.assert_close(shadow, e)


@pytest.mark.parametrize("planted", ["image", "gradient", "image, not fused"])
def test_non_finite_update_is_skipped(game, planted):
    """A NaN in one image or one gradient leaves weights, moments, EMA and code counts alone; the next step is normal.

    Red when clip_and_step does not set found_inf, or an optimiser that is not fused steps anyway.
    """
    run, images = game
    if planted == "image, not fused":  # as AdamW on MPS, and 8-bit AdamW
        optimizer = run.state.optimizers["generator"].optimizer
        for options in (optimizer.defaults, *optimizer.param_groups):
            options["fused"] = False
    generator, ema, codes = run.state.generator, run.state.ema, run.state.codes
    generator_step(run, [images], 0.0)
    g, counts, latents = weights(generator), codes.since_log.clone(), codes.moments.clone()
    shadow = [s.clone() for s in ema.shadow_params]
    optimizer = run.state.optimizers["generator"].optimizer
    moments = [m.clone() for s in optimizer.state.values() for m in s.values()]
    handle = None
    bad = images.clone()
    if planted != "gradient":
        bad[0, 0, 0, 0] = float("nan")
    else:
        handle = generator.quant_conv.weight.register_hook(lambda gradient: gradient * float("nan"))
    generator_step(run, [bad], 0.0)
    assert not moved(g, generator)
    assert all(torch.equal(a, b) for a, b in zip(moments, [m for s in optimizer.state.values() for m in s.values()]))
    assert counts.any() and torch.equal(counts, codes.since_log) and torch.equal(counts, codes.since_restart)
    assert latents.any() and torch.equal(latents, codes.moments)
    # the EMA may move towards the weights, which are good, but stays finite
    assert all(s.isfinite().all() and s.shape == t.shape for s, t in zip(ema.shadow_params, shadow))
    assert run.state.averages.read(run.accelerator)["opt/skipped"] == 0.5
    if handle:
        handle.remove()
    generator_step(run, [images], 0.0)
    assert moved(g, generator) and all(p.isfinite().all() for p in generator.parameters())


def test_gradient_norm_is_clipped_and_reported_before_clipping(game):
    run, images = game
    run.args.max_grad_norm = 1e-3
    gradients = recorded_gradients(run)
    generator_step(run, [images], 0.0)
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert run.state.averages.read(run.accelerator)["opt/grad_norm"] > 0.01


def test_discriminator_is_not_run_before_its_start(train, monkeypatch):
    """Red when train_loop calls discriminator_step whatever the weight."""
    calls = []
    forward = train_vqgan.Discriminator.forward
    monkeypatch.setattr(
        train_vqgan.Discriminator, "forward", lambda self, x, samples: calls.append(len(x)) or forward(self, x, samples)
    )
    train("--max_train_steps", "4", "--discriminator_start", "3", "--discriminator_warmup", "0")
    assert calls == [2, 4]  # one generator pass on x_hat, one concatenated pass on x and x_hat, in the fourth step only


# ---- The terms of L_G


def total_variation(x_hat, codes):
    return (x_hat[..., 1:] - x_hat[..., :-1]).abs().mean() + (x_hat[..., 1:, :] - x_hat[..., :-1, :]).abs().mean()


def latent_square(x_hat, codes):
    return codes.z.square().mean()


OWN_TERMS = {"image": (30.0, total_variation), "latents": (2.0, latent_square)}


def with_own_term(monkeypatch, on, what=None):
    """generator_loss gives a term more: that of OWN_TERMS[on], or of OWN_TERMS[what], declared as `on`."""
    objective = train_vqgan.generator_loss
    weight, value = OWN_TERMS[what or on]

    def more(x, x_hat, codes, *rest):
        return objective(x, x_hat, codes, *rest) | {"own": Term(weight, value(x_hat, codes), on)}

    monkeypatch.setattr(train_vqgan, "generator_loss", more)


def double_backward(run, images, lam, own=None):
    """(gradients of L_G by name, lambda times the ratio), as taming-transformers has them: two backward passes for the
    ratio of the adaptive weight, where that is asked for, and one for the sum.

    own: of OWN_TERMS, added here, not by generator_loss.
    """
    generator = run.state.generator
    if run.args.pixel_range == "unit":
        x_hat, codes = generator((images + 1) / 2, return_dict=False)
        x_hat = 2 * x_hat - 1
    else:
        x_hat, codes = generator(images, return_dict=False)
    terms = train_vqgan.generator_loss(images, x_hat, codes, run.perceptual, run.state.discriminator, run.args, lam)
    assert set(terms) == {"pixel", "perceptual", "codebook", "commitment", "adversarial"}
    values = {name: term.weight * term.value for name, term in terms.items()}
    image, latents = values["pixel"] + values["perceptual"], values["codebook"] + values["commitment"]
    adversarial = terms["adversarial"].value
    if own:
        weight, value = OWN_TERMS[own]
        value = weight * value(x_hat, codes)
        image, latents = (image + value, latents) if own == "image" else (image, latents + value)
    if run.args.adaptive_weight:
        last = generator.decoder.conv_out.weight
        norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (image, adversarial)]
        lam = lam * (norms[0] / (norms[1] + 1e-4)).item()
    total = image + lam * adversarial + latents
    return dict(zip(dict(generator.named_parameters()), torch.autograd.grad(total, list(generator.parameters())))), lam


@pytest.mark.parametrize(
    "own, flags_more",
    [
        (None, ["--adaptive_weight"]),
        (None, ["--adaptive_weight", "--pixel_range", "unit"]),
        ("image", ["--adaptive_weight"]),
        ("latents", ["--adaptive_weight"]),
        ("image", []),
        ("latents", []),
    ],
)
def test_gradients_of_a_step_are_those_of_a_double_backward(flags, float64, monkeypatch, own, flags_more):
    """All parameters' gradients, with and without --adaptive_weight, and with a term more.

    Red when the ratio is inverted, the terms on the latents are left out of the objective, a term on them counts in the
    ratio, one on the image does not, gradients are added twice, or pixels in [0, 1] are taken for [-1, 1].
    """
    flags += ["--timm_model_layers", "0", "--max_grad_norm", "0", *flags_more]
    run = Run(train_vqgan.parse_args(flags), Accelerator(cpu=True))
    stream = SampleStream(run.items, run.args, run.seed)
    images = train_vqgan.to_signed(torch.stack([stream[g][0] for g in range(4)]), "cpu")
    without, lam_without = double_backward(run, images, 0.8)
    expected, lam = double_backward(run, images, 0.8, own)
    if own:
        far = [name for name, g in expected.items() if (g - without[name]).norm() > 0.01 * without[name].norm()]
        assert len(far) > 0.5 * len([name for name in expected if own == "image" or "encoder" in name])
        with_own_term(monkeypatch, own)
    if run.args.adaptive_weight:
        assert 0.8e-3 < lam < 0.8 * 100 and abs(lam - 0.8) > 0.01  # neither clamped nor a ratio of 1
        assert (abs(lam / lam_without - 1) > 0.1) == (own == "image")
    else:
        assert lam == lam_without == 0.8
    gradients = recorded_gradients(run)
    generator_step(run, [images], 0.8)
    metrics = run.state.averages.read(run.accelerator)
    assert ("loss/own" in metrics) == (own is not None)
    assert metrics.get("opt/adversarial_weight", 0.8) == pytest.approx(lam, rel=1e-9)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_total_loss_is_that_with_the_adaptive_weight(game):
    """Of --adaptive_weight: the sum of the other losses. Red when it is the objective that gradients come from."""
    run, images = game
    run.args.adaptive_weight = True
    generator_step(run, [images], 0.8)
    found = run.state.averages.read(run.accelerator)
    total = found["loss/pixel"] + found["loss/perceptual"] + found["loss/codebook"] + 0.25 * found["loss/commitment"]
    total += found["opt/adversarial_weight"] * found["loss/adversarial"]
    assert found["loss/total"] == pytest.approx(total, rel=1e-9)


def test_term_on_something_unknown_is_an_error(game, monkeypatch):
    """Under --adaptive_weight, where it would be left out of the gradients. Red when `parts` takes any key."""
    run, images = game
    run.args.adaptive_weight = True
    with_own_term(monkeypatch, "pixels", what="image")
    with pytest.raises(KeyError, match="pixels"):
        generator_step(run, [images], 0.8)


def test_adaptive_weight_passes_each_judge_once(game):
    """Backward passes through the perceptual backbone, the discriminator and the decoder. Red when one is run twice."""
    run, images = game
    run.args.adaptive_weight, passes = True, {"perceptual": 0, "discriminator": 0, "decoder": 0}
    watched = {
        "perceptual": next(m for m in run.perceptual.modules() if isinstance(m, torch.nn.Conv2d)),
        "discriminator": run.state.discriminator.layers[0],
        "decoder": run.state.generator.decoder.conv_in,
    }
    for name, module in watched.items():

        def count(module, inputs, output, name=name):
            if output.requires_grad:
                output.register_hook(lambda gradient: passes.update({name: passes[name] + 1}))

        module.register_forward_hook(count)
    generator_step(run, [images], 0.1)
    assert passes == {"perceptual": 1, "discriminator": 1, "decoder": 1}
    assert run.state.averages.read(run.accelerator)["opt/adversarial_weight"] != pytest.approx(0.1)


def test_adaptive_weight_is_bounded(game):
    """A discriminator that is all but flat would get a weight without end. Red without the clamp."""
    run, images = game
    run.args.adaptive_weight = True
    with torch.no_grad():
        run.state.discriminator.layers[-1].weight *= 1e-9
    generator_step(run, [images], 0.8)
    assert run.state.averages.read(run.accelerator)["opt/adversarial_weight"] == pytest.approx(80)


def test_lecam_anchors_follow_the_logits(game):
    """After one step a thousandth of the way from 0 to the mean logits. Red when they stay, or real and fake swap."""
    run, images = game
    run.args.lecam_weight = 1.0
    pairs = generator_step(run, list(images.split(2)), 0.1)
    with torch.no_grad():
        real, fake = (run.state.discriminator(torch.cat(part)).mean().item() for part in zip(*pairs))
    assert abs(real - fake) > 1e-3
    discriminator_step(run, pairs)
    assert run.state.lecam_anchors.tolist() == pytest.approx([real / 1000, fake / 1000], rel=1e-4)


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
    run, _ = game
    run.schedule.discriminator_start, run.schedule.discriminator_warmup = 10, 5
    for step in (12, 100, 200):
        run.state.step = step
        train_vqgan.warn_of_discriminator(run, said)
    lines = [record.message for record in caplog.records if "discriminator" in record.message]
    assert len(lines) == (word is not None)
    assert word is None or f"has {word}" in lines[0] and "Step 100" in lines[0]


# ---- Gradient checkpointing


@pytest.mark.parametrize("norm_type", ["group", "spatial"])
def test_residual_block_is_that_of_diffusers(norm_type):
    """Every residual block of a VQModel, with and without a convolution in its shortcut: output and gradients to the
    last bit.

    Red when residual_block leaves out the second norm's latents, the shortcut's convolution, or the shortcut.
    """
    torch.manual_seed(0)
    model = VQModel(**TINY_MODEL | {"norm_type": norm_type, "block_out_channels": [32, 64]}).train()
    kinds = {"group": {ResnetBlock2D}, "spatial": {ResnetBlock2D, ResnetBlockCondNorm2D}}[norm_type]
    blocks = [block for block in model.modules() if isinstance(block, (ResnetBlock2D, ResnetBlockCondNorm2D))]
    assert {type(block) for block in blocks} == kinds
    for kind in kinds:
        assert {block.conv_shortcut is None for block in blocks if type(block) is kind} == {True, False}
    for block in blocks:
        x = torch.randn(2, block.in_channels, 12, 12, requires_grad=True)
        temb = torch.randn(2, 4, 6, 6, requires_grad=True) if isinstance(block, ResnetBlockCondNorm2D) else None
        leaves = [x, *block.parameters()] + [temb] * (temb is not None)
        results = []
        for forward in (type(block).forward, train_vqgan.residual_block):
            y = forward(block, x, temb)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        assert all(gradient.any() for gradient in results[0][1:])
        assert all(torch.equal(theirs, ours) for theirs, ours in zip(*results))


@pytest.mark.parametrize("norm_type", ["group", "spatial"])
def test_gradient_checkpointing_keeps_less_and_convolves_no_more(flags, tmp_path, norm_type):
    """The same gradients to the last bit, less held after the forward pass, and no convolution in the backward pass but
    the 1 x 1 ones of spatial norm.

    Red when the flag is ignored, when either kind of residual block, the upsampling or the last spatial norm is left
    out, and when whole blocks are computed again.
    """
    config = TINY_MODEL | {"norm_type": norm_type, "block_out_channels": [32, 32], "layers_per_block": 2}
    (tmp_path / "model.json").write_text(json.dumps(config))
    x, gradients, held, again = torch.rand(2, 3, 64, 64), {}, {}, {}
    for flag in ("--no-gradient_checkpointing", "--gradient_checkpointing"):
        torch.manual_seed(0)
        generator = train_vqgan.build_generator(train_vqgan.parse_args([*flags, flag]))
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
    assert equal(gradients[none], gradients[some])


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_scaler_skips_what_the_log_says_was_skipped(bad):
    """fp16's scaler looks at the gradients alone. Red when a loss that is not finite does not reach them."""
    network = torch.nn.Linear(2, 2)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    accelerator.native_amp = True
    optimizer = accelerator.prepare_optimizer(torch.optim.SGD(network.parameters(), 0.1))
    optimizer.scaler = accelerator.scaler
    for finite in (True, False, True):
        before = copy.deepcopy(network.state_dict())
        loss = network(torch.ones(1, 2)).square().mean()
        accelerator.scaler.scale(loss).backward()
        if not finite and bad == "gradient":
            network.weight.grad[0, 0] = torch.inf
        if not finite and bad == "loss":
            loss = loss + torch.inf
        _, said = train_vqgan.clip_and_step(accelerator, network, optimizer, loss.detach(), 1.0)
        assert said.item() is finite and equal(before, network.state_dict()) is not finite
