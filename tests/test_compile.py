"""--torch_compile: the same training, faster."""

import pytest
import torch
from conftest import equal, exported, metrics

import train_vqgan

pytestmark = pytest.mark.slow

STEPS = ("--max_train_steps", "5", "--log_steps", "1", "--discriminator_start", "1", "--discriminator_warmup", "2")
# flags, and graphs: encoder, decoder, perceptual loss, the discriminator frozen and in training; under the adaptive
# weight the decoder is its middle and its two blocks, and the judges come back for gradients of their own
EXTRAS = {
    "plain": ((), 5),
    "kept": (("--no-gradient_checkpointing", "--use_ema", "--gradient_accumulation_steps", "2"), 5),
    "adaptive": (("--adaptive_weight", "--adversarial_weight", "0.5"), 7),
}


@pytest.fixture
def graphs():
    """graphs() -> number of graphs compiled since the last call."""
    torch._dynamo.reset()

    def count():
        assert not torch._dynamo.utils.counters["graph_break"]
        found = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch._dynamo.utils.counters.clear()
        return found

    count()
    yield count
    torch._dynamo.reset()


@pytest.mark.parametrize("extras", EXTRAS)
def test_compiled_as_eager(train, tmp_path, float64, graphs, extras):
    """In float64: every logged number to 1e-6, every exported weight to 1e-6, and the same names.

    Red when only the compiled run clips to half the norm.
    """
    more, expected = [*STEPS, *EXTRAS[extras][0]], EXTRAS[extras][1]
    eager = train(*more, "--output_dir", str(tmp_path / "eager"))
    assert graphs() == 0
    compiled = train(*more, "--output_dir", str(tmp_path / "compiled"), "--torch_compile")
    assert graphs() == expected
    for one, other in zip(metrics(eager), metrics(compiled), strict=True):
        assert other == pytest.approx(one, rel=1e-6, abs=1e-9), one["step"]
    for part in ("vqmodel", "discriminator"):
        one, other = exported(eager, part), exported(compiled, part)
        assert list(one) == list(other)
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_compiled_run_resumes(train, tmp_path, float64, graphs):
    """Compiled to step 3 and compiled on to step 5 is compiled to step 5; other sizes in validation compile nothing."""
    more = [*STEPS, "--torch_compile", "--checkpointing_steps", "3", "--lr_scheduler", "constant"]
    whole = train(*more, "--output_dir", str(tmp_path / "whole"))
    needed = graphs()
    train(*more, "--output_dir", str(tmp_path / "parts"), "--max_train_steps", "3")
    torch._dynamo.reset()
    graphs()
    held_out = ("--validation_fraction", "0.3", "--validation_steps", "1")
    parts = train(*more, "--output_dir", str(tmp_path / "parts"), "--resume_from_checkpoint", "latest")
    assert 0 < graphs() <= needed
    assert metrics(whole)[-1] == pytest.approx(metrics(parts)[-1], rel=1e-9)
    assert equal(exported(parts), exported(whole))
    torch._dynamo.reset()
    validated = train(*more, *held_out, "--output_dir", str(tmp_path / "validated"))
    assert any("val/psnr" in key for line in metrics(validated) for key in line)
    assert graphs() == needed, "compiled again"
    assert train_vqgan.Discriminator.from_pretrained(parts / "discriminator")
