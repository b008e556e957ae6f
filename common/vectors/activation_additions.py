"""Activation additions: activations of one prompt, multiplied and added to those of another.

The method, its names and its three demonstrations are those of Turner et al., "Activation Addition:
Steering Language Models Without Optimization" (https://arxiv.org/abs/2308.10248), and of the post
and the library that went with it (https://github.com/montemac/activation_additions). Where that
library goes wrong, this one differs: each row of a padded batch has its own front, a prompt of one
token is a prompt, a pad id of 0 is an id, and nothing is changed in place.

Notation: resid_pre of block `l` is what the block reads, the same as resid_post of block `l - 1`.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from common.arguments import finite_number, finite_product, is_integer
from common.passes.hooks import (
    SteeringHook,
    holder_of_blocks,
    hook_input,
    hook_output,
    hook_passes,
    unsteered,
)
from common.passes.padding import padded
from common.passes.prompts import Prompt, is_prompt, prompt_ids
from common.passes.recording import record_pass
from common.passes.running import in_evaluation_mode, input_device
from common.places.blocks import text_config
from common.places.positions import PositionTracker, TokenSpan, of_rows
from common.places.sites import Site, find_site, parse_site

ActName = int | str | tuple[int, str]
AdditionLocation = Literal["front", "mid", "back"]


@dataclass(frozen=True, eq=False, repr=False)
class ActivationAddition:
    """A prompt whose activations are added, the place where that is, and the coefficient.

    Args:
        coeff: the coefficient; negative ones subtract.
        act_name: a number l or "blocks.{l}.hook_resid_pre" (both: what block l reads),
            "blocks.{l}.hook_resid_post", or a pair (layer, part); see `sites.parse_site`. It is
            kept as the name that TransformerLens gives the place.
        prompt: a text, or messages for a chat model. When a text is read it gets a BOS, where the
            tokenizer has one; the text may then be empty. Prompts and additions follow one rule,
            see `prompts.prompt_ids`.
        tokens: token ids [pos] instead of a prompt, including a BOS if one is wanted.

    Raises:
        ValueError: an unknown place, a coefficient that is not finite, both or neither of prompt
            and tokens, a prompt that is neither text nor messages, tokens that are not a row of
            integers from 0 on.
    """

    coeff: float
    act_name: ActName
    prompt: Prompt | None = None
    tokens: Tensor | Sequence[int] | None = None
    site: Site = field(init=False)

    def __post_init__(self) -> None:
        coeff = finite_number(self.coeff, "coefficient")
        site = parse_site(self.act_name)
        if (self.prompt is None) == (self.tokens is None):
            raise ValueError(
                f"give a prompt or tokens, exactly one of them; got prompt={self.prompt!r} and"
                f" tokens={self.tokens!r}"
            )
        if self.prompt is not None and not is_prompt(self.prompt):
            raise ValueError(
                f"expected a text or a list of messages as prompt, got {self.prompt!r}"
            )
        if self.prompt is not None and not isinstance(self.prompt, str):
            object.__setattr__(self, "prompt", [dict(message) for message in self.prompt])
        if self.tokens is not None:
            tokens = torch.as_tensor(self.tokens).detach().cpu()
            if (
                tokens.dim() != 1
                or not tokens.numel()
                or tokens.is_floating_point()
                or tokens.dtype == torch.bool
                or tokens.min() < 0
            ):
                raise ValueError(
                    f"expected tokens [pos] as integers from 0 on, got {tokens.dtype} of shape"
                    f" {list(tokens.shape)}"
                )
            object.__setattr__(self, "tokens", tokens.long().clone())
        object.__setattr__(self, "coeff", coeff)
        object.__setattr__(self, "site", site)
        object.__setattr__(
            self, "act_name", str(site) if str(site).startswith("blocks.") else tuple(site)
        )

    def _tokens(self) -> list[int] | None:
        return None if self.tokens is None else torch.as_tensor(self.tokens).tolist()

    def _key(self) -> tuple:
        return self.coeff, self.act_name, repr((self.prompt, self._tokens()))

    def __eq__(self, other: object) -> bool:
        """Say whether both have the same coefficient, place, and prompt or tokens."""
        if not isinstance(other, ActivationAddition):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        """Equal additions have equal hashes."""
        return hash(self._key())

    def __repr__(self) -> str:
        """Return the call that makes it."""
        tokens = self._tokens()
        what = f"prompt={self.prompt!r}" if tokens is None else f"tokens={tokens}"
        return f"ActivationAddition(coeff={self.coeff:g}, act_name={self.act_name!r}, {what})"

    def token_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return what the model reads: the tokens as they are, or BOS and the prompt (`with_bos`).

        Raises:
            ValueError: a prompt without tokens, as the empty text is where there is no BOS; or what
                `prompt_ids` raises.
        """
        tokens = self._tokens()
        ids = with_bos(tokenizer, cast(Prompt, self.prompt)) if tokens is None else tokens
        if not ids:
            raise ValueError(
                f"{self.prompt!r} has no tokens, since {type(tokenizer).__name__} has no BOS: pad"
                " it (get_x_vector with pad_method), or leave this addition out"
            )
        return ids


