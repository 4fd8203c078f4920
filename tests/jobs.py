"""Training jobs as the command makes them."""

from lorafit.adapter.plan import resolve
from lorafit.data.dataset import load
from lorafit.distributed import ALONE
from lorafit.events import Evaluated, Stepped
from lorafit.model.chart import chart_of
from lorafit.model.load import load_tokenizer
from lorafit.model.source import find
from lorafit.settings.precedence import derive_from_model, derive_from_rows, settle
from lorafit.train.job import assemble
from lorafit.train.loggers import recorded
from lorafit.train.loop import run
from lorafit.train.run_folder import RunFolder


def job_for(model, output, stop=lambda: 0, world=ALONE, **flags):
    """A job as the command makes it, without a sample if none is asked for."""
    config, preset = settle({"model": str(model), "sample": False, **flags})
    source = find(config.model)
    found = chart_of(source)
    config = derive_from_model(config, found)
    exclude = ["feed-forward", "shared-experts"] if found.reinterpreted else []
    plan = resolve(found, preset, config.layers, exclude=exclude)
    found_tokenizer = load_tokenizer(source.place, source.name)
    rows = load(config, found_tokenizer, found.task, found.vocab_size)
    config = derive_from_rows(config, rows.look.mean, len(rows.train))
    folder = RunFolder(output)
    if world.first:
        folder.open(config.overwrite, config.resume)
    return assemble(source, found, config, plan, rows, found_tokenizer, folder, stop, world=world)


def events_of(job):
    return list(recorded(job, run(job)) if job.world.first else run(job))


def stopped_after(job, step):
    """The events of a run that is asked to end once that step is done. Raises what ends it."""
    events = []
    job.stop = lambda: 2 if any(isinstance(e, Stepped) and e.step >= step for e in events) else 0
    events.extend(recorded(job, run(job)))
    return events


def losses(events):
    return [e.loss for e in events if isinstance(e, (Stepped, Evaluated))]
