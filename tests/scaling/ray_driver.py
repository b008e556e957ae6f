"""A program that sweeps on an engine, for tests that kill it: `python ray_driver.py FILE [LIMIT]`.

It prints the ids of its processes once rows are in the file, then goes on. With a limit, no file
may grow beyond so many bytes, as on a disk that is full.
"""

import resource
import sys
from functools import partial

import psutil
import torch
from played import load_embedded

from common import Grid, Sampling, SteeringVector, sweep
from common.scaling.ray_engine import RayEngine

PROMPTS = ["I think dogs are", "My neighbour", "The old library is on the", "This year winter is"]
ROWS = 4 * (1 + 2 * 20)


def vector() -> SteeringVector:
    generator = torch.Generator().manual_seed(0)
    return SteeringVector(dict(enumerate(0.5 * torch.randn(6, 256, generator=generator))))


def run(model, tokenizer, metric=None, **options):
    """The sweep, in units of few rows."""
    coeffs = [0.1 * number for number in range(1, 21)]
    metrics = {"words": metric or words}
    sampling = Sampling(max_new_tokens=12, temperature=0.0)
    options = {"max_memory": 3_000_000, **options}
    return sweep(
        model,
        tokenizer,
        Grid({"v": vector()}, [1, 4], coeffs),
        PROMPTS,
        metrics,
        sampling=sampling,
        **options,
    )


def words(texts) -> list[int]:
    return [len(text.split()) for text in texts]


def main() -> None:
    model, tokenizer, _ = load_embedded()
    calls = []

    def metric(texts):
        calls.append(texts)
        if len(calls) == 4:  # the first is the trial on the prompts
            processes = [one.pid for one in psutil.Process().children(recursive=True)]
            print("processes", *processes, flush=True)
            if len(sys.argv) > 2:
                limit = int(sys.argv[2])
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return words(texts)

    with RayEngine(workers=2, load=partial(load_embedded)) as engine:
        run(model, tokenizer, metric, path=sys.argv[1], engine=engine)


if __name__ == "__main__":
    main()
