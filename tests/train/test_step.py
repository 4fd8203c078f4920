"""A run beside a plain one: PEFT, torch's AdamW, transformers' schedule, and a mean over the supervised tokens."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import FAMILIES, build_model, save_model
from jobs import events_of, job_for
from peft import LoraConfig, get_peft_model

from lorafit.data.rows import IGNORED
from lorafit.evaluate.score import Evaluator
from lorafit.events import EpochDone, Note, Stepped
from lorafit.forward.head import Forward
from lorafit.forward.prefix import Prefix
from lorafit.train.checkpoint import trainable
from lorafit.train.objective import TokenLoss
from lorafit.train.step import Stepper

NO_NOISE = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0},
    "mixtral": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
}
PEAK, DECAY, CLIP, ACCUMULATE = 5e-3, 0.3, 0.1, 3


def settings(pairs, **more):
    """Five steps an epoch of three micro-batches, the last of fewer; weights decay, gradients are clipped."""
    return {
        "data": (str(pairs),), "preset": "attention", "layers": "last:2", "batch_size": 3, "accumulate": ACCUMULATE,
        "epochs": 2, "max_length": 100, "learning_rate": PEAK, "scheduler": "cosine", "warmup": 2,
        "weight_decay": DECAY, "max_grad_norm": CLIP, **more,
    }  # fmt: skip


def plainly_trained(family, job, folder, steps, warmup=2):
    """(losses, gradient norms, trained weights by name) of the same steps, done plainly."""
    model = getattr(transformers, FAMILIES[family].model).from_pretrained(folder)
    targets = list(job.plan.modules)
    model = get_peft_model(
        model, LoraConfig(r=job.config.rank, lora_alpha=job.config.alpha, target_modules=targets)
    )
    own = trainable(model)
    for name, start in trainable(job.model).items():
        own[name].data.copy_(start)
    optimizer = torch.optim.AdamW(own.values(), lr=PEAK, weight_decay=DECAY)
    schedule = transformers.get_scheduler("cosine", optimizer, warmup, len(steps))
    losses, norms = [], []
    for batches in steps:
        total, parts = sum(weights_of(b, job.task).sum() for b in batches), []
        for batch in batches:
            labels = batch.labels
            inputs = dict(batch.inputs, labels=labels) if job.task == "seq2seq" else batch.inputs
            output = model(**inputs)
            logits, labels = output.logits[:, : labels.shape[1] - skip(job.task)], labels[:, skip(job.task) :]
            weights_BT = weights_of(batch, job.task)
            loss_N = F.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
            )
            loss = (loss_N * weights_BT.flatten()).sum()
            if family == "mixtral":  # counted as the tokens are
                loss = loss + 0.5 * output.aux_loss * weights_BT.sum()
            (loss / total).backward()
            parts.append(loss.detach() / total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(own.values(), CLIP)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(sum(parts)))
    return losses, norms, own


def weights_of(batch, task):
    """What each place counts, of a batch whose rows each have one weight."""
    learned_BT = batch.labels[..., skip(task) :] != IGNORED
    if not batch.row_weights:
        return learned_BT.float()
    each = torch.tensor(batch.row_weights) / learned_BT.sum(1)
    return learned_BT * each[:, None]


def skip(task):
    return 1 if task == "causal" else 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "mixtral"])
def test_a_run_is_what_peft_adamw_and_transformers_make_of_the_same_batches(
    tmp_path, pairs, family, weighted
):
    if weighted:
        rows = [json.loads(line) for line in pairs.read_text().splitlines()]
        pairs = tmp_path / "weighted.jsonl"
        lines = (json.dumps({**row, "loss_weight": (0.2, 1, 3)[n % 3]}) + "\n" for n, row in enumerate(rows))
        pairs.write_text("".join(lines))
    folder = save_model(family, tmp_path / "m", **NO_NOISE.get(family, {}))
    job = job_for(folder, tmp_path / "r", **settings(pairs))
    steps = [batches for _, _, batches in job.optimizer_steps(0)]
    counts = [[b.supervised for b in batches] for batches in steps]
    assert len(steps) == 2 * job.steps_per_epoch >= 8
    assert len(job.batches) % ACCUMULATE and any(len(set(c)) > 1 for c in counts), (
        "a mean of means would differ"
    )
    losses, norms, plain = plainly_trained(family, job, folder, steps)
    events = events_of(job)
    ours = [e for e in events if isinstance(e, Stepped)]
    assert [e.loss for e in ours] == pytest.approx(losses, rel=1e-5)
    assert [e.grad_norm for e in ours] == pytest.approx(norms, rel=5e-4)
    assert max(norms) > CLIP, "clipping is active"
    epochs = [e for e in events if isinstance(e, EpochDone)]
    for number, epoch in enumerate(epochs, 1):
        own = [e for e in ours if e.epoch == number]
        assert epoch.loss == pytest.approx(sum(e.loss * e.weight for e in own) / sum(e.weight for e in own))
        assert weighted == (abs(sum(e.weight for e in own) - epoch.supervised_tokens) > 1)
    for name, parameter in trainable(job.model).items():
        torch.testing.assert_close(parameter.detach(), plain[name].detach(), atol=1e-5, rtol=0, msg=name)
    assert any(isinstance(e, Note) and "auxiliary loss" in e.text for e in events) == (family == "mixtral")


def test_the_auxiliary_loss_is_transformers_own(tmp_path, pairs):
    """One micro-batch, against the loss that the model makes of its labels."""
    folder = save_model("mixtral", tmp_path / "m", **NO_NOISE["mixtral"])
    job = job_for(folder, tmp_path / "r", **settings(pairs))
    batch = job.micro_batch(0, 0)
    job.model.train()
    wanted = job.model(**batch.inputs, labels=batch.labels).loss
    without = job.model(**batch.inputs, labels=batch.labels, output_router_logits=False).loss
    assert wanted > without + 0.1
    slopes = torch.autograd.grad(wanted, job.parameters)
    chosen = Forward.of(job.model, job.task, chunk=4)
    for head in ("apart", "inside", "whole"):
        from dataclasses import replace

        forward = replace(chosen, head=head)
        loss = forward.loss_sum(job.model, batch) / batch.supervised
        torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
        for got, right in zip(torch.autograd.grad(loss, job.parameters), slopes, strict=True):
            torch.testing.assert_close(got, right, atol=1e-6, rtol=1e-4)


def test_a_stepper_takes_one_step_and_a_check_that_raises_takes_none(tmp_path, pairs, tiny):
    job = job_for(tiny("llama"), tmp_path / "r", **settings(pairs, scheduler="constant", warmup=0))
    before = [p.detach().clone() for p in job.parameters]

    def stop(loss, finite, number, rate):
        raise RuntimeError(f"{number} at {rate}")

    step = Stepper(
        job.model, job.parameters, TokenLoss(Forward.of(job.model, job.task), Prefix()),
        torch.optim.SGD(job.parameters, lr=99.0), torch.amp.GradScaler("cpu", enabled=False), job.device, 1e9, stop,
    )  # fmt: skip
    _, _, batches = next(job.optimizer_steps(0))
    with pytest.raises(RuntimeError, match=r"7 at 0\.5"):
        step(batches, 7, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, job.parameters, strict=True))
    slopes = [p.grad.clone() for p in job.parameters]  # kept from the step that was stopped
    step.optimizer.zero_grad()
    step.check = lambda *_: None
    result = step(batches, 8, 0.5)
    assert result.supervised_tokens == sum(b.supervised for b in batches)
    assert result.grad_norm == pytest.approx(float(torch.stack([s.norm() for s in slopes]).norm()))
    for was, slope, now in zip(before, slopes, job.parameters, strict=True):
        torch.testing.assert_close(now.detach(), was - 0.5 * slope)


@pytest.mark.parametrize(
    "size", [3, 64]
)  # of 64 there is one batch: the order of the rows is always the same
def test_masks_differ_in_each_epoch_and_are_the_same_again(tiny, pairs, tmp_path, size):
    job = job_for(tiny("bert"), tmp_path / "r", **settings(pairs, batch_size=size))

    def masks(epoch):
        found = {}
        for batches in job.micro_batches(epoch):
            for batch in batches:
                rows = batch.inputs["input_ids"] * batch.inputs["attention_mask"]
                for ids, labels in zip(rows.tolist(), batch.labels.tolist(), strict=True):
                    whole = tuple(
                        label if label != IGNORED else one for one, label in zip(ids, labels, strict=True)
                    )
                    found[whole] = [label != IGNORED for label in labels]
        return found

    first, again, second = masks(1), masks(1), masks(2)
    assert first == again and first.keys() == second.keys()
    same = sum(first[row] == second[row] for row in first)
    assert same < len(first) / 4, "the same tokens are hidden in each epoch"


def test_rows_of_the_same_text_are_evaluated_with_other_masks(tiny, pairs, tmp_path):
    job = job_for(tiny("bert"), tmp_path / "r", **settings(pairs))
    rows = job.rows.held_out
    one = max(job.rows.train, key=lambda row: len(row.ids))
    many = type(rows).of([one] * 6)
    evaluator = Evaluator(
        many, Forward.of(job.model, job.task), 4, job.tokenizer, job.found.vocab_size, job.device
    )
    seen = [evaluator.masked(n).labels for n in range(6)]
    assert len(set(seen)) > 3 and seen == [evaluator.masked(n).labels for n in range(6)]


def test_a_mixture_without_an_auxiliary_loss_says_so(tmp_path, pairs):
    """The config asks for it, and the model's forward returns none."""
    model = build_model("llama")
    model.config.output_router_logits = True
    forward = Forward.of(model, "causal")
    assert forward.router == 0.0
    from lorafit.train.loop import _router_note

    assert "not in the training loss" in _router_note(forward)