def with_bos(tokenizer: PreTrainedTokenizerBase, text: Prompt) -> list[int]:
    """Return BOS, where the tokenizer has one, and the tokens of a text.

    Of messages it returns what the chat template gives. GPT-2's tokenizer adds no BOS by itself;
    the activation-addition work always has one, and an X-vector is 0 there. Without a BOS (Qwen)
    additions begin at the first token of the prompt.

    Raises:
        ValueError: see `prompts.prompt_ids`, which this is, with `prepend_bos=True`.
    """
    return prompt_ids(tokenizer, [text], prepend_bos=True)[0]


def get_x_vector(
    prompt1: Prompt,
    prompt2: Prompt,
    coeff: float,
    act_name: ActName,
    model: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pad_method: Literal["tokens_right", "tokens_left"] | None = None,
    custom_pad_id: int | None = None,
) -> tuple[ActivationAddition, ActivationAddition]:
    """Return two additions whose sum is an X-vector.

    It is coeff times the difference between the activations of two prompts.

    Args:
        prompt1: what is added.
        prompt2: what is subtracted.
        coeff: the coefficient of the first; the second gets its negative.
        act_name: where, as for `ActivationAddition`.
        model: needed only if it brings the tokenizer, as models of TransformerLens do
            (`model.tokenizer`).
        tokenizer: needed for padding.
        pad_method: how two prompts of different lengths become equally long: "tokens_right" puts
            padding after the shorter, "tokens_left" before it, after BOS where there is one. None
            leaves them as they are; past the end of the shorter the X-vector is then the longer one
            alone, which is rarely what is wanted.
        custom_pad_id: the token to pad with, 0 included; the tokenizer's pad token by default. The
            published vectors are padded with a space.

    Raises:
        ValueError: an unknown pad method, no tokenizer to pad with, no pad token, an id outside the
            vocabulary; and what `ActivationAddition` raises.
    """
    if pad_method is None:
        return ActivationAddition(coeff, act_name, prompt=prompt1), ActivationAddition(
            -coeff, act_name, prompt=prompt2
        )
    if pad_method not in ("tokens_right", "tokens_left"):
        raise ValueError(
            f"expected 'tokens_right', 'tokens_left' or None as pad_method, got {pad_method!r}"
        )
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("padding needs a tokenizer: give tokenizer=, or a model that has one")
    pad: object = tokenizer.pad_token_id if custom_pad_id is None else custom_pad_id
    if not is_integer(pad) or not 0 <= pad < len(tokenizer):
        raise ValueError(
            f"expected a token id from 0 to {len(tokenizer) - 1} to pad with, got {pad!r}"
        )
    rows = [with_bos(tokenizer, prompt) for prompt in (prompt1, prompt2)]
    length = max(map(len, rows))
    for row in rows:
        bos = int(row[:1] == [tokenizer.bos_token_id])  # padding comes after it
        place = len(row) if pad_method == "tokens_right" else bos
        row[place:place] = [pad] * (length - len(row))
    return ActivationAddition(coeff, act_name, tokens=rows[0]), ActivationAddition(
        -coeff, act_name, tokens=rows[1]
    )


