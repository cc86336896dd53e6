"""The codebook: search, gradients, its terms, restarts, statistics, export, and another quantiser in its place."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import TINY_MODEL, equal, metrics, weights
from diffusers.models.autoencoders.vae import VectorQuantizer

import train_vqgan as tv

CODES, DIM = TINY_MODEL["num_vq_embeddings"], TINY_MODEL["vq_embed_dim"]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unequal_codes(codes, dim, seed=1, dtype=torch.float32):
    """Codes of random direction, lengths from 0.05 to 20."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.logspace(np.log10(0.05), np.log10(20), codes)[torch.randperm(codes, generator=rng)]
    return F.normalize(random(codes, dim, seed=seed), dim=1).to(dtype) * lengths.unsqueeze(1).to(dtype)


def quantizer_with(weight, norm):
    quantizer = tv.Quantizer(*weight.shape, norm).to(weight.dtype)
    quantizer.embedding.weight.data = weight.clone()
    return quantizer


def grid(z, batch, height, width):
    """[tokens, dim], rows of pixels first, to [batch, dim, height, width]."""
    return z.reshape(batch, height, width, -1).permute(0, 3, 1, 2)


# ---- Rotation


def test_rotation_is_the_matrix_of_the_paper():
    """Forward the code, backward |e| / |z| R^T g with the R of Fifty et al. as a matrix, z's gradient alone.

    Red when the 2 of a reflection, `scale`, or a `detach` is left out.
    """
    z, e = (random(40, 6, seed=i, dtype=torch.float64).requires_grad_() for i in (1, 2))
    gradient = random(40, 6, seed=3, dtype=torch.float64)
    found = tv.rotated(z, e)
    assert torch.allclose(found, e, atol=1e-12)
    found.backward(gradient)
    assert e.grad is None
    for zi, ei, gi, back in zip(z.detach(), e.detach(), gradient, z.grad):
        a, b = zi / zi.norm(), ei / ei.norm()
        r = (a + b) / (a + b).norm()
        matrix = torch.eye(6, dtype=torch.float64) - 2 * torch.outer(r, r) + 2 * torch.outer(b, a)
        assert torch.allclose(matrix @ matrix.T, torch.eye(6, dtype=torch.float64))  # a rotation
        assert torch.allclose(back, ei.norm() / zi.norm() * matrix.T @ gi)


def test_rotation_needs_no_matrix_per_token():
    """A matrix for each of 100,000 tokens of 64 dimensions would be 1.6 GB. Red when R is built."""
    z, e = random(100_000, 64), random(100_000, 64, seed=1)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else [out]) if torch.is_tensor(t))
            return out

    with Sizes():
        tv.rotated(z.requires_grad_(), e).sum().backward()
    assert len(sizes) > 10 and max(sizes) == z.numel()


@pytest.mark.parametrize("norm", ["none", "l2"])
def test_gradient_estimator_changes_gradients_not_images(norm):
    """Red when Quantizer.forward forgets the estimator."""
    z, weight = random(2, 6, 4, 4, dtype=torch.float64), unequal_codes(50, 6, dtype=torch.float64)
    results = {}
    for estimator in ("straight_through", "rotation"):
        quantizer = tv.Quantizer(50, 6, norm, estimator).double()
        quantizer.embedding.weight.data = weight.clone()
        leaf = z.clone().requires_grad_()
        z_q, codes, _ = quantizer(leaf)
        (z_q * random(2, 6, 4, 4, seed=5, dtype=torch.float64)).sum().backward()
        results[estimator] = z_q.detach(), leaf.grad
        assert quantizer.embedding.weight.grad is None or not quantizer.embedding.weight.grad.any()
    (a, grad_a), (b, grad_b) = results.values()
    assert torch.allclose(a, b, atol=1e-12) and not torch.allclose(grad_a, grad_b, atol=1e-3)


# ---- Search


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("buffer_bytes", [64 << 20, 50 * 8 * 7, 1])
def test_nearest_codes_is_the_brute_force_argmin(dtype, buffer_bytes):
    """In one piece, in chunks of a few rows and of one. Red when `/ 2` is left out, or a chunk is dropped."""
    z, codes = random(101, 5, dtype=dtype), unequal_codes(50, 5, dtype=dtype)
    distances = np.linalg.norm(z.double().numpy()[:, None] - codes.double().numpy()[None], axis=2)
    nearest, second = np.sort(distances, axis=1)[:, :2].T
    assert (second - nearest).min() > 1e-5  # no ties, so that fp32 has to find the same
    found = tv.nearest_codes(z, codes, buffer_bytes)
    assert found.shape == (101,) and found.dtype == torch.long
    assert found.tolist() == distances.argmin(axis=1).tolist()
    assert len(set(found.tolist())) > 5


