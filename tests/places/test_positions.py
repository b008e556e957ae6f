"""Which tokens are selected: absolute positions, whatever the padding and the passes."""

import copy
import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from common.places.positions import (
    PositionTracker,
    Text,
    TokenSelection,
    TokenSpan,
    being_generated,
    generating,
)

ends = st.none() | st.integers(-12, 12)


def selected(selection: TokenSelection, prompt_length: int, total: int) -> list[int]:
    positions = torch.arange(total)[None]
    return (
        selection.select(positions, torch.tensor([prompt_length]))[0].nonzero().flatten().tolist()
    )


@given(
    start=ends,
    stop=ends,
    step=st.none() | st.integers(1, 3),
    length=st.integers(1, 10),
    new=st.integers(0, 5),
)
def test_slices_are_pythons(start, stop, step, length, new):
    """Within the prompt a slice means what it means for a list."""
    found = selected(TokenSelection(token_indices=slice(start, stop, step)), length, length + new)
    assert [i for i in found if i < length] == list(range(length))[start:stop:step]


@given(start=ends, step=st.integers(1, 3), length=st.integers(1, 10), new=st.integers(0, 5))
def test_open_slices_reach_over_what_is_generated(start, step, length, new):
    """They go on after the prompt in the same steps; a negative start counts from its end."""
    first = 0 if start is None else max(0, start if start >= 0 else length + start)
    found = selected(TokenSelection(token_indices=slice(start, None, step)), length, length + new)
    assert found == list(range(first, length + new, step))


@given(
    indices=st.lists(st.integers(-4, 12), max_size=5),
    length=st.integers(4, 10),
    new=st.integers(0, 5),
)
def test_lists(indices, length, new):
    """Negative indices count from the end of the prompt, others from its start."""
    wanted = {index if index >= 0 else length + index for index in indices}
    assert selected(TokenSelection(token_indices=indices), length, length + new) == sorted(
        i for i in wanted if i < length + new
    )


@pytest.mark.parametrize("mask", [[0, 1, 1, 0], [[0, 1, 1, 0]]])
def test_masks(mask):
    """A mask selects what it marks, and nothing after its end."""
    assert selected(TokenSelection(token_indices=torch.tensor(mask)), 4, 9) == [1, 2]


def test_min_token_index_is_an_open_slice():
    """From token 2 on, and from the last but one on, means all that follow as well."""
    assert selected(TokenSelection(min_token_index=2), 4, 7) == [2, 3, 4, 5, 6]
    assert selected(TokenSelection(min_token_index=-2), 4, 7) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "given",
    [{}, {"min_token_index": 0}, {"token_indices": slice(None)}, {"token_indices": slice(0, None)}],
)
def test_everything_is_known_to_be_everything(given):
    """The cheap way is taken where nothing is left out."""
    assert TokenSelection(**given).everything


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"min_token_index": 1, "token_indices": [2]}, "not both"),
        ({"min_token_index": 1.5}, "integer"),
        ({"min_token_index": True}, "integer"),
        ({"token_indices": [1, "2"]}, "list of positions"),
        ({"token_indices": "12"}, "list of positions"),
        ({"token_indices": 3}, "list of positions"),
        ({"token_indices": slice(None, None, -1)}, "step of 1"),
        ({"token_indices": slice("a", None)}, "slice of integers"),
        ({"token_indices": torch.tensor([0, 2])}, "mask of 0 and 1"),
        ({"token_indices": torch.ones(1, 1, 1)}, "mask of 0 and 1"),
        ({"token_indices": torch.ones(0)}, "mask of 0 and 1"),
    ],
)
def test_wrong_selections_are_refused(wrong, says):
    """Each wrong selection is named, before any model is touched."""
    with pytest.raises(ValueError, match=says):
        TokenSelection(**wrong)


def test_an_index_before_the_prompt_is_refused():
    """-5 in a prompt of 4 tokens is not a token."""
    with pytest.raises(
        ValueError, match="token index -5 lies before the first token of a prompt of 4 tokens"
    ):
        selected(TokenSelection(token_indices=[-5]), 4, 4)


