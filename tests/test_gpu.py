"""What training does on a GPU, checked without one: types under CUDA's autocast, layouts, waits, and copies."""

import pytest
import torch
from conftest import exported, metrics

import train_vqgan

# ---- Layouts of weights


def strides_of(run):
    """Pairs of strides, of each weight and of a moment or an average that goes with it."""
    for optimizer in run.state.optimizers.values():
        for weight, moments in optimizer.state.items():
            yield from ((weight.stride(), moments[name].stride()) for name in ("exp_avg", "exp_avg_sq"))
    yield from ((w.stride(), s.stride()) for w, s in zip(run.state.generator.parameters(), run.state.ema.shadow_params))


@pytest.mark.parametrize("layouts", ["last last", "last first", "first last"])
def test_resume_across_layouts_of_weights(train, tmp_path, float64, monkeypatch, layouts):
    """Two steps with one layout of the convolutions' weights and two with another are four steps, with EMA.

    Red when the moments, or the averages, keep the strides they were saved with: fused steps then mix up numbers.
    """
    more = ("--max_train_steps", "4", "--log_steps", "1", "--use_ema", "--lr_scheduler", "constant", "--ema_decay", "0.5")
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