def test_nearest_codes_works_in_bounded_memory(monkeypatch):
    """No distance matrix exceeds buffer_bytes. Red when the split is left out."""
    sizes = []
    addmm = torch.addmm

    def measured(*args, **kwargs):
        result = addmm(*args, **kwargs)
        sizes.append(result.nbytes)
        return result

    monkeypatch.setattr(torch, "addmm", measured)
    tv.nearest_codes(random(1000, 4), random(64, 4, seed=1), buffer_bytes=10_000)
    assert sum(sizes) == 1000 * 64 * 4 and max(sizes) <= 10_000


# ---- Quantizer.forward


@pytest.mark.parametrize("norm", ["none", "l2"])
def test_forward_gives_the_nearest_codes_in_place(norm):
    """z_q is the code at every position, Codes and indices in the same order. Red when height and width swap."""
    z, weight = random(2 * 3 * 5, 4), unequal_codes(12, 4)
    codebook = F.normalize(weight, dim=1) if norm == "l2" else weight
    z_q, codes, (_, _, indices) = quantizer_with(weight, norm)(grid(z, 2, 3, 5))
    expected = torch.cdist(z.double(), codebook.double()).argmin(1)
    assert expected.unique().numel() >= 4
    if norm == "l2":  # cosine, and not what the unscaled codes would give
        assert expected.tolist() == (z @ codebook.T).argmax(1).tolist()
        assert expected.tolist() != torch.cdist(z, weight).argmin(1).tolist()
    assert isinstance(codes, tv.Codes)
    assert indices.tolist() == codes.indices.tolist() == expected.tolist()
    assert z_q.shape == (2, 4, 3, 5)
    torch.testing.assert_close(z_q, grid(codebook[expected], 2, 3, 5))
    torch.testing.assert_close(codes.z, z)
    torch.testing.assert_close(codes.e, codebook[expected])
    assert z_q.dtype == codes.z.dtype == codes.e.dtype == torch.float32


