"""The head's share of a step: the loss and gradients of the plain way, at a part of its work."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import FAMILIES, LLAMA_LIKE, build_config, build_model, tokenizer

from lorafit.data.collate import collate_rows
from lorafit.data.rows import IGNORED, Row, RowSet
from lorafit.evaluate.score import Evaluator
from lorafit.forward.head import Forward

ROWS = [Row(tuple(range(5, 5 + n)), (IGNORED, IGNORED, *range(7, 5 + n)), "x") for n in (9, 4, 17, 12)]
# Heads that scale, divide or bias their logits, beside gemma2 of the families, which caps them.
ODD_HEADS = {
    "cohere": ("CohereConfig", "CohereForCausalLM", {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {"logits_scaling": 4.0}),
    "phi": ("PhiConfig", "PhiForCausalLM", {}),
}


def model_of(name):
    """A frozen tiny model whose blocks' weights of two dimensions in the last layer train."""
    if name in FAMILIES:
        model, task = build_model(name), FAMILIES[name].task
    else:
        config, cls, more = ODD_HEADS[name]
        torch.manual_seed(0)
        model, task = (
            getattr(transformers, cls)(getattr(transformers, config)(**LLAMA_LIKE, **more)),
            "causal",
        )
    model.requires_grad_(False).eval()
    last = [p for n, p in model.named_parameters() if ".3." in n and p.ndim == 2]
    for parameter in last:
        parameter.requires_grad_(True)
    return model, task, last


@pytest.mark.parametrize(("attention", "apart"), [("sdpa", 1e-6), ("eager", 0)])
def test_without_the_mask_a_padded_row_gives_the_same(attention, apart):
    """And the mask is needed where tokens look ahead."""
    model, task, parameters = model_of("llama")
    model.set_attn_implementation(attention)
    batch = batch_of(model, task)
    assert not batch.inputs["attention_mask"].all()
    forward = Forward.of(model, task)
    assert "attention_mask" not in forward.arguments(model, batch)
    made = []
    for way in (forward, replace(forward, masked=True)):
        loss = way.loss_sum(model, batch)
        made.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    for left, right in zip(*made, strict=True):
        torch.testing.assert_close(left, right, rtol=apart, atol=apart * right.abs().max().item())
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.config.is_causal = False
    assert Forward.of(model, task).masked


def batch_of(model, task):
    if task != "masked":
        return collate_rows(ROWS, 0, task)
    rows = Evaluator(RowSet.of(ROWS), Forward.of(model, task), 4, tokenizer(True), 896, torch.device("cpu"))
    return collate_rows([rows.masked(n) for n in range(len(ROWS))], 0, task)


def plainly(model, task, batch):
    """Whole logits, whole cross-entropy, the attention mask given."""
    forward = replace(Forward.of(model, task), masked=True)
    logits = model(**forward.arguments(model, batch)).logits
    labels = batch.labels
    if task == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("name", [*FAMILIES, *ODD_HEADS])
def test_loss_and_gradient_are_those_of_the_plain_way(name):
    model, task, parameters = model_of(name)
    batch = batch_of(model, task)
    wanted = plainly(model, task, batch)
    gradients = torch.autograd.grad(wanted, parameters, allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in gradients)
    for chunk in (0, 3):
        forward = Forward.of(model, task, chunk)
        assert forward.head == ("inside" if name == "t5" else "apart")
        loss = forward.loss_sum(model, batch)
        torch.testing.assert_close(loss, wanted, atol=1e-4, rtol=1e-6)
        for got, right in zip(
            torch.autograd.grad(loss, parameters, allow_unused=True), gradients, strict=True
        ):
            if right is not None:
                torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "t5", "bert", "cohere"])
