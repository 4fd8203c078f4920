"""The FLOPs of a report, counted by hand."""

from families import MOE

from lorafit.adapter.plan import resolve
from lorafit.estimate.formulas import flops_per_token
from lorafit.estimate.terms import Shape
from lorafit.model.chart import chart_of
from lorafit.model.source import find
from lorafit.settings import load_preset


def test_a_token_goes_through_two_experts(tiny):
    """Of four, by the config; the others' weights cost nothing."""
    found = chart_of(find(str(tiny("qwen3_moe"))))
    preset = load_preset("attention")
    plan = resolve(found, preset, "all")
    hidden, inner, vocabulary, length = 32, MOE["moe_intermediate_size"], MOE["vocab_size"], 10
    attention = 2 * hidden * (2 * hidden + 2 * hidden // 2) + 2 * length * hidden  # q, o; k, v; the scores
    experts = MOE["num_experts_per_tok"] * 2 * 3 * hidden * inner
    router = 2 * hidden * MOE["num_experts"]
    head = 2 * hidden * vocabulary
    adapters = 2 * sum(preset.lora.r * (s.in_features + s.out_features) for s in plan.slots)
    counted = flops_per_token(plan, found, Shape(1, length))
    wanted = 4 * (attention + experts) + head + adapters
    assert wanted <= counted.forward <= wanted + 4 * router
    assert counted.backward == counted.forward + adapters
