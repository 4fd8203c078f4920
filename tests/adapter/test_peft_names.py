"""Our reading of PEFT's rule against PEFT's own, and the silent misses it is there to prevent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from lorafit.adapter.peft_names import Spelling, pattern_value, spell

names = st.lists(
    st.sampled_from(["model", "layers", "0", "1", "12", "self_attn", "mlp", "q_proj", "experts", "h", "c_proj"]),
    min_size=1, max_size=7,
).map(".".join)  # fmt: skip
targets = st.lists(
    st.sampled_from(["q_proj", "c_proj", "mlp.c_proj", "attn", "model.layers.1.q_proj"]),
    min_size=1,
    max_size=3,
    unique=True,
)
layers = st.one_of(st.none(), st.lists(st.integers(0, 13), min_size=0, max_size=4))
patterns = st.one_of(st.none(), st.sampled_from([["layers"], ["h"], ["layers", "h"], []]))


@given(names, targets, layers, patterns)
def test_we_match_as_peft_does(name, wanted, indices, pattern):
    if pattern and not indices:
        indices = [1]
    config = LoraConfig(target_modules=wanted, layers_to_transform=indices, layers_pattern=pattern)
    ours = Spelling(
        tuple(wanted), tuple(indices) if indices is not None else None, tuple(pattern) if pattern else None
    )
    assert ours.matches(name) == bool(check_target_module_exists(config, name))


def modules(depth: int) -> list[str]:
    inner = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    return ["lm_head", *(f"transformer.h.{i}.{name}" for i in range(depth) for name in inner)]


def test_the_shortest_exact_spelling():
    every = modules(4)
    wanted = [m for m in every if m.startswith("transformer.h.3.") and "c_proj" in m]
    assert spell(wanted, {"attn.c_proj", "mlp.c_proj"}, (3,), {"h"}, every) == Spelling(("c_proj",), (3,))
    only_mlp = [m for m in wanted if "mlp" in m]
    assert spell(only_mlp, {"mlp.c_proj"}, (3,), {"h"}, every) == Spelling(("mlp.c_proj",), (3,))


def test_two_stacks_need_the_name_of_theirs():
    every = [f"{s}.block.{i}.q" for s in ("encoder", "decoder") for i in range(2)]
    found = spell(["decoder.block.1.q"], {"q"}, (1,), {"block"}, every)
    assert found == Spelling(("decoder.block.1.q",))  # both stacks' lists are called `block`
    other = [f"encoder.layers.{i}.q" for i in range(2)] + [f"decoder.h.{i}.q" for i in range(2)]
    assert spell(["decoder.h.1.q"], {"q"}, (1,), {"h"}, other) == Spelling(("q",), (1,), ("h",))


@given(st.sets(st.sampled_from(modules(6)), min_size=1), st.sets(st.integers(0, 5), min_size=1).map(sorted))
def test_a_spelling_denotes_exactly_what_was_wanted(wanted, indices):
    tails = {".".join(w.split(".")[3:]) or w for w in wanted}
    found = spell(wanted, tails, indices, {"h"}, modules(6))
    assert found.denotes(modules(6)) == frozenset(wanted)


@pytest.mark.parametrize(
    "pattern, name, hit",
    [("q_proj", "a.q_proj", True), ("q", "a.q_proj", False), (r".*\.1\..*", "a.1.b", True)],
)
def test_patterns_are_read_as_peft_reads_them(pattern, name, hit):
    from peft.utils.other import get_pattern_key

    assert (get_pattern_key([pattern], name) == pattern) is hit
    assert pattern_value({pattern: 4}, name, 8) == (4 if hit else 8)
