"""Memory and FLOPs of a step by formula, for models whose code cannot be simulated; FLOPs for reports."""

from __future__ import annotations

from lorafit.adapter import ADAPTER_ITEMSIZE, Plan
from lorafit.estimate.terms import ITEMSIZE, Flops, Profile, Shape
from lorafit.model import ModelMap, Part, Slot


def by_formula(plan: Plan, model_map: ModelMap, shape: Shape) -> Profile:
    """A profile without a simulation."""
    flops = flops_per_token(plan, model_map, shape, supervised=shape.supervised)
    replayed = flops_per_token(plan, model_map, shape, replayed=True, supervised=shape.supervised)
    item = ITEMSIZE.get(shape.dtype, 4)
    return Profile(
        activations=activation_bytes(plan, model_map, shape),
        logits=logit_bytes(model_map, shape),
        workspace=shape.tokens * widest(model_map) * item * 2,
        heap=0,
        forward=flops.forward,
        backward=flops.backward,
        prefix=flops.forward - replayed.forward,
        simulated=False,
        refusal="the model's code cannot be simulated",
    )


def widest(model_map: ModelMap) -> int:
    """The widest output of a block's weight, in features."""
    return max((s.out_features for s in model_map.slots if s.copies == 1), default=0)


def _blocks_kept(plan: Plan, model_map: ModelMap) -> list[tuple[str, int]]:
    """The blocks whose activations backward needs: those at and above the cut of each stack.

    Vision and audio towers are left out: only text is trained on.
    """
    kept = []
    reached = False  # an adapted encoder's gradient comes through all of the decoder
    for stack in model_map.text_stacks:
        cut = plan.cut.get(stack.path, stack.depth)
        start = 0 if reached and model_map.task == "seq2seq" else cut
        kept += [(stack.path, layer) for layer in range(start, stack.depth)]
        reached = reached or stack.path in plan.cut
    return kept


def activation_bytes(plan: Plan, model_map: ModelMap, shape: Shape) -> int:
    """Bytes that autograd keeps from the forward pass, without the logits.

    A frozen linear keeps nothing (its weight gives the gradient of its input); what stays, per
    token and block (after Korthikanti et al., arXiv:2205.05198, sec. 4, for frozen weights):
    two norms with their float32 input and output, queries, keys, values and the attention's
    output, and three tensors of the inner width. An adapted linear keeps its input once more
    (shared by the adapters that read the same) and its rank-r product, in float32. Under
    checkpointing a block keeps its input only, and one block at a time is whole.
    """
    item = ITEMSIZE.get(shape.dtype, 4)
    hidden = model_map.hidden_size
    adapted = {(s.stack, s.layer, s.path): s for s in plan.slots}
    by_block: dict[tuple[str, int], list[Slot]] = {}
    for slot in model_map.slots:
        by_block.setdefault((slot.stack, slot.layer), []).append(slot)
    sizes = []
    for block in _blocks_kept(plan, model_map):
        kept = hidden * (2 * 4 + 4 * item)  # two norms, two residual sums
        inputs: set[tuple[Part, int]] = set()
        for slot in by_block.get(block, ()):
            if slot.part in (Part.SELF_ATTENTION, Part.CROSS_ATTENTION, Part.LINEAR_ATTENTION):
                kept += slot.out_features * item
            elif slot.part in (Part.FEED_FORWARD, Part.SHARED_EXPERTS):
                kept += int(slot.out_features * item * 1.5) if "down" not in slot.roles else 0
            if (slot.stack, slot.layer, slot.path) in adapted:
                inputs.add((slot.part, slot.in_features))
                kept += plan.lora.r * 4
        kept += sum(width * ADAPTER_ITEMSIZE for _, width in inputs)
        sizes.append(kept)
    if not sizes:
        return 0
    if shape.checkpointing:
        return shape.tokens * (len(sizes) * hidden * item + max(sizes))
    return shape.tokens * sum(sizes)


def logit_bytes(model_map: ModelMap, shape: Shape) -> int:
    """The head's output in the base's dtype, in float32 for the softmax, and its gradient."""
    item = ITEMSIZE.get(shape.dtype, 4)
    return shape.tokens * model_map.vocab_size * (item + 4 + 4)


def flops_per_token(
    plan: Plan, model_map: ModelMap, shape: Shape, *, replayed: bool = False, supervised: float = 1.0
) -> Flops:
    """FLOPs per token: two per weight forward (every block, and the head), two per weight backward for
    the gradient of the input at and above the cut, and the adapters' own two and four; attention
    adds 4 * length * width per block forward and twice that backward (causal halves it).

    `replayed`: blocks below the cut are not run. `supervised`: the share of the tokens that the
    head is run on.
    """
    head = int(2 * model_map.hidden_size * model_map.vocab_size * supervised)
    forward = backward = head
    kept = set(_blocks_kept(plan, model_map))
    for slot in model_map.slots:
        if slot.stack not in {stack.path for stack in model_map.text_stacks}:
            continue
        cost = 2 * slot.in_features * slot.out_features
        if slot.part is Part.EXPERTS and slot.copies > 1:
            cost *= 2  # routed: each token uses a few of the experts; two is the common choice
        if slot.part is Part.SELF_ATTENTION and "q" in slot.roles:
            cost += 2 * shape.length * slot.out_features
        if (slot.stack, slot.layer) in kept:
            forward += cost
            backward += cost
        elif not replayed:
            forward += cost
    added = sum(plan.lora.r * (s.in_features + s.out_features) for s in plan.slots)
    return Flops(forward + 2 * added, backward + 4 * added)
