"""Prompts become token ids by one rule, for every kind of tokenizer, wherever a prompt is taken."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import D_MODEL, tiny_model
from odd_tokenizers import CHAT, KINDS
from tokenizers.processors import TemplateProcessing

import common as c
from common.measuring.perplexity import split_corpus
from common.measuring.tone import tone_by_prompt
from common.passes.padding import encode
from common.passes.prompts import check_prompts, prompt_ids, prompt_text
from common.places.sites import Site
from common.texts.completions import side_by_side
from common.texts.sampling import Sampling
from common.vectors.activation_additions import read_sites

TEXTS = ["I think", "You love the old garden.", "Monday", " red bride", "what is this?"]
MODELS = {"Llama": "Llama", "Gemma": "Gemma", "Llama 3": "Llama", "Qwen": "Qwen2", "GPT-2": "GPT-2"}
LOVE = [{"role": "user", "content": "I love her"}]
HATE = [{"role": "user", "content": "I hate Monday"}]
BEGUN = [*LOVE, {"role": "assistant", "content": "The garden"}]


@pytest.fixture(scope="module")
def subjects() -> dict:
    """By kind of tokenizer, a tiny model and the tokenizer."""
    made = {kind: make() for kind, make in KINDS.items()}
    return {
        kind: (tiny_model(MODELS[kind], len(tokenizer)), tokenizer)
        for kind, tokenizer in made.items()
    }


@pytest.fixture(params=KINDS)
def subject(request, subjects):
    return subjects[request.param]


@pytest.fixture(params=[kind for kind in KINDS if kind != "Qwen"])
def with_a_bos(request, subjects):
    return subjects[request.param]


@pytest.fixture(params=CHAT)
def chat(request, subjects):
    return subjects[request.param]


def plain_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def bos_of(tokenizer) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def rows_of(inputs) -> list[list[int]]:
    """A batch without its padding."""
    return [
        ids[mask.bool()].tolist()
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])
    ]


def a_vector(size: float = 3.0) -> c.SteeringVector:
    draw = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))
    return c.SteeringVector({1: size * draw / draw.norm()})


@contextmanager
def reading(model) -> Iterator[list[list[int]]]:
    """The rows of ids that each pass reads."""
    rows: list[list[int]] = []
    handle = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: rows.extend(args[0].tolist())
    )
    try:
        yield rows
    finally:
        handle.remove()


def is_read(expected: list[int], rows: list[list[int]]) -> bool:
    """Whether a row begins so; a sweep reads the last token of a prompt in a pass of its own."""
    beginnings = [row[: len(expected)] for row in rows]
    return expected in beginnings or (expected[:-1] in beginnings and expected[-1:] in rows)


# Everything that runs a model on a prompt, called with the tokenizer's own way.
OWN_WAY = {
    "read": lambda model, tokenizer, prompt: c.read_activations(
        model, tokenizer, [prompt], layers=[1]
    ),
    "train": lambda model, tokenizer, prompt: c.train_steering_vector(
        model, tokenizer, [(prompt, "old")], [1]
    ),
    "sweep": lambda model, tokenizer, prompt: c.sweep(
        model,
        tokenizer,
        c.Grid({"v": a_vector()}, [1], [1.0]),
        [prompt],
        sampling=c.Sampling(max_new_tokens=1, temperature=0.0),
        show_progress=False,
    ),
    "logits": lambda model, tokenizer, prompt: c.sweep_logits(
        model, tokenizer, c.Grid({"v": a_vector()}, [1], [1.0]), [prompt], show_progress=False
    ),
    "perplexity": lambda model, tokenizer, prompt: c.sweep_perplexity(
        model,
        tokenizer,
        c.Grid({"v": a_vector()}, [1], [1.0]),
        [prompt],
        prepend_bos=None,
        show_progress=False,
    ),
    "complete": lambda model, tokenizer, prompt: c.complete(
        model, tokenizer, [prompt], prepend_bos=None, sampling=Sampling(max_new_tokens=1)
    ),
    "tone": lambda model, tokenizer, prompt: tone_by_prompt(
        model, tokenizer, {"v": a_vector().apply(model)}, [prompt], per_prompt=1, max_new_tokens=1
    ),
    "next": lambda model, tokenizer, prompt: c.next_token_probs(
        model, tokenizer, prompt, prepend_bos=None
    ),
    "loss": lambda model, tokenizer, prompt: c.get_loss_metric(model, tokenizer, prepend_bos=None)(
        [prompt]
    ),
}


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_bos_and_the_tokens_of_the_text(subject, text):
    """For every tokenizer and each of the three ways; a batch holds what each text alone gives."""
    _, tokenizer = subject
    plain, bos = plain_ids(tokenizer, text), bos_of(tokenizer)
    for way, expected in (
        (None, tokenizer(text)["input_ids"]),
        (True, bos + plain),
        (False, plain),
    ):
        assert prompt_ids(tokenizer, [text], way) == [expected]
        assert rows_of(encode(tokenizer, [*TEXTS, text], way))[-1] == expected
    assert c.with_bos(tokenizer, text) == bos + plain


@pytest.mark.parametrize("text", TEXTS)
def test_additions_and_prompts_begin_alike(subject, text):
    """Token by token: a prompt's own activations, subtracted, leave nothing at its front."""
    model, tokenizer = subject
    addition = c.ActivationAddition(-1.0, 2, prompt=text)
    longer = text + " the old garden"
    assert encode(tokenizer, [text])["input_ids"][0].tolist() == addition.token_ids(tokenizer)
    frame = c.line_up(model, tokenizer, longer, [addition])
    count = len(addition.token_ids(tokenizer))
    assert frame["-1"].tolist()[:count] == frame["prompt"].tolist()[:count]
    inputs = encode(tokenizer, [longer])
    with (
        c.apply_activation_additions(model, tokenizer, [addition]),
        c.record_activations(model, layer_nums=[1]) as records,
    ):
        model(**inputs)
    front = read_sites(model, [inputs["input_ids"][0].tolist()], [Site(2, "resid_pre")]).popitem()[
        1
    ][:count]
    torch.testing.assert_close(records[1][0][0, :count], torch.zeros_like(front), atol=1e-4, rtol=0)


