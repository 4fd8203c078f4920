"""What a run has done so far, and what it must have in common with the one that a checkpoint came from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from lorafit.errors import RequestError
from lorafit.estimate import Shape, flops_per_token
from lorafit.events import EpochDone, Loss, Stepped
from lorafit.forward import Prefix
from lorafit.jsonio import jsonable
from lorafit.settings import IN_DIGESTS, MAY_CHANGE, OPTIONS, lasting
from lorafit.train.job import Job
from lorafit.train.measure import efficiency

DIGESTS = ("adapted modules", "training rows", "held-out rows", "base weights")

FOLDERS = ("model", "from_adapter")  # options that may name a folder

MEASURED_AGAIN = ("rate",)  # what a resumed run finds out for itself


@dataclass(slots=True)
class State:
    """What the loop has done so far: all of it goes into a checkpoint."""

    step: int = 0
    before: Loss | None = None
    said: str | None = None  # to a held-out row, before training
    tokens: int = 0
    supervised: int = 0
    seconds: float = 0.0
    epochs: list[EpochDone] = field(default_factory=list)
    epoch_loss: float = 0.0
    epoch_supervised: int = 0
    epoch_weight: float = 0.0
    epoch_tokens: int = 0
    epoch_seconds: float = 0.0
    scaler: dict[str, Any] = field(default_factory=dict)
    best: Loss | None = None  # the lowest held-out loss on the way, and where
    best_step: int | None = None
    gained: float | None = None  # the held-out loss at the last gain that counts for --patience
    waited: int = 0  # evaluations since then
    fill_seconds: float = 0.0  # of `seconds`, those of the layers below the cut before the first step
    rate: float = 0.0  # FLOPs a second of this device's matrix products

    def add(self, done: Stepped) -> None:
        """Count a step."""
        self.step = done.step
        self.tokens += done.tokens
        self.supervised += done.supervised_tokens
        self.seconds += done.seconds
        self.epoch_loss += done.loss * done.weight
        self.epoch_weight += done.weight
        self.epoch_supervised += done.supervised_tokens
        self.epoch_tokens += done.tokens
        self.epoch_seconds += done.seconds

    def is_best(self, found: Loss) -> bool:
        """Whether a held-out loss is the lowest on the way; then it is kept as such."""
        if self.best is not None and found.loss >= self.best.loss:
            return False
        self.best, self.best_step = found, self.step
        return True

    def waits(self, found: Loss, least: float) -> int:
        """How many evaluations it is since the held-out loss last fell by more than `least`."""
        reached = self.gained if self.gained is not None else self.before.loss if self.before else found.loss
        if found.loss < reached - least:
            self.gained, self.waited = found.loss, 0
        else:
            self.waited += 1
        return self.waited

    def close_epoch(self, epoch: int, job: Job, prefix: Prefix) -> EpochDone:
        """The epoch that ends here; the next one begins at 0."""
        replayed = prefix.cut > 0
        speed = self.epoch_tokens / max(1e-9, self.epoch_seconds)
        length = self.epoch_tokens / max(1, len(job.rows.train))
        flops = flops_per_token(
            job.plan,
            job.found,
            Shape(1, round(length)),
            replayed=replayed,
            supervised=self.epoch_supervised / max(1, self.epoch_tokens),
        )
        done = EpochDone(
            epoch,
            self.epoch_loss / self.epoch_weight if self.epoch_weight else 0.0,
            self.epoch_tokens,
            self.epoch_seconds,
            speed,
            self.epoch_supervised,
            efficiency(speed * (flops.forward + flops.backward), self.rate, job.matrix_rate(0.05)),
            replayed,
        )
        self.epochs.append(done)
        self.epoch_loss = self.epoch_weight = self.epoch_seconds = 0.0
        self.epoch_supervised = self.epoch_tokens = 0
        return done

    def as_json(self, job: Job) -> dict[str, Any]:
        """The state as a checkpoint holds it, with what identifies the run."""
        own = {name: jsonable(getattr(self, name)) for name in self.__slots__ if name not in MEASURED_AGAIN}
        return {**own, "run": identity(job)}

    def load(self, saved: dict[str, Any], job: Job) -> None:
        """Take over a checkpoint's state. Raises RequestError when the run is another one."""
        was, now = saved.pop("run"), identity(job)
        # what an earlier version did not state: an option that came later had its default
        was |= {
            name: lasting(was.get(name)) for name in FOLDERS
        }  # an earlier version kept them as they were typed
        known = {n: was.get(n, OPTIONS[n].default if n in OPTIONS else value) for n, value in now.items()}
        if changed := [name for name in now if known[name] != now[name]]:
            name = changed[0]
            what = (
                f"the {name} differ" if name in DIGESTS else f"`{name}` was {known[name]!r}, is {now[name]!r}"
            )
            raise RequestError(
                f"this is not the run that was saved: {what}",
                "resume with the data, the model and the options it began with, or --overwrite to start again",
            )
        for name in self.__slots__:
            if name in saved:
                setattr(self, name, saved[name])
        self.epoch_weight = saved.get("epoch_weight", self.epoch_supervised)
        self.before, self.best = (Loss(**v) if v else None for v in (saved["before"], saved["best"]))
        self.epochs = [EpochDone(**row) for row in saved["epochs"]]


def identity(job: Job) -> dict[str, Any]:
    """What a resumed run must have in common with the one that was saved: every option that changes the
    arithmetic, the modules, the base's weights, the rows."""
    names = [name for name in OPTIONS if name not in MAY_CHANGE | IN_DIGESTS]
    return {
        **{name: jsonable(getattr(job.config, name)) for name in names},
        **{name: lasting(getattr(job.config, name)) for name in FOLDERS},
        "lora": jsonable(job.plan.lora),
        "adapted modules": hashlib.sha256("\n".join(sorted(job.plan.modules)).encode()).hexdigest(),
        "base weights": job.fingerprint,
        "training rows": job.rows.train.digest,
        "held-out rows": job.rows.held_out.digest,
    }
