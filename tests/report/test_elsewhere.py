"""The lines for other tools: those in Python are run, and none is shown for what its tool does not take."""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorafit.adapter.plan import resolve
from lorafit.model.chart import map_of
from lorafit.report.elsewhere import GGUF, VLLM, uses_of_adapter, uses_of_merged, why_not_gguf, why_not_vllm
from lorafit.report.model_card import _elsewhere
from lorafit.report.run import Run
from lorafit.settings.preset import load_preset


@pytest.fixture(scope="module")
def plan(tiny):
    return resolve(map_of(str(tiny("llama"))), load_preset("all"), "2-3")


def tools(plan, family="llama", task="causal", **more):
    return {use.tool: use.line for use in uses_of_adapter(plan, family, task, "runs/x y", "ada/base", **more)}


def test_a_plain_adapter_goes_everywhere(plan):
    found = tools(plan)
    assert list(found) == ["PEFT", "transformers", "vLLM", "llama.cpp"]
    words = shlex.split(found["vLLM"])
    assert words[:3] == ["vllm", "serve", "ada/base"] and words[-2:] == ["--lora-modules", "x y=runs/x y"]
    assert words[words.index("--max-lora-rank") + 1] == "16" and "--enable-lora" in words
    words = shlex.split(found["llama.cpp"].split(" && ")[0])
    assert words[1:] == [
        "convert_lora_to_gguf.py",
        "runs/x y",
        "--base-model-id",
        "ada/base",
        "--outfile",
        "x y.gguf",
    ]
    local = {use.tool: use.line for use in uses_of_adapter(plan, "llama", "causal", "a", "/m/base")}
    assert "--base /m/base" in local["llama.cpp"]
    assert all("\n" not in line for line in found.values())


def lora(**more):
    return lambda plan: replace(plan, lora=replace(plan.lora, **more))


@pytest.mark.parametrize(
    "change, why, vllm, gguf",
    [
        (lora(use_dora=True), "DoRA", False, False),
        (lora(bias="all"), "biases", False, False),
        (lora(modules_to_save=("lm_head",)), "modules_to_save", False, False),
        (lora(rank_pattern={"q_proj": 4}), "differ in rank", False, False),
        (lora(use_rslora=True), "rank-stabilised", True, False),
        (lora(r=600), "rank is above 512", False, True),
        (lora(r=300, init_lora_weights="pissa"), "rank is above 512", False, True),
        (lambda p: replace(p, slots=tuple(replace(s, kind="parameter", copies=8) for s in p.slots)), "more than plain", False, False),
    ],
)  # fmt: skip
def test_a_tool_is_named_only_for_what_it_takes(plan, change, why, vllm, gguf):
    changed = change(plan)
    found = tools(changed)
    assert ("vLLM" in found, "llama.cpp" in found) == (vllm, gguf)
    reasons = why_not_vllm(changed, "llama", "causal"), why_not_gguf(changed, "llama", "causal")
    assert (not reasons[0], not reasons[1]) == (vllm, gguf) and any(why in reason for reason in reasons)


def test_the_rank_is_one_that_vllm_takes(plan):
    for rank, shown in ((1, 8), (16, 16), (17, 32), (300, 320)):
        assert f"--max-lora-rank {shown}" in tools(lora(r=rank)(plan))["vLLM"]
    assert "--max-lora-rank 32" in tools(lora(init_lora_weights="pissa")(plan))["vLLM"], (
        "it is saved with twice its rank"
    )


@pytest.mark.parametrize(
    "family, task", [("gpt2", "causal"), ("t5", "seq2seq"), ("bert", "masked"), ("unheard", "causal")]
)
def test_families_that_are_not_known_to_be_served(plan, family, task):
    assert not {"vLLM", "llama.cpp"} & tools(plan, family, task).keys()
    assert GGUF <= VLLM


def test_a_revision_stands_in_the_lines(plan):
    found = tools(plan, revision="v2")
    assert 'revision="v2"' in found["PEFT"] and "--revision v2" in found["vLLM"]
    assert "transformers" not in found, "it takes the base without its revision"


def test_a_merged_model(plan):
    found = {use.tool: use.line for use in uses_of_merged("llama", "causal", "out/m", "ada/base")}
    assert found["vLLM"] == "vllm serve out/m" and found["Ollama"].endswith("ollama create m")
    assert found["llama.cpp"] == "python convert_hf_to_gguf.py out/m --outfile m.gguf"
    demo = [use.tool for use in uses_of_merged("llama", "causal", "m", "demo")]
    assert demo == ["transformers", "vLLM"]
    assert [use.tool for use in uses_of_merged("t5", "seq2seq", "m", "x")] == ["transformers"]


def test_a_hub_id_needs_no_explanation_in_the_card(plan):
    run = Run(Path("a"), {}, ())
    for model, explained in (("ada/base", False), ("/models/base", True), ("base", True)):
        lines = _elsewhere(replace(plan, model=model), run, "llama", "causal", "a")
        assert ("is the folder or the hub id" in lines) is ("`base` is the folder" in lines) is explained
        assert "/models" not in lines


def test_the_python_of_the_cards_runs(run, tiny, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny("llama"), "base")
    words = ("--data", pairs, "--layers", "2-3", "--learning-rate", 0.05, "--max-steps", 5, "--no-sample")
    done = run("train", "base", *words, "-o", "a")
    shown = [line.strip() for line in done.out.splitlines()]
    assert any(line.startswith("vLLM") and line.endswith("--lora-modules a=a") for line in shown), done.out
    done = run("merge", "a", "-o", "m")
    assert "ollama create m" in done.out
    stands_for = "is the folder or the hub id of the base."
    assert f"In these lines `base` {stands_for}\n\n```python" in (tmp_path / "a" / "README.md").read_text()
    ids, logits = torch.arange(3, 30)[None], []
    for name in ("a", "m"):
        (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / name / "README.md").read_text(), re.DOTALL)
        imports = code.split("\nmodel = ")[0]
        for line in code.split("\nmodel = ")[1:]:
            space = {}
            exec(f"{imports}\nmodel = {line}", space)
            with torch.no_grad():
                logits.append(space["model"].eval()(ids).logits)
    assert len(logits) == 3
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], atol=1e-4, rtol=1e-3)
