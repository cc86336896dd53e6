"""The objectives against numbers worked out by hand, and the perceptual loss against numpy and torchmetrics."""

import logging
import math

import numpy as np
import pytest
import timm
import torch
import torchmetrics.functional.image.lpips as lpips
from accelerate import Accelerator
from torch import nn

import train_vqgan as tv
from discriminator import Discriminator, TimmFeatures, choose_stages, lpips_heads


def by_channel(images, samples=None):
    """A stand-in discriminator whose logits are the images' first channel."""
    return images[:, :1]


def with_logits(*logits):
    """Images [n, 3, 2, 2] to which `by_channel` gives these logits, four each."""
    images = torch.zeros(len(logits), 3, 2, 2)
    images[:, 0] = torch.tensor(logits).view(-1, 2, 2)
    return images


@pytest.fixture
def objectives(flags):
    """objectives(*more flags) -> parsed flags."""
    return lambda *more: tv.parse_args([*flags, *more])


# ---- The discriminator's loss


def test_discriminator_loss_is_the_hinge_loss():
    """Red when a sign inside a hinge flips, `2 -` replaces `1 -`, or real and fake swap places in `torch.cat`."""
    x = with_logits([2.0, 0.5, -1.0, 0.0], [1.0, 3.0, 0.25, -2.0])
    x_hat = with_logits([-3.0, -0.5, 1.0, 0.0], [-1.0, 0.75, -4.0, -2.0])
    loss, metrics = tv.discriminator_loss(x, x_hat, by_channel)
    real = (0 + 0.5 + 2 + 1 + 0 + 0 + 0.75 + 3) / 8
    fake = (0 + 0.5 + 2 + 1 + 0 + 1.75 + 0 + 0) / 8
    assert loss.item() == pytest.approx(real + fake)
    assert metrics["disc/loss"].item() == pytest.approx(real + fake)
    assert metrics["disc/real"].item() == pytest.approx(3.75 / 8)
    assert metrics["disc/fake"].item() == pytest.approx(-8.75 / 8)


def test_discriminator_accuracy_counts_both_kinds_alike():
    """5 of 8 real and 5 of 8 fake logits are right, then all and none. Red when a `>` turns, or `/ 2` is dropped."""
    x = with_logits([2.0, 0.5, -1.0, 0.0], [1.0, 3.0, 0.25, -2.0])
    x_hat = with_logits([-3.0, -0.5, 1.0, 0.0], [-1.0, 0.75, -4.0, -2.0])
    accuracy = tv.discriminator_loss(x, x_hat, by_channel)[1]["disc/accuracy"]
    assert accuracy.item() == pytest.approx((5 / 8 + 5 / 8) / 2)
    ones = with_logits([0.1] * 4)
    for real, fake, expected in [(ones, -ones, 1.0), (ones, ones, 0.5), (-ones, ones, 0.0)]:
        assert tv.discriminator_loss(real, fake, by_channel)[1]["disc/accuracy"].item() == expected


def test_discriminator_judges_real_and_fake_in_one_pass():
    sizes = []

    def counting(images, samples):
        sizes.append(len(images))
        return by_channel(images)

    tv.discriminator_loss(torch.zeros(3, 3, 2, 2), torch.zeros(3, 3, 2, 2), counting)
    assert sizes == [6]


def test_discriminator_gradient_stops_at_the_margin():
    """Only logits inside the margin are pushed: real ones up, fake ones down. Red when `F.relu` is left out."""
    x = with_logits([2.0, 0.5, -1.0, 1.5]).requires_grad_()
    x_hat = with_logits([-3.0, -0.5, 1.0, -1.5]).requires_grad_()
    tv.discriminator_loss(x, x_hat, by_channel)[0].backward()
    assert x.grad[0, 0].flatten().tolist() == [0, -0.25, -0.25, 0]
    assert x_hat.grad[0, 0].flatten().tolist() == [0, 0.25, 0.25, 0]


