"""What a pass over a batch needs, where several threads or several parts of a batch meet."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from architectures import WIDE, tiny_model
from odd_tokenizers import gpt2
from transformers import DynamicCache, Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel

from common.passes.hooks import uncompiled
from common.passes.padding import padded
from common.passes.running import in_evaluation_mode
from common.places.sites import Site
from common.sweeping.grid import Grid
from common.sweeping.rows import RowSteering, steering_rows
from common.sweeping.sweep import sweep
from common.texts.completions import complete
from common.texts.generation import generate, logits
from common.texts.sampling import Sampling, sample
from common.vectors.steering_vector import SteeringVector


def left_by_another_thread(block: Callable[[], AbstractContextManager]) -> Callable[[], None]:
    """Open a block in another thread; what is returned ends it there."""
    inside, leave = threading.Event(), threading.Event()

    def run() -> None:
        with block():
            inside.set()
            leave.wait(10)

    def end() -> None:
        leave.set()
        thread.join()

    thread = threading.Thread(target=run)
    thread.start()
    inside.wait(10)
    return end


def test_evaluation_mode_lasts_as_long_as_any_thread_needs_it():
    model = tiny_model("GPT-2", 50).train()
    model.lm_head.eval()
    end = left_by_another_thread(lambda: in_evaluation_mode(model))
    with in_evaluation_mode(model):
        end()
        assert not any(module.training for module in model.modules())
    assert {name for name, module in model.named_modules() if not module.training} == {"lm_head"}


def test_compiled_code_is_left_out_as_long_as_any_thread_needs_it():
    ran = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        def run(*args: torch.Tensor) -> tuple:
            ran.append("compiled")
            return graph(*args)

        return run

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    end = left_by_another_thread(uncompiled)
    with uncompiled():
        end()
        compiled(torch.ones(2))
        assert not ran
    compiled(torch.ones(2))
    assert ran == ["compiled"]


# Bart numbers the columns: rows of different lengths are run by themselves.
BATCH = {
    "input_ids": torch.tensor([[5, 9, 3, 7, 8, 4], [0, 0, 0, 3, 4, 11], [0, 0, 0, 6, 9, 2]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1]]),
}


def bart() -> PreTrainedModel:
    """A decoder that does not end by itself."""
    model = tiny_model("BART decoder", 50)
    model.generation_config.eos_token_id = None
    return model


def sampled(model, inputs, max_new_tokens: int, **options) -> torch.Tensor:
    return sample(model, inputs, [0, 1, 2], Sampling(max_new_tokens), **options)


@pytest.mark.parametrize("run", [generate, sampled])
def test_what_ended_early_in_a_part_is_padded_with_the_end_that_was_asked_for(run):
    model = bart()
    end = run(model, BATCH, max_new_tokens=6)[0, 8].item()
    found = run(model, BATCH, max_new_tokens=6, eos_token_id=end)[0, 6:].tolist()
    assert end in found[:3] and set(found[3:]) == {end}


@pytest.mark.parametrize(
    "option",
    [
        {"past_key_values": DynamicCache()},
        {"prefix_allowed_tokens_fn": lambda row, ids: [row]},
        {"num_return_sequences": 2},
    ],
)
@pytest.mark.parametrize("run", [generate, sampled])
def test_what_belongs_to_the_rows_of_a_batch_is_refused_where_they_are_run_by_themselves(
    run, option
):
    with pytest.raises(ValueError, match=f"with {next(iter(option))} give one prompt at a time"):
        run(bart(), BATCH, max_new_tokens=3, **option)
    run(bart(), BATCH, max_new_tokens=3, num_return_sequences=1)


@pytest.mark.parametrize("pad", [-1, 5, None, 10**6])
def test_a_text_that_ends_early_is_the_same_in_a_batch_whatever_the_checkpoint_pads_with(pad):
    tokenizer = gpt2()
    model = tiny_model("GPT-2", len(tokenizer))
    prompts = ["I love you", "The quick brown fox", "My neighbour hates"]
    inputs = tokenizer(prompts[0], return_tensors="pt")
    model.generation_config.eos_token_id = generate(model, inputs, max_new_tokens=4)[
        0, -1
    ].item()  # no special token
    model.generation_config.pad_token_id = pad
    vector = {"zero": SteeringVector({0: torch.zeros(32)})}

    def swept(prompts: list[str]) -> list[str]:
        rows = sweep(
            model,
            tokenizer,
            Grid(vector, [0], [1.0]),
            prompts,
            sampling=Sampling(max_new_tokens=8, temperature=0.0),
            show_progress=False,
        )
        return rows[rows.kind == "steering"].completion.tolist()

    assert swept(prompts) == [swept([prompt])[0] for prompt in prompts]
    whole = complete(
        model, tokenizer, prompts, sampling=Sampling(max_new_tokens=8, temperature=0.0)
    ).completions.tolist()
    assert whole == [
        complete(
            model, tokenizer, [prompt], sampling=Sampling(max_new_tokens=8, temperature=0.0)
        ).completions[0]
        for prompt in prompts
    ]


def test_positions_in_a_model_that_hands_its_blocks_a_mask_of_its_own():
    """Gemma 3 with images makes the masks of its attention above the text model."""
    torch.manual_seed(0)
    text = {**WIDE, "vocab_size": 60, "head_dim": 8, "sliding_window": 4, "pad_token_id": 0}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    tokens = {"image_token_id": 59, "boi_token_index": 58, "eoi_token_index": 57}
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    ).eval()
    rows = [[5, 9, 3, 7, 8, 4], [3, 4, 11]]
    with SteeringVector({1: 3 * torch.randn(32)}).apply(model, token_indices=[-1, -3]):
        whole = logits(model, padded(rows))
        for found, row in zip(whole, rows):
            torch.testing.assert_close(
                found[-len(row) :], logits(model, padded([row]))[0], atol=1e-4, rtol=1e-4
            )


ROWS = [[5, 9, 3, 7], [3, 4, 11], [6, 8, 2, 12, 30], [14, 4, 11]]


def per_row(
    model: PreTrainedModel,
) -> dict[str, tuple[AbstractContextManager, list[AbstractContextManager]]]:
    """Steering that is another one in each row: of a whole batch, and of each row alone."""
    draw = torch.Generator().manual_seed(0)
    vector = SteeringVector({1: 5 * torch.randn(32, generator=draw)})
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 0, 0, 0]])
    found = {
        "mask": (
            vector.apply(model, token_indices=mask),
            [vector.apply(model, token_indices=row[None]) for row in mask],
        )
    }
    for location, count in ((None, 1), ("front", 2), ("back", 3)):
        rows = [
            RowSteering(Site(1, "resid_post"), 5 * torch.randn(count, 32, generator=draw), location)
            for _ in ROWS
        ]
        rows[1] = None
        found[str(location)] = (
            steering_rows(model, rows),
            [steering_rows(model, [row]) for row in rows],
        )
    return found


@pytest.mark.parametrize("name", ["GPT-2", "BART decoder", "RWKV"])
@pytest.mark.parametrize("kind", ["mask", "None", "front", "back"])
def test_steering_by_rows_stays_with_its_row(name, kind):
    """Logits and greedy ids are those of each row alone, also where a batch runs in parts."""
    model, inputs = tiny_model(name, 50), padded(ROWS)
    options = {"max_new_tokens": 3, "eos_token_id": None, "forced_eos_token_id": None}
    whole, alone = per_row(model)[kind]
    with whole:
        scores, ids = logits(model, inputs), generate(model, inputs, **options)
    for number, (row, steering) in enumerate(zip(ROWS, alone)):
        one = padded([row])
        with steering:
            torch.testing.assert_close(
                scores[number, -len(row) :], logits(model, one)[0], atol=1e-3, rtol=1e-3
            )
            assert ids[number, -3:].tolist() == generate(model, one, **options)[0, -3:].tolist()


@pytest.mark.parametrize("name", ["GPT-2", "BART decoder"])
def test_steering_of_other_rows_is_refused(name):
    """A mask of four rows, and three in the batch."""
    model, inputs = tiny_model(name, 50), padded(ROWS[:3])
    for whole, _ in per_row(model).values():
        with whole, pytest.raises(ValueError, match="has 4 rows and the batch has 3"):
            logits(model, inputs)