@pytest.mark.parametrize("norm", ["none", "l2"])
def test_straight_through_gradient(norm):
    """Of the latents as they are, or with l2 of their direction: (g - u u.g) / |z| with u = z / |z|, in numpy.

    Red when the straight-through `.detach()` is dropped (the codebook would move with the reconstruction), or `through`
    stays z.
    """
    quantizer = quantizer_with(unequal_codes(12, 4, dtype=torch.float64), norm)
    z = random(30, 4, dtype=torch.float64).requires_grad_()
    slope = random(30, 4, seed=3, dtype=torch.float64)
    (quantizer(grid(z, 2, 3, 5))[0] * grid(slope, 2, 3, 5)).sum().backward()
    expected = slope.numpy()
    if norm == "l2":
        length = np.linalg.norm(z.detach().numpy(), axis=1, keepdims=True)
        u = z.detach().numpy() / length
        expected = (expected - u * (u * expected).sum(axis=1, keepdims=True)) / length
    np.testing.assert_allclose(z.grad.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert quantizer.embedding.weight.grad is None or not quantizer.embedding.weight.grad.any()


@pytest.mark.parametrize("norm", ["none", "l2"])
def test_codebook_and_commitment_terms(norm):
    """Values in numpy. The codebook term moves the chosen rows only, through their norm with l2; the commitment term
    moves the latents as they are.

    Red when a `.detach()` is dropped or moved over, the weights are exchanged, or Codes holds a detached e or scaled z.
    """
    weight = unequal_codes(12, 4, dtype=torch.float64)
    quantizer = tv.Quantizer(12, 4, norm, codebook_weight=1.5, commitment_weight=0.5).double()
    quantizer.embedding.weight.data = weight.clone()
    latents = random(30, 4, dtype=torch.float64)
    z = latents.clone().requires_grad_()
    codes = quantizer(grid(z, 2, 3, 5))[1]
    assert {name: (term.weight, term.on) for name, term in codes.terms.items()} == {
        "codebook": (1.5, "latents"),
        "commitment": (0.5, "latents"),
    }
    length = np.linalg.norm(weight.numpy(), axis=1, keepdims=True) if norm == "l2" else np.ones((12, 1))
    u = weight.numpy() / length
    chosen = u[codes.indices.numpy()]
    np.testing.assert_allclose(codes.e.detach().numpy(), chosen, rtol=1e-12)
    np.testing.assert_allclose(codes.z.detach().numpy(), latents.numpy(), rtol=0)
    for term in codes.terms.values():
        assert term.value.item() == pytest.approx(((latents.numpy() - chosen) ** 2).mean(), rel=1e-12)
    codes.terms["codebook"].value.backward(retain_graph=True)
    assert z.grad is None or not z.grad.any()
    slope = 2 * (chosen - latents.numpy()) / latents.numel()
    g = np.zeros((12, 4))
    np.add.at(g, codes.indices.numpy(), slope)
    if norm == "l2":
        g = (g - u * (u * g).sum(axis=1, keepdims=True)) / length
    np.testing.assert_allclose(quantizer.embedding.weight.grad.numpy(), g, rtol=1e-9, atol=1e-12)
    quantizer.embedding.weight.grad = None
    codes.terms["commitment"].value.backward()
    np.testing.assert_allclose(z.grad.numpy(), -slope, rtol=1e-9, atol=1e-12)
    assert quantizer.embedding.weight.grad is None or not quantizer.embedding.weight.grad.any()


@pytest.mark.parametrize("norm", ["none", "l2"])
def test_search_is_fp32_inside_bf16_autocast(norm):
    """bf16 latents among close codes. Red when the quantiser no longer disables autocast, or leaves z in bf16."""
    z = random(400, 4).bfloat16()
    weight = random(4096, 4, seed=1)
    codebook = F.normalize(weight, dim=1) if norm == "l2" else weight
    expected = torch.cdist(z.double(), codebook.double()).argmin(1)
    in_bf16 = (codebook.square().sum(1) / 2 - z @ codebook.bfloat16().T).argmin(1)
    assert (in_bf16 != expected).sum() > 20  # a search in bf16 would show
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (z @ weight.T).dtype == torch.bfloat16
        z_q, codes, _ = quantizer_with(weight, norm)(grid(z, 1, 20, 20))
    assert z_q.dtype == codes.z.dtype == codes.e.dtype == torch.float32
    assert codes.indices.tolist() == expected.tolist()
    torch.testing.assert_close(z_q, grid(codebook[expected], 1, 20, 20))


def test_zero_latents_and_zero_codes_stay_finite():
    """Nothing is divided by a length of 0."""
    weight = unequal_codes(12, 4)
    weight[3] = 0
    quantizer = quantizer_with(weight, "l2")
    z = torch.zeros(1, 4, 2, 2, requires_grad=True)
    z_q, codes, _ = quantizer(z)
    (z_q.sum() + codes.e.sum()).backward()
    assert z_q.isfinite().all() and z.grad.isfinite().all() and quantizer.embedding.weight.grad.isfinite().all()


# ---- Inside a VQModel


def generator_and_args(flags, *more):
    args = tv.parse_args([*flags, *more])
    torch.manual_seed(0)
    return tv.build_generator(args), args


def training_state(generator, args):
    accelerator = Accelerator(cpu=True)
    schedule = tv.Schedule(args, images_per_step=2, n_images=7)
    return tv.TrainingState(generator, tv.build_discriminator(args), schedule, args, accelerator)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_vqmodel_hands_codes_through_its_loss_slot(flags, precision):
    """Also when accelerate wraps the forward pass. Red when `forward` returns anything else in second place."""
    generator, _ = generator_and_args(flags)
    x = random(3, 3, 16, 16)
    prepared = Accelerator(cpu=True, mixed_precision=precision).prepare(generator)
    x_hat, codes = prepared(x, return_dict=False)
    assert x_hat.shape == x.shape and x_hat.dtype == torch.float32
    assert isinstance(codes, tv.Codes)
    assert codes.z.shape == codes.e.shape == (3 * 8 * 8, 4) and codes.indices.shape == (3 * 8 * 8,)
    assert codes.z.dtype == codes.e.dtype == torch.float32 and codes.indices.dtype == torch.long
    if precision == "no":
        torch.testing.assert_close(grid(codes.z, 3, 8, 8), generator.encode(x).latents)


@pytest.mark.parametrize(
    "term, moved",
    [
        ("pixel", ["encoder", "quant_conv", "post_quant_conv", "decoder"]),
        ("codebook", ["quantize"]),
        ("commitment", ["encoder", "quant_conv"]),
    ],
)
def test_each_term_moves_its_part_of_the_model(flags, term, moved):
    """Every parameter of these parts and no other. Red when Codes or the straight-through is detached, or e is not."""
    others = {"pixel": 0, "perceptual": 0, "codebook": 0, "commitment": 0, term: 1}
    generator, args = generator_and_args(flags, *(f"--{name}_weight={weight}" for name, weight in others.items()))
    x = random(2, 3, 16, 16)
    x_hat, codes = generator(x, return_dict=False)
    tv.weighted_sum(tv.generator_loss(x, x_hat, codes, None, None, args, 0.0)).backward()
    gradients = {name: 0.0 if p.grad is None else p.grad.abs().max().item() for name, p in generator.named_parameters()}
    assert {name for name, size in gradients.items() if size > 0} == {n for n in gradients if n.split(".")[0] in moved}


@pytest.mark.parametrize("norm", ["none", "l2"])
@pytest.mark.parametrize("init", ["sphere", "uniform"])
def test_initial_codes(flags, init, norm):
    """Unit length in every direction, or diffusers' own, drawn by seed. Red when the flag is ignored."""
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        args = tv.parse_args([*flags, "--codebook_init", init, "--codebook_norm", norm])
        drawn.append(tv.build_generator(args).quantize.embedding.weight.detach())
    codes, again, other = drawn
    assert torch.equal(codes, again) and not torch.equal(codes, other)
    if init == "sphere":
        torch.testing.assert_close(codes.norm(dim=1), torch.ones(CODES))
    else:
        assert 0.9 / CODES < codes.abs().max() <= 1 / CODES
    assert codes.mean(0).norm() < 2 * codes.square().sum(1).mean().sqrt() / CODES**0.5
    assert codes.unique(dim=0).shape == (CODES, DIM)


# ---- Export


def striking(generator, latent_scale=1.0, dtype=torch.float32):
    """Give the generator codes of very different lengths, wide latents and reconstructions with contrast."""
    weight = generator.quantize.embedding.weight
    weight.data = unequal_codes(*weight.shape, dtype=dtype)
    generator.quant_conv.weight.data *= 3 * latent_scale
    generator.post_quant_conv.weight.data *= 3
    generator.decoder.conv_out.weight.data *= 4


@torch.no_grad()
def grey_levels(model, x):
    """Reconstructions in 0..255, through encode and decode."""
    return ((model.decode(model.encode(x).latents).sample / 2 + 0.5).clamp(0, 1) * 255).round()


def assert_same_images(plain, trained):
    """At most one grey level, in at most one pixel of a thousand."""
    assert trained.std() > 20 and trained.unique().numel() > 100  # there is something to see
    difference = (plain - trained).abs()
    assert difference.max() <= 1
    assert difference.amax(dim=1).gt(0).double().mean() <= 1e-3


def reload(model, folder):
    """Saved, and loaded by diffusers alone."""
    model.save_pretrained(folder)
    loaded = diffusers.VQModel.from_pretrained(folder)
    assert type(loaded) is diffusers.VQModel and type(loaded.quantize) is VectorQuantizer
    assert not [m for m in loaded.modules() if type(m).__module__.startswith("train_vqgan")]
    return loaded


def change_model(flags, **config):
    """Change the tiny model's config."""
    path = Path(flags[flags.index("--model_config_name_or_path") + 1])
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.mark.parametrize("norm", ["none", "l2"])
@pytest.mark.parametrize("latent_scale", [1, 10])
def test_plain_vqmodel_gives_the_same_images(flags, tmp_path, norm, latent_scale):
    """4,096 latents among 1,024 codes. Red when plain_vqmodel takes embedding.weight unfolded (l2).

    For norm none: red when the training search drops `half_squares`.
    """
    change_model(flags, num_vq_embeddings=1024)
    generator, _ = generator_and_args(flags, "--codebook_norm", norm)
    striking(generator, latent_scale)
    generator.eval()
    x = random(4, 3, 64, 64).clamp(-1, 1)
    trained = grey_levels(generator, x)
    chosen = generator.quantize(generator.encode(x).latents)[1].indices
    assert chosen.unique().numel() > 50
    plain = reload(tv.plain_vqmodel(generator), tmp_path / "plain")
    assert plain.config.num_vq_embeddings == 1024
    assert_same_images(grey_levels(plain, x), trained)
    with torch.no_grad():
        forward = ((plain(x).sample / 2 + 0.5).clamp(0, 1) * 255).round()
    assert_same_images(forward, trained)
    if norm == "l2":  # the fold matters: with the unscaled codes the images are others
        plain.quantize.embedding.weight.data = generator.quantize.embedding.weight.data
        assert (grey_levels(plain, x) - trained).abs().mean() > 5


@pytest.mark.parametrize("norm", ["none", "l2"])
def test_plain_vqmodel_of_the_ema_weights(flags, tmp_path, norm):
    """Inside as_exported the EMA is exported, afterwards the weights. Red when the swap, or one of the two, is gone."""
    generator, args = generator_and_args(flags, "--codebook_norm", norm, "--use_ema")
    striking(generator)
    state = training_state(generator, args)
    for i, shadow in enumerate(state.ema.shadow_params):
        shadow += 0.3 * shadow.std().nan_to_num(0.1) * random(*shadow.shape, seed=i)
    generator.eval()
    x = random(4, 3, 64, 64).clamp(-1, 1)
    without = grey_levels(generator, x)
    with tv.as_exported(state):
        averaged = grey_levels(generator, x)
        plain = tv.plain_vqmodel(generator)
    assert (averaged - without).abs().mean() > 5  # the two are different models
    assert torch.equal(grey_levels(generator, x), without)
    assert_same_images(grey_levels(reload(plain, tmp_path / "ema"), x), averaged)
    assert_same_images(grey_levels(reload(tv.plain_vqmodel(generator), tmp_path / "raw"), x), without)


@pytest.mark.parametrize(
    "named",
    [
        {"scaling_factor": 0.18215},
        {},
    ],
)
def test_plain_vqmodel_takes_config_overrides(flags, tmp_path, named):
    """The measured scaling_factor is saved whether or not the config named one. Red when `| config` is left out."""
    change_model(flags, **named)
    generator, _ = generator_and_args(flags)
    assert reload(tv.plain_vqmodel(generator, scaling_factor=0.5), tmp_path / "plain").config.scaling_factor == 0.5


def test_exported_weights_do_not_follow_the_training(flags):
    """The plain model owns its tensors."""
    generator, _ = generator_and_args(flags, "--codebook_norm", "none")
    plain = tv.plain_vqmodel(generator)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], tensor) for name, tensor in plain.state_dict().items())