def test_non_saturating_losses_by_hand():
    """log(1 + e^-D) for what should be real, log(1 + e^D) for what should not. Red when a sign flips."""
    x, x_hat = with_logits([2.0, 0.5, -1.0, 0.0]), with_logits([-3.0, -0.5, 1.0, 0.0])
    loss, _ = tv.discriminator_loss(x, x_hat, by_channel, "non_saturating")
    real = np.mean([math.log1p(math.exp(-v)) for v in (2.0, 0.5, -1.0, 0.0)])
    fake = np.mean([math.log1p(math.exp(v)) for v in (-3.0, -0.5, 1.0, 0.0)])
    assert loss.item() == pytest.approx(real + fake)
    generator = tv.ADVERSARIAL["non_saturating"].generator(torch.tensor([-3.0, 2.0])).tolist()
    assert generator == pytest.approx([math.log1p(math.exp(3)), math.log1p(math.exp(-2))])


def test_lecam_pulls_logits_that_run_away():
    """By hand: real 2 above the fakes' average of 0.5, fake -1 below the reals' average of 0.25. Red when they swap."""
    anchors = torch.tensor([0.25, 0.5])
    assert tv.lecam(torch.tensor(2.0), torch.tensor(-1.0), anchors).item() == pytest.approx(1.5**2 + 1.25**2)
    # each logit counts, as in the paper's code: those of mean 0.5 are pulled, too. Red on means of the batch.
    spread = torch.tensor([2.5, -1.5])
    assert tv.lecam(spread, spread, anchors).item() == pytest.approx(2.0**2 / 2 + 1.75**2 / 2)
    assert tv.lecam(torch.tensor(0.0), torch.tensor(1.0), anchors).item() == 0


# ---- The generator's loss


def example():
    """x, x_hat [2, 3, 4, 4], the latter a leaf, and codes whose terms are the quantiser's to weigh."""
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 4, 4, generator=rng) * 2 - 1
    x_hat = (torch.rand(2, 3, 4, 4, generator=rng) * 0.5).requires_grad_()
    z, e = torch.randn(2, 8, 4, generator=rng)
    terms = {"codebook": tv.Term(3.0, torch.tensor(0.75), "latents"), "own": tv.Term(0.5, torch.tensor(2.0), "latents")}
    return x, x_hat, tv.Codes(z, e, torch.arange(8), terms)


def stand_in_perceptual(x, x_hat):
    return 3 * (x_hat - x).abs().amax()


def numpy_terms(kind, x, x_hat):
    """The values of L_G's terms, in numpy for the stand-ins above."""
    x, x_hat = (t.detach().double().numpy() for t in (x, x_hat))
    return {
        "pixel": np.abs(x - x_hat).mean() if kind == "l1" else ((x - x_hat) ** 2).mean(),
        "perceptual": 3 * np.abs(x - x_hat).max(),
        "codebook": 0.75,
        "own": 2.0,
        "adversarial": -x_hat[:, 0].mean(),
    }


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_generator_loss_is_the_weighted_sum_of_its_terms(objectives, kind):
    """Red when a weight is dropped or two are exchanged, a term is summed instead of averaged, or l1 and l2 swap."""
    args = objectives("--vae_loss", kind, "--pixel_weight", "0.5", "--perceptual_weight", "2")
    x, x_hat, codes = example()
    terms = tv.generator_loss(x, x_hat, codes, stand_in_perceptual, by_channel, args, 0.7)
    expected = numpy_terms(kind, x, x_hat)
    assert abs(numpy_terms("l1", x, x_hat)["pixel"] - numpy_terms("l2", x, x_hat)["pixel"]) > 0.05
    weights = {"pixel": 0.5, "perceptual": 2.0, "codebook": 3.0, "own": 0.5, "adversarial": 0.7}
    on = {"pixel": "image", "perceptual": "image", "codebook": "latents", "own": "latents", "adversarial": "adversary"}
    assert {name: term.weight for name, term in terms.items()} == weights
    assert {name: term.on for name, term in terms.items()} == on
    assert {name: term.value.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-5)
    total = sum(weights[name] * expected[name] for name in expected)
    assert tv.weighted_sum(terms).item() == pytest.approx(total, rel=1e-5)
    heavier = total + 2 * weights["adversarial"] * expected["adversarial"]
    assert tv.weighted_sum(terms, adversary=3.0).item() == pytest.approx(heavier, rel=1e-5)