def test_a_mask_of_other_rows_is_refused():
    """Two rows of a mask do not fit others; in `generate` each covers two completions."""
    selection = TokenSelection(token_indices=torch.tensor([[1, 0], [0, 1]]))
    with pytest.raises(ValueError, match="the mask has 2 rows and the batch has 3"):
        selection.select(torch.arange(2).expand(3, 2), torch.full((3,), 2))
    with pytest.raises(ValueError, match="the mask has 2 rows and the batch has 4"):
        selection.select(torch.arange(2).expand(4, 2), torch.full((4,), 2))
    with generating(Reader(), Text.of(torch.ones(2, 2))):
        four = selection.select(torch.arange(2).expand(4, 2), torch.full((4,), 2))
    assert four.tolist() == [[True, False], [True, False], [False, True], [False, True]]


def test_rows_that_a_span_does_not_mean_may_be_short():
    """Only the prompts that vectors are added to have to be as long as they are many."""
    positions, lengths = torch.arange(4).expand(2, 4), torch.tensor([4, 2])
    assert TokenSpan(3, "back", torch.tensor([True, False])).select(
        positions, lengths
    ).tolist() == [[False, True, True, True], [False] * 4]
    with pytest.raises(ValueError, match="3 tokens and a prompt only 2"):
        TokenSpan(3, "back", torch.tensor([False, True])).select(positions, lengths)


def test_tracker_knows_the_names_of_positional_arguments_under_another_forward():
    """Nnsight replaces `forward` by one without names; GPT-2 passes the ids by position."""

    class Model(nn.Module):
        def forward(self, input_ids, attention_mask=None):
            return input_ids

    model = Model()
    model.forward = lambda *args, **kwargs: None
    tracker = PositionTracker(model, TokenSelection(1))
    tracker((torch.tensor([[0, 5, 6]]),), {"attention_mask": torch.tensor([[0, 1, 1]])})
    assert tracker.mask[0, :, 0].tolist() == [False, False, True]


class Reader(nn.Module):
    """Takes what a model takes."""

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return input_ids


class Cache:
    """Knows how many columns it holds."""

    def __init__(self, length: int = 0):
        self.get_seq_length = lambda: length


IDS = torch.tensor([[7, 5, 6]])


def marks(tracker: PositionTracker, *ids: Tensor, **given) -> list[list[bool]]:
    """What a pass selects."""
    tracker(ids, given)
    return (
        torch.ones_like(ids[0], dtype=torch.bool) if tracker.mask is None else tracker.mask[..., 0]
    ).tolist()


@pytest.mark.parametrize(
    "packed",
    [
        {"position_ids": torch.tensor([[0, 1, 0]])},
        {"cu_seq_lens_q": torch.tensor([0, 3])},
        {"cu_seq_lens_q": torch.tensor([0, 3]), "position_ids": torch.tensor([[0, 1, 2]])},
    ],
)
def test_texts_in_one_row(packed):
    """The model's numbers find tokens from the front; what needs prompts or rows is refused."""
    places = {"position_ids": torch.tensor([[4, 0, 1]]), **packed}
    for from_the_front in ([1], torch.tensor([0, 1])):
        tracker = PositionTracker(Reader(), TokenSelection(token_indices=from_the_front))
        assert marks(tracker, IDS, **places) == (places["position_ids"] == 1).tolist()
    rows = torch.tensor([[1, 0], [0, 1]])
    others = [TokenSelection(token_indices=chosen) for chosen in (rows, slice(0, -1), slice(-2, 3))]
    for selection in (TokenSelection(-1), *others, TokenSpan(1, "front")):
        with pytest.raises(ValueError, match="several texts share one row"):
            PositionTracker(Reader(), selection)((IDS,), places)


def test_a_prompt_that_generate_did_not_tell_is_refused():
    """Rather than taken for the first pass, which may be a part of it."""
    reader = Reader()
    with (
        generating(reader, Text()),
        pytest.raises(ValueError, match="`generate` has not said how long the prompts are"),
    ):
        PositionTracker(reader, TokenSelection(-1))((IDS,), {})