@torch.no_grad()
def read_sites(
    model: nn.Module, rows: Sequence[Sequence[int]], sites: Sequence[Site]
) -> dict[tuple[tuple[int, ...], Site], Tensor]:
    """Read the activations of token sequences at some places, without any open steering.

    Args:
        model: a causal language model; unchanged, dropout is off while it reads.
        rows: token ids of each sequence, of any lengths.
        sites: the places.

    Returns:
        By sequence and place, [pos, d_model].

    Raises:
        ValueError: the model has no such place; a token outside its vocabulary.
    """
    vocabulary = cast(Any, model).get_input_embeddings().num_embeddings
    if bad := [token for row in rows for token in row if not 0 <= token < vocabulary]:
        raise ValueError(
            f"token {bad[0]} does not exist: the model has tokens 0 to {vocabulary - 1}"
        )
    # In one order whatever the order given: the last bits depend on the place in the batch.
    distinct = sorted({tuple(row) for row in rows}, key=lambda row: (len(row), row))
    places = {site: find_site(model, site) for site in dict.fromkeys(sites)}
    inputs = padded(distinct, side="right").to(input_device(model))
    with unsteered(), in_evaluation_mode(model):
        found = record_pass(
            partial(model, **inputs), places, lambda site, hidden: hidden.detach().clone()
        )
    return {
        (row, site): hidden[index, : len(row)]
        for site, hidden in found.items()
        for index, row in enumerate(distinct)
    }


def addition_vectors(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    activation_additions: Sequence[ActivationAddition],
) -> dict[tuple[Site, int], Tensor]:
    """Return what is added: for each place and number of tokens, the sum of the additions there.

    Returns:
        By (place, count), [count, d_model], in the dtype and on the device of the model.

    Raises:
        ValueError: something that is not an addition, or what `read_sites` raises.
    """
    additions = list(activation_additions)
    if bad := [addition for addition in additions if not isinstance(addition, ActivationAddition)]:
        raise ValueError(f"expected ActivationAdditions, got {bad[0]!r}")
    if not additions:
        return {}
    rows = [addition.token_ids(tokenizer) for addition in additions]
    read = read_sites(model, rows, [addition.site for addition in additions])
    summed: dict[tuple[Site, int], Tensor] = {}
    # In one order whatever the order given, so that additions commute to the last bit.
    for addition, row in sorted(
        zip(additions, rows), key=lambda pair: (pair[0].site, pair[1], pair[0].coeff)
    ):
        activations = read[tuple(row), addition.site]
        vectors = finite_product(addition.coeff, activations, activations.dtype, f"{addition!r}")
        key = addition.site, len(row)
        summed[key] = summed[key] + vectors if key in summed else vectors
    return summed


class SpanHook(SteeringHook):
    """Adds one vector to each token of a span of the prompt.

    Args:
        vectors: [count, d_model], or for each row [batch, count, d_model].
        tracker: follows the passes, with a `TokenSpan` as its selection.
    """

    def __init__(self, vectors: Tensor, tracker: PositionTracker):
        self.vectors, self.tracker = vectors, tracker

    def steer(self, hidden: Tensor) -> Tensor:
        """Return the hidden states with the vectors added, both [batch, pos, d_model]."""
        now, span = self.tracker.current, cast(TokenSpan, self.tracker.selection)
        mask = now.mask
        if mask is not None and not mask.any():  # a decoding step: the prompt is in the cache
            return hidden
        offsets = span.offsets(cast(Tensor, now.positions), cast(Tensor, now.lengths))
        offsets = offsets.clamp(0, span.count - 1).to(hidden.device)
        vectors = self.vectors.to(hidden)
        if vectors.dim() == 2:
            delta = vectors[offsets]
        else:
            vectors = of_rows(vectors, len(offsets), "the steering")
            delta = vectors[torch.arange(len(offsets), device=offsets.device)[:, None], offsets]
        steered = hidden + delta
        return steered if mask is None else torch.where(mask.to(hidden.device), steered, hidden)