def test_default_weights_are_the_documented_ones(flags):
    """1, 1, 1, 0.25 and 0.1, l2. Red when a default of a flag changes, or build_quantizer takes another weight."""
    args = tv.parse_args(flags)
    lam = tv.build_discriminator(args).config.adversarial_weight
    x, x_hat, _ = example()
    codes = tv.build_generator(args)(torch.rand(2, 3, 16, 16), return_dict=False)[1]
    terms = tv.generator_loss(x, x_hat, codes, stand_in_perceptual, by_channel, args, lam)
    weights = {name: term.weight for name, term in terms.items()}
    assert weights == {"pixel": 1, "perceptual": 1, "codebook": 1, "commitment": 0.25, "adversarial": 0.1}
    assert terms["pixel"].value.item() == pytest.approx(numpy_terms("l2", x, x_hat)["pixel"], rel=1e-5)


def test_what_is_left_out_is_not_called(objectives):
    """No discriminator at lambda 0, and no perceptual term without its network. Red when `lam > 0` becomes `>= 0`."""

    def forbidden(images, samples):
        raise AssertionError("the discriminator was called")

    x, x_hat, codes = example()
    terms = tv.generator_loss(x, x_hat, codes, None, forbidden, objectives(), 0.0)
    assert set(terms) == {"pixel", "codebook", "own"}
    with pytest.raises(AssertionError, match="was called"):
        tv.generator_loss(x, x_hat, codes, None, forbidden, objectives(), 1e-6)


def test_adversarial_term_moves_the_reconstruction_and_not_the_frozen_discriminator(objectives):
    """d(-mean D)/dx_hat for a linear D. Red when the minus is dropped, or `frozen` does nothing."""
    discriminator = Discriminator(hidden_channels=4, depth=1, norm_num_groups=4)
    discriminator.layers = nn.Conv2d(3, 1, 1)
    x, x_hat, codes = example()
    with tv.frozen(discriminator):
        terms = tv.generator_loss(x, x_hat, codes, None, discriminator, objectives("--pixel_weight", "0"), 0.4)
        tv.weighted_sum(terms).backward()
    slope = discriminator.layers.weight.detach().view(1, 3, 1, 1) * -0.4 / (2 * 4 * 4)
    torch.testing.assert_close(x_hat.grad, slope.expand_as(x_hat))
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())


def test_frozen_ends_with_an_exception_too():
    """What was frozen before stays so. Red when the second loop is not in a `finally`, or goes over all parameters."""
    network = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False))
    with pytest.raises(KeyError), tv.frozen(network):
        assert not any(p.requires_grad for p in network.parameters())
        raise KeyError
    assert [p.requires_grad for p in network.parameters()] == [True, True, False, False]


@pytest.mark.parametrize(
    "start, warmup, expected",
    [
        (3, 4, [0, 0, 0, 0.05, 0.1, 0.15, 0.2, 0.2, 0.2]),
        (2, 0, [0, 0, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]),
        (0, 2, [0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]),
        (0, 0, [0.2] * 9),
        (100, 0, [0.0] * 9),
    ],
)
def test_adversarial_weight_schedule(objectives, start, warmup, expected):
    """0 before the start, a linear ramp, then constant. Red when `step + 1` becomes `step`, or the clamp at 1 goes."""
    flags = ["--adversarial_weight=0.2", f"--discriminator_start={start}", f"--discriminator_warmup={warmup}"]
    schedule = tv.Schedule(objectives(*flags, "--max_train_steps=200"), 2, 7)
    weights = [schedule.lambda_at(step) for step in range(9)]
    assert weights == pytest.approx(expected)
    assert all(weight == 0 for weight in weights[:start])  # exactly: the discriminator must not run
    assert schedule.lambda_at(10**6) == 0.2