@pytest.mark.parametrize("way", OWN_WAY)
def test_everything_reads_what_the_tokenizer_gives(subject, way):
    """Training, sweeps, completions and measuring run `tokenizer(text)` under None."""
    model, tokenizer = subject
    for text in TEXTS[:2]:
        expected = tokenizer(text)["input_ids"]
        with reading(model) as rows:
            OWN_WAY[way](model, tokenizer, text)
        assert is_read(expected, rows)
        if way not in (
            "train",
            "sweep",
            "complete",
            "tone",
        ):  # these read other prompts and new tokens, too
            assert rows and all(row == expected for row in rows)


def test_a_sweep_writes_what_plain_calls_write(subject):
    """All prompts in one batch, as `tokenizer(text)` and `generate` do for each alone."""
    model, tokenizer = subject
    frame = c.sweep(
        model,
        tokenizer,
        c.Grid({"v": a_vector()}, [1], [2.0]),
        TEXTS,
        sampling=c.Sampling(max_new_tokens=4, temperature=0.0),
        show_progress=False,
    )
    for row in frame.itertuples():
        inputs = tokenizer(row.prompt, return_tensors="pt")
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with a_vector().apply(model, multiplier=0.0 if row.kind == "unsteered" else 2.0):
            ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[
                0, inputs["input_ids"].shape[1] :
            ]
        assert row.completion == tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


# --- BOS once ---


@pytest.mark.parametrize("way", [None, True, False])
def test_a_text_that_begins_with_bos_gets_no_second(with_a_bos, way):
    """It keeps its own, in all that reads prompts."""
    model, tokenizer = with_a_bos
    text = tokenizer.bos_token + "I think"
    plain = plain_ids(tokenizer, text)
    assert plain[0] == tokenizer.bos_token_id != plain[1]
    assert (
        prompt_ids(tokenizer, [text, "Monday"], way)[0]
        == rows_of(encode(tokenizer, [text, "Monday"], way))[0]
        == plain
    )
    assert (
        c.ActivationAddition(1, 0, prompt=text).token_ids(tokenizer)
        == c.with_bos(tokenizer, text)
        == plain
    )
    for run in OWN_WAY.values():
        with reading(model) as rows:
            run(model, tokenizer, text)
        assert is_read(plain, rows)