def test_as_exported_swaps_back_after_an_exception(flags):
    """Red when the second swap is not in a `finally`."""
    generator, args = generator_and_args(flags, "--use_ema")
    state = training_state(generator, args)
    with torch.no_grad():
        for shadow in state.ema.shadow_params:
            shadow.add_(1)
    before = [p.detach().clone() for p in generator.parameters()]
    shadows = [s.clone() for s in state.ema.shadow_params]
    identities = [id(p) for p in generator.parameters()]
    with pytest.raises(KeyError), tv.as_exported(state):
        assert all(torch.equal(p, s) for p, s in zip(generator.parameters(), shadows))
        raise KeyError
    assert all(torch.equal(p, w) for p, w in zip(generator.parameters(), before))
    assert all(torch.equal(a, b) for a, b in zip(state.ema.shadow_params, shadows))
    assert [id(p) for p in generator.parameters()] == identities  # the optimiser still owns them


def test_as_exported_without_ema_changes_nothing(flags):
    generator, args = generator_and_args(flags)
    state = training_state(generator, args)
    assert state.ema is None
    before = [p.detach().clone() for p in generator.parameters()]
    with tv.as_exported(state):
        assert all(torch.equal(p, w) for p, w in zip(generator.parameters(), before))


# ---- Dead codes