@pytest.fixture
def gradient_shares(flags, monkeypatch, caplog):
    """gradient_shares(terms of x_hat, or None for the script's own, lambda) -> {name: share} as logged, run, x."""

    def log(terms, lam):
        run = tv.Run(tv.parse_args([*flags, "--perceptual_weight", "0", "--pixel_weight", "3"]), Accelerator(cpu=True))
        if terms:
            monkeypatch.setattr(tv, "generator_loss", lambda x, x_hat, *rest: terms(x_hat))
        x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        with caplog.at_level(logging.INFO, "train_vqgan"):
            tv.log_gradient_shares(run, x, lam)
        line = next(line for line in caplog.messages if line.startswith("Gradient at x_hat: "))
        shares = dict(part.split(" ") for part in line.removeprefix("Gradient at x_hat: ").split(", "))
        for network in (run.state.generator, run.state.discriminator):
            assert all(p.grad is None and p.requires_grad for p in network.parameters())
        return shares, run, x

    return log


def test_gradient_shares_by_hand(gradient_shares):
    """Norms 2 x 5, 1 x 30 and 4 x 2.5 at x_hat. Red when the weight is left out, or terms with weight 0 count."""
    elsewhere = torch.ones(2, requires_grad=True)

    def terms(x_hat):
        first = x_hat[0, 0, 0, :2]
        return {
            "pixel": tv.Term(2.0, (first * torch.tensor([3.0, 4.0])).sum(), "image"),
            "perceptual": tv.Term(1.0, -30 * first[1], "image"),
            "adversarial": tv.Term(4.0, (first * torch.tensor([1.5, 2.0])).sum(), "adversary"),
            "codebook": tv.Term(1.0, (elsewhere**2).sum(), "latents"),
            "unused": tv.Term(0.0, 1000 * first.sum(), "image"),
        }

    assert gradient_shares(terms, 0.1)[0] == {"pixel": "20%", "perceptual": "60%", "adversarial": "20%"}
    assert elsewhere.grad is None


def test_gradient_shares_of_the_real_terms(gradient_shares):
    """l2 and the adversarial term: |3 x 2 (x_hat - x) / n| and lambda |grad of the mean logit|, within the rounding."""
    shares, run, x = gradient_shares(None, 0.6)
    x_hat = run.state.generator(x, return_dict=False)[0].detach().requires_grad_()
    run.state.discriminator(x_hat).mean().backward()
    pixel = 3 * np.linalg.norm(2 * (x_hat.detach() - x).double().numpy() / x.numel())
    adversarial = 0.6 * x_hat.grad.norm().item()
    assert 0.2 < pixel / (pixel + adversarial) < 0.8
    expected = {"pixel": pixel / (pixel + adversarial), "adversarial": adversarial / (pixel + adversarial)}
    found = {name: float(share.removesuffix("%")) / 100 for name, share in shares.items()}
    assert found == pytest.approx(expected, abs=0.0051)


# ---- The perceptual loss


