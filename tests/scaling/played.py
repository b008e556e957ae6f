"""Workers that are played in this process, with all that may become of them, and an engine of them.

Also what real workers load, which they import from here.
"""

import os
import pickle
import random
from collections import Counter
from functools import partial

import cloudpickle
import torch

from common.loading import copy_sharing_weights, load_model
from common.scaling.dispatch import Dispatch, Done, Lost, Raised
from common.scaling.units import packed

load_embedded = partial(load_model, "embedded", device="cpu")


def load_another():
    """The embedded model with one weight changed a little."""
    model, tokenizer, _ = load_embedded()
    with torch.no_grad():
        model.transformer.h[3].mlp.c_fc.weight[-1, -1] += 1e-3
    return model, tokenizer


def load_deadly(word: str):
    """The embedded model in a process that ends when it reads a word."""
    model, tokenizer, _ = load_embedded()
    (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]

    def die(module, args):
        if (args[0] == token).any():
            os._exit(1)

    model.transformer.wte.register_forward_pre_hook(die)
    return model, tokenizer


class Workers:
    """Workers that are played, and what becomes of them by chance.

    Args:
        seed: of the chance, which also says who is finished first.
        deadly: numbers that kill the worker that comes to them.
        risk: how likely a worker dies at a unit, whatever it is; `deaths` of them at most.
        late: whether a unit of a worker that is gone may be answered in the end.
        raising: a number at which the work raises.
        unborn: how many workers in a row die while they load.
        ready: workers of an earlier run.
        compute: what each does; it returns the numbers of a unit.
    """

    def __init__(
        self,
        seed=0,
        deadly=(),
        risk=0.0,
        deaths=10,
        late=False,
        raising=None,
        unborn=0,
        ready=(),
        compute=None,
    ):
        self.compute = compute or (lambda worker, unit: list(unit.numbers))
        self.random, self.deadly, self.risk, self.deaths = random.Random(seed), deadly, risk, deaths
        self.late, self.raising, self.unborn, self.old = late, raising, unborn, list(ready)
        self.queues: dict[int, list] = {worker: [] for worker in self.old}
        self.alive, self.stopped, self.tickets = set(self.old), [], 0
        self.kills: Counter = Counter()
        self.answers: list = []
        self.deepest = self.most = 0

    def _ticket(self) -> int:
        self.tickets += 1
        return self.tickets

    def start(self):
        worker, ticket = f"worker {self._ticket()}", self._ticket()
        self.alive.add(worker)
        self.most = max(self.most, len(self.alive))
        self.queues[worker] = [(ticket, None)]
        return worker, ticket

    def ready(self):
        return list(self.old)

    def send(self, worker, unit):
        ticket = self._ticket()
        assert worker not in self.stopped
        self.queues[worker].append((ticket, unit))
        self.deepest = max(self.deepest, len(self.queues[worker]))
        return ticket

    def stop(self, worker):
        self.alive.discard(worker)
        self.stopped.append(worker)
        if self.late:  # it was only out of reach
            self.answers += [
                (t, Done(u and self.compute(worker, u))) for t, u in self.queues[worker]
            ]
        self.queues[worker] = []

    def wait(self, tickets):
        assert tickets, "nobody is at work: it would wait for ever"
        if self.answers and self.random.random() < 0.5:
            return [self.answers.pop()]
        worker = self.random.choice(sorted(w for w, queue in self.queues.items() if queue))
        ticket, unit = self.queues[worker][0]
        return self._outcomes(worker, ticket, unit)

    def _outcomes(self, worker, ticket, unit):
        if worker not in self.alive:
            return self._dead(worker)
        if unit is None:
            if self.unborn:
                self.unborn -= 1
                return self._dead(worker)
            self.queues[worker].pop(0)
            return [(ticket, Done(None))]
        if killers := set(unit.numbers) & set(self.deadly):
            self.kills.update(killers)
            return self._dead(worker)
        if self.deaths and self.random.random() < self.risk:
            self.deaths -= 1
            # It may have answered before.
            done = self.random.random() < 0.3
            first = [(ticket, Done(self.compute(worker, unit)))] if done else []
            self.queues[worker] = self.queues[worker][done:]
            return self._dead(worker)[:1] + first
        self.queues[worker].pop(0)
        if self.raising in unit.numbers:
            return [(ticket, Raised(KeyError("a bug")))]
        return [(ticket, Done(self.compute(worker, unit)))]

    def _dead(self, worker):
        self.alive.discard(worker)
        return [(ticket, Lost("killed")) for ticket, _ in self.queues[worker]]


class PlayedEngine:
    """An engine whose workers are played: each has a model of its own, and a job that was sent.

    Args:
        size: how many workers.
        options: for `Workers`.
    """

    def __init__(self, size: int = 2, parts=None, **options):
        self.size, self.options = size, options
        self.parts, self.runner = None if parts is None else str(parts), None

    def run(self, model, tokenizer, job, units, bar):
        sent, at_work = packed(job, model, cloudpickle.Pickler), {}

        def compute(worker, unit):
            if worker not in at_work:
                at_work[worker] = pickle.loads(sent).on(copy_sharing_weights(model), tokenizer)
            return pickle.loads(pickle.dumps(at_work[worker](unit)))

        self.workers = Workers(**self.options, compute=compute)
        report = lambda *given: None  # noqa: E731
        dispatch = Dispatch(self.workers, self.size, job.halves, job.describe, report)
        yield from dispatch.run(units)