DEAD = [0, 5, 6, 31]


def moving_parts(state):
    """Copies of everything of the codebook that training moves, and of all other weights."""
    weight = state.generator.quantize.embedding.weight
    moments = state.optimizers["generator"].optimizer.state[weight]
    shadow = next(s for s, p in zip(state.ema.shadow_params, state.generator.parameters()) if p is weight)
    others = [p.detach().clone() for p in state.generator.parameters() if p is not weight]
    others += [s.clone() for s, p in zip(state.ema.shadow_params, state.generator.parameters()) if p is not weight]
    for p in state.generator.parameters():
        if p is not weight:
            others += [m.clone() for m in state.optimizers["generator"].optimizer.state[p].values()]
    parts = {"weight": weight.detach(), "ema": shadow, "mean": moments["exp_avg"], "square": moments["exp_avg_sq"]}
    return SimpleNamespace(**{k: v.clone() for k, v in parts.items()}, others=others, steps=float(moments["step"]))


@pytest.fixture
def trained(flags):
    """trained(norm) -> state after two updates, with codes DEAD chosen rarely or never."""

    def build(norm="l2", tokens=1000 * CODES):
        generator, args = generator_and_args(flags, "--codebook_norm", norm, "--use_ema", "--ema_decay", "0.9")
        state = training_state(generator, args)
        for i in range(2):
            for j, p in enumerate(generator.parameters()):
                p.grad = random(*p.shape, seed=100 * i + j)
            state.optimizers["generator"].step()
            state.ema.step(generator.parameters())
        counts = torch.full((CODES,), 1100)
        counts[DEAD] = torch.tensor([0, 20, 0, 1])  # 2 % of uniform use and less
        counts[[1, 30]] = torch.tensor([50, 60])  # 5 % and more: rare, not dead
        state.codes.since_restart += counts
        state.codes.tokens = tokens
        state.step = 7
        parts = moving_parts(state)
        assert parts.weight.shape == (CODES, DIM) and parts.steps == 2
        assert all((part[DEAD] != 0).all() for part in (parts.mean, parts.square))
        assert not torch.equal(parts.ema, parts.weight)
        return state

    return build