def images(n=2, side=64, seed=0):
    """Two batches [n, 3, side, side] in [-1, 1] that differ."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, side // 8, side // 8, generator=rng) * 2 - 1
    x = nn.functional.interpolate(x, scale_factor=8, mode="bilinear")
    return x, (x + 0.2 * torch.randn(x.shape, generator=rng)).clamp(-1, 1)


def build(name="test_resnet"):
    stages = choose_stages(name)
    heads = lpips_heads(stages) if name == "vgg16" else ()
    torch.manual_seed(0)
    return tv.PerceptualLoss(TimmFeatures(name, stages, "random"), heads)


def shuffled_norms(backbone):
    """Random statistics and biases, so that batch norms in training mode would show."""
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.bias, std=0.3)


def numpy_distance(targets, maps):
    """sum over layers, mean over positions, of 0.088 x the squared distance between features scaled to unit length."""
    layers = []
    for t, m in zip(targets, maps):
        t, m = (f.detach().double().numpy() for f in (t, m))
        t, m = (f / np.sqrt((f**2).sum(axis=1, keepdims=True) + 1e-10) for f in (t, m))
        layers.append(((t - m) ** 2).sum(axis=1).mean())
    return 0.088 * np.sum(layers)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_perceptual_loss_equals_numpy_on_raw_feature_maps(name):
    """Features from timm directly. Red when channels or layers are averaged, or features not normalised."""
    loss = build(name)
    shuffled_norms(loss.features.backbone)
    reference = timm.create_model(name, pretrained=False, features_only=True).eval()
    reference.load_state_dict(loss.features.backbone.state_dict())
    config = reference.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    x, x_hat = images()
    with torch.no_grad():
        raw = [reference(((batch + 1) / 2 - mean) / std) for batch in (x, x_hat)]
    assert len(raw[0]) >= 4
    value = loss(x, x_hat)
    assert value.shape == () and value.dtype == torch.float32
    assert value.item() == pytest.approx(numpy_distance(*raw), rel=1e-4)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_perceptual_loss_is_zero_for_equal_images_only(name):
    """Red when the target's features are taken from x_hat."""
    loss = build(name)
    x, x_hat = images()
    assert loss(x, x).item() == 0
    assert loss(x, x_hat).item() > 1e-3
    assert loss(x, x_hat).item() == pytest.approx(loss(x_hat, x).item(), rel=1e-5)
    nearer = x + 0.3 * (x_hat - x)
    assert loss(x, nearer).item() < loss(x, x_hat).item()


class Recorder(nn.Module):
    """A backbone that hands its input on as its only feature map."""

    def forward(self, x):
        self.seen = x
        return [x]