def test_each_token_counts_its_weight_in_loss_and_gradient(name):
    """Against a cross-entropy of whole logits, each term times its label's weight; also where the head is run
    whole. Held-out losses count the weights alike."""
    from dataclasses import replace

    model, task, parameters = model_of(name)
    rows = [replace(r, weights=tuple((0.25, 1.0, 2.5)[n % 3] for n in range(len(r.labels)))) for r in ROWS]
    evaluator = Evaluator(
        RowSet.of(rows), Forward.of(model, task), 4, tokenizer(True), 896, torch.device("cpu")
    )
    batch = collate_rows(
        [evaluator.masked(n) if task == "masked" else r for n, r in enumerate(rows)], 0, task
    )
    skip = int(task == "causal")
    forward = Forward.of(model, task, 3)
    logits = model(**forward.arguments(model, batch)).logits
    labels = batch.labels[:, skip:]
    logits = logits[:, : labels.shape[1]]
    loss_BT = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    weights_BT = torch.tensor([0.25, 1.0, 2.5]).repeat(labels.shape[1])[skip : labels.shape[1] + skip]
    wanted = (loss_BT * weights_BT).sum()
    assert batch.weight == pytest.approx(float(((labels != IGNORED) * weights_BT).sum()), rel=1e-6)
    slopes = torch.autograd.grad(wanted, parameters, allow_unused=True)
    for way in (forward, replace(forward, head="whole")):
        loss = way.loss_sum(model, batch)
        torch.testing.assert_close(loss, wanted.detach(), atol=1e-4, rtol=1e-6)
        for got, right in zip(torch.autograd.grad(loss, parameters, allow_unused=True), slopes, strict=True):
            if right is not None:
                torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-4)
    mean = evaluator.loss(model)
    assert mean.loss == pytest.approx(wanted.item() / batch.weight, rel=1e-5)
    assert mean.tokens == batch.supervised


@pytest.mark.parametrize("name", ["llama", "t5", "bert", "opt", "cohere"])
def test_the_head_sees_supervised_tokens_only_and_no_more_than_a_chunk(name):
    model, task, _ = model_of(name)
    batch = batch_of(model, task)
    forward = Forward.of(model, task, chunk=5)
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].numel() // inputs[0].shape[-1])
    )
    forward.loss_sum(model, batch).backward()
    hook.remove()
    assert sum(seen) == batch.supervised
    assert max(seen) <= 5 or forward.head == "inside"


def test_a_head_that_is_trained_is_not_taken_apart():
    """The chunks give no gradient to the head's own weights: it is run whole, and they get theirs."""
    model, task, _ = model_of("llama")
    model.lm_head.weight.requires_grad_(True)
    batch = batch_of(model, task)
    forward = Forward.of(model, task)
    assert forward.head == "inside"
    (got,) = torch.autograd.grad(forward.loss_sum(model, batch), [model.lm_head.weight])
    (wanted,) = torch.autograd.grad(plainly(model, task, batch), [model.lm_head.weight])
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_bfloat16_takes_its_softmax_in_float32():
    model, task, _ = model_of("llama")
    model = model.bfloat16()
    batch = batch_of(model, task)
    logits = model(**Forward.of(model, task).arguments(model, batch)).logits[:, :-1].flatten(0, 1)
    wanted = F.cross_entropy(logits.float(), batch.labels[:, 1:].flatten(), reduction="sum")
    loss = Forward.of(model, task, 4).loss_sum(model, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, atol=1e-2, rtol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_rounding_is_no_reason_to_run_the_head_whole(seed):
    """At a width of 512 in float32 the two ways to the logits differ by a few spacings."""
    torch.manual_seed(seed)
    config = build_config(
        "llama", hidden_size=512, intermediate_size=512, num_attention_heads=8, num_key_value_heads=8, head_dim=64,
        num_hidden_layers=2, vocab_size=4000,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
    assert Forward.of(model, "causal").head == "apart"


def test_a_target_that_the_model_rules_out_costs_what_it_costs():
    """Its probability is below the smallest float32: the loss is no infinity, and the gradient is right."""
    from lorafit.forward.loss import _softmax_loss

    hidden = torch.eye(3).requires_grad_()
    weight = torch.tensor([[300.0, 0.0, -5.0], [1.0, 2.0, 3.0], [-250.0, 0.0, 250.0]])
    targets = torch.tensor([2, 1, 0])
    wanted = F.cross_entropy(hidden @ weight, targets, reduction="sum")
    (slope,) = torch.autograd.grad(wanted, hidden)
    gradients = []
    found = _softmax_loss(hidden @ weight, targets, None, gradients, hidden)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6) and wanted > 800
    assert torch.allclose(gradients[0], slope, rtol=1e-5)
