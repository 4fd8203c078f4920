"""The short way through an adapted layer: PEFT's own numbers, in fewer passes; what is special stays PEFT's."""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from families import build_config
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from twins import twin_of

from lorafit.adapter.lora_linear import Quick, quicken
from lorafit.estimate.memory_trace import MemoryTrace
from lorafit.model import find, load_model

TARGETS = {"llama": ["q_proj", "up_proj", "down_proj"], "gpt2": ["c_attn", "c_fc", "c_proj"]}


def models(family, dtype=torch.float32, **lora):
    """(PEFT's, the quick one): the same model with the same adapter, its B no longer zero."""
    torch.manual_seed(0)
    quiet = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if family == "gpt2" else {}
    model = AutoModelForCausalLM.from_config(build_config(family, **quiet)).to(dtype)
    config = LoraConfig(
        target_modules=TARGETS[family], r=4, lora_alpha=12, fan_in_fan_out=family == "gpt2", **lora
    )
    plain = get_peft_model(model, config).train()
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    quick = copy.deepcopy(plain)
    quicken(quick)
    return plain, quick


def loss_of(model):
    ids = torch.randint(3, 800, (2, 24), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, labels=ids).loss


def gradients(model):
    loss = loss_of(model)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def steps(loss):
    """The names of all nodes of the loss's graph."""
    found, waiting = set(), [loss.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(node.name())
        waiting += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"rank_pattern": {TARGETS["llama"][1]: 7}}])
def test_loss_and_gradients_are_pefts(family, more):
    plain, quick = models(family, **more)
    assert "_LowRankBackward" in steps(loss_of(quick)) and "_LowRankBackward" not in steps(loss_of(plain))
    (wanted, theirs), (found, ours) = gradients(plain), gradients(quick)
    assert found == pytest.approx(wanted, rel=1e-6) and theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, rtol=1e-4, atol=1e-7), name
        assert ours[name].dtype == torch.float32


@pytest.mark.parametrize("family", TARGETS)
def test_in_bfloat16_it_is_as_near_to_the_truth_as_peft(family):
    """Both against the same weights in float32: the loss, and the direction of the adapter's gradient."""
    plain, quick = models(family, torch.bfloat16)
    exact = copy.deepcopy(plain).float()
    true, theirs, ours = (gradients(model) for model in (exact, plain, quick))
    assert abs(ours[0] - true[0]) <= abs(theirs[0] - true[0]) + 2e-3

    def off(found):
        return sum((found[n] - g).square().sum() for n, g in true[1].items()).sqrt()

    size = sum(g.square().sum() for g in true[1].values()).sqrt()
    assert off(ours[1]) <= 1.3 * off(theirs[1]) + 0.005 * size


@pytest.mark.parametrize(
    "more", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}, {"bias": "all"}]
)
def test_what_is_special_stays_pefts(more):
    _, quick = models("gpt2", **more)
    assert "_LowRankBackward" not in steps(loss_of(quick))


def test_an_adapter_that_is_off_or_merged_or_one_of_two_stays_pefts():
    plain, quick = models("llama")
    with plain.disable_adapter(), quick.disable_adapter(), torch.no_grad():
        assert loss_of(plain).item() == loss_of(quick).item()
    plain.merge_adapter(), quick.merge_adapter()
    assert loss_of(plain).item() == loss_of(quick).item()
    plain.unmerge_adapter(), quick.unmerge_adapter()
    for model in (plain, quick):
        torch.manual_seed(3)
        model.add_adapter("other", LoraConfig(target_modules=TARGETS["llama"], r=2, init_lora_weights=False))
        model.base_model.set_adapter(["default", "other"])
    assert loss_of(plain).item() == loss_of(quick).item()