@pytest.mark.parametrize(
    "name, mean, std",
    [
        ("test_resnet", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("test_efficientnet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_images_enter_the_backbone_with_its_own_mean_and_std(name, mean, std):
    """Black and white in each channel, written out. Red when `/ 2 + 0.5` is left out, or mean and std are fixed."""
    loss = build(name)
    loss.features.backbone = Recorder()
    for signed, unit in [(-1, 0.0), (1, 1.0), (0, 0.5)]:
        loss.normalised(torch.full((1, 3, 8, 8), float(signed)))
        expected = [(unit - m) / s for m, s in zip(mean, std)]
        assert loss.features.backbone.seen[0, :, 4, 4].tolist() == pytest.approx(expected, abs=1e-5)


def test_gradient_is_finite_where_all_channels_are_zero():
    """A black position after the model's mean: features exactly 0. Red when epsilon moves outside the root."""
    loss = build("test_resnet")  # mean 0.5: 0 in [-1, 1] becomes 0
    loss.features.backbone = Recorder()
    x, x_hat = images(1, 8)
    x_hat = x_hat.clone()
    x_hat[:, :, :4] = 0
    x_hat.requires_grad_()
    value = loss(x, x_hat)
    assert (loss.features.backbone.seen == 0).all(dim=1).sum() == 4 * 8
    value.backward()
    assert value.isfinite() and x_hat.grad.isfinite().all()
    assert x_hat.grad[:, :, 4:].abs().max() > 0


def test_no_gradient_on_the_backbone_and_none_through_the_target():
    """Red when `requires_grad_(False)` or the target's `no_grad` is left out."""
    loss = build()
    x, x_hat = (batch.requires_grad_() for batch in images())
    loss(x, x_hat).backward()
    assert x.grad is None
    assert x_hat.grad.abs().max() > 0
    parameters = list(loss.parameters())
    assert parameters and all(p.grad is None and not p.requires_grad for p in parameters)


def training_shows(loss):
    """Whether a forward pass changes the backbone's statistics, or one image's features depend on its neighbour."""
    before = {name: tensor.clone() for name, tensor in loss.features.backbone.state_dict().items()}
    x, x_hat = images()
    alone = loss(x[:1], x_hat[:1]) + loss(x[1:], x_hat[1:])
    together = loss(x, x_hat)
    moved = any(not torch.equal(before[name], tensor) for name, tensor in loss.features.backbone.state_dict().items())
    return moved or not torch.allclose(alone / 2, together, rtol=1e-4)


def test_backbone_is_in_eval_mode():
    """Red when `.eval()` is left out."""
    loss = build()
    shuffled_norms(loss.features.backbone)
    assert any(isinstance(module, nn.BatchNorm2d) for module in loss.features.backbone.modules())
    assert not training_shows(loss)


def test_backbone_stays_in_eval_mode_when_a_parent_trains():
    parent = nn.ModuleList([build()])
    shuffled_norms(parent[0].features.backbone)
    parent.train()
    assert not training_shows(parent[0])


def test_arithmetic_is_fp32_under_bf16_autocast():
    """Raw maps in bf16, the distance as numpy has it in float64. Red when `normalised` leaves `at_least_fp32` out."""
    loss = build()
    shuffled_norms(loss.features.backbone)
    maps = []
    loss.features.backbone.register_forward_hook(lambda module, inputs, outputs: maps.append(outputs))
    x, x_hat = images()
    x_hat.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(x, x_hat)
    assert all(f.dtype == torch.bfloat16 for layer in maps for f in layer)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(numpy_distance(*[[f.float() for f in layer] for layer in maps]), rel=1e-5)
    value.backward()
    assert x_hat.grad.dtype == torch.float32 and x_hat.grad.isfinite().all()
    assert value.item() == pytest.approx(loss(x, x_hat).item(), rel=0.05)  # and it is the same distance


def test_backbones_of_fixed_size_get_images_of_that_size():
    """64 pixels into a model that only takes 160. Red when the resizing is left out, or its antialiasing."""
    loss = build("test_vit")
    sizes = []
    loss.features.backbone.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[-2:]))
    x, x_hat = images()
    assert loss(x, x_hat).item() > 0
    assert sizes == [(160, 160)] * 2
    loss.features.backbone = Recorder()
    checkers = (torch.arange(480).view(-1, 1) + torch.arange(480)) % 2 * 2.0 - 1
    loss.normalised(checkers.expand(1, 3, 480, 480))
    assert (
        loss.features.backbone.seen.abs()[..., 2:-2, 2:-2].max() < 0.3
    )  # averaged to grey, not sampled as black and white


@pytest.fixture(scope="module")
def vgg16():
    loss = build("vgg16")
    for convolution in loss.features.backbone.children():
        if isinstance(convolution, nn.Conv2d):
            nn.init.normal_(convolution.bias, std=0.1)
    return loss


def torchmetrics_lpips(vgg16, monkeypatch):
    """torchmetrics' LPIPS with its own heads on our random trunk."""
    trunk = nn.Sequential(*vgg16.features.backbone.children())
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda *args: trunk)
    reference = lpips._LPIPS(pretrained=True, net="vgg", pnet_rand=True)
    assert [len(part) for part in (reference.net.slice1, reference.net.slice5)] == [4, 7]
    assert reference.lin0.model[-1].weight.std() > 0
    return reference


def test_vgg16_is_lpips(vgg16, monkeypatch):
    """Against torchmetrics, per layer and whole. Red when layers are averaged, or two heads are exchanged."""
    reference = torchmetrics_lpips(vgg16, monkeypatch)
    x, x_hat = images()
    with torch.no_grad():
        total, parts = reference(x, x_hat, retperlayer=True)
        assert len(parts) == 5 and all(part.min() > 0 for part in parts)
        assert vgg16(x, x_hat).item() == pytest.approx(total.mean().item(), rel=1e-4)


def test_lpips_heads_follow_the_layers_asked_for(vgg16, monkeypatch):
    """Two of the five layers: the sum of their parts. Red when heads are taken from the front of the list."""
    reference = torchmetrics_lpips(vgg16, monkeypatch)
    x, x_hat = images()
    heads = lpips_heads([1, 3])
    with torch.no_grad():
        parts = reference(x, x_hat, retperlayer=True)[1]
        t, f = vgg16.normalised(x), vgg16.normalised(x_hat)
        ours = sum((w * (t[i] - f[i]) ** 2).sum(1).mean() for w, i in zip(heads, (1, 3)))
    assert ours.item() == pytest.approx((parts[1] + parts[3]).mean().item(), rel=1e-4)
    with pytest.raises(ValueError, match=r"features\.3, features\.8, features\.15"):
        lpips_heads([5])
