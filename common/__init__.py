"""Activation steering: the library that the notebooks share and a reader takes home.

`from common import …` is its one door: the public names stand in `__init__.pyi`, and a module is
loaded when a name of it is asked for, not before.

The folders import one way, each only from those above it:

    scaling    the same work on many processes and machines
    places     where: the blocks of a model, a part of one, a token, a name
    passes     running a model: prompts to ids, padding, hooks, which rows share a batch
    vectors    what is added: read, trained, saved, or taken from a prompt
    texts      generating, sampling, completing
    serving    the same steering in other engines: vLLM, a request at a time, and llama.cpp
    learning   steering by gradient: vectors of three losses, and weights
    measuring  tone, likelihood, next token, perplexity, effects, ratings
    sweeping   layers x coefficients x prompts in one batch, kept in a file
    checking   what is wrong with a steering, and what it left behind
    choosing   layer and multiplier in one call, with a card that says how far to trust them

`loading` brings a model, `embedded` is the one that comes with the project, `tensor_parallel` knows
models that are split over processes, `plots` draws what `measuring` and `sweeping` found. `jobs` is
work that a file describes, and `__main__` its command line.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