def restart(state, z):
    state.codes.latents = z.unsqueeze(1)
    state.codes.restart_dead_codes(state)


@pytest.mark.parametrize("norm", ["none", "l2"])
def test_dead_codes_move_onto_latents_and_live_ones_stay(trained, norm):
    """Red when a moment or the EMA row stays, a live row moves, or (l2) latents are not scaled to unit length."""
    state = trained(norm)
    z = random(500, DIM, seed=4) * 3
    before = moving_parts(state)
    restart(state, z)
    after = moving_parts(state)
    live = [i for i in range(CODES) if i not in DEAD]
    pool = F.normalize(z, dim=1) if norm == "l2" else z
    distances = torch.cdist(after.weight[DEAD].double(), pool.double())
    assert distances.amin(1).max() < 1e-6
    assert len(set(distances.argmin(1).tolist())) == len(DEAD)  # each on a latent of its own
    assert torch.equal(after.ema[DEAD], after.weight[DEAD])
    assert not after.mean[DEAD].any() and not after.square[DEAD].any()
    for part in ("weight", "ema", "mean", "square"):
        assert torch.equal(getattr(after, part)[live], getattr(before, part)[live]), part
    assert after.steps == before.steps
    assert all(torch.equal(a, b) for a, b in zip(after.others, before.others))


def test_restart_empties_its_counters(trained):
    """Red when one of them is not reset."""
    state = trained()
    restart(state, random(500, DIM))
    assert state.codes.tokens == 0 and not state.codes.since_restart.any()
    moved = state.averages.read(Accelerator(cpu=True))
    assert moved["codebook/restarted"] == len(DEAD)


