"""What one mechanism must share with another: the same logits, ids and readings.

test_parity checks these laws in drawn cases; test_mutations, that a broken mechanism fails them.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from support import Bench
from torch import Tensor
from transformers import BatchEncoding

from repository.agreement import tolerance

NEW = 6  # tokens generated in each run: one from the prompt, the others from decoding steps


class Steering(NamedTuple):
    """Where a mechanism steers, and by what."""

    inputs: BatchEncoding
    layer: int
    vector: Tensor  # [d_model]


def steered_logits(bench: Bench, steering: Steering) -> Tensor:
    """Return the logits of the real tokens, [tokens, vocab]."""
    mechanism, wrapped = bench
    inputs, layer, vector = steering
    with mechanism.steer(wrapped, layer, vector):
        return mechanism.logits(wrapped, inputs)[inputs["attention_mask"].bool()]


def steered_ids(
    bench: Bench, steering: Steering, use_cache: bool = True, sampled: bool = False
) -> list[list[int]]:
    """Return prompts and `NEW` tokens, greedy or sampled from one seed."""
    mechanism, wrapped = bench
    inputs, layer, vector = steering
    options = {"do_sample": True, "top_p": 0.9} if sampled else {}
    with mechanism.steer(wrapped, layer, vector):
        torch.manual_seed(0)
        ids = mechanism.generate(
            wrapped, inputs, max_new_tokens=NEW, use_cache=use_cache, **options
        )
    return ids.tolist()


def read_states(bench: Bench, inputs: BatchEncoding, layer: int, steering=None) -> Tensor:
    """Return resid_post of `layer` at the real tokens, [tokens, d_model]; steered if asked."""
    mechanism, wrapped = bench
    with mechanism.steer(wrapped, *steering[1:]) if steering else nullcontext():
        states = mechanism.read(wrapped, inputs, layer)
    assert states.shape[:2] == inputs["attention_mask"].shape
    return states[inputs["attention_mask"].bool()]


def logits_equal(bench: Bench, hooks: Bench, steering: Steering) -> None:
    """Steered logits are those of the plain hook, within the mechanism's tolerance."""
    torch.testing.assert_close(
        steered_logits(bench, steering),
        steered_logits(hooks, steering),
        rtol=0,
        atol=tolerance(bench.mechanism.name),
    )


def ids_equal(bench: Bench, hooks: Bench, steering: Steering, **options: bool) -> None:
    """Generated ids are those of the plain hook."""
    assert steered_ids(bench, steering, **options) == steered_ids(hooks, steering, **options)