@pytest.mark.parametrize("way", OWN_WAY)
def test_two_bos_are_refused(with_a_bos, way):
    """By name, and before the model runs."""
    model, tokenizer = with_a_bos
    text = 2 * tokenizer.bos_token + "I think"
    with reading(model) as rows, pytest.raises(ValueError, match="begins with two BOS"):
        OWN_WAY[way](model, tokenizer, text)
    assert rows == []
    for prepend_bos in (None, True, False):
        with pytest.raises(ValueError, match="begins with two BOS"):
            prompt_ids(tokenizer, ["Monday", text], prepend_bos)
    for wrong in (
        c.with_bos,
        lambda *args: c.ActivationAddition(1, 0, prompt=text).token_ids(args[0]),
    ):
        with pytest.raises(ValueError, match="begins with two BOS"):
            wrong(tokenizer, text)


def test_bos_in_a_corpus_and_in_front_of_it(subjects):
    """Pieces, windows and a prompt that bring their own BOS: each row begins with one."""
    model, tokenizer = subjects["Llama"]
    bos, (number,) = tokenizer.bos_token, bos_of(tokenizer)
    for method in ("sentence", "token"):
        pieces, _ = split_corpus(
            tokenizer, [bos + "I think. You love.", bos + "Monday."], method, window=4, stride=4
        )
        assert all(piece[0] == number and number not in piece[1:] for piece in pieces)
    with reading(model) as rows:
        c.get_stats_over_corpus(model, tokenizer, "I think. You love.", bos + " red")
    assert rows and all(row[0] == number != row[1] for row in rows)


def test_bos_that_is_not_true_or_false(subjects):
    _, tokenizer = subjects["Llama"]
    for wrong in ("yes", 1, tokenizer.bos_token):
        with pytest.raises(ValueError, match="expected True, False or None"):
            prompt_ids(tokenizer, ["I"], wrong)


# --- without BOS ---


@pytest.fixture
def qwen(subjects):
    return subjects["Qwen"]


def test_loss_without_bos(qwen):
    """The first token has no prediction and does not count: the loss with the tokens as labels."""
    model, tokenizer = qwen
    expected = []
    for text in TEXTS:
        ids = torch.tensor([plain_ids(tokenizer, text)])
        expected.append(model(ids, labels=ids).loss.item() if ids.shape[1] > 1 else math.nan)
    for size in (1, 3, 32):
        np.testing.assert_allclose(
            c.get_loss_metric(model, tokenizer, batch_size=size)(TEXTS), expected, rtol=1e-4
        )
    many = [text for text, loss in zip(TEXTS, expected) if not math.isnan(loss)]
    assert len(many) >= 3
    frame = c.sweep_perplexity(
        model, tokenizer, c.Grid({"v": a_vector()}, [1], [1.0]), many, show_progress=False
    )
    plain = frame[frame["kind"] == "unsteered"]
    np.testing.assert_allclose(
        plain["loss"], [loss for loss in expected if not math.isnan(loss)], rtol=1e-4
    )
    assert plain["tokens"].tolist() == [len(plain_ids(tokenizer, text)) - 1 for text in many]


def test_an_empty_text_without_bos(qwen):
    """No tokens, so no mean of their losses; its neighbours in the batch keep their values."""
    model, tokenizer = qwen
    for texts in ([""], ["", TEXTS[1], ""]):
        full = c.get_loss_metric(model, tokenizer, "full")(texts)
        assert [len(row) for row in full] == [
            max(0, len(plain_ids(tokenizer, text)) - 1) for text in texts
        ]
        assert math.isnan(c.get_loss_metric(model, tokenizer)(texts)[0])
        frame = c.get_logprob_metric(model, tokenizer, lambda: a_vector().apply(model))(texts)
        assert frame.isna().all(axis=1).tolist() == [text == "" for text in texts]
    np.testing.assert_allclose(
        full[1], c.get_loss_metric(model, tokenizer, "full")([TEXTS[1]])[0], rtol=1e-4
    )
    with pytest.raises(ValueError, match="one token or more"):
        encode(tokenizer, ["I", ""])