@pytest.mark.parametrize("tokens, acts", [(1, False), (1.3, False), (1.5, True), (8, True)])
def test_no_restart_when_codes_may_just_be_unlucky(trained, tokens, acts):
    """Half of the codes unused is twice chance, exp(-tokens / codes), at 1.39 tokens a code.

    Red when the check, or its 2, is gone.
    """
    state = trained(tokens=round(tokens * CODES))
    state.codes.since_restart.fill_(0)
    state.codes.since_restart[: CODES // 2] = 1000
    before, counts = moving_parts(state), state.codes.since_restart.clone()
    restart(state, random(500, DIM))
    after = moving_parts(state)
    for part in ("weight", "ema", "mean", "square"):
        assert torch.equal(getattr(after, part), getattr(before, part)) != acts, part
    assert (state.codes.tokens == round(tokens * CODES) and torch.equal(state.codes.since_restart, counts)) != acts


@pytest.mark.parametrize("tokens, acts", [(7, False), (8, True)])
def test_counting_begins_anew_at_the_latest_after_eight_tokens_a_code(trained, tokens, acts):
    """Though nothing is dead, and so nothing changes.

    Red when it waits for a dead code: then it would take ever longer to see one.
    """
    state = trained(tokens=tokens * CODES)
    state.codes.since_restart.fill_(1000)
    before = moving_parts(state)
    restart(state, random(500, DIM))
    assert (state.codes.tokens == 0) == acts and (not state.codes.since_restart.any()) == acts
    after = moving_parts(state)
    for part in ("weight", "ema", "mean", "square"):
        assert torch.equal(getattr(after, part), getattr(before, part)), part


def test_more_dead_codes_than_latents(trained):
    """Each latent for one code, the other codes wait.

    Red when latents are taken in turn: equal codes are never chosen.
    """
    state = trained("none")
    state.codes.since_restart.zero_()
    state.codes.since_restart[3] = 32000
    z = random(5, DIM, seed=4)
    before = state.generator.quantize.embedding.weight.detach().clone()
    restart(state, z)
    weight = state.generator.quantize.embedding.weight.detach()
    moved = (weight != before).any(1)
    assert moved.sum() == 5 and not moved[3]
    distances = torch.cdist(weight[moved].double(), z.double())
    assert distances.amin(1).max() < 1e-6 and len(set(distances.argmin(1).tolist())) == 5
    assert state.averages.read(Accelerator(cpu=True))["codebook/restarted"] == 5


def test_latents_of_the_last_steps_are_kept(train, monkeypatch):
    """One image of 64 latents for 32 codes, though a micro-batch has two: the latest. Red when the first one is kept."""
    seen = []
    step = tv.generator_step

    def spy(run, *rest):
        pairs = step(run, *rest)
        seen.append(run.state.codes.latents.clone())
        return pairs

    monkeypatch.setattr(tv, "generator_step", spy)
    train("--codebook_restart_steps", "1000", "--max_train_steps", "3")
    assert [z.shape for z in seen] == [(1, 64, 4)] * 3 and not torch.equal(seen[0], seen[1])


def test_restart_is_the_same_on_every_process_and_another_at_every_step(trained):
    """Whatever the global generator says. Red when `generator=` is left out of `randperm`."""
    drawn = []
    for step, seed in [(7, 0), (7, 1), (8, 1)]:
        state = trained()
        state.step = step
        torch.manual_seed(seed)
        restart(state, random(500, DIM))
        drawn.append(state.generator.quantize.embedding.weight.detach().clone())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_restarted_codes_train_on(trained):
    """The search can choose every moved code, and the optimiser steps on from zero. Red when moments stay."""
    state = trained("l2")
    z = random(500, DIM, seed=4)
    restart(state, z)
    with torch.no_grad():
        chosen = state.generator.quantize(grid(z, 1, 20, 25))[1].indices
    assert set(DEAD) <= set(chosen.tolist())
    weight = state.generator.quantize.embedding.weight
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    state.optimizers["generator"].step()
    step = (before - weight.detach())[DEAD]
    assert step.isfinite().all() and (step > 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_restart_does_not_take_latents_that_are_not_finite(trained, bad):
    """One NaN code is nearest to everything, for ever."""
    state = trained("none")
    z = random(20, DIM, seed=4)
    z[1::2] = bad
    state.codes.since_restart.zero_()
    state.codes.since_restart[3] = 32000
    restart(state, z)
    assert state.generator.quantize.embedding.weight.isfinite().all()


# ---- Statistics


def statistics():
    return tv.CodeStatistics(tv.Quantizer(CODES, DIM, "none"), True, Accelerator(cpu=True))


def recorded(into, steps, bad=()):
    """Record a step for each number, of two micro-batches, wider and further from 0 with the number; those in `bad` are
    not finite, every second of them in the gradient alone. Returns the latents of the others, in numpy.
    """
    kept = []
    for step in steps:
        z = random(2, 30, DIM, seed=step) * (1 + step / 20) + step / 40
        if step not in bad:
            kept.append(z.numpy().copy())
        elif step % 2 == 0:
            z[1, 3, 2] = float("nan")
        chosen = [tv.Codes(part, part, torch.full((30,), step % CODES), {}) for part in z]
        into.record(chosen, 3, torch.tensor(step not in bad))
    return np.concatenate(kept)


@pytest.mark.parametrize("steps, bad", [(1, ()), (7, ()), (100, ()), (7, (0, 1, 2)), (97, (3, 50, 99))])
def test_latent_deviation_is_numpys(steps, bad):
    """Over all latents of up to 100 steps of equal size, but for those that were not finite.

    Red when the mean is left out, a step is weighted by anything but 1 / (steps so far), or a skipped one counts.
    """
    found = statistics()
    expected = recorded(found, range(steps + len(bad)), bad)
    assert expected.shape == (2 * steps, 30, DIM)
    assert found.latent_deviation() == pytest.approx(expected.astype(np.float64).std(), rel=1e-5)


def test_latent_deviation_is_that_of_the_last_steps():
    """600 steps later the first hundred are all but forgotten. Red when every step ever taken counts alike."""
    found = statistics()
    for i in range(700):
        z = random(60, DIM, seed=i) * (3 if i < 100 else 1)
        found.record([tv.Codes(z, z, torch.zeros(60, dtype=torch.long), {})], 4, torch.tensor(True))
    assert found.latent_deviation() == pytest.approx(1, rel=0.02)


def assert_same_statistics(ours, theirs):
    ours, theirs = (statistics.state_dict() for statistics in (ours, theirs))
    assert ours.keys() == theirs.keys() and ours["latents"].shape == (4, 10, DIM)
    for name, value in ours.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[name])), name


def test_statistics_go_on_where_they_were_saved():
    """Halves of 40 steps around a state_dict are as the whole.

    Red when steps, moments, latents, tokens or a count is not in it.
    """
    whole, before, after = statistics(), statistics(), statistics()
    expected = recorded(whole, range(40), bad=(30,))
    recorded(before, range(25))
    after.load_state_dict(before.state_dict())
    assert_same_statistics(after, before)
    recorded(after, range(25, 40), bad=(30,))
    assert_same_statistics(after, whole)
    assert after.latent_deviation() == pytest.approx(expected.astype(np.float64).std(), rel=1e-5)
    assert after.since_log.sum() == after.since_restart.sum() == 39 * 60


# ---- Another quantiser


