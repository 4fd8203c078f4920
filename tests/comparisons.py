"""Comparisons as the command makes them."""

from lorafit.compare import CompareFolder, Comparison, Request, SharedBase, look_ahead, resolve_all
from lorafit.data import load
from lorafit.model import chart_of, find, load_tokenizer
from lorafit.train import load_base

FLAGS = {"batch_size": 8, "epochs": 2, "holdout": 0.2}


def comparison_of(
    model, data, target, stop=lambda: 0, halving=False, resume=False, also=None, loader=load_base, **lists
):
    """A comparison over the lists of a request; FLAGS unless `flags` says otherwise."""
    flags = {**FLAGS, "model": str(model), "data": [str(data)], **lists.pop("flags", {})}
    asked = Request(flags, **{name: tuple(value) for name, value in lists.items()}).checked()
    folder = CompareFolder(target)
    folder.open(resume)
    asked = Request.of(folder.request()) if resume else asked
    common, wanted = asked.wanted()
    source = find(flags["model"], None)
    found = chart_of(source)
    candidates, _ = resolve_all(found, wanted, common, None, None)
    config = candidates[0].config
    tokenizer = load_tokenizer(source.place, source.name)
    rows = load(config, tokenizer, found.task, found.vocab_size)
    ahead = look_ahead(source, found, candidates, rows.look)
    digests = {one.name: one.digest for one in ahead.candidates}
    folder.begin(asked, [rows.train.digest, rows.held_out.digest], digests)
    config, lowest = ahead.candidates[0].config, ahead.lowest.plan
    shared = SharedBase(lambda: loader(source, found, config, lowest))
    return Comparison(ahead, shared, rows, tokenizer, folder, also or {}, halving, stop=stop)