def test_a_process_without_a_row_takes_its_first_step_in_float16(tmp_path, pairs, tiny):
    """What its scaler would have learned from a loss, it learns from the sum of none."""
    job = job_for(tiny("llama"), tmp_path / "r", **settings(pairs, scheduler="constant_with_warmup"))
    step = Stepper(
        job.model, job.parameters, TokenLoss(Forward.of(job.model, job.task), Prefix()),
        torch.optim.SGD(job.parameters, lr=1.0), torch.amp.GradScaler("cpu", init_scale=1024.0), job.device, 1e9,
        lambda *_: None,
    )  # fmt: skip
    for parameter in job.parameters:  # what the other processes have found
        parameter.grad = torch.full_like(parameter, 1024.0)
    before = [p.detach().clone() for p in job.parameters]
    result = step([], 1, 0.5)
    assert (result.loss, result.tokens) == (0.0, 0)
    for was, now in zip(before, job.parameters, strict=True):
        torch.testing.assert_close(now.detach(), was - 0.5)


def test_checkpointing_that_a_class_does_not_have_is_refused(tmp_path, pairs, tiny, monkeypatch, run):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    words = (tiny("llama"), "--data", pairs, "--max-length", 64, "--gradient-checkpointing")
    for command in ("plan", "train"):
        done = run(command, *words, *(("-o", tmp_path / "r") if command == "train" else ()))
        assert (
            done.code == 2
            and "--gradient-checkpointing: transformers does not support it for LlamaForCausalLM" in done.err
        )
    fitted = run("plan", *words[:-1], "--batch-size", 8, "--fit", "1MB", "--no-probe", "--json")
    assert fitted.code == 0 and not any(
        "checkpointing" in option["flags"] for option in fitted.document["fit"]["alternatives"]
    )
