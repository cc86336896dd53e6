"""scripts/convert_to_diffusers.py: models of other projects, on state dicts with their names and shapes made here.

`plan` says what each original does, in its own names; the tests build random weights of it, run it as it says, and
compare the converted VQModel. docs/tokenizers.md has the comparison with the original code.
"""

import argparse
import json
import os
import pydoc
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, equal, exported, without
from diffusers import VQModel
from diffusers.image_processor import VaeImageProcessor

import train_vqgan

sys.path.insert(0, str(REPOSITORY / "scripts"))
import convert_to_diffusers  # noqa: E402

KINDS = ["taming", "llamagen", "open_muse", "maskbit", "maskbit_legacy", "maskbit_lookup_free"]
MASKGIT = KINDS[2:]  # kinds with MaskGIT's blocks


def plan(kind, widths=(32, 64), layers=2, z=4, attention=True, decoder_layers=None):
    """(encoder, decoder) of the original as lists of (what it does, name, channels in, channels out)."""
    maskgit, top = kind in MASKGIT, len(widths) - 1
    block = {"taming": "block", "llamagen": "res", "open_muse": "block"}.get(kind, "res_blocks")
    down = "conv_blocks" if kind == "llamagen" else "down"
    attention = attention and not maskgit

    def middle(part, count):
        names = {"taming": ["block_1", "attn_1", "block_2"], "llamagen": ["0", "1", "2"]}.get(kind)
        names = names or [f"{'' if kind == 'open_muse' else 'res_blocks.'}{i}" for i in range(count)]
        kinds = ["block"] * len(names) if maskgit else ["block", "attention", "block"]
        return [(what, f"{part}.mid.{name}", widths[-1], widths[-1]) for what, name in zip(kinds, names)]

    def level_blocks(name, last, width_in, width, count):
        for j in range(count):
            yield "block", f"{name}.{block}.{j}", width_in if j == 0 else width, width
            if last and attention:
                yield "attention", f"{name}.attn.{j}", width, width

    encoder, width_in = [("conv", "encoder.conv_in", 3, widths[0])], widths[0]
    for i, width in enumerate(widths):
        name = f"encoder.{down}.{i}"
        encoder += level_blocks(name, i == top, width_in, width, layers)
        if i < top and kind == "open_muse":
            encoder.append(("average", name, width, width))
        elif i < top:
            encoder.append(("halve", f"{name}.{'down_conv' if maskgit else 'downsample.conv'}", width, width))
        width_in = width
    encoder += middle("encoder", layers)
    encoder.append(("norm", "encoder.norm_out", widths[-1], widths[-1]))
    encoder.append(("conv1x1" if maskgit else "conv", "encoder.conv_out", widths[-1], z))

    deep = decoder_layers or layers + (not maskgit)
    decoder = [("conv", "decoder.conv_in", z, widths[-1]), *middle("decoder", deep)]
    for i in reversed(range(len(widths))):
        in_order_of_use = kind in ("llamagen", "maskbit", "maskbit_lookup_free")
        name = f"decoder.{'conv_blocks' if kind == 'llamagen' else 'up'}.{top - i if in_order_of_use else i}"
        decoder += level_blocks(name, i == top, widths[min(i + 1, top)], widths[i], deep)
        if i > 0:
            decoder.append(
                ("double", f"{name}.{'upsample_conv' if maskgit else 'upsample.conv'}", widths[i], widths[i])
            )
    decoder += [("norm", "decoder.norm_out", widths[0], widths[0]), ("conv", "decoder.conv_out", widths[0], 3)]
    return encoder, decoder


