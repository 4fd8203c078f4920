"""What is trained beside the adapters, modules and biases, is float32 whatever the base's dtype."""

import pytest
import torch
from families import FAMILIES
from jobs import events_of, job_for
from safetensors.torch import load_file

from lorafit.adapter.folder import WEIGHTS
from lorafit.events import Stepped
from lorafit.forward.head import Forward
from lorafit.train.checkpoint import trainable

WHOLE = {
    "llama": "modules_to_save: [lm_head, norm]",
    "gpt2": "bias: all",
    "gpt_neox": "bias: all",
    "opt": "bias: lora_only",
    "bloom": "bias: all, modules_to_save: [word_embeddings]",
    "bert": "bias: all",
    "t5": "modules_to_save: [final_layer_norm]",
    "gpt_oss": "modules_to_save: [router]",
    "jamba": "bias: all",
}


def job_of(tiny, pairs, tmp_path, family, dtype, name="r", **more):
    preset = tmp_path / "p.yaml"
    preset.write_text(f"roles: [q, v]\nlayers: high\nlora: {{r: 4, alpha: 8, {WHOLE[family]}}}\n")
    return job_for(
        tiny(family), tmp_path / name, data=(str(pairs),), preset=str(preset), dtype=dtype, batch_size=8, max_steps=4,
        max_length=100, learning_rate=2e-4, warmup=0.0, scheduler="constant", **more,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", WHOLE)
def test_it_is_trained_and_saved_in_float32_and_every_weight_moves(tiny, pairs, tmp_path, family, dtype):
    job = job_of(tiny, pairs, tmp_path, family, dtype)
    before = {name: p.detach().clone() for name, p in trainable(job.model).items()}
    whole = [name for name in before if "lora_" not in name]
    assert whole and all(p.dtype == torch.float32 for p in job.parameters)
    base = {str(p.dtype).removeprefix("torch.") for p in job.model.parameters() if not p.requires_grad}
    assert dtype in base
    steps = [e for e in events_of(job) if isinstance(e, Stepped)]
    assert len(steps) == 4 and all(e.loss > 0 for e in steps)
    after = trainable(job.model)
    moved = [name for name in whole if (after[name] != before[name]).float().mean() > 0.5]
    assert moved, "updates of 2e-4 are below bfloat16's rounding of most weights"
    saved = load_file(tmp_path / "r" / WEIGHTS)
    assert saved and {t.dtype for t in saved.values()} == {torch.float32}
    rounded = after[moved[0]].to(getattr(torch, dtype)).float()
    assert not torch.equal(rounded, after[moved[0]]), "more digits are kept than the base's dtype has"


@pytest.mark.parametrize("family", WHOLE)
def test_the_model_computes_as_it_did_in_its_own_dtype(tiny, pairs, tmp_path, family):
    """Before a step the logits are those of the base to the bit, in its dtype."""
    job = job_of(tiny, pairs, tmp_path, family, "bfloat16")
    task = FAMILIES[family].task
    from lorafit.model import find, load_model

    base = load_model(find(str(tiny(family))), torch.bfloat16, torch.device("cpu"))
    batch = next(job.optimizer_steps(0))[2][0]
    with torch.no_grad():
        wanted = Forward.of(base, task).logits(base, batch)
        got = Forward.of(job.model, task).logits(job.model.eval(), batch)
    assert got.dtype == wanted.dtype == torch.bfloat16 and torch.equal(got, wanted)


def test_it_is_resumed_to_the_bit(tiny, pairs, tmp_path):
    from lorafit.errors import Interrupted

    straight = events_of(job_of(tiny, pairs, tmp_path, "gpt2", "bfloat16", "whole"))
    with pytest.raises(Interrupted):
        events_of(job_of(tiny, pairs, tmp_path, "gpt2", "bfloat16", stop=lambda: 2))
    resumed = events_of(job_of(tiny, pairs, tmp_path, "gpt2", "bfloat16", resume=True))
    assert resumed[-1].eval == straight[-1].eval
    assert (tmp_path / "r" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