class FiniteScalar(torch.nn.Module):
    """FSQ (Mentzer et al. 2023, https://arxiv.org/abs/2309.15505): each dimension of a latent is rounded to one of its
    levels, an odd number of them, evenly spaced around 0; a code is a point of their grid. Nothing is learnt.
    """

    def __init__(self, levels, spacing):
        super().__init__()
        self.spacing = spacing
        grid = torch.cartesian_prod(*(torch.arange(n) - n // 2 for n in levels)) * spacing
        strides = torch.tensor([math.prod(levels[i + 1 :]) for i in range(len(levels))])
        for name, constant in {"last": torch.tensor(levels) // 2, "grid": grid, "strides": strides}.items():
            self.register_buffer(name, constant, persistent=False)

    def codebook(self):
        return self.grid

    def forward(self, z):
        batch, dim, height, width = z.shape
        z = tv.at_least_fp32(z).permute(0, 2, 3, 1).reshape(-1, dim)
        places = (z / self.spacing).round().clamp(-self.last, self.last)
        indices = ((places + self.last) * self.strides).sum(1).long()
        e = places * self.spacing
        z_q = (z + (e - z).detach()).reshape(batch, height, width, dim).permute(0, 3, 1, 2).contiguous()
        return z_q, tv.Codes(z, e, indices, {}), (None, None, indices)


LEVELS = [3, 3, 3, 5]


def test_another_quantiser_in_one_place(flags, train, monkeypatch, tmp_path):
    """FSQ, known to build_quantizer alone, trains, is validated, saved, resumed and exported as a plain VQModel that
    chooses the same codes.

    Red when anything else asks the quantiser for an embedding, or for terms that it does not have.
    """
    change_model(flags, num_vq_embeddings=math.prod(LEVELS))
    monkeypatch.setattr(tv, "build_quantizer", lambda plain, args: FiniteScalar(LEVELS, 0.1))
    more = [
        "--codebook_restart_steps",
        "0",
        "--use_ema",
        "--adaptive_weight",
        "--discriminator_start",
        "1",
        "--perceptual_weight",
        "0",
    ]
    more += ["--learning_rate", "1e-2", "--lr_warmup_steps", "0", "--log_steps", "1"]
    more += ["--validation_fraction", "0.3", "--validation_steps", "2", "--checkpointing_steps", "2"]
    whole = train(*more, "--max_train_steps", "4", "--output_dir", str(tmp_path / "whole"))
    more += ["--output_dir", str(tmp_path / "parts")]
    train(*more, "--max_train_steps", "2")
    parts = train(*more, "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    assert metrics(parts) == metrics(whole)
    for name in ("generator", "ema", "discriminator"):
        assert equal(weights(parts, name), weights(whole, name))
    moved = [not torch.equal(a, weights(whole, step=2)[name]) for name, a in weights(whole).items()]
    assert sum(moved) > 0.9 * len(moved)
    assert "loss/codebook" not in metrics(whole)[0] and metrics(whole)[-1]["val/codebook_used_n2"] > 0

    plain = diffusers.VQModel.from_pretrained(whole / "vqmodel")
    assert type(plain.quantize) is VectorQuantizer and plain.config.num_vq_embeddings == 135
    ours = FiniteScalar(LEVELS, 0.1)
    assert torch.equal(plain.quantize.embedding.weight, ours.codebook())
    with torch.no_grad():
        latents = plain.encode(random(4, 3, 64, 64).clamp(-1, 1)).latents
        z_q, codes, _ = ours(latents)
        theirs, _, (_, _, indices) = plain.quantize(latents)
    assert codes.indices.unique().numel() > 20
    assert torch.equal(codes.indices, indices)
    torch.testing.assert_close(z_q, theirs)


@pytest.mark.parametrize("keep", [CODES, 60])
def test_latents_for_restarts_are_those_of_one_process(keep):
    """Six steps of four images of 5 tokens, as one process sees them, and as two and four do between them.

    Red when each process keeps tokens instead of images, or when they are not put into the order of the samples.
    """
    samples = random(24, 5, DIM)

    class Process(tv.CodeStatistics):
        def __init__(self, world):
            super().__init__(tv.Quantizer(CODES, DIM, "none"), True, Accelerator(cpu=True))
            self.processes, self.keep = world, keep

    for world in (1, 2, 4):
        processes = [Process(world) for _ in range(world)]
        for step in range(6):
            for rank, process in enumerate(processes):
                z = samples[4 * step + rank : 4 * step + 4 : world].flatten(0, 1)
                process.record(
                    [tv.Codes(z, z, torch.zeros(len(z), dtype=torch.long), {})], 4 // world, torch.tensor(True)
                )
        gathered = torch.cat([process.latents for process in processes])
        processes[0].accelerator = SimpleNamespace(gather=lambda _, all_of_them=gathered: all_of_them)
        found = processes[0].latest_latents()[-processes[0].images_kept() :]
        assert len(found) == -(-keep // 5) and torch.equal(found, samples[-len(found) :])
