"""Checks for steering code, your own included: each fails with a sentence that says what it found and what usually causes it.

`model` is a causal language model in evaluation mode. `steering` is a callable that returns a
context manager, for example
`lambda: my_steer(model)`; it is opened anew for each pass. A check sees where steering acts,
whatever it is made of: it reads what each block gets and what the last one gives. For a model that
is not called as those of Hugging Face are, hand over the `logits(model, inputs)` and
`generate(model, inputs, **options)` of its mechanism, and your own to check how YOU run it. The
hooks of a check are gone afterwards, also when it fails. Whether steering left anything behind:
`pristine.assert_pristine`. The mistakes themselves are shown in failures.ipynb.

All checks raise AssertionError for what they are there to find, and ValueError for arguments that
they cannot work with: a model in training mode, a tokenizer without padding token, prompts without
tokens, steering that is no callable.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from common.measuring.likelihood import kl_divergence
from common.passes.padding import encode
from common.passes.prompts import Prompt, is_prompt, prompt_ids
from common.passes.rounding import rounding_error
from common.passes.running import Steering, input_device
from common.places.blocks import check_vector, get_block, get_blocks, get_hidden, with_hidden
from common.places.names import _find
from common.places.positions import TokenSelection, position_ids
from common.places.sites import Site
from common.texts import generation

PROMPTS = ("I think that dogs are", "The garden", "My old neighbour went to the house and said")
Logits = Callable[[Any, Mapping[str, Tensor]], Tensor]

# --- where steering acts, and where not ---


@torch.no_grad()
def assert_steers_every_row(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    steering: Steering,
    prompts: Sequence[str] = PROMPTS,
    *,
    logits: Logits = generation.logits,
) -> None:
    """Fail if a row of a left-padded batch is steered otherwise than the same prompt alone.

    It catches `output[0]` on a block that gives the bare tensor (only row 0 moves), positions
    counted from the padding, and, with your own `logits`, a pass without position ids. The prompts
    need two lengths or more; one that is too short for the steering, and does not move alone, must
    not move in the batch.
    """
    batch = _batch(model, tokenizer, steering, prompts)
    if len(set(batch["attention_mask"].sum(-1).tolist())) < 2:
        raise ValueError(
            "expected prompts of two lengths or more, so that there is padding; got"
            f" {list(prompts)}"
        )
    before, after = _read(model, batch, logits), _read(model, batch, logits, steering)
    unmoved, otherwise, silent = [], [], 0
    for row, real in enumerate(batch["attention_mask"].bool()):
        single = {
            name: batch[name][row : row + 1, real] for name in ("input_ids", "attention_mask")
        }
        one_before, one_after = _read(model, single, logits), _read(model, single, logits, steering)
        if not _same_logits(before.logits[row, real], one_before.logits[0]):
            off = (before.logits[row, real] - one_before.logits[0]).abs().max().item()
            _fail(
                f"without any steering, the logits of row {row} of a padded batch are off by"
                f" {off:.1g}",
                "those of the prompt alone",
                "a left-padded pass without position ids: use positions.with_position_ids(inputs)",
            )
        places = (
            _first_place(one_before, one_after),
            _first_place(before, after, batch["attention_mask"].bool()),
        )
        silent += places[0] is None
        place = next((place for place in places if place is not None), 0)
        moved, alone = after.moves(before, place)[row, real], one_after.moves(one_before, place)[0]
        if alone.any() and not moved.any():
            unmoved.append(row)
        elif not _agree(moved, alone, one_before.places[place][0]) or not _same_logits(
            after.logits[row, real], one_after.logits[0]
        ):
            tokens, tokens_alone = (
                part.any(-1).nonzero().flatten().tolist() for part in (moved, alone)
            )
            otherwise.append(
                f"row {row} of a padded batch is moved at its tokens {tokens}, and alone at"
                f" {tokens_alone} or by something else"
            )
    if silent == len(prompts):
        _fail(
            "no prompt is moved anywhere",
            "steering",
            "a hook on a module that does not run, or a vector of 0",
        )
    if unmoved:
        _fail(
            f"rows {unmoved} of a batch of {len(prompts)} do not move, and each prompt alone does",
            "all rows to move",
            "output[0] of a block, which is the first row where the block gives the bare tensor:"
            " use blocks.get_hidden and with_hidden",
        )
    if otherwise:
        _fail(
            otherwise[0],
            "the same in both",
            "positions counted from the padding, not from the row's first token",
        )


def assert_steers_generated_tokens(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    steering: Steering,
    prompts: Sequence[str] = PROMPTS[:1],
    new_tokens: int = 5,
    *,
    logits: Logits = generation.logits,
    generate: Callable = generation.generate,
) -> None:
    """Fail unless generated tokens are steered too, with a KV cache as without one.

    It catches a mask over the length of the pass: with a cache each new token is a pass of length
    1. Greedy; the last of the new tokens is never read and does not count. ValueError also if the
    text ends at once.
    """
    cached, uncached = _generated(model, tokenizer, steering, prompts, new_tokens, logits, generate)
    for way, found in (("with", cached), ("without", uncached)):
        if not found.new.all():
            cause = (
                "steering meant for the prompt only (then: assert_leaves_generated_tokens), or"
                " applied to the first pass only"
            )
            if uncached.new.all():
                cause = (
                    "a mask over the length of the pass, which with a cache is 1 at each new token:"
                    " count absolute positions"
                )
            _fail(
                f"{way} a KV cache {int(found.new.sum())} of {found.new.numel()} generated tokens"
                " are steered",
                "all of them",
                cause,
            )
    _assert_same(cached, uncached)


def assert_leaves_generated_tokens(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    steering: Steering,
    prompts: Sequence[str] = PROMPTS[:1],
    new_tokens: int = 5,
    *,
    logits: Logits = generation.logits,
    generate: Callable = generation.generate,
) -> None:
    """Fail unless steering keeps to the prompt, with a KV cache as without one; for activation additions, for example.

    It catches "the first token" or "the last token" of a pass, which with a cache is every new
    token. Steering inside a block, in front of its attention, moves later tokens through the
    attention, and fails here.
    """
    cached, uncached = _generated(model, tokenizer, steering, prompts, new_tokens, logits, generate)
    for way, found in (("with", cached), ("without", uncached)):
        if found.new.any():
            _fail(
                f"{way} a KV cache {int(found.new.sum())} of {found.new.numel()} generated tokens"
                " are steered",
                "only the prompt",
                "positions counted within the pass: with a cache the first and the last token of a"
                " pass are the new one",
            )
    _assert_same(cached, uncached)


@torch.no_grad()
def assert_adds(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    steering: Steering,
    layer: int,
    vector: Tensor,
    positions: list[int] | slice | None = None,
    prompts: Sequence[str] = PROMPTS,
    *,
    logits: Logits = generation.logits,
) -> None:
    """Fail unless steering adds `vector` [d_model] at resid_post of `layer`, once, in the model's dtype, and does nothing else.

    It catches steering twice, another sign or scale, a layer that is off by one, rows and positions
    that are left out, and whatever is steered besides, further up.

    Args:
        model, tokenizer, steering, logits: see above.
        layer: the block after which it is added, counted from 0.
        vector: other than 0, of any floating-point dtype.
        positions: the tokens that are meant, as absolute positions, negative ones from the end of
            the prompt; all by default.
        prompts: one or more, run as one batch.
    """
    vector = check_vector(_module(model), layer, vector)
    if not vector.any():
        raise ValueError("expected a vector other than 0")
    batch = _batch(model, tokenizer, steering, prompts)
    mask = batch["attention_mask"]
    real, selection = mask.bool(), TokenSelection(token_indices=positions)
    meant = selection.select(position_ids(mask), mask.sum(-1)) & real
    before, after = _read(model, batch, logits), _read(model, batch, logits, steering)
    place, wanted = _first_place(before, after, real), f"resid_post of layer {layer}"
    if place is None:
        _fail(
            "nothing is moved",
            f"the vector at {wanted}",
            "a hook on a module that does not run, or that is gone already",
        )
    if place != layer + 1:
        cause = (
            "'resid_pre' 6 and the 'layer 6' of the activation-addition post are resid_post of"
            " layer 5 (see checks.where_is)"
        )
        _fail(f"the first place that moves is {_named(place)}", wanted, cause)
    hidden = before.places[place]
    if after.places[place].dtype != hidden.dtype:
        _fail(
            f"steered hidden states are {after.places[place].dtype}",
            str(hidden.dtype),
            "a vector that was not brought to the model's dtype",
        )
    moves = after.moves(before, place)
    for row, moved in enumerate(moves.any(-1) & real):
        if not torch.equal(moved, meant[row]):
            found, expected = (
                (part.nonzero().flatten() - (mask[row] == 0).sum()).tolist()
                for part in (moved, meant[row])
            )
            _fail(
                f"row {row} is moved at its tokens {found}",
                f"{expected}",
                "output[0] of a bare tensor, or positions counted from the padding",
            )
    if not _agree(moves[meant], vector.float().expand_as(moves[meant]), hidden[meant]):
        times = (moves[meant] @ vector.float() / vector.float().square().sum()).mean().item()
        cosine = torch.cosine_similarity(moves[meant].mean(0), vector.float(), dim=0).item()
        cause = (
            "the sign of the difference"
            if times < 0
            else "steering that is open twice"
            if times > 1.5
            else "the scale"
        )
        cause = cause if abs(cosine) > 0.99 else "another vector, or several at this layer"
        _fail(
            f"what is added at {wanted} is {times:.2g} times the vector (cosine {cosine:.2f})",
            "the vector once",
            cause,
        )
    addition = vector * meant[..., None]
    handle = get_block(_module(model), layer).register_forward_hook(
        lambda module, args, out: with_hidden(out, get_hidden(out) + addition)
    )
    try:
        reference = _read(model, batch, logits)
    finally:
        handle.remove()
    for above in range(place + 1, len(before.places)):
        if not _agree(
            after.moves(before, above)[real],
            reference.moves(before, above)[real],
            before.places[above][real],
        ):
            found = (
                f"beside the vector at {wanted}, something acts further up: {_named(above)} is not"
                " that of a plain addition"
            )
            _fail(
                found, "nothing else", "steering at several layers, or a hook that was left behind"
            )


def assert_same_place(model: nn.Module, *names: int | str | Site) -> None:
    """Fail unless all names mean one place; numbers are our layers. It catches the layer that is off by one."""
    places = [_find(model, name) for name in names]
    for name, place in zip(names, places):
        if place != places[0]:
            found = f"{names[0]!r} is {_named(places[0])}, and {name!r} is {_named(place)}"
            _fail(
                found,
                "one place",
                "what a block reads (resid_pre, hidden_states, the post's 'layer') is counted one"
                " higher than what the block before gives",
            )


# --- prompts, sampling, numbers ---


def assert_same_length(tokenizer: PreTrainedTokenizerBase, *prompts: Prompt) -> None:
    """Fail unless all prompts have as many tokens; otherwise position i of one has no counterpart in the other."""
    if len(prompts) < 2 or not all(map(is_prompt, prompts)):
        raise ValueError(f"expected two texts or more, got {prompts!r}")
    tokens = [
        [tokenizer.decode([number]) for number in row] for row in prompt_ids(tokenizer, prompts)
    ]
    if len({len(row) for row in tokens}) > 1:
        found = "; ".join(f"{len(row)} tokens {row}" for row in tokens)
        _fail(
            found,
            "as many in each",
            "words that are split differently: pad the shorter prompt (get_x_vector), or read the"
            " last token only",
        )


def assert_bos(
    tokenizer: PreTrainedTokenizerBase,
    *prompts: Prompt | Sequence[int] | Tensor | Mapping[str, Tensor],
) -> None:
    """Fail unless all prompts begin alike: each with one BOS, or each with none, as where the tokenizer has none.

    It catches a vector read with BOS and a prompt run without one, and a second BOS in front of the
    first. A text is taken as your own `tokenizer(text)` gives it; where this library reads a text,
    the second BOS does not come about.

    Args:
        tokenizer: the model's tokenizer.
        prompts: texts, as this tokenizer encodes them; messages, as its chat template does; token
            ids [pos] without padding; or what a tokenizer returned, where the attention mask says
            what is padding.
    """
    rows: list[list[int]] = []
    for prompt in prompts:
        given = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        given = (
            prompt_ids(tokenizer, [prompt])[0]
            if is_prompt(prompt) and not isinstance(prompt, str)
            else given
        )
        if isinstance(given, Mapping | BatchEncoding):
            ids, mask = (
                torch.atleast_2d(torch.as_tensor(given[name]))
                for name in ("input_ids", "attention_mask")
            )
            rows += [row[real].tolist() for row, real in zip(ids, mask.bool())]
        else:
            rows.append(torch.as_tensor(given).tolist())
    if not rows or not all(
        row and isinstance(row, list) and isinstance(row[0], int) for row in rows
    ):
        raise ValueError(
            "expected prompts of one token or more, as texts, ids [pos], or with an attention mask"
        )
    counts = [
        next((i for i, number in enumerate(row) if number != tokenizer.bos_token_id), len(row))
        for row in rows
    ]
    if max(counts) > 1 or len(set(counts)) > 1:
        cause = (
            "a text with its own BOS, and a tokenizer that puts another in front"
            if max(counts) > 1
            else (
                "TransformerLens puts BOS in front of a text and GPT-2's tokenizer does not: write"
                " it in all of them (generation.encode)"
            )
        )
        _fail(f"the prompts begin with {counts} BOS tokens", "one each, or none at all", cause)


@torch.no_grad()
def assert_no_top_k(model: PreTrainedModel, **options: Any) -> None:
    """Fail if sampling with these options of `model.generate` never gives some of the tokens.

    One token is sampled, and those that could have been are counted; the random state is put back.
    top_p and min_p are left
    out: whoever gives them wants them.
    """
    options |= {
        "do_sample": True,
        "top_p": 1.0,
        "min_p": None,
        "max_new_tokens": 1,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        scores = model.generate(
            torch.zeros(1, 1, dtype=torch.long, device=model.device), **options
        ).scores[0]
    if (kept := int(torch.isfinite(scores).sum())) < scores.shape[-1]:
        cause = (
            "top_k=50, which Hugging Face sets by itself: pass top_k=0 (generation.generate does)"
        )
        _fail(f"sampling chooses among {kept} of {scores.shape[-1]} tokens", "all of them", cause)


def precision_of_difference(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> float:
    """Return about how many significant bits the difference of two activations of one shape has left at most.

    Each was rounded to the precision of `dtype` (by default their own), and what they share
    cancels. The passes that gave them have rounded too, so there may be fewer.
    """
    if a.shape != b.shape or not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(
            f"expected two floating-point tensors of one shape, got {a.dtype} {list(a.shape)} and"
            f" {b.dtype} {list(b.shape)}"
        )
    error = rounding_error(a, b, dtype=dtype or torch.promote_types(a.dtype, b.dtype))
    difference = (a.double() - b.double()).norm().item()
    return max(0.0, math.log2(difference / error)) if difference else 0.0


def assert_precise_difference(
    a: Tensor, b: Tensor, bits: float = 5, dtype: torch.dtype | None = None
) -> None:
    """Fail if the difference of two activations has fewer significant bits left; see `precision_of_difference`."""
    if (left := precision_of_difference(a, b, dtype)) < bits:
        name = str(dtype or torch.promote_types(a.dtype, b.dtype)).removeprefix("torch.")
        found = (
            f"of a difference of {(a.double() - b.double()).norm():.1g} between activations of"
            f" {a.double().norm():.2g} in {name}, "
        )
        _fail(
            f"{found}{int(left)} significant bits are left at most",
            f"{bits:g} or more",
            "large activations in 16 bit: read them in float32",
        )


def assert_beats_random(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    steer: Callable[[Tensor], AbstractContextManager],
    vector: Tensor,
    measure: Callable[[], float] | None = None,
    controls: int = 8,
    margin: float = 1.5,
    prompts: Sequence[str] = PROMPTS,
    seed: int = 0,
) -> None:
    """Fail unless a vector does clearly more than random directions of the same norm.

    It catches a coefficient so large that everything "works", and a vector that means nothing.

    Args:
        model, tokenizer: see above.
        steer: a vector [d_model] -> a context manager, for example `lambda v: my_steer(model, v)`.
        vector: with its coefficient.
        measure: a number, taken once unsteered and once under each vector; the effect is how far it
            moves. By default the divergence of the next token after `prompts` from unsteered, in
            nats, which says how much happens, and not what.
        controls: how many random directions, drawn from `seed`.
        margin: by which factor the effect must be larger than the largest effect of a control.
    """
    if controls < 1:
        raise ValueError(f"expected one control or more, got {controls!r}")
    measure = measure or _divergence(model, tokenizer, prompts)
    unsteered = measure()

    def effect(candidate: Tensor) -> float:
        with steer(candidate):
            return abs(measure() - unsteered)

    noise = torch.randn(controls, len(vector), generator=torch.Generator().manual_seed(seed))
    randoms = (noise / noise.norm(dim=-1, keepdim=True)).to(vector) * vector.norm()
    ours, largest = effect(vector), max(map(effect, randoms))
    if not ours > margin * largest:
        found = (
            f"the vector, of norm {vector.norm():.3g}, moves the measure by {ours:.2g}, and random"
            f" directions of that norm by up to {largest:.2g}"
        )
        _fail(
            found,
            f"{margin:g} times as much as they",
            "a coefficient so large that any direction would do, or a vector that means nothing",
        )


# --- how it is measured ---


class _Pass(NamedTuple):
    """What a pass gave: what block 0, 1, … read and what the last one gave, [batch, pos, d_model] each; and the logits."""

    places: list[Tensor]
    logits: Tensor

    def moves(self, before: "_Pass", place: int) -> Tensor:
        """The difference to another pass at a place, [batch, pos, d_model], fp32."""
        return self.places[place].float() - before.places[place].float()


class _Generated(NamedTuple):
    """A generated text: its ids, how each token was moved where steering acts, the hidden states there, which new ones moved."""

    ids: Tensor
    moves: Tensor
    hidden: Tensor
    new: Tensor


def _fail(found: str, expected: str, cause: str) -> NoReturn:
    raise AssertionError(f"{found}; expected {expected}. Usual cause: {cause}.")


def _module(model: Any) -> nn.Module:
    """The torch module that holds the blocks, also of an nnsight model or a TransformerBridge."""
    return getattr(model, "_module", getattr(model, "original_model", model))


def _named(place: int) -> str:
    return f"resid_post of layer {place - 1}" if place else "what block 0 reads"


def _batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    steering: Steering | None,
    prompts: Sequence[str],
) -> BatchEncoding:
    """The prompts as a batch padded on the left, after a look at the arguments."""
    if steering is not None and (
        isinstance(steering, AbstractContextManager) or not callable(steering)
    ):
        raise ValueError(
            "expected a callable that returns a context manager, as in `lambda: my_steer(model)`;"
            f" got {type(steering).__name__}"
        )
    if _module(model).training:
        raise ValueError(
            "the model is in training mode, where dropout moves everything: call model.eval()"
        )
    if tokenizer.pad_token is None:
        raise ValueError(
            "the tokenizer has no padding token: set tokenizer.pad_token = tokenizer.eos_token"
        )
    return encode(tokenizer, prompts).to(input_device(_module(model)))


@contextmanager
def _recording(model: Any) -> Iterator[list[list[Tensor]]]:
    """Record what each block reads and what the last one gives, after all hooks that are open; by place, one tensor a pass."""
    _, blocks = get_blocks(_module(model))
    places: list[list[Tensor]] = [[] for _ in range(len(blocks) + 1)]

    def reads(place: int) -> Callable:
        return lambda module, args, kwargs: places[place].append(
            (args[0] if args else kwargs["hidden_states"]).detach().clone()
        )

    handles = [
        block.register_forward_pre_hook(reads(place), with_kwargs=True)
        for place, block in enumerate(blocks)
    ]
    handles.append(
        blocks[-1].register_forward_hook(
            lambda module, args, output: places[-1].append(get_hidden(output).detach().clone())
        )
    )
    try:
        yield places
    finally:
        for handle in handles:
            handle.remove()


def _read(
    model: Any, inputs: Mapping[str, Tensor], logits: Logits, steering: Steering = nullcontext
) -> _Pass:
    with steering(), _recording(model) as places:
        scores = logits(model, inputs)
    if not all(places):
        raise ValueError("expected `logits` to run the model, and it did not run its blocks")
    return _Pass([passes[-1] for passes in places], scores)


def _first_place(before: _Pass, after: _Pass, real: Tensor | None = None) -> int | None:
    """The first place at which a pass differs from another of the same shape; below it nothing differs, not even by rounding."""
    for place in range(len(before.places)):
        moved = after.moves(before, place).ne(0).any(-1)
        if (moved if real is None else moved & real).any():
            return place
    return None


def _rounding(hidden: Tensor) -> float:
    """By what part of its size a hidden state can differ between two passes that compute the same in another order."""
    return max(4 * torch.finfo(hidden.dtype).eps, 1e-5)


def _agree(moves: Tensor, others: Tensor, hidden: Tensor) -> bool:
    """Whether two differences [..., d_model] are the same but for the rounding of the hidden states they were taken from."""
    size = hidden.float().abs() + others.abs()
    slack = 0.02 * others.abs().amax(-1, keepdim=True) + _rounding(hidden) * (
        size + size.mean(-1, keepdim=True)
    )
    return bool(((moves - others).abs() <= slack).all())


def _same_logits(scores: Tensor, others: Tensor) -> bool:
    """Whether two logits are the same but for rounding."""
    slack = max(8 * torch.finfo(scores.dtype).eps, 1e-3)
    return bool((scores - others).abs().max() <= slack * others.abs().max())


@torch.no_grad()
def _generated(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    steering: Steering,
    prompts: Sequence[str],
    new_tokens: int,
    logits: Logits,
    generate: Callable,
) -> list[_Generated]:
    """Generate steered, with a KV cache and without, and compare with an unsteered pass over the same text."""
    batch = _batch(model, tokenizer, steering, prompts)
    length = batch["input_ids"].shape[1]
    place = _first_place(
        _read(model, batch, logits),
        _read(model, batch, logits, steering),
        batch["attention_mask"].bool(),
    )
    runs = []
    for use_cache in (True, False):
        with steering(), _recording(model) as places:
            try:
                ids = generate(model, batch, max_new_tokens=new_tokens, use_cache=use_cache)
            except Exception as error:
                cause = (
                    "token indices of the prompt, applied to a pass of length 1, as each new token"
                    " is with a cache"
                )
                raise AssertionError(
                    f"steered generation, use_cache={use_cache}, fails with {error!r}. Usual cause:"
                    f" {cause}."
                ) from error
        if ids.shape[1] < length + 2:
            raise ValueError(
                f"the text ended at once after {list(prompts)}: expected prompts that the model"
                " continues"
            )
        # With a cache all passes together are the text; without one the last pass is.
        steered = [
            passes[-1] if passes[-1].shape[1] == ids.shape[1] - 1 else torch.cat(passes, dim=1)
            for passes in places
        ]
        mask = torch.cat([batch["attention_mask"], torch.ones_like(ids[:, length:-1])], dim=1)
        before = _read(model, {"input_ids": ids[:, :-1], "attention_mask": mask}, logits)
        after = _Pass(steered, before.logits)
        size = [
            _rounding(hidden) * hidden[:, length:].float().norm(dim=-1) for hidden in before.places
        ]
        new = [
            ~(after.moves(before, number)[:, length:].norm(dim=-1) <= noise)
            for number, noise in enumerate(size)
        ]
        if place is None:  # the prompt is not steered; perhaps what follows is
            place = next((number for number, moved in enumerate(new) if moved.any()), None)
        if place is None:
            _fail(
                "neither prompt nor generated tokens are moved",
                "steering",
                "a hook on a module that does not run, or a vector of 0",
            )
        runs.append(
            _Generated(
                ids, after.moves(before, place) * mask[..., None], before.places[place], new[place]
            )
        )
    return runs


def _assert_same(cached: _Generated, uncached: _Generated) -> None:
    """Fail if a token is moved otherwise with a cache than without, as far as both texts are the same."""
    size = min(cached.ids.shape[1], uncached.ids.shape[1]) - 1
    same = (cached.ids[:, :size] == uncached.ids[:, :size]).long().cumprod(-1).bool()
    if not _agree(
        cached.moves[:, :size][same],
        uncached.moves[:, :size][same],
        uncached.hidden[:, :size][same],
    ):
        _fail(
            "tokens are moved otherwise with a KV cache than without",
            "the same",
            "what is added depends on the length of the pass",
        )


@torch.no_grad()
def _divergence(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> Callable[[], float]:
    """A measure: the mean divergence of the next token after the prompts from what it is now."""
    batch = _batch(model, tokenizer, None, prompts)
    unsteered = generation.logits(model, batch)[:, -1].float()
    return lambda: (
        kl_divergence(generation.logits(model, batch)[:, -1].float(), unsteered).mean().item()
    )