def test_a_working_window_without_bos(qwen):
    """From a sweep of effects and one of costs, with controls."""
    model, tokenizer = qwen
    grid = c.Grid({"v": a_vector()}, [1], [-1.0, 1.0])
    rows = c.sweep_logits(
        model,
        tokenizer,
        replace(grid, random_controls=1),
        TEXTS[:2],
        {"t": c.token_logprob([5])},
        show_progress=False,
    )
    costs = c.sweep_perplexity(model, tokenizer, grid, TEXTS[:2], show_progress=False)
    window = c.working_window(rows, costs, "t", max_ratio=1e9)
    assert window.cells["layer"].tolist() == [1] and window.cells["ratio"].notna().all()


def test_next_tokens_without_bos(qwen):
    model, tokenizer = qwen

    def steering():
        return a_vector().apply(model)

    ids = plain_ids(tokenizer, TEXTS[1])
    probs = model(torch.tensor([ids])).logits[0].softmax(-1)
    torch.testing.assert_close(c.next_token_probs(model, tokenizer, TEXTS[1]), probs.detach())
    top = c.top_changed_tokens(model, tokenizer, TEXTS[1], steering, count=3)
    assert all((probs[-1] - value).abs().min() < 1e-6 for value in top["unsteered"])
    table = c.effectiveness_and_disruption(model, tokenizer, TEXTS[1], steering, [" the"])
    assert table["token"].tolist() == [tokenizer.decode([number]) for number in ids]


@pytest.mark.parametrize("method", ["tokens_left", "tokens_right"])
def test_an_x_vector_without_bos(qwen, method):
    """Padding is at the very front or at the end; additions begin at the prompt's first token."""
    model, tokenizer = qwen
    additions = c.get_x_vector(
        "love", "", 2.0, 2, tokenizer=tokenizer, pad_method=method, custom_pad_id=7
    )
    love = plain_ids(tokenizer, "love")
    assert [addition.token_ids(tokenizer) for addition in additions] == [love, [7] * len(love)]
    longer, shorter = (
        one.token_ids(tokenizer)
        for one in c.get_x_vector(
            "what is this?", "red", 1.0, 2, tokenizer=tokenizer, pad_method=method, custom_pad_id=7
        )
    )
    red, pads = plain_ids(tokenizer, "red"), [7] * (len(longer) - len(plain_ids(tokenizer, "red")))
    assert pads and shorter == ([*pads, *red] if method == "tokens_left" else [*red, *pads])

    inputs = encode(tokenizer, TEXTS[1:2])
    states = []
    for using in ((), additions):
        with (
            c.apply_activation_additions(model, tokenizer, using),
            c.record_activations(model, layer_nums=[1]) as records,
        ):
            model(**inputs)
        states.append(records[1][0][0])
    moved = (states[1] - states[0]).norm(dim=-1) > 1e-3
    assert moved.nonzero().flatten().tolist() == list(range(len(love)))


def test_an_addition_without_tokens_is_refused(qwen):
    _, tokenizer = qwen
    with pytest.raises(
        ValueError, match="'' has no tokens, since Qwen2Tokenizer has no BOS: .*pad_method"
    ):
        c.ActivationAddition(1, 0, prompt="").token_ids(tokenizer)
    assert c.ActivationAddition(1, 3, tokens=[4]).token_ids(tokenizer) == [4]