def test_padding_has_no_position():
    """The first token is the first real one; what comes before it is not selected."""
    padded = torch.tensor([[0, 0, 1]])
    for first in ([0], slice(0, 1), torch.tensor([1])):
        assert marks(
            PositionTracker(Reader(), TokenSelection(token_indices=first)),
            IDS,
            attention_mask=padded,
        ) == [[False, False, True]]


def test_a_pass_after_a_padded_one_need_not_bring_the_mask():
    """The padding is known from the pass that left the cache, also where that gave a tuple."""
    padded = torch.tensor([[1, 1, 1], [0, 0, 1]])
    for leave in (lambda cache: SimpleNamespace(past_key_values=cache), lambda cache: (IDS, cache)):
        tracker, cache = PositionTracker(Reader(), TokenSelection(token_indices=[-1, 3])), Cache(3)
        assert marks(tracker, IDS.expand(2, 3), attention_mask=padded) == [[False, False, True]] * 2
        tracker.finish(leave(cache))
        assert marks(tracker, IDS[:, :2].expand(2, 2), past_key_values=cache) == [
            [True, False],
            [False, False],
        ]


def test_rows_that_do_not_fit_the_prompts_of_a_cache():
    """Tokens from the front are found in any number of rows; others need as many per prompt."""
    for index, rows in ((-2, 3), (-2, 5), (3, 1), (3, 3), (3, 5)):
        tracker, cache = PositionTracker(Reader(), TokenSelection(token_indices=[index])), Cache(3)
        marks(tracker, IDS.expand(2, 3))
        tracker.finish(SimpleNamespace(past_key_values=cache))
        if index < 0:
            with pytest.raises(
                ValueError, match=f"filled with 2 prompts.*the pass has {rows} rows"
            ):
                marks(tracker, IDS[:, :1].expand(rows, 1), past_key_values=cache)
        else:
            assert (
                marks(tracker, IDS[:, :1].expand(rows, 1), past_key_values=cache) == [[True]] * rows
            )


def test_memories_with_which_a_pass_reads_tokens_again():
    """XLNet's `mems` does not say how many tokens it holds, nor is that known in generation."""

    class Remembering(Reader):
        def forward(self, input_ids, mems=None):
            return input_ids

    reader = Remembering()
    tracker = PositionTracker(reader, TokenSelection(1))
    with generating(reader, Text.of(torch.ones(1, 3))):
        assert marks(tracker, IDS) == [[False, True, True]]
        tracker.finish(SimpleNamespace(mems=[IDS]))
        with pytest.raises(
            ValueError,
            match="Remembering was given a cache that does not say how many tokens it holds",
        ):
            tracker((IDS[:, :2],), {"mems": [IDS]})


def test_what_was_generated_is_forgotten():
    """After an exception too, a pass by hand is a new text, and nothing keeps the large cache."""
    reader, cache = Reader(), Cache(3)
    tracker, kept = PositionTracker(reader, TokenSelection(-1)), weakref.ref(cache)

    def fail_in_a_generation(cache):
        with generating(reader, Text.of(torch.ones(1, 3))):
            marks(tracker, IDS)
            tracker.finish(SimpleNamespace(past_key_values=cache))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_in_a_generation(cache)
    del cache
    gc.collect()
    assert kept() is None and being_generated(reader) is None
    assert marks(tracker, IDS[:, :2]) == [[False, True]]


def test_a_thread_without_a_pass_gets_the_latest():
    """As in gradient checkpointing, in a thread of autograd; not where two threads had a pass."""
    tracker, found = PositionTracker(Reader(), TokenSelection(1)), []

    def look() -> None:
        try:
            found.append(tracker.mask[0, :, 0].tolist())
        except ValueError as error:
            found.append(str(error))

    def in_a_thread(call, *args) -> None:
        thread = threading.Thread(target=call, args=args)
        thread.start()
        thread.join()

    tracker((IDS,), {})
    in_a_thread(look)
    in_a_thread(tracker, (IDS[:, :2],), {})
    look()
    in_a_thread(look)
    tracker((IDS,), {})
    tracker((IDS,), {})
    in_a_thread(look)
    assert found[:2] == [[False, True, True]] * 2 and all(
        "began no pass, and two threads did" in each for each in found[2:]
    )
    assert copy.deepcopy(tracker).selection.spec == slice(1, None)
