"""Which position a token has, and which tokens of a text are chosen: all that counting needs.

Notation: `attention_mask` is 1 at real tokens and 0 at padding, shape [batch, pos].
"""

import inspect
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor, nn


def position_ids(attention_mask: Tensor) -> Tensor:
    """Number the real tokens of every row from 0, so that padding on the left does not move them.

    A plain forward pass of GPT-2 numbers the columns instead: the first real token of a row with three padding tokens
    gets position 3, and its logits are off by several units. `model.generate` does this by itself.

    Args:
        attention_mask: [batch, pos], integer or bool.

    Returns:
        [batch, pos], int64. Padding gets position 0, which nothing attends to.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def with_position_ids(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the tokenizer gave, with `position_ids` [batch, pos] counted from the attention mask."""
    return {**inputs, "position_ids": position_ids(inputs["attention_mask"])}


class TokenSelection:
    """Which tokens of a text are steered, as absolute positions: 0 is the first real token, padding has no position.

    Args:
        min_token_index: this token and all later ones.
        token_indices: a list of positions; a slice; or a mask of 0 and 1, [pos] or [batch, pos], in which entry i stands for
            the i-th real token of the row (what lies behind its end is not selected, and neither is padding).
            With several sequences per prompt (`num_return_sequences`, `num_beams`) a row of the mask holds for all of
            its prompt's.

    Negative numbers count from the end of the prompt, not of what was generated so far: -1 is the last token of the
    prompt, and slice(-1, None) that one and all that follow.

    Raises:
        ValueError: both arguments; something else than the above; a slice with a step below 1.
    """

    def __init__(self, min_token_index: int | None = None, token_indices: list[int] | slice | Tensor | None = None):
        if min_token_index is not None and token_indices is not None:
            raise ValueError(
                f"give min_token_index or token_indices, not both; got {min_token_index!r} and {token_indices!r}"
            )
        if min_token_index is not None:
            if not _is_integer(min_token_index):
                raise ValueError(f"expected an integer as min_token_index, got {min_token_index!r}")
            token_indices = slice(int(min_token_index), None)
        self.everything = token_indices is None or (isinstance(token_indices, slice) and token_indices in EVERYTHING)
        self.spec = _checked(token_indices)

    @property
    def counts_from_the_end(self) -> bool:
        """Whether the length of the prompt matters."""
        if isinstance(self.spec, slice):
            return any(end is not None and end < 0 for end in (self.spec.start, self.spec.stop))
        return isinstance(self.spec, list) and any(index < 0 for index in self.spec)

    def select(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """Return which entries are selected.

        Args:
            positions: absolute positions, [batch, pos], int64.
            lengths: how many real tokens the prompts have, [batch], int64.

        Returns:
            [batch, pos], bool.

        Raises:
            ValueError: a negative index in a list reaches before the prompt; a mask has another number of rows.
        """
        if self.spec is None:
            return torch.ones_like(positions, dtype=torch.bool)
        lengths = lengths[:, None]
        if isinstance(self.spec, slice):
            start, stop = (
                end if end is None or end >= 0 else (lengths + end).clamp(min=0) for end in (self.spec.start, self.spec.stop)
            )
            start, step = 0 if start is None else start, self.spec.step or 1
            chosen = (positions >= start) & ((positions - start) % step == 0)
            return chosen if stop is None else chosen & (positions < stop)
        if isinstance(self.spec, list):
            if self.spec and min(self.spec) < -int(lengths.min()):
                short = int(lengths.min())
                raise ValueError(f"token index {min(self.spec)} lies before the first token of a prompt of {short} tokens")
            chosen = torch.zeros_like(positions, dtype=torch.bool)
            for index in self.spec:
                chosen |= positions == (index if index >= 0 else lengths + index)
            return chosen
        return self._by_mask(positions)

    def _by_mask(self, positions: Tensor) -> Tensor:
        mask = self.spec.to(positions.device)
        if mask.dim() == 1:
            mask = mask.expand(len(positions), -1)
        elif len(positions) % len(mask):
            raise ValueError(f"the mask has {len(mask)} rows and the batch has {len(positions)}")
        else:
            mask = mask.repeat_interleave(len(positions) // len(mask), dim=0)
        inside = positions < mask.shape[1]
        return mask.gather(1, positions.clamp(max=mask.shape[1] - 1)) & inside


class TokenSpan:
    """The tokens of a prompt to which a sequence of vectors is added, one vector a token; as absolute positions.

    Args:
        count: how many vectors.
        location: "front" (from the first token of the prompt on), "back" (up to its last one) or "mid" (from
            `length // 2 - count // 2` on).
        rows: which rows of the batch are meant, [batch], bool; all by default.

    Raises:
        ValueError: another location.
    """

    everything = False

    def __init__(self, count: int, location: Literal["front", "mid", "back"] = "front", rows: Tensor | None = None):
        if location not in LOCATIONS:
            raise ValueError(f"expected one of {', '.join(LOCATIONS)} as addition_location, got {location!r}")
        self.count, self.location, self.rows = count, location, rows

    @property
    def counts_from_the_end(self) -> bool:
        """Whether the length of the prompt matters."""
        return self.location != "front"

    def offsets(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """Return which of the vectors is meant for each entry, [batch, pos]; outside 0 to count - 1 it is none of them.

        Raises:
            ValueError: a prompt has fewer tokens than there are vectors.
        """
        meant = lengths if self.rows is None else lengths[self.rows.to(lengths.device)]
        if (shortest := int(meant.min())) < self.count:
            raise ValueError(f"the addition has {self.count} tokens and a prompt only {shortest}: expected a prompt that is as long")
        start = {"front": 0 * lengths, "back": lengths - self.count, "mid": lengths // 2 - self.count // 2}[self.location]
        return positions - start[:, None]

    def select(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """Return to which entries a vector is added, [batch, pos], bool."""
        offsets = self.offsets(positions, lengths)
        chosen = (offsets >= 0) & (offsets < self.count)
        return chosen if self.rows is None else chosen & self.rows.to(chosen.device)[:, None]


LOCATIONS = ("front", "mid", "back")
EVERYTHING = (slice(None), slice(0, None), slice(None, None, 1), slice(0, None, 1))


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _checked(token_indices: list[int] | slice | Tensor | None) -> list[int] | slice | Tensor | None:
    """Token indices in one of the forms that `select` knows."""
    if token_indices is None:
        return None
    if isinstance(token_indices, Tensor):
        if token_indices.dim() not in (1, 2) or not token_indices.numel() or not ((token_indices == 0) | (token_indices == 1)).all():
            raise ValueError(
                f"a tensor of token_indices is a mask of 0 and 1, [pos] or [batch, pos]; got {list(token_indices.shape)} "
                "with other values or another shape. For positions, give a list"
            )
        return token_indices.bool()
    if isinstance(token_indices, slice):
        ends = (token_indices.start, token_indices.stop, token_indices.step)
        if not all(end is None or _is_integer(end) for end in ends) or (token_indices.step or 1) < 1:
            raise ValueError(f"expected a slice of integers with a step of 1 or more, got {token_indices}")
        return token_indices
    if isinstance(token_indices, Sequence) and not isinstance(token_indices, str) and all(map(_is_integer, token_indices)):
        return [int(index) for index in token_indices]
    raise ValueError(f"expected a list of positions, a slice or a mask as token_indices, got {token_indices!r}")


class PositionTracker:
    """Follows the passes of a model and says which of their entries are selected.

    With a KV cache a pass sees only the new tokens, without one it sees all again, and padding shifts both: the absolute
    positions come from the attention mask and the length of the cache. It is to be called with the arguments of every pass
    of the module that holds the blocks (`hooking.hook_passes`).

    Attributes:
        mask: what the current pass selects, [batch, pos, 1], bool, or None where every entry is selected.
        positions: absolute positions of the entries of this pass, [batch, pos]; only where not everything is selected.
        lengths: how many real tokens the prompts have, [batch]; likewise.
    """

    def __init__(self, module: nn.Module, selection: "TokenSelection | TokenSpan"):
        self.selection = selection
        self.mask: Tensor | None = None
        self.positions: Tensor | None = None
        self.lengths: Tensor | None = None
        # nnsight puts a `forward(*args, **kwargs)` on the module; the class still knows the names.
        self._names = list(inspect.signature(type(module).forward).parameters)[1:]
        self._lengths: Tensor | None = None
        self._prompt: Tensor | None = None
        self._total = 0

    def __call__(self, args: tuple, kwargs: dict) -> None:
        """Note the positions of a pass that begins, from its arguments."""
        given = {**dict(zip(self._names, args)), **kwargs}
        cache = given.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        if past and self.selection.everything:
            # What comes behind a prompt is real; only the prompt itself can be padded.
            self.mask = None
            return
        ids = given.get("input_ids")
        entries = ids if ids is not None else given["inputs_embeds"]
        batch, count = entries.shape[:2]
        attention = given.get("attention_mask")
        if isinstance(attention, Tensor) and attention.dim() == 2:
            if self.selection.everything and bool(attention.all()):
                self.mask = None
                return
            real = attention[:, -count:].bool()
            positions = (attention.long().cumsum(-1) - 1).clamp(min=0)[:, -count:]
            lengths = attention.long().sum(-1)
        else:
            # No mask, or one that was made for the attention already: then the model's own numbering holds.
            own = given.get("position_ids")
            positions = own if own is not None else torch.arange(past, past + count, device=entries.device)[None]
            positions = positions.expand(batch, count)
            real = torch.ones_like(positions, dtype=torch.bool)
            lengths = positions[:, -1] + 1
        if self.selection.counts_from_the_end:
            # A pass of the model by hand leaves `use_cache` open; generation without a cache says False, each time.
            repeats = given.get("use_cache", False) is False
            lengths = self._prompt_lengths(ids, lengths, past, count, repeats)
        self.positions, self.lengths = positions, lengths
        mask = self.selection.select(positions, lengths) & real
        self.mask = None if bool(mask.all()) else mask[..., None]

    def _prompt_lengths(self, ids: Tensor | None, lengths: Tensor, past: int, count: int, repeats: bool) -> Tensor:
        """The lengths of the prompts, also when the pass continues them, with a cache or (where it `repeats`) without one."""
        total = past + count
        continues = self._lengths is not None and len(self._lengths) == len(lengths) and total > self._total
        if continues and not past:
            # Generation without a cache: the same prompt again, and one token more than in the pass before.
            continues = (
                repeats
                and ids is not None
                and self._prompt is not None
                and total == self._total + 1
                and torch.equal(ids[:, : self._prompt.shape[1]], self._prompt)
            )
        if not continues:
            self._lengths, self._prompt = lengths, ids
        self._total = total
        return self._lengths