def test_comparisons_without_bos(qwen, capsys):
    """The table, the frames and the loss: the first token does not count."""
    model, tokenizer = qwen
    additions = c.get_x_vector(
        "love", "hate", 2.0, 1, tokenizer=tokenizer, pad_method="tokens_right"
    )
    text = "You love the old garden"
    c.print_n_comparisons(
        text, model, tokenizer, additions, num_comparisons=2, tokens_to_generate=4, seed=0
    )
    assert "You love" in capsys.readouterr().out
    frame = c.gen_normal_and_modified(
        model, tokenizer, [text], additions, seed=0, tokens_to_generate=4
    )
    alone = c.complete(
        model, tokenizer, [text], seed=0, include_logits=True, sampling=Sampling(max_new_tokens=4)
    )
    assert frame["completions"][0] == alone["completions"][0]
    scores = alone["logits"][0]
    ids = torch.tensor(plain_ids(tokenizer, text))
    torch.testing.assert_close(
        scores[: len(ids)], model(ids[None]).logits[0].detach(), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("method", ["sentence", "token"])
def test_a_corpus_without_bos(qwen, method):
    """The first token of a piece does not count, with a text to prompt with in front as without."""
    model, tokenizer = qwen
    texts = ["I think that they are old. You love her.", "Monday is red."]
    pieces, known = split_corpus(tokenizer, texts, method, window=6, stride=3)
    expected, prompted = [], []
    prefix = plain_ids(tokenizer, " red bride")
    for piece, seen in zip(pieces, known):
        first = max(1, seen)
        for row, found in ((piece, expected), (prefix + piece, prompted)):
            scores = model(torch.tensor([row])).logits[0].log_softmax(-1)
            start = len(row) - len(piece) + first
            found.append([scores[place - 1, row[place]].item() for place in range(start, len(row))])
    for condition, rows in ((None, expected), (" red bride", prompted)):
        stats = c.get_stats_over_corpus(
            model, tokenizer, texts, condition, method, window=6, stride=3
        )
        np.testing.assert_allclose(np.concatenate(stats.logprobs), np.concatenate(rows), atol=1e-4)
    if method == "sentence":
        sentences = ("I think that they are old.", "You love her.", "Monday is red.")
        assert pieces == [plain_ids(tokenizer, sentence) for sentence in sentences]
    else:  # every token but the first counts once
        end = tokenizer.eos_token_id
        row = [*plain_ids(tokenizer, texts[0]), end, *plain_ids(tokenizer, texts[1])]
        assert sum(map(len, expected)) == len(row) - 1
        assert [number for piece, seen in zip(pieces, known) for number in piece[seen:]] == row
    ratios = c.perplexity_ratios(
        model,
        tokenizer,
        {"all": texts},
        {"prompted": " red bride"},
        split_method=method,
        window=6,
        stride=3,
    )
    assert ratios["tokens"].tolist() == [sum(map(len, expected))]


def test_checks_without_bos(qwen):
    """Nothing begins with what is not there; the checks of steering run."""
    model, tokenizer = qwen
    c.assert_bos(tokenizer, "I think", encode(tokenizer, TEXTS), LOVE)
    with pytest.raises(ValueError, match="one token or more"):
        c.assert_bos(tokenizer, "")
    c.assert_adds(
        model,
        tokenizer,
        lambda: a_vector().apply(model),
        1,
        a_vector().layer_activations[1],
        prompts=TEXTS,
    )


# --- messages ---


def test_messages_are_what_the_template_gives(chat):
    """As ids; and the text from the template gives the same ids, in all three ways."""
    _, tokenizer = chat
    for messages, options in (
        (LOVE, {"add_generation_prompt": True}),
        ([{"role": "system", "content": "old"}, *LOVE], {"add_generation_prompt": True}),
        (BEGUN, {"continue_final_message": True}),
        (tuple(BEGUN), {"continue_final_message": True}),
    ):
        expected = tokenizer.apply_chat_template(list(messages), return_dict=False, **options)
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        assert prompt_text(tokenizer, messages) == text and prompt_text(tokenizer, text) == text
        for way in (None, True, False):
            assert prompt_ids(tokenizer, [messages, text, "Monday"], way)[:2] == [
                expected,
                expected,
            ]
            assert rows_of(encode(tokenizer, ["Monday", messages], way))[1] == expected
        assert c.ActivationAddition(1, 0, prompt=messages).token_ids(tokenizer) == expected
        assert c.with_bos(tokenizer, messages) == expected
        assert expected.count(tokenizer.bos_token_id) == len(bos_of(tokenizer))
    assert prompt_text(tokenizer, BEGUN).endswith("The garden")


@pytest.mark.parametrize("way", [way for way in OWN_WAY if way != "loss"])
def test_messages_are_taken_wherever_a_prompt_is(chat, way):
    """And read as the template gives them."""
    model, tokenizer = chat
    expected = prompt_ids(tokenizer, [LOVE])[0]
    with reading(model) as rows:
        OWN_WAY[way](model, tokenizer, LOVE)
    assert is_read(expected, rows)


def test_training_on_messages(chat):
    """Pairs of messages and their texts make one vector; a callable gets each prompt as given."""
    model, tokenizer = chat
    seen = []

    def index(prompt):
        seen.append(prompt)
        return -1

    messages = [(LOVE, HATE), (BEGUN, HATE)]
    texts = [tuple(prompt_text(tokenizer, one) for one in pair) for pair in messages]
    vectors = [
        c.train_steering_vector(model, tokenizer, pairs, [1], read_token_index=index, batch_size=2)
        for pairs in (messages, texts)
    ]
    torch.testing.assert_close(
        vectors[0].layer_activations[1], vectors[1].layer_activations[1], rtol=0, atol=0
    )
    assert seen[:4] == [LOVE, BEGUN, HATE, HATE]
    assert len({vector.metadata["pairs_sha256"] for vector in vectors}) == 2


def test_tables_show_messages_as_text(chat, capsys):
    """Completions, comparisons and sweeps: one readable text, from which the same ids come."""
    model, tokenizer = chat
    frame = c.complete(
        model, tokenizer, [LOVE, "Monday"], seed=0, sampling=Sampling(max_new_tokens=3)
    )
    assert frame["prompts"].tolist() == [prompt_text(tokenizer, LOVE), "Monday"]
    assert prompt_ids(tokenizer, [frame["prompts"][0]], True) == prompt_ids(tokenizer, [LOVE])
    again = c.complete(
        model, tokenizer, frame["prompts"].tolist(), seed=0, sampling=Sampling(max_new_tokens=3)
    )
    assert again.equals(frame)
    swept = (model, tokenizer, c.Grid({"v": a_vector()}, [1]), [LOVE, HATE])
    for table, column in (
        (
            c.sweep(
                *swept,
                {"words": c.get_word_count_metric(["love"])},
                sampling=c.Sampling(max_new_tokens=2, temperature=0.0),
                show_progress=False,
            ),
            "prompt",
        ),
        (c.sweep_logits(*swept, show_progress=False), "prompt"),
        (c.sweep_perplexity(*swept, show_progress=False), "text"),
    ):
        assert table[column].tolist() == 2 * [
            prompt_text(tokenizer, LOVE),
            prompt_text(tokenizer, HATE),
        ]
    c.print_n_comparisons(
        LOVE, model, tokenizer, [], num_comparisons=1, tokens_to_generate=2, seed=0
    )
    assert "I love her" in capsys.readouterr().out
    tones = tone_by_prompt(model, tokenizer, {}, [LOVE], per_prompt=1, max_new_tokens=1)
    assert tones.columns.tolist() == [prompt_text(tokenizer, LOVE)]


def test_a_sweep_file_belongs_to_the_ids(subjects, tmp_path):
    """Another BOS or chat template makes another sweep; the same ids in another form go on."""
    model, tokenizer = subjects["Llama"]

    def swept(prompts, path="one.db", **settings):
        return c.sweep_logits(
            model,
            tokenizer,
            c.Grid({"v": a_vector()}, [1], [1.0]),
            prompts,
            path=tmp_path / path,
            show_progress=False,
            **settings,
        )

    frame = swept([LOVE, "Monday"])
    assert swept([LOVE, "Monday"]).equals(frame) and swept(
        [LOVE, "Monday"], prepend_bos=True
    ).equals(frame)
    assert swept([prompt_text(tokenizer, LOVE), "Monday"]).equals(frame)
    assert c.read_sweep(tmp_path / "one.db").equals(frame)
    with pytest.raises(ValueError, match="other settings .*prompts"):
        swept([LOVE, "Monday"], prepend_bos=False)
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template.replace("[INST] ", "[INST]")
        with pytest.raises(ValueError, match="other settings .*prompts"):
            swept([LOVE, "Monday"])
    finally:
        tokenizer.chat_template = template


def test_additions_of_messages(subjects):
    """An addition keeps its own messages, and equals another one of the same."""
    model, tokenizer = subjects["Qwen"]
    messages = [dict(LOVE[0])]
    addition, same = (c.ActivationAddition(1, 0, prompt=one) for one in (messages, LOVE))
    assert addition == same and hash(addition) == hash(same) and repr(LOVE) in repr(addition)
    assert (
        addition
        != c.ActivationAddition(1, 0, prompt=HATE)
        != c.ActivationAddition(1, 0, prompt=repr(HATE))
    )
    messages[0]["content"] = "changed"
    assert addition == same
    x_vector = c.get_x_vector(LOVE, HATE, 1.0, 0, tokenizer=tokenizer, pad_method="tokens_left")
    rows = [one.token_ids(tokenizer) for one in x_vector]
    hate = prompt_ids(tokenizer, [HATE])[0]
    assert len(rows[0]) == len(rows[1]) and rows[1][-len(hate) :] == hate
    frame = c.gen_using_activation_additions(
        model, tokenizer, [LOVE], [addition], tokens_to_generate=2, seed=0
    )
    assert side_by_side(frame)["Steered completions"][0][0] == prompt_text(tokenizer, LOVE)


def test_a_tokenizer_without_a_chat_template(subjects):
    model, tokenizer = subjects["Gemma"]
    for run in OWN_WAY.values():
        with (
            reading(model) as rows,
            pytest.raises(
                ValueError, match="GemmaTokenizer has no chat template.*set tokenizer.chat_template"
            ),
        ):
            run(model, tokenizer, LOVE)
        assert rows == []


def test_what_a_template_refuses(subjects):
    """The template's own words, as a ValueError; and a template that writes BOS twice."""
    _, tokenizer = subjects["Llama"]
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(ValueError, match="does not take .*roles must alternate"):
            prompt_ids(tokenizer, [LOVE])
        tokenizer.chat_template = "{{ bos_token }}" + template
        with pytest.raises(ValueError, match="begins with two BOS"):
            prompt_ids(tokenizer, [LOVE])
    finally:
        tokenizer.chat_template = template


@pytest.mark.parametrize(
    "prompts, says",
    [
        ([], r"a list of prompts, got \[\]"),
        ("I think", "a list of prompts, got 'I think'"),
        (LOVE, r"the messages of one: write \[messages\]"),
        (["I", 3], "as prompts, got 3"),
        (["I", []], r"as prompts, got \[\]"),
        (["I", [{"role": "user"}]], "as prompts, got"),
        (["I", [{"role": "user", "content": None}]], "as prompts, got"),
        (["I", {"role": "user", "content": "Hi"}], "as prompts, got"),
        ([["I", "You"]], "as prompts, got"),
    ],
)
def test_what_is_not_a_prompt(subjects, prompts, says):
    """Refused by all, in the same words."""
    model, tokenizer = subjects["Llama"]
    for call in (
        lambda: check_prompts(prompts),
        lambda: encode(tokenizer, prompts),
        lambda: c.read_activations(model, tokenizer, prompts),
        lambda: c.complete(model, tokenizer, prompts),
        lambda: c.sweep_logits(model, tokenizer, c.Grid({"v": a_vector()}, [1], [1.0]), prompts),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_a_conversation_is_not_a_pair(subjects):
    """Two messages are one prompt, not two."""
    model, tokenizer = subjects["Llama"]
    with pytest.raises(ValueError, match="pair 0: expected two"):
        c.train_steering_vector(model, tokenizer, [BEGUN])
    with pytest.raises(ValueError, match="pair 0: expected two"):
        c.train_steering_vector(model, tokenizer, [(LOVE, 3)])


# Everything that takes `prepend_bos`, with a choice.
CHOICE = {
    "read": lambda m, t, p, way: c.read_activations(m, t, [p], layers=[1], prepend_bos=way),
    "extract": lambda m, t, p, way: c.extract_activations(m, t, [(p, p)], [1], prepend_bos=way),
    "train": lambda m, t, p, way: c.train_steering_vector(
        m, t, [(p, p + " old")], [1], prepend_bos=way
    ),
    "sweep": lambda m, t, p, way: c.sweep(
        m,
        t,
        c.Grid({"v": a_vector()}, [1], [1.0]),
        [p],
        sampling=c.Sampling(max_new_tokens=1, temperature=0.0),
        prepend_bos=way,
    ),
    "logits": lambda m, t, p, way: c.sweep_logits(
        m, t, c.Grid({"v": a_vector()}, [1], [1.0]), [p], prepend_bos=way
    ),
    "perplexity": lambda m, t, p, way: c.sweep_perplexity(
        m, t, c.Grid({"v": a_vector()}, [1], [1.0]), [p], prepend_bos=way
    ),
    "complete": lambda m, t, p, way: c.complete(
        m, t, [p], prepend_bos=way, sampling=Sampling(max_new_tokens=1)
    ),
    "print": lambda m, t, p, way: c.print_n_comparisons(
        p, m, t, num_comparisons=1, tokens_to_generate=1, prepend_bos=way
    ),
    "tone": lambda m, t, p, way: tone_by_prompt(
        m, t, {}, [p], per_prompt=1, max_new_tokens=1, prepend_bos=way
    ),
    "next": lambda m, t, p, way: c.next_token_probs(m, t, p, prepend_bos=way),
    "changed": lambda m, t, p, way: c.top_changed_tokens(
        m, t, p, lambda: a_vector().apply(m), prepend_bos=way
    ),
    "effectiveness": lambda m, t, p, way: c.effectiveness_and_disruption(
        m, t, p, lambda: a_vector().apply(m), [], prepend_bos=way
    ),
    "loss": lambda m, t, p, way: c.get_loss_metric(m, t, prepend_bos=way)([p]),
    "logprob": lambda m, t, p, way: c.get_logprob_metric(
        m, t, lambda: a_vector().apply(m), prepend_bos=way
    )([p]),
    "corpus": lambda m, t, p, way: c.get_stats_over_corpus(m, t, p, prepend_bos=way),
    "ratios": lambda m, t, p, way: c.perplexity_ratios(
        m, t, {"a": p}, {"b": lambda: a_vector().apply(m)}, prepend_bos=way
    ),
}


@pytest.mark.parametrize("name", CHOICE)
def test_a_caller_can_choose(subjects, name):
    """With a tokenizer that adds BOS and one that does not: every row begins as was asked for."""
    text = TEXTS[1]
    for kind in ("Gemma", "GPT-2"):
        model, tokenizer = subjects[kind]
        plain, bos = plain_ids(tokenizer, text), bos_of(tokenizer)
        own = tokenizer(text)["input_ids"]
        for way, expected in ((None, own), (True, bos + plain), (False, plain)):
            with reading(model) as rows:
                found = CHOICE[name](model, tokenizer, text, way)
            assert is_read(expected, rows)
            other = plain if expected != plain else bos + plain
            assert not any(row[: len(other) - 1] == other[:-1] for row in rows)
            if name == "effectiveness":
                assert found["token"].tolist() == [tokenizer.decode([one]) for one in expected]


@pytest.mark.parametrize("template", ["$A {eos}", "{bos} $A {eos}"])
@pytest.mark.parametrize("kind", ["Llama 3", "GPT-2"])
def test_an_end_that_the_tokenizer_adds_is_left_out(kind, template):
    """It would be read in place of the last word, and end the text; the text's own end stays."""
    tokenizer = KINDS[kind]()
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    named = [(token, tokenizer.convert_tokens_to_ids(token)) for token in {bos, eos}]
    processor = TemplateProcessing(single=template.format(bos=bos, eos=eos), special_tokens=named)
    tokenizer.backend_tokenizer.post_processor = processor
    front = bos_of(tokenizer) if "{bos}" in template else []
    texts = [*TEXTS, f"Monday{eos}"]
    assert all(tokenizer(text)["input_ids"][-1] == tokenizer.eos_token_id for text in texts)
    assert prompt_ids(tokenizer, texts) == [front + plain_ids(tokenizer, text) for text in texts]
    assert prompt_ids(tokenizer, texts, True)[0] == bos_of(tokenizer) + plain_ids(
        tokenizer, texts[0]
    )


def test_half_a_surrogate_pair_is_refused(subject):
    """No tokenizer takes it, and says so in its own words."""
    with pytest.raises(ValueError, match=r"texts that can be written as UTF-8, got \['\\ud800'\]"):
        prompt_ids(subject[1], ["\ud800"])