@contextmanager
def apply_activation_additions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    activation_additions: Sequence[ActivationAddition],
    addition_location: AdditionLocation = "front",
    res_stream_slice: slice = slice(None),
) -> Iterator[None]:
    """Add activations to the tokens of every prompt that the model reads while the block is open.

    They are added once, at positions of the prompt, in forward passes and in generation, with and
    without a KV cache: what is generated is not touched. Each row of a left-padded batch has its
    own front. The prompts of the additions are read when the block opens, from the model without
    any steering of this library, so nested blocks add up. Let the model's prompt begin with BOS
    (`padding.encode`, `with_bos`), since additions do where the tokenizer has one: otherwise they
    fall one token too late. What `SteeringVector.patch_activations` says of models that are copied
    or compiled holds here too.

    Args:
        model: a causal language model. It gets hooks while the block is open, and is as it was
            afterwards and after any exception.
        tokenizer: its tokenizer, for additions that are given as prompts.
        activation_additions: what is added; an empty list changes nothing.
        addition_location: "front" (from the first token on), "mid" or "back" (up to the last token
            of the prompt).
        res_stream_slice: to which of the d_model numbers to add; all by default.

    Raises:
        ValueError: before anything is changed: an unknown location or place, a slice that leaves
            nothing, tokens that the model does not have. In a forward pass: a prompt shorter than
            an addition, or one whose end is not known (see `SteeringVector.patch_activations`), as
            in the packed rows of `generate_batch`.
    """
    TokenSpan(0, addition_location)
    if not isinstance(res_stream_slice, slice):
        raise ValueError(f"expected a slice as res_stream_slice, got {res_stream_slice!r}")
    d_model = text_config(model).hidden_size
    kept = torch.zeros(d_model)
    kept[list(range(d_model)[res_stream_slice])] = 1
    if not kept.any():
        raise ValueError(f"{res_stream_slice} leaves none of the {d_model} numbers of d_model")
    vectors = addition_vectors(model, tokenizer, activation_additions)
    if res_stream_slice != slice(None):
        vectors = {key: vector * kept.to(vector) for key, vector in vectors.items()}
    with adding_spans(model, vectors, addition_location):
        yield


@contextmanager
def adding_spans(
    model: nn.Module, vectors: dict[tuple[Site, int], Tensor], location: AdditionLocation
) -> Iterator[None]:
    """Add vectors, by (place, count), to the tokens of every prompt while the block is open."""
    by_count: dict[int, list[tuple[Site, Tensor]]] = defaultdict(list)
    for (site, count), vector in vectors.items():
        by_count[count].append((site, vector))
    with ExitStack() as stack:
        for count, items in by_count.items():
            tracker = PositionTracker(holder_of_blocks(model), TokenSpan(count, location))
            stack.callback(hook_passes(model, tracker).remove)
            for site, vector in items:
                module, side = find_site(model, site)
                register = hook_input if side == "input" else hook_output
                stack.callback(register(module, SpanHook(vector, tracker)).remove)
        yield


def line_up(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    activation_additions: Sequence[ActivationAddition],
    addition_location: AdditionLocation = "front",
) -> pd.DataFrame:
    """Show which tokens of additions fall on which tokens of a prompt, and how large they are.

    Args:
        model: a causal language model; unchanged.
        tokenizer: its tokenizer.
        prompt: the prompt; a text gets a BOS, where the tokenizer has one.
        activation_additions: all at one place.
        addition_location: as for `apply_activation_additions`.

    Returns:
        One row for each token: `prompt`, one column for each addition (headed by its coefficient),
        `steering` and `residual` (the norms of what is added and of what the prompt has there), and
        their `ratio`.

    Raises:
        ValueError: no addition, additions at different places, or a prompt shorter than one of
            them.
    """
    sites = list(dict.fromkeys(addition.site for addition in activation_additions))
    if len(sites) != 1:
        raise ValueError(
            f"expected additions at one place, got {', '.join(map(str, sites)) or 'no addition'}"
        )
    ids = with_bos(tokenizer, prompt)
    positions, lengths = torch.arange(len(ids))[None], torch.tensor([len(ids)])
    frame = pd.DataFrame({"prompt": tokenizer.batch_decode([[token] for token in ids])})
    for number, addition in enumerate(activation_additions):
        row = addition.token_ids(tokenizer)
        offsets = TokenSpan(len(row), addition_location).offsets(positions, lengths)[0].tolist()
        name = f"{addition.coeff:+g}"
        name = name if name not in frame else f"{name} ({number + 1})"
        frame[name] = [
            tokenizer.decode([row[offset]]) if 0 <= offset < len(row) else "" for offset in offsets
        ]
    total = torch.zeros(len(ids), text_config(model).hidden_size)
    for (_, count), vectors in addition_vectors(model, tokenizer, activation_additions).items():
        span = TokenSpan(count, addition_location)
        offsets = span.offsets(positions, lengths)[0]
        inside = span.select(positions, lengths)[0]
        total[inside] += vectors.float().cpu()[offsets[inside]]
    frame["steering"] = total.norm(dim=-1).double().numpy()
    residual = read_sites(model, [ids], sites)[tuple(ids), sites[0]]
    frame["residual"] = residual.double().norm(dim=-1).cpu().numpy()
    frame["ratio"] = frame["steering"] / frame["residual"]
    return frame