def state_of(kind, *, z=4, dim=3, codes=32, tensor=torch.randn, **options):
    """A state dict of the original with weights that no two tensors share, norms included."""
    maskgit, state = kind in MASKGIT, {}

    def conv(name, width_in, width, side, bias=True):
        state[f"{name}.weight"] = tensor(width, width_in, side, side) / (width_in * side**2) ** 0.5
        if bias:
            state[f"{name}.bias"] = tensor(width) / 10

    def norm(name, width):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + tensor(width) / 5, tensor(width) / 10

    for what, name, width_in, width in sum(plan(kind, z=z, **options), []):
        if what == "block":
            norm(f"{name}.norm1", width_in)
            conv(f"{name}.conv1", width_in, width, 3, bias=not maskgit)
            norm(f"{name}.norm2", width)
            conv(f"{name}.conv2", width, width, 3, bias=not maskgit)
            if width_in != width:
                conv(f"{name}.nin_shortcut", width if maskgit else width_in, width, 1, bias=not maskgit)
        elif what == "attention":
            norm(f"{name}.norm", width)
            for part in ("q", "k", "v", "proj_out"):
                conv(f"{name}.{part}", width, width, 1)
        elif what == "norm":
            norm(name, width)
        elif what != "average":
            bias_free = maskgit and name == "encoder.conv_in"
            conv(name, width_in, width, 1 if what == "conv1x1" else 3, bias=not bias_free)
    if not maskgit:
        conv("quant_conv", z, dim, 1)
        conv("post_quant_conv", dim, z, 1)
    if kind == "maskbit_lookup_free":  # 2^z signs
        bits = 2 ** torch.arange(z)
        state["quantize.bits_to_indices"] = bits.int()
        state["quantize.codebook"] = ((torch.arange(2**z)[:, None] & bits) != 0).float() * 2 - 1
    else:
        state["quantize.embedding.weight"] = tensor(codes, z if maskgit else dim)
    return state