def test_it_keeps_and_does_less():
    """In bfloat16, against PEFT: a layer's input is kept as it is, not in float32, and the adapter's output is not
    made, scaled, added and cast, three times in float32 and once in bfloat16."""
    held, made = [], []
    for model in models("llama", torch.bfloat16):
        tracker = MemoryTrace()
        tracker.know(model)
        with tracker:
            loss = loss_of(model)
        held.append(sum(entry.bytes for entry in tracker.log))
        made.append(sum(entry.bytes for entry in tracker.log if entry.bytes > 0))
        del loss
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    tokens = 2 * 24
    assert held[0] - held[1] > 0.9 * sum(2 * tokens * layer.in_features for layer in layers)
    assert made[0] - made[1] > 0.9 * sum(
        tokens * (4 * layer.in_features + 14 * layer.out_features) for layer in layers
    )


def test_its_flops_are_counted():
    """The tracker's, which knows a product that is added in place, against PyTorch's own over PEFT's way."""
    plain, quick = models("llama")
    counter, tracker = FlopCounterMode(display=False), MemoryTrace()
    with counter:
        loss_of(plain).backward()
    with tracker:
        loss_of(quick).backward()
    attention = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
    assert attention == 0  # its counter knows none of the CPU's
    products = sum(tracker.flops.values()) - attention_flops(quick)
    assert products == counter.get_total_flops()


def attention_flops(model):
    """Seven products of 24 × 24 × 16 a head: two forward, five backward, each multiply and add counted."""
    config = model.config
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * 2 * heads * 7 * 2 * 24 * 24 * width


def test_pefts_layers_are_what_it_was_written_for():
    """The conditions under which PEFT's forward is the plain formula, by the names it has for them."""
    _, quick = models("llama")
    layer = next(m for m in quick.modules() if isinstance(m, Linear))
    assert type(layer) is Quick
    for name in ("active_adapters", "lora_variant", "lora_bias", "disable_adapters", "merged", "scaling"):
        assert hasattr(layer, name)


def test_a_base_layer_that_is_watched_is_called():
    _, quick = models("llama")
    layer = next(m for m in quick.modules() if isinstance(m, Linear))
    seen = []
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    loss_of(quick)
    assert seen == [1]


def test_a_model_that_changes_the_output_in_place_trains():
    """OLMo clamps its queries, keys and values where they lie."""
    config = transformers.OlmoConfig(
        vocab_size=900, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, clip_qkv=0.05, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = get_peft_model(
        AutoModelForCausalLM.from_config(config), LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    )
    quick = copy.deepcopy(plain)
    quicken(quick)
    (wanted, theirs), (found, ours) = gradients(plain), gradients(quick)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert all(
        torch.allclose(ours[name], gradient, rtol=1e-4, atol=1e-7) for name, gradient in theirs.items()
    )


def test_a_layer_is_freed_with_its_model():
    """Without the collector: the weights of a model that was only probed go back at once."""
    _, quick = models("llama")
    layers = [weakref.ref(m.base_layer.weight) for m in quick.modules() if isinstance(m, Linear)]
    gc.disable()
    try:
        del quick
        assert not any(layer() is not None for layer in layers)
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(("family", "dtype", "off"), [("llama", torch.float32, 1e-6), ("gpt2", torch.float32, 1e-6),
                                                      ("llama", torch.bfloat16, 0.1)])  # fmt: skip
def test_over_a_quantised_weight_it_is_what_peft_computes(kind, family, dtype, off, tiny):
    """Of float32 what PEFT computes in float64, over the dequantised weights: the rounding is that of one way alone."""
    place = tiny(family)
    base = load_model(find(str(place)), dtype, torch.device("cpu"), kind)
    config = LoraConfig(target_modules=TARGETS[family], r=4, lora_alpha=12)
    twin = twin_of(base, place) if dtype == torch.float32 else None
    torch.manual_seed(0)
    model = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    exact = model
    if twin is not None:
        exact = get_peft_model(twin, config).eval().double()
        own = {name: p.data.double() for name, p in model.named_parameters() if "lora_" in name}
        assert exact.load_state_dict(own, strict=False).unexpected_keys == []
    loss, wanted = gradients(exact)
    model.zero_grad()
    quicken(model)
    assert "_LowRankBackward" in steps(loss_of(model))
    again, found = gradients(model)
    assert again == pytest.approx(loss, rel=off) and found.keys() == wanted.keys()
    for name in wanted:
        assert (found[name] - wanted[name]).norm() <= off * wanted[name].norm(), name
