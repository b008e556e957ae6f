"""Count tokens: which position each has, and which ones of a text are steered.

Notation: `attention_mask` is 1 at real tokens and 0 at padding, shape [batch, pos].
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from common.arguments import integer, is_integer


def position_ids(attention_mask: Tensor) -> Tensor:
    """Number the real tokens of every row from 0, so that padding on the left does not move them.

    `model.generate` does this by itself. A plain forward pass of GPT-2 numbers the columns instead:
    the first real token after three padding tokens gets position 3, and its logits are off by
    several units.

    Args:
        attention_mask: [batch, pos], integer or bool.

    Returns:
        [batch, pos], int64. Padding gets position 0, which nothing attends to.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def with_position_ids(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the tokenizer gave, with `position_ids` [batch, pos] by the attention mask."""
    return {**inputs, "position_ids": position_ids(inputs["attention_mask"])}


Decide = Callable[[list[list[int]]], Tensor]


class TokenSelection:
    """Which tokens of a text are steered, as absolute positions.

    Position 0 is the first real token; padding has none.

    Args:
        min_token_index: this token and all later ones.
        token_indices: a list of positions; a slice; or a mask of 0 and 1, [pos] or [batch, pos], in
            which entry i means the i-th real token of the row (what comes after its end is not
            selected, and neither is padding). With several sequences per prompt
            (`num_return_sequences`, `num_beams`) a row of the mask holds for all those of its
            prompt.

        decide: which prompts are meant, from their token ids, one list for each: [prompt], bool.
            It is asked once for each text, and what it said holds for all that is generated.
        by_row: whether rows are steered in ways of their own.

    Negative numbers count from the end of the prompt, not of what was generated so far: -1 is the
    last token of the prompt, and slice(-1, None) that one and all that follow.

    Raises:
        ValueError: both arguments; anything but the above; a slice with a step below 1.
    """

    def __init__(
        self,
        min_token_index: int | None = None,
        token_indices: list[int] | slice | Tensor | None = None,
        decide: Decide | None = None,
        by_row: bool = False,
    ):
        if min_token_index is not None and token_indices is not None:
            raise ValueError(
                f"give min_token_index or token_indices, not both; got {min_token_index!r} and"
                f" {token_indices!r}"
            )
        if min_token_index is not None:
            token_indices = slice(integer(min_token_index, "min_token_index", least=None), None)
        self.decide, self.by_row = decide, by_row
        everywhere = token_indices is None or (
            isinstance(token_indices, slice) and token_indices in EVERYTHING
        )
        self.everything = everywhere and decide is None and not by_row
        self.spec = _checked(token_indices)

    @property
    def counts_from_the_end(self) -> bool:
        """Whether the length of the prompt matters."""
        if self.decide is not None:
            return True
        if isinstance(self.spec, slice):
            return any(end is not None and end < 0 for end in (self.spec.start, self.spec.stop))
        return isinstance(self.spec, list) and any(index < 0 for index in self.spec)

    @property
    def needs_rows(self) -> bool:
        """Whether a row of the batch has to be one text, not several that are packed into one."""
        own = self.by_row or (isinstance(self.spec, Tensor) and self.spec.dim() == 2)
        return own or self.counts_from_the_end

    def select(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """Return which entries are selected.

        Args:
            positions: absolute positions, [batch, pos], int64.
            lengths: how many real tokens the prompts have, [batch], int64.

        Returns:
            [batch, pos], bool.

        Raises:
            ValueError: a negative index in a list reaches back before the prompt; a mask has
                another number of rows.
        """
        if self.spec is None:
            return torch.ones_like(positions, dtype=torch.bool)
        lengths = lengths[:, None]
        if isinstance(self.spec, slice):
            start, stop = (
                end if end is None or end >= 0 else (lengths + end).clamp(min=0)
                for end in (self.spec.start, self.spec.stop)
            )
            start, step = 0 if start is None else start, self.spec.step or 1
            chosen = (positions >= start) & ((positions - start) % step == 0)
            return chosen if stop is None else chosen & (positions < stop)
        if isinstance(self.spec, list):
            if self.spec and min(self.spec) < -int(lengths.min()):
                short = int(lengths.min())
                raise ValueError(
                    f"token index {min(self.spec)} lies before the first token of a prompt of"
                    f" {short} tokens"
                )
            chosen = torch.zeros_like(positions, dtype=torch.bool)
            for index in self.spec:
                chosen |= positions == (index if index >= 0 else lengths + index)
            return chosen
        return _by_mask(self.spec, positions)


class TokenSpan:
    """The tokens of a prompt to which vectors are added, one vector to each.

    Args:
        count: how many vectors.
        location: "front" (from the first token of the prompt on), "back" (up to its last one) or
            "mid" (from `length // 2 - count // 2` on).
        rows: which rows of the batch are meant, [batch], bool; all by default.

    Raises:
        ValueError: another location.
    """

    everything = False
    decide: Decide | None = None
    # Also at the front, where a prompt that is too short is refused.
    counts_from_the_end = needs_rows = True

    def __init__(
        self,
        count: int,
        location: Literal["front", "mid", "back"] = "front",
        rows: Tensor | None = None,
    ):
        if location not in LOCATIONS:
            raise ValueError(
                f"expected one of {', '.join(LOCATIONS)} as addition_location, got {location!r}"
            )
        self.count, self.location, self.rows = count, location, rows

    def offsets(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """Return which vector each entry gets, [batch, pos]; outside 0 to count - 1 it gets none.

        Raises:
            ValueError: a prompt has fewer tokens than there are vectors.
        """
        rows = self._of_batch(lengths)
        meant = lengths if rows is None else lengths[rows]
        if len(meant) and (shortest := int(meant.min())) < self.count:
            raise ValueError(
                f"the addition has {self.count} tokens and a prompt only {shortest}: expected a"
                " prompt that is as long"
            )
        start = {
            "front": 0 * lengths,
            "back": lengths - self.count,
            "mid": lengths // 2 - self.count // 2,
        }[self.location]
        return positions - start[:, None]

    def select(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """Return to which entries a vector is added, [batch, pos], bool."""
        offsets = self.offsets(positions, lengths)
        chosen = (offsets >= 0) & (offsets < self.count)
        rows = self._of_batch(chosen)
        return chosen if rows is None else chosen & rows[:, None]

    def _of_batch(self, values: Tensor) -> Tensor | None:
        """Return which rows of a pass, with values [batch, …], are meant; None where all are."""
        if self.rows is None:
            return None
        return of_rows(self.rows, len(values), "the steering").to(values.device)


def _by_mask(mask: Tensor, positions: Tensor) -> Tensor:
    """Return which positions [batch, pos] a mask, [pos] or [prompt, pos], selects."""
    mask = mask.to(positions.device)
    if mask.dim() == 1:
        mask = mask.expand(len(positions), -1)
    else:
        mask = of_rows(mask, len(positions), "the mask")
    inside = positions < mask.shape[1]
    return mask.gather(1, positions.clamp(max=mask.shape[1] - 1)) & inside


_part: ContextVar[tuple[Tensor, int] | None] = ContextVar("part_of_a_batch", default=None)


@contextmanager
def reading_part(rows: Tensor, total: int) -> Iterator[None]:
    """Say that the passes in the block read some rows [n] of a batch of `total`."""
    token = _part.set((rows, total))
    try:
        yield
    finally:
        _part.reset(token)


def of_rows(values: Tensor, batch: int, what: str) -> Tensor:
    """Return for each row of a pass what belongs to it.

    Args:
        values: one for each row of the batch; where `generating` is open one for each prompt,
            [prompt, ...], whose rows are neighbours, or without beams one for each row.
        batch: how many rows the pass has; those of a part where `reading_part` is open.
        what: what has these values, for the message.

    Returns:
        [batch, ...].

    Raises:
        ValueError: there is another number of values.
    """
    rows, total = _part.get() or (None, batch)
    text = _generating.get()[-1][1] if _generating.get() and rows is None else Text()
    prompts = total if text.lengths is None else len(text.lengths)
    known = len(values) == prompts or (len(values) == total and not text.beams)
    if not known or total % len(values) or (rows is not None and batch % len(rows)):
        more = f" (prompts: {prompts})" if prompts != total else ""
        raise ValueError(f"{what} has {len(values)} rows and the batch has {total}{more}")
    values = values.repeat_interleave(total // len(values), dim=0)
    if rows is None:
        return values
    return values[rows.to(values.device)].repeat_interleave(batch // len(rows), dim=0)


LOCATIONS = ("front", "mid", "back")
EVERYTHING = (slice(None), slice(0, None), slice(None, None, 1), slice(0, None, 1))


def _checked(token_indices: list[int] | slice | Tensor | None) -> list[int] | slice | Tensor | None:
    """Return token indices in one of the forms that `select` knows."""
    if token_indices is None:
        return None
    if isinstance(token_indices, Tensor):
        if (
            token_indices.dim() not in (1, 2)
            or not token_indices.numel()
            or not ((token_indices == 0) | (token_indices == 1)).all()
        ):
            raise ValueError(
                "a tensor of token_indices is a mask of 0 and 1, [pos] or [batch, pos]; got"
                f" {list(token_indices.shape)} with other values or another shape. For positions,"
                " give a list"
            )
        return token_indices.bool()
    if isinstance(token_indices, slice):
        ends = (token_indices.start, token_indices.stop, token_indices.step)
        if not all(end is None or is_integer(end) for end in ends) or (token_indices.step or 1) < 1:
            raise ValueError(
                f"expected a slice of integers with a step of 1 or more, got {token_indices}"
            )
        return token_indices
    if (
        isinstance(token_indices, Sequence)
        and not isinstance(token_indices, str)
        and all(map(is_integer, token_indices))
    ):
        return [int(index) for index in token_indices]
    raise ValueError(
        f"expected a list of positions, a slice or a mask as token_indices, got {token_indices!r}"
    )


# What models call the memory of the tokens that they have read: transformers has no common name.
# Those of XLNet and Reformer come last, since a pass with them reads tokens again.
CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
_TAG = "_text_of_this_cache"


class _Decisions(WeakKeyDictionary[Any, Tensor]):
    """What trackers decided, which hold the model: a cache does not. A pickle knows none."""

    def __reduce__(self) -> tuple:
        return _Decisions, ()


@dataclass
class Text:
    """What is known of the rows that several passes read, one after the other.

    Attributes:
        lengths: how many real tokens the prompts have, [prompt], int64; None where unknown.
        mask: 1 at their real tokens and 0 at padding, [prompt, pos]; what follows is real.
        seen: how many columns have been read.
        cache: what remembers them, only while `generate` runs: there a pass with another cache
            reads another text.
        ids: the token ids of the prompts, [prompt, pos]; None where unknown.
        decided: which prompts are meant, [prompt], bool, by the tracker that asked.
        guided: whether `generate` reads a second text beside it, one row for each of its rows
            (`guidance_scale`).
        beams: whether rows of a prompt change places, because they are beams.
    """

    lengths: Tensor | None = None
    mask: Tensor | None = None
    seen: int = 0
    cache: Any = None
    ids: Tensor | None = None
    decided: MutableMapping[Any, Tensor] = field(default_factory=_Decisions, repr=False)
    guided: bool = False
    beams: bool = False

    @classmethod
    def of(cls, mask: Tensor) -> "Text":
        """Return a text whose prompts have this attention mask, [prompt, pos]."""
        return cls(mask.long().sum(-1), mask)

    @property
    def columns(self) -> int:
        """How many columns the prompts take, 1 where unknown."""
        if self.mask is not None:
            return self.mask.shape[1]
        return 1 if self.lengths is None else int(self.lengths.max())

    def mask_up_to(self, total: int, entries: Tensor) -> Tensor | None:
        """Return the attention mask of the first columns, [batch, total]; None where unknown.

        Args:
            total: how many columns.
            entries: the rows of a pass, [batch, ...].
        """
        if self.mask is None or len(entries) % len(self.mask):
            return None
        mask = _for_rows(self.mask, len(entries))[:, :total].to(entries.device)
        return nn.functional.pad(mask, (0, total - mask.shape[1]), value=1)


_generating: ContextVar[tuple[tuple[nn.Module, Text], ...]] = ContextVar(
    "texts_being_generated", default=()
)


@contextmanager
def generating(module: nn.Module, text: Text) -> Iterator[None]:
    """Say which text the passes of a module read, in this thread; blocks may be nested."""
    token = _generating.set((*_generating.get(), (module, text)))
    try:
        yield
    finally:
        _generating.reset(token)
        text.cache = None  # it is large, and trackers remember the text


def being_generated(module: nn.Module) -> Text | None:
    """Return the text that the passes of a module read, if `generating` is open for it."""
    return next((text for other, text in reversed(_generating.get()) if other is module), None)


class Pass(NamedTuple):
    """One pass of a model (`PositionTracker`); `text` is what it reads, up to column `total`."""

    mask: Tensor | None = None
    positions: Tensor | None = None
    lengths: Tensor | None = None
    text: Text = Text()
    total: int = 0


class _OfThisThread(threading.local):
    """The pass that this thread is in, or was in last, and its cache. A copy knows none."""

    now: Pass | None = None
    cache: Any = None
    mask: Tensor | None = None  # what the whole model was given, [batch, pos]

    def __reduce__(self) -> tuple:
        return _OfThisThread, ()


class PositionTracker:
    """Follows the passes of a model and says which of their entries are selected.

    A pass is not always a text: with a cache it sees only new tokens, without one all of them
    again; generation may cut the prompt into chunks or put guesses after it; padding shifts
    everything. The absolute positions come from the attention mask and the length of the cache.
    Where the prompt ends is known while `generating` is open. In a pass by hand, all that it reads
    is the prompt, and passes with the cache that it leaves continue it. Caches of state-space
    models do not count their tokens, so the tracker does, for those that it saw filled.

    `hooks.hook_passes` calls it with the arguments of every pass of the module that holds the
    blocks, and `finish` with what the pass gives. Each thread has a pass of its own. A thread that
    runs blocks without one (as autograd's does under gradient checkpointing) gets the latest.

    Attributes:
        mask: what the current pass selects, [batch, pos, 1], bool, or None where every entry is
            selected.
        current: the pass, with the positions of its entries [batch, pos] and the lengths of the
            prompts [batch] where not everything is selected.
    """

    def __init__(self, module: nn.Module, selection: "TokenSelection | TokenSpan"):
        self.module, self.selection = module, selection
        # nnsight puts a `forward(*args, **kwargs)` on the module; the class still knows the names.
        self._names = list(inspect.signature(type(module).forward).parameters)[1:]
        self._own = _OfThisThread()
        self._latest, self._thread, self._several = Pass(), 0, False

    @property
    def mask(self) -> Tensor | None:
        """What the current pass selects."""
        return self.current.mask

    @property
    def current(self) -> Pass:
        """The pass of this thread, or the latest one where it has none.

        Raises:
            ValueError: it has none, and two others had one.
        """
        if self._own.now is None and self._several:
            raise ValueError(
                "blocks run in a thread that began no pass, and two threads did: steer a copy of"
                " the model in each"
            )
        return self._own.now or self._latest

    def note_mask(self, mask: Any) -> None:
        """Note the attention mask of the whole model: Gemma 3 with images gives blocks another."""
        self._own.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def __call__(self, args: tuple, kwargs: dict) -> None:
        """Note the positions of a pass that begins, from its arguments.

        Raises:
            ValueError: the positions are not known, because nobody counted the tokens of a cache
                or said which row belongs to which prompt; or what `select` raises.
        """
        thread = threading.get_ident()
        self._several |= thread != self._thread != 0
        self._latest = self._own.now = self._begin({**dict(zip(self._names, args)), **kwargs})
        self._thread = thread

    def finish(self, output: Any) -> None:
        """Note the cache that a pass leaves, so that the next one with it goes on there."""
        now, cache = self.current, _cache_in(output)
        cache = self._own.cache if cache is None else cache  # RecurrentGemma does not return it
        self._own.cache = None
        if being_generated(self.module) is now.text:
            now.text.cache, now.text.seen = cache, now.total
        if hasattr(cache, "__dict__"):  # RWKV's is a list
            # Another tracker may have seen the same pass.
            before = getattr(cache, _TAG, None)
            others = before.decided if before is not None and before.seen == now.total else {}
            tag = Text(now.text.lengths, now.text.mask, now.total)
            tag.decided = _Decisions({**others, **now.text.decided})
            setattr(cache, _TAG, tag)

    def _begin(self, given: dict[str, Any]) -> Pass:
        ids = given.get("input_ids")
        entries = ids if ids is not None else given["inputs_embeds"]
        count = entries.shape[1]
        attention = given.get("attention_mask")
        if not isinstance(attention, Tensor) or attention.dim() != 2:
            # None, or one that was made for the attention already.
            attention = self._own.mask if attention is not None else None
        if self.selection.everything:
            # A token after others is real. Asking would make a GPU wait for the answer.
            generated = attention is not None and attention.shape[1] > count == 1
            if attention is None or generated or bool(attention[:, -count:].all()):
                return Pass()
            return Pass(attention[:, -count:, None].bool())
        names = (name for name in CACHES if given.get(name) is not None)
        name = next(names, CACHES[0])
        self._own.cache = cache = given.get(name)
        text = self._text_with(cache)
        past = _columns_before(self.module, cache, name, text)
        if past < text.columns and text is not being_generated(self.module):
            text = Text()  # a cache that was emptied or cut begins anew
        if attention is None:
            attention = text.mask_up_to(past + count, entries)
        numbers = given.get("position_ids")
        positions, real = _positions(entries, past, attention, numbers)
        packed = "cu_seq_lens_q" in given or (
            attention is None and bool((positions.diff() != 1).any())
        )
        if packed and self.selection.needs_rows:
            raise ValueError(PACKED)
        if text.lengths is None:
            text = self._new_text(positions, attention)
        lengths = self._lengths(text, len(entries)).to(entries.device)
        mask = self.selection.select(positions, lengths) & real
        if self.selection.decide is not None:
            meant = self._decided(text, ids, past).to(entries.device)
            mask = mask & _for_rows(meant, len(entries))[:, None]
        mask = None if bool(mask.all()) else mask[..., None]
        return Pass(mask, positions, lengths, text, past + count)

    def _new_text(self, positions: Tensor, attention: Tensor | None) -> Text:
        """Return the text of a pass by hand: all that it has read is its prompt.

        Raises:
            ValueError: the pass is one of `generate`, where that need not be so.
        """
        text = being_generated(self.module)
        if text is not None and text.lengths is None:
            raise ValueError(
                "`generate` has not said how long the prompts are: this version of transformers"
                " begins otherwise"
            )
        return Text(positions[:, -1] + 1) if attention is None else Text.of(attention)

    def _decided(self, text: Text, ids: Tensor | None, past: int) -> Tensor:
        """Return which prompts of a text are meant, [prompt], as it was decided at its beginning.

        Args:
            text: what the pass reads.
            ids: the token ids of the pass, [batch, pos]; None where it was given embeddings.
            past: how many columns were read before.

        Raises:
            ValueError: the prompts are not known, all of them: the pass reads embeddings, or goes
                on where another one began.
        """
        outer = being_generated(self.module)
        if outer is not None and outer.guided and self in outer.decided:
            text = outer  # what guides it has its rows
        if self not in text.decided:
            count, prompts = text.columns, len(cast(Tensor, text.lengths))
            if text.ids is None and ids is not None and not past and ids.shape[1] >= count:
                text.ids = ids[:: len(ids) // prompts, :count]
            mask = text.mask
            if text.ids is None or (mask is not None and text.ids.shape != mask.shape):
                raise ValueError(
                    "a condition is decided on the token ids of the prompt, and this pass does not"
                    " have them: let `generate` run on input_ids, or begin with a pass that reads"
                    " the whole prompt"
                )
            real = torch.ones_like(text.ids) if mask is None else mask.to(text.ids.device)
            rows = [row[kept.bool()].tolist() for row, kept in zip(text.ids, real, strict=True)]
            text.decided[self] = cast(Decide, self.selection.decide)(rows)
        return text.decided[self]

    def _text_with(self, cache: Any) -> Text:
        """Return the text that a pass with this cache continues; a new one where there is none."""
        text = being_generated(self.module)
        if text is not None and (not text.seen or cache is text.cache):
            return text
        return getattr(cache, _TAG, None) or Text()

    def _lengths(self, text: Text, batch: int) -> Tensor:
        """Return the lengths of the prompts for the rows of a pass, [batch].

        Raises:
            ValueError: they matter, and it is not known which row belongs to which prompt.
        """
        lengths = cast(Tensor, text.lengths)  # a text without them became a new one with them
        if len(lengths) != batch and self.selection.counts_from_the_end:
            sure = text is being_generated(self.module) or bool((lengths == lengths[0]).all())
            if not sure or batch % len(lengths):
                raise ValueError(
                    f"the cache was filled with {len(lengths)} prompts of different lengths, and"
                    f" the pass has {batch} rows"
                )
        return _for_rows(lengths, batch)


PACKED = (
    "several texts share one row (continuous batching or packed sequences), so where a prompt ends"
    " is not known there, nor whose row it is: count positions from the front, or generate in"
    " padded batches"
)


def _columns_before(module: nn.Module, cache: Any, name: str, text: Text) -> int:
    """Return how many columns the cache of a pass holds; `name` is what the model calls it.

    Raises:
        ValueError: it holds some, and nobody counted them.
    """
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):  # a list, or a cache without attention
        if _is_empty(cache):
            return 0
    if text.seen and CACHES.index(name) < 3:
        return text.seen
    raise ValueError(
        f"{type(module).__name__} was given a cache that does not say how many tokens it"
        " holds, so positions are not known: steer all positions, let `generate` run, or read"
        " the whole text in one pass without a cache"
    )


def _positions(
    entries: Tensor, past: int, attention: Tensor | None, numbers: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return absolute positions and which entries are real, both [batch, pos].

    They come from the attention mask where there is one, else from the model's own numbers.
    """
    batch, count = entries.shape[:2]
    if attention is not None:
        real = attention[:, -count:].bool()
        return position_ids(attention)[:, -count:], real
    if numbers is None:
        numbers = torch.arange(past, past + count, device=entries.device)[None]
    numbers = numbers.expand(batch, count)
    return numbers, torch.ones_like(numbers, dtype=torch.bool)


def _for_rows(values: Tensor, batch: int) -> Tensor:
    """Return the values [prompt, ...] of prompts by row, [batch, ...]; beams are neighbours."""
    if len(values) == batch:
        return values
    return values.repeat_interleave(-(-batch // len(values)), dim=0)[:batch]


def _cache_in(output: Any) -> Any:
    """Return the cache in what a model gives, or None."""
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    return next(
        (cache for name in CACHES if (cache := getattr(output, name, None)) is not None), None
    )


def _is_empty(cache: Any) -> bool:
    """Say whether nothing has been written to a cache of layers without attention."""
    layers = getattr(cache, "layers", None)
    return layers is not None and not any(
        any(layer.has_previous_state.values()) for layer in layers
    )
