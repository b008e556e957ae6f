"""The prompts of a sweep: as the model reads them, how long they are, which may share a batch."""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, TypeVar

from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from common.passes.batching import Batching, batching
from common.passes.padding import pad_id, padded
from common.passes.prompts import Prompt, prompt_ids, prompt_text
from common.passes.running import input_device
from common.sweeping.grid import Cell
from common.sweeping.skipping import can_prefill, can_skip_blocks

Item = TypeVar("Item")


class Texts:
    """Prompts by their numbers.

    Args:
        model: the model that reads them.
        tokenizer: its tokenizer.
        prompts: texts, or messages for a chat model.
        bos: what stands in front, see `prompt_ids`.
        following: token ids that follow each prompt; nothing by default.

    Raises:
        ValueError: a prompt without tokens, or what `prompt_ids` raises.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        bos: bool | None,
        following: Sequence[Sequence[int]] | None = None,
    ):
        rows = prompt_ids(tokenizer, prompts, bos)
        if not all(rows):
            raise ValueError("expected prompts of one token or more, got an empty one")
        self.rows = [[*row, *new] for row, new in zip(rows, following or [()] * len(rows))]
        self.lengths = list(map(len, self.rows))
        self.model, self.tokenizer = model, tokenizer
        self.prompts = list(prompts)
        self.shown = [prompt_text(tokenizer, prompt) for prompt in self.prompts]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the model, and what lies on its device, to this process.

        What was measured on the model goes along: a batch must not be cut in two ways.
        """
        content = {**vars(self), "model": None, "tokenizer": None}
        return {name: it for name, it in content.items() if name not in ("samples", "_both")}

    def on(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "Texts":
        """Return these prompts for the same model in another process."""
        other = copy.copy(self)
        other.model, other.tokenizer = model, tokenizer
        return other

    def check(self, cells: Sequence[Cell], new_tokens: int = 1) -> None:
        """Refuse a prompt that is too short for an addition, or too long for the model.

        Raises:
            ValueError: with the prompt, or the number of positions.
        """
        additions = (
            vectors
            for cell in cells
            if cell.steering and cell.steering.location
            for vectors in cell.steering.vectors.values()
        )
        needed, shortest = max(map(len, additions), default=0), min(self.lengths)
        if shortest < needed:
            short = self.prompts[self.lengths.index(shortest)]
            raise ValueError(
                f"the addition has {needed} tokens and the prompt {short!r} only {shortest}:"
                " expected one that is as long"
            )
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        # The last new token is not read.
        if limit and max(self.lengths) + new_tokens - 1 > limit:
            raise ValueError(
                f"{max(self.lengths)} tokens of a prompt and {new_tokens} new ones are more than"
                f" the {limit} positions of the model"
            )

    def identity(self) -> list[tuple[str, list[int]]]:
        """Return what the model reads: each prompt as text and as token ids."""
        return list(zip(self.shown, self.rows))

    def inputs(self, numbers: Sequence[int]) -> BatchEncoding:
        """Return prompts as one batch, padded on the left, on the device of the model."""
        chosen = [self.rows[number] for number in numbers]
        return padded(chosen, pad_id(self.tokenizer)).to(input_device(self.model))

    @cached_property
    def together(self) -> Batching:
        """Which prompts may share a batch, measured on the longest and the shortest one."""
        return batching(self.model, self._both)

    @cached_property
    def prefills(self) -> bool:
        """Whether a prompt may be read once for all its rows, see `can_prefill`."""
        return can_prefill(self.model, self.samples)

    @cached_property
    def skips(self) -> bool:
        """Whether a pass may start after a block, see `can_skip_blocks`."""
        return can_skip_blocks(self.model, self.samples)

    @cached_property
    def samples(self) -> BatchEncoding:
        """Prompts to try the model on: the longest, and the shortest if it may stand beside it."""
        return self._both if self.together == "any" else self.inputs([self._longest])

    def batches(
        self, items: Sequence[Item], size: int, text_of: Callable[[Item], int]
    ) -> Iterator[list[Item]]:
        """Split items, in their order, into batches of up to `size` whose texts may share one."""
        size = 1 if self.together == "alone" else size

        def kind(item: Item) -> int | None:
            return self.lengths[text_of(item)] if self.together == "equal" else None

        for _, group in groupby(items, kind):
            found = list(group)
            for start in range(0, len(found), size):
                yield found[start : start + size]

    @property
    def vocabulary(self) -> int:
        """How many tokens the model chooses among."""
        head: Any = self.model.get_output_embeddings()
        return head.weight.shape[0]

    def bytes_of(self, length: int) -> int:
        """Return about how many bytes a text takes while it runs: its cache, and a block's work."""
        config = self.model.config.get_text_config()
        size = next(self.model.parameters()).element_size()
        return size * length * config.hidden_size * (2 * config.num_hidden_layers + 12)

    @property
    def _longest(self) -> int:
        return self.lengths.index(max(self.lengths))

    @cached_property
    def _both(self) -> BatchEncoding:
        return self.inputs([self._longest, self.lengths.index(min(self.lengths))])
