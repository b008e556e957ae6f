"""A compiled model is steered like any other: from the first pass in the block to its end.

Compiled code does not look whether hooks came or went, so whatever comes from this library has to
see to it. The graph is what
matters: it is run as it is, and no machine code is made of it.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from architectures import ARCHITECTURES, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import CompileConfig

from common import (
    ActivationAddition,
    Grid,
    SteeringVector,
    addition_vectors,
    apply_activation_additions,
    read_activations,
    record_activations,
    sweep_logits,
)
from common.checking.pristine import assert_pristine, snapshot
from common.places.blocks import get_blocks
from common.places.sites import Site
from common.sweeping.rows import RowSteering, steering_rows

IDS = torch.tensor([[5, 9, 30, 2, 7]])


@pytest.fixture
def small() -> Iterator[PreTrainedModel]:
    """One block, so that it compiles fast; what was compiled is forgotten afterwards."""
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        kind, sizes = ARCHITECTURES["GPT-NeoX"]
        patch.setitem(ARCHITECTURES, "GPT-NeoX", (kind, {**sizes, "num_hidden_layers": 1}))
        yield tiny_model("GPT-NeoX", 40)
    torch.compiler.reset()


def in_place(block: nn.Module) -> None:
    block.compile(backend="eager")


def forward(block: nn.Module) -> None:
    block.forward = torch.compile(block.forward, backend="eager")


@torch.no_grad()
def logits(model: Callable) -> Tensor:
    return model(IDS, use_cache=False).logits


def vector(seed: int = 0, layer_type: str = "mlp") -> SteeringVector:
    return SteeringVector(
        {0: 3 * torch.randn(32, generator=torch.Generator().manual_seed(seed))}, layer_type
    )


STEERINGS = {
    "vector": lambda model: vector().apply(model),
    "vector from a token on": lambda model: vector().apply(model, min_token_index=2),
    "rows": lambda model: steering_rows(
        model, [RowSteering(Site(0, "mlp"), vector().layer_activations[0][None])]
    ),
}


def test_a_compiled_model(small):
    """The wrapper that `torch.compile` gives, which the module inside knows nothing of."""
    plain = logits(small)
    with vector(layer_type="decoder_block").apply(small):
        steered = logits(small)
    fast = torch.compile(small, backend="eager")
    before = snapshot(small)
    torch.testing.assert_close(logits(fast), plain)
    with vector(layer_type="decoder_block").apply(small):
        torch.testing.assert_close(logits(fast), steered)
    torch.testing.assert_close(logits(fast), plain)
    with vector(layer_type="decoder_block").apply(fast):
        pass
    assert_pristine(small, before)


@pytest.mark.parametrize(
    "name, compiled",
    [("vector", in_place), ("vector from a token on", forward), ("rows", in_place)],
)
def test_a_compiled_block(small, name, compiled):
    """Its MLP is steered, and after an exception is not: always as without compiling."""
    plain = logits(small)
    with STEERINGS[name](small):
        steered = logits(small)
    assert not torch.allclose(plain, steered, atol=1e-2)
    compiled(small.gpt_neox.layers[0])
    torch.testing.assert_close(logits(small), plain)

    def fail_in_the_block():
        with STEERINGS[name](small):
            torch.testing.assert_close(logits(small), steered)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail_in_the_block()
    torch.testing.assert_close(logits(small), plain)


def test_an_addition_to_what_a_block_reads(small):
    """It is read from the model as it is, and added to the compiled one."""
    addition = [ActivationAddition(4, 0, tokens=[3, 8])]
    with apply_activation_additions(small, None, addition):
        steered = logits(small)
    fast = torch.compile(small, backend="eager")
    assert not torch.allclose(logits(fast), steered, atol=1e-2)
    with apply_activation_additions(small, None, addition):
        torch.testing.assert_close(logits(fast), steered)


def test_generation_with_a_static_cache(small):
    """Transformers compiles the model inside `generate`, and keeps that for the next call."""
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True  # on a GPU it does so by itself

    def text(**options) -> list[int]:
        return small.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None, **options)[
            0
        ].tolist()

    options = {"cache_implementation": "static", "compile_config": config}
    plain = text()
    with vector().apply(small):
        steered = text()
    assert plain[7:] != steered[7:]
    assert text(**options) == plain and hasattr(small, "_compiled_call")
    with vector().apply(small):
        assert text(**options) == steered
    assert text(**options) == plain


def test_reading_a_compiled_model(small, tokenizer):
    """Recorded, read and swept as without compiling; what was compiled is kept."""
    words = ["You", "I love dogs"]
    own = tiny_model("GPT-2", len(tokenizer))
    wanted = read_activations(own, tokenizer, words, [1], "mlp")[1]
    with torch.no_grad(), record_activations(own, "mlp", layer_nums=[1]) as records:
        own(IDS)
    addition = [ActivationAddition(4, (1, "mlp"), tokens=[3, 8])]
    (added,) = addition_vectors(own, tokenizer, addition).values()
    table = sweep_logits(
        own,
        tokenizer,
        Grid({"v": vector(layer_type="decoder_block")}, [0], [1.0]),
        words,
        show_progress=False,
    )
    for block in get_blocks(own)[1]:
        block.compile(backend="eager")
    logits(own)
    compiled = len(torch._dynamo.convert_frame.input_codes.seen)
    torch.testing.assert_close(read_activations(own, tokenizer, words, [1], "mlp")[1], wanted)
    with torch.no_grad(), record_activations(own, "mlp", layer_nums=[1]) as again:
        own(IDS)
    torch.testing.assert_close(again[1], records[1])
    torch.testing.assert_close(
        next(iter(addition_vectors(own, tokenizer, addition).values())), added
    )
    found = sweep_logits(
        own,
        tokenizer,
        Grid({"v": vector(layer_type="decoder_block")}, [0], [1.0]),
        words,
        show_progress=False,
    )
    assert (
        found["kl"].tolist() == pytest.approx(table["kl"].tolist(), abs=1e-5)
        and (found["kl"] > 0).any()
    )
    assert compiled and len(torch._dynamo.convert_frame.input_codes.seen) == compiled