def run(kind, state, x):
    """(latents, codes, images) of the original."""

    def conv(x, name, **options):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state.get(f"{name}.bias"), **{"padding": weight.shape[-1] // 2} | options)

    def norm(x, name):
        return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def step(what, name, x):
        if what == "block":
            h = conv(F.silu(norm(x, f"{name}.norm1")), f"{name}.conv1")
            h = conv(F.silu(norm(h, f"{name}.norm2")), f"{name}.conv2")
            if f"{name}.nin_shortcut.weight" in state:
                x = conv(h if kind in MASKGIT else x, f"{name}.nin_shortcut")  # MaskGIT's takes the block's output
            return x + h
        if what == "attention":
            q, k, v = (conv(norm(x, f"{name}.norm"), f"{name}.{part}").flatten(2) for part in "qkv")
            weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(2)
            return x + conv((v @ weights.transpose(1, 2)).reshape(x.shape), f"{name}.proj_out")
        if what == "norm":
            return F.silu(norm(x, name))
        if what == "average":
            return F.avg_pool2d(x, 2)
        if what == "halve":
            return conv(F.pad(x, (0, 1, 0, 1)), name, stride=2, padding=0)
        return conv(F.interpolate(x, scale_factor=2) if what == "double" else x, name)

    encoder, decoder = plan(kind)
    for what, name, *_ in encoder:
        x = step(what, name, x)
    z = conv(x, "quant_conv") if "quant_conv.weight" in state else x
    vectors = z.permute(0, 2, 3, 1)
    if kind == "maskbit_lookup_free":
        codes = ((vectors > 0) * state["quantize.bits_to_indices"].long()).sum(-1)
        e = torch.where(vectors > 0, 1.0, -1.0)
    else:
        book = state["quantize.embedding.weight"]
        if kind == "llamagen":
            vectors, book = F.normalize(vectors, dim=-1), F.normalize(book, dim=-1)
        codes = (vectors.unsqueeze(-2) - book).square().sum(-1).argmin(-1)
        e = book[codes]
    x = e.permute(0, 3, 1, 2).to(x)
    x = conv(x, "post_quant_conv") if "post_quant_conv.weight" in state else x
    for what, name, *_ in decoder:
        x = step(what, name, x)
    return z, codes, x


def as_published(kind, state, junk):
    """The content of a file as the project writes it; `junk`: what is no tensor in it."""
    wrong = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    if kind == "taming":
        state = state | {"loss.discriminator.main.0.weight": torch.zeros(3)}
        return {"epoch": 1, "state_dict": state, "callbacks": {"x": junk}, "optimizer_states": [junk]}
    if kind == "llamagen":
        state = state | {"quantize.codebook_used": torch.zeros(65536)}
        return {"model": wrong, "ema": state, "args": junk}
    return state


@pytest.fixture
def convert(tmp_path, capsys):
    """convert(content of the file) -> (the directory, what was printed)."""

    def run(content):
        torch.save(content, tmp_path / "last.ckpt")
        assert convert_to_diffusers.main([str(tmp_path / "last.ckpt"), str(tmp_path / "converted")]) == 0
        return tmp_path / "converted", capsys.readouterr().out

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_gives_the_original_s_latents_codes_and_images(convert, kind):
    """Red when `fold_maskgit` leaves the identity out of `both`, when `last - int(...)` is `int(...)`, when the codes
    are not normalised, when the mean of 2x2 pixels becomes a sum, or when the blocks in the middle change places.
    """
    torch.manual_seed(3)
    state = state_of(kind)
    x = torch.rand(2, 3, 16, 24).double() * 2 - 1
    z, codes, images = run(kind, {name: tensor.double() for name, tensor in state.items()}, x)
    assert len(codes.unique()) > 5
    folder, said = convert(as_published(kind, state, argparse.Namespace(a=1)))
    model = VQModel.from_pretrained(folder / "vqmodel").double()
    with torch.no_grad():
        latents = model.encode(x).latents
        indices = model.quantize(latents)[2][2]
        assert torch.allclose(latents, z, atol=2e-6, rtol=0)  # the file holds fp32
        assert torch.equal(indices.reshape(codes.shape), codes)
        assert torch.allclose(model(x).sample, images, atol=2e-5, rtol=0)
    unit = kind in MASKGIT
    assert VaeImageProcessor.load_config(folder / "image_processor")["do_normalize"] is not unit
    assert ("--pixel_range=unit" in said) == unit


PUBLISHED = {  # what each kind's configuration gives, as far as a state dict can say it
    "taming_16x": ("taming", {"widths": (128, 128, 256, 256, 512), "z": 256, "dim": 256, "codes": 1024}),
    "llamagen_16x": ("llamagen", {"widths": (128, 128, 256, 256, 512), "z": 256, "dim": 8, "codes": 16384}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_architecture_follows_from_the_tensors(name):
    """The configs in configs/model were written by hand. Red when up_block_types are not reversed."""
    kind, shape = PUBLISHED[name]
    state = state_of(kind, tensor=lambda *shape: torch.zeros(shape, device="meta"), **shape)
    family = {"taming": "taming", "llamagen": "LlamaGen"}[kind]
    config = convert_to_diffusers.infer_config(convert_to_diffusers.renamed(state, family), family)
    ours = json.loads((REPOSITORY / "configs" / "model" / f"{name}.json").read_text())
    left = {"scaling_factor", "mid_block_add_attention"}  # not in both
    assert {key: value for key, value in config.items() if key not in left} == {
        key: ours[key] for key in config.keys() - left
    }
    assert config["mid_block_add_attention"]


@pytest.mark.parametrize("prefix", ["first_stage_model.", "module."])
def test_a_model_is_taken_out_of_what_holds_it(convert, prefix):
    """A latent diffusion model, or DistributedDataParallel. Red when that prefix is not removed."""
    state = state_of("taming", attention=False)
    whole = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    whole |= {"model.diffusion_model.out.weight": torch.zeros(2), "first_stage_model.colorize": torch.zeros(1)}
    folder, _ = convert({"state_dict": whole})
    assert torch.equal(exported(folder)["encoder.conv_in.weight"], state["encoder.conv_in.weight"])


@pytest.mark.parametrize("kind", ["taming", "open_muse"])
def test_the_training_script_takes_a_converted_model(convert, flags, tmp_path, kind):
    """At learning rate 0 it exports what it got. Red when the layout is another, such as model/ for vqmodel/."""
    folder, said = convert(state_of(kind))
    flags = without(flags, "--model_config_name_or_path")
    named = said.split("For train_vqgan.py: ")[1].split()  # with --pixel_range where it is needed
    assert train_vqgan.main([*flags, *named, "--learning_rate", "0", "--max_train_steps", "1"]) == 0
    assert equal(exported(folder), exported(tmp_path / "run"))
    processors = [VaeImageProcessor.load_config(path / "image_processor") for path in (folder, tmp_path / "run")]
    assert processors[0] == processors[1]


# ---- Files that hold more than tensors, or something else ----------------------------------------------------------


@pytest.fixture
def foreign(monkeypatch):
    """foreign("module.Class") -> a class that pickle finds there, and that must never be made when reading."""

    def make(path):
        def made(self, state):
            raise AssertionError(f"{path} was made")

        module, name = path.rsplit(".", 1)
        home = sys.modules.get(module) or types.ModuleType(module)
        cls = type(name, (), {"__module__": module, "__setstate__": made})
        for part in (".".join(module.split(".")[: i + 1]) for i in range(module.count(".") + 1)):
            monkeypatch.setitem(sys.modules, part, home if part == module else types.ModuleType(part))
        setattr(home, name, cls)
        return cls

    return make


def filled(cls, **attributes):
    thing = cls()
    thing.__dict__.update(attributes)
    return thing


def test_what_is_no_tensor_is_neither_imported_nor_made(convert, foreign, monkeypatch, tmp_path):
    """Red when a name is missing in INERT, or when a stand-in is the class itself."""
    checkpoint = foreign("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    config, node = foreign("omegaconf.dictconfig.DictConfig"), foreign("omegaconf.nodes.AnyNode")
    metadata = foreign("omegaconf.base.ContainerMetadata")
    junk = {
        checkpoint: {"best_model_score": torch.zeros(1), "best_model_path": "x"},
        "config": filled(config, _metadata=filled(metadata, ref_type=dict), _content={"a": filled(node, _val=1)}),
        "score": np.float64(0.5),
        "args": argparse.Namespace(codebook_size=16384),
    }
    state = state_of("taming")
    torch.save({"state_dict": state, "callbacks": junk}, tmp_path / "last.ckpt")
    for name in [name for name in sys.modules if name.split(".")[0] in ("pytorch_lightning", "omegaconf")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(Exception, match="GLOBAL"):  # torch alone refuses the file
        torch.load(tmp_path / "last.ckpt", weights_only=True)
    tensors = convert_to_diffusers.read_tensors(str(tmp_path / "last.ckpt"))
    assert equal(tensors, state)
    assert not {"pytorch_lightning", "omegaconf"} & sys.modules.keys()


MENTIONED = """argparse.Namespace builtins.dict builtins.int builtins.list builtins.str collections.defaultdict typing.Any
    pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint pytorch_lightning.callbacks.early_stopping.EarlyStopping
    pytorch_lightning.utilities.parsing.AttributeDict omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig
    omegaconf.base.Metadata omegaconf.base.ContainerMetadata omegaconf.nodes.AnyNode numpy.ndarray numpy.dtype
    numpy._core.multiarray.scalar numpy._core.multiarray._reconstruct numpy.core.multiarray.scalar
    numpy.core.multiarray._reconstruct""".split()


@pytest.mark.parametrize("name", MENTIONED)
def test_a_file_may_mention_what_published_ones_do(name, monkeypatch, tmp_path):
    """Each name by itself. Red when it is left out of INERT."""
    module, _, last = name.rpartition(".")
    if module.startswith(("pytorch_lightning", "omegaconf", "numpy.core.")):  # of packages that need not be here
        thing = type(last, (), {"__module__": module})
        for part in (module[:at] for at, sign in enumerate(module + ".") if sign == "."):
            monkeypatch.setitem(sys.modules, part, sys.modules.get(part) or types.ModuleType(part))
        monkeypatch.setattr(sys.modules[module], last, thing, raising=False)
    else:
        thing = pydoc.locate(name)
    state, path = state_of("taming"), tmp_path / "last.ckpt"
    torch.save({"state_dict": state, "hyper_parameters": thing}, path)
    monkeypatch.undo()
    with pytest.raises(Exception, match=f"GLOBAL {name.removeprefix('builtins.')}"):  # torch alone refuses the file
        torch.load(path, weights_only=True)
    assert equal(convert_to_diffusers.read_tensors(str(path)), state)


class Malicious:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture
def refusal(tmp_path, capsys):
    """refusal(file) -> the one line of a conversion that must fail with status 2 and write nothing."""

    def run(path):
        assert convert_to_diffusers.main([str(path), str(tmp_path / "converted")]) == 2
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert not out and len(lines) == 1 and lines[0].startswith(f"convert_to_diffusers.py: error: {path}: "), err
        assert not (tmp_path / "converted").exists()
        return lines[0]

    return run


@pytest.mark.parametrize("name", ["posix.mkdir", "exec"])
def test_a_malicious_file_runs_nothing(refusal, tmp_path, name):
    """Red when the file is read with weights_only=False."""
    made = str(tmp_path / "made")
    code = f"import os; os.mkdir({made!r})"
    call = {"posix.mkdir": (os.mkdir, made), "exec": (exec, code)}[name]
    torch.save({"state_dict": state_of("taming"), "callbacks": Malicious(*call)}, tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=False)
    os.rmdir(made)  # so the file does run, for whoever lets it
    line = refusal(tmp_path / "last.ckpt")
    assert f"asks for {name}, which is not known to be harmless" in line
    assert not os.path.exists(made)


def test_a_file_cannot_call_what_stands_in(refusal, tmp_path, monkeypatch):
    """Arguments and state come to nothing. Red when Inert takes no arguments, or has no __setstate__."""
    monkeypatch.setattr(argparse.Namespace, "__init__", lambda self, *args: None)
    things = [Malicious(argparse.Namespace, 1, 2), filled(argparse.Namespace, __class__="x", keys=1)]
    things.append(Malicious(argparse.Namespace))
    things[-1].call += ([1, 2],)  # a state that is no dict of attributes
    torch.save({"x": things}, tmp_path / "last.ckpt")
    assert "no encoder.conv_in.weight among its 0 tensors" in refusal(tmp_path / "last.ckpt")


def renamed(state, old, new):
    return {name.replace(old, new): tensor for name, tensor in state.items()}


def lacking(state, part):
    assert any(part in name for name in state)
    return {name: tensor for name, tensor in state.items() if part not in name}


CONTENTS = {
    "a classifier": (lambda: {"fc.weight": torch.zeros(2, 2)}, "no encoder.conv_in.weight among its 1 tensors"),
    "a list": (lambda: [1, 2], "no encoder.conv_in.weight among its 0 tensors"),
    "a KL autoencoder": (lambda: lacking(state_of("taming"), "quantize."), "no quantize.embedding.weight"),
    "MAGVIT2": (lambda: state_of("open_muse") | {"decoder.adaptive.0.gamma.weight": torch.zeros(2)}, "MAGVIT2"),
    "Gumbel": (lambda: state_of("taming") | {"quantize.proj.weight": torch.zeros(2)}, "Gumbel"),
    "a deep middle": (lambda: state_of("maskbit", decoder_layers=3), "two blocks in the middle"),
    "a tensor short": (lambda: lacking(state_of("taming"), "up.1.block.2.conv1.bias"), "0.resnets.2.conv1.bias"),
    "a tensor more": (lambda: state_of("taming") | {"quantize.used": torch.zeros(2)}, "quantize.used"),
    "half of MaskGIT": (lambda: lacking(state_of("open_muse"), "up.1.block.1.conv2"), "0.resnets.1.conv2.weight"),
    "diffusers": (lambda: renamed(state_of("taming"), ".mid.block_1", ".mid_block.resnets.0"), "diffusers' names"),
    "other names": (lambda: renamed(state_of("taming"), ".mid.", ".centre."), "not named as those of taming"),
    "odd widths": (lambda: state_of("taming", widths=(32, 48)), "cannot build"),
    "no levels": (lambda: lacking(state_of("taming"), "encoder.down"), "no encoder.down_blocks.0.resnets.0"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_what_a_vqmodel_cannot_hold_is_refused_with_the_reason(refusal, tmp_path, name):
    """Red when an entry of REFUSED is missing, or when load_state_dict is told strict=False."""
    make, words = CONTENTS[name]
    torch.save(make(), tmp_path / "last.ckpt")
    assert words in refusal(tmp_path / "last.ckpt")


@pytest.mark.parametrize("name", ["truncated", "empty", "text", "picture", "missing", "folder"])
def test_a_file_of_another_kind_is_one_line(refusal, tmp_path, name):
    """Red when only UnpicklingError is caught."""
    path = tmp_path / "last.ckpt"
    if name == "truncated":
        torch.save(state_of("taming"), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif name == "folder":
        path.mkdir()
    elif name == "picture":
        path.write_bytes(next((REPOSITORY / "images" / "train").iterdir()).read_bytes())
    elif name != "missing":
        path.write_text("" if name == "empty" else "hello\n")
    line = refusal(path)
    assert ("no such file" if name in ("missing", "folder") else "no checkpoint that can be read") in line


def test_an_output_that_exists_is_left_alone(tmp_path, capsys):
    """Red without the check."""
    torch.save(state_of("taming"), tmp_path / "last.ckpt")
    (tmp_path / "converted").mkdir()
    assert convert_to_diffusers.main([str(tmp_path / "last.ckpt"), str(tmp_path / "converted")]) == 2
    assert "exists already" in capsys.readouterr().err and not [*(tmp_path / "converted").iterdir()]
