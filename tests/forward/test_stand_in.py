"""Stand-ins: what is around them sees the original, and afterwards nothing is left of them."""

from functools import partial

import pytest
import torch
from families import FAMILIES, build_model

from lorafit.data.collate import collate_rows
from lorafit.data.rows import IGNORED, Row
from lorafit.forward.head import Forward
from lorafit.forward.prefix import Prefix
from lorafit.forward.prefix_fill import fill
from lorafit.forward.stand_in import Fixed, HandOn, in_place

ROWS = [Row(tuple(range(5, 5 + n)), (IGNORED, *range(6, 5 + n)), "x") for n in (9, 4)]


def test_a_stand_in_reads_as_the_original():
    model = build_model("gemma2")
    layers = model.model.layers
    blocks, names = list(layers), [name for name, _ in model.named_parameters()]
    stand_ins = {str(n): HandOn(blocks[n], 0) for n in (0, 1)}
    with in_place(layers, stand_ins):
        assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
        assert layers[1].self_attn is blocks[1].self_attn and layers[0] is stand_ins["0"]
        assert [name for name, _ in model.named_parameters()] == names
        assert model.dtype == torch.float32 and not layers[0].training
        assert not hasattr(layers[0], "nothing_of_that_name")
        with in_place(model, {"model": Fixed(model.model, "output")}):
            assert model.model() == "output" and [n for n, _ in model.named_parameters()] == names
    assert list(layers) == blocks and list(model.model.layers._modules) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_after_a_pass_that_fails(family):
    """Head and prefix put the originals back, and overwrite no forward."""
    model, task = build_model(family), FAMILIES[family].task
    modules = dict(model.named_modules())
    batch = collate_rows(ROWS, 0, task, "rows 0")
    forward = Forward.of(model, task, 4)
    prefix = Prefix.below(
        model,
        next(n for n, m in modules.items() if isinstance(m, torch.nn.ModuleList) and "vision" not in n),
        2,
    )
    forward.scores(model, batch)
    if task == "causal":
        whole = forward.scores(model, batch)[0]
        assert sum(fill([prefix], [batch], partial(forward.run, model), torch.device("cpu"))) == batch.tokens
        with prefix.around(batch):
            again = forward.scores(model, batch)[0]
        assert torch.equal(whole, again) and prefix.store.has(batch.key)

        def fails(*_):
            raise OSError("cut off")

        hook = prefix.blocks["2"].register_forward_pre_hook(fails)
        with pytest.raises(OSError), prefix.around(batch):
            forward.scores(model, batch)
        hook.remove()
    assert dict(model.named_modules()) == modules
    assert not any("forward" in vars(module) for module in modules.values())
