"""Choosing on the embedded model: what a card says can be measured again, and bad pairs are told.

Metrics of the next token and small budgets: the whole of it many times, in seconds.
"""

import json
import random
import re
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from itertools import pairwise, product
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from architectures import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from support import a_vector

import common.choosing.choose as choosing
from common import (
    Budget,
    Choice,
    Grid,
    Sampling,
    SteeringVector,
    VectorCard,
    ab_metric,
    choose,
    complete,
    copy_sharing_weights,
    encode,
    logits,
    pca_aggregator,
    perplexity_ratios,
    progress,
    steering_kl,
    tone_sign,
)
from common.checking.pristine import assert_pristine, snapshot
from common.choosing.card import HASH
from common.choosing.evidence import Evidence, asked, competing
from common.choosing.judging import gentlest_of_the_best
from common.choosing.splitting import Split, keep_back, split_at_random
from common.choosing.trying import Directions, Subject, layers_to_try, try_strength, with_controls
from common.vectors.pairs import hash_of_pairs, samples_of
from common.vectors.training import train_steering_vector
from embedded_model import grammar
from embedded_model.prompts import NEW_PROMPTS, TABLE_PROMPTS

PROMPTS = [*NEW_PROMPTS, *TABLE_PROMPTS]
SHORT = Sampling(max_new_tokens=4, temperature=0.0)
SMALL = Budget(layers=1, strengths=(0.5,), prompts=4, calibrating=1, instructions=0, sampling=SHORT)
GOOD = ["wonderful", "lovely", "good", "nice", "great"]
BAD = ["terrible", "horrible", "bad", "poor", "awful"]


@pytest.fixture(autouse=True, scope="module")
def unchanged(model):
    before = snapshot(model)
    yield
    assert_pristine(model, before)


@pytest.fixture(scope="module")
def praise(tokenizer):
    """How much likelier praise is than blame, as the next word."""
    return ab_metric(tokenizer, GOOD, BAD)


def pairs_of(kind: str, seed: int) -> list[tuple[str, str]]:
    """Good pairs; good ones with sides swapped at random; sentences that have nothing in common.

    And texts on sides at random, each beside each: many pairs, and few texts.
    """
    draw = random.Random(seed)
    if kind == "crossed":
        texts = [side for pair in grammar.contrast_pairs(8, seed=seed) for side in pair]
        draw.shuffle(texts)
        return list(product(texts[:8], texts[8:]))
    if kind == "unrelated":
        _, sentences = grammar.topic_sentences(seed=444_100_000 + seed, on=0, off=60)
        draw.shuffle(sentences)
        return list(zip(sentences[::2], sentences[1::2]))
    pairs = grammar.contrast_pairs(24, seed=seed)
    if kind == "good":
        return pairs
    return [pair if draw.random() < 0.5 else pair[::-1] for pair in pairs]


@pytest.fixture(scope="module")
def choice(model, tokenizer, praise) -> Choice:
    budget = Budget(layers=2, strengths=(0.3, 1.0), prompts=8, calibrating=2, sampling=SHORT)
    given = (pairs_of("good", 0), PROMPTS, praise, budget)
    return choose(model, tokenizer, *given, name="praise")


# --- the law ---


def test_bad_pairs_are_told_and_good_ones_are_found(model, tokenizer, praise):
    """Of 20 bad sets at most one passes as better than random; of 3 good ones all do."""

    def better(kind: str, seed: int) -> bool:
        given = (pairs_of(kind, seed), PROMPTS, praise, SMALL)
        quick = {"other_texts": PROMPTS[:2], "layers": [5]}  # a block to compute, no more
        card = choose(model, tokenizer, *given, seed=seed, **quick).card
        said = "Better than random" if card.better else "No better than random"
        assert card.verdict.startswith(said) and said in card.markdown()
        return card.better

    bad = [better(kind, seed) for seed in range(7) for kind in ("swapped", "unrelated")]
    bad += [better("crossed", seed) for seed in range(6)]
    assert sum(bad) <= 0.05 * len(bad)
    assert all(better("good", seed) for seed in range(3))


# --- what the card says ---


def test_the_effect_can_be_measured_again(model, tokenizer, praise, choice):
    """By plain passes over the prompts of the judgement, one at a time."""

    def found(prompt: str) -> float:
        with torch.no_grad():
            scores = model(**encode(tokenizer, [prompt], None)).logits[:, -1]
        return float(praise(scores, scores))

    prompts = list(choice.card.slopes)
    plain = [found(prompt) for prompt in prompts]
    with choice.vector.apply(model, multiplier=choice.multiplier):
        steered = [found(prompt) for prompt in prompts]
    effect = choice.card.effect
    assert effect["mean"] == pytest.approx(np.subtract(steered, plain).mean(), abs=1e-4)
    assert effect["unsteered"] == pytest.approx(np.mean(plain), abs=1e-4)
    assert effect["low"] < effect["mean"] < effect["high"]
    steering = partial(choice.vector.apply, model, multiplier=choice.multiplier)
    kl = steering_kl(model, tokenizer, steering, prompts, new_tokens=4)
    assert choice.card.place["kl"] == pytest.approx(kl, rel=1e-4)


def test_slopes_go_through_both_signs(model, tokenizer, praise, choice):
    """Of the metric over the multiplier, in units of the chosen one."""
    prompts, coeffs = list(choice.card.slopes)[:2], (-1.0, -0.5, 0.5, 1.0)
    found = []
    for coeff in coeffs:
        with choice.vector.apply(model, multiplier=coeff * choice.multiplier):
            scores = logits(model, encode(tokenizer, prompts, None))[:, -1]
        found.append(praise(scores, scores).tolist())
    slopes = np.polyfit(coeffs, found, 1)[0]
    assert slopes.tolist() == pytest.approx([*choice.card.slopes.values()][:2], abs=1e-4)


def test_a_vector_is_trained_on_what_was_not_kept_back(
    model, tokenizer, praise, choice, monkeypatch
):
    """And its controls, and their settings, know the prompts to choose on only."""
    split = split_at_random(tokenizer, pairs_of("good", 0), PROMPTS, 8, seed=0)
    expected = train_steering_vector(model, tokenizer, split.trained, [choice.layer])
    torch.testing.assert_close(choice.vector.layer_activations, expected.layer_activations)
    given: list = []
    for name in ("with_controls", "try_strength"):
        original = getattr(choosing, name)

        def noting(subject, of, prompts, *more, original=original):
            given.append(prompts)
            return original(subject, of, prompts, *more)

        monkeypatch.setattr(choosing, name, noting)
    others = PROMPTS[:3]
    card = choose(model, tokenizer, pairs_of("good", 0), PROMPTS, praise, SMALL, other_texts=others)
    choosing_on = split_at_random(tokenizer, pairs_of("good", 0), PROMPTS, 4, seed=0).choosing
    assert given == [choosing_on] * 2
    apply = partial(card.vector.apply, model, multiplier=card.multiplier)
    table = perplexity_ratios(model, tokenizer, {"t": others}, {"v": apply}, bootstrap=0)
    cost = card.card.cost
    assert cost["ratio"] == pytest.approx(table["ratio"].item(), rel=1e-4)
    assert (cost["what"], cost["texts"]) == ("other texts", 3)


@pytest.fixture(scope="module")
def measured(model, tokenizer, praise):
    """Makes evidence of a vector of one layer, of any metric, after a split by hand."""
    pairs = samples_of(pairs_of("good", 0))
    subject = Subject(model, tokenizer, praise, True, SMALL, 0, None)
    vector = train_steering_vector(model, tokenizer, pairs[:16], [4])
    directions = with_controls(subject, vector, PROMPTS[:8])
    chosen = gentlest_of_the_best(try_strength(subject, directions, PROMPTS[:8], 0.5))

    def evidence(kept: slice | list = slice(16, None), **changes) -> Evidence:
        kept = pairs[kept] if isinstance(kept, slice) else kept
        split = Split(pairs[:16], kept, PROMPTS[:8], PROMPTS[8:10])
        return Evidence.gather(replace(subject, **changes), split, directions, chosen)

    return evidence


def test_kept_pairs_lie_along_the_vector_as_they_are_labelled(measured):
    """Those that were kept back, not those of the training."""
    pairs = pairs_of("good", 0)[16:]
    for sides, sign in ((1, 1), (-1, -1)):
        along = measured(samples_of([pair[::sides] for pair in pairs])).apart({})
        assert len(along) == 8 and np.mean(np.sign(along)) * sign > 0.7


def test_a_card_says_what_it_was_made_of(model, tokenizer, measured):
    """By hashes, each of which changes with what it is of, and with nothing else."""
    evidence = measured()
    other = copy_sharing_weights(model)
    other.transformer.wpe.weight = torch.nn.Parameter(1.01 * other.transformer.wpe.weight)
    changed = {
        "prompts, SHA-256": replace(evidence, split=replace(evidence.split, judging=PROMPTS[10:])),
        "model, SHA-256": replace(evidence, subject=replace(evidence.subject, model=other)),
        HASH: replace(evidence, directions=Directions({"vector": 2 * evidence.vector})),
    }
    data = evidence.data()
    for name, one in changed.items():
        differing = {key for key, value in one.data().items() if value != data[key]}
        assert differing - {"prompts to judge on"} == {name}


def test_costs_are_compared_with_those_of_random_directions(model, tokenizer, measured):
    """With the median of them, each at its own setting; unrelated vectors have no part in it."""
    evidence, texts = measured(), PROMPTS[:2]
    cost = evidence.cost(texts)
    ways = {
        row["steering"]: partial(
            evidence.directions.vectors[row["steering"]].select([4]).apply,
            model,
            multiplier=row["multiplier"],
        )
        for row in evidence.chosen.query("kind != 'unrelated'").to_dict("records")
    }
    table = perplexity_ratios(model, tokenizer, {"t": texts}, ways, bootstrap=0)
    ratios = table.set_index("condition")["ratio"]
    assert cost["ratio"] == pytest.approx(ratios.pop("vector"), rel=1e-4)
    assert len(ratios) == 19 and cost["random"] == pytest.approx(ratios.median(), rel=1e-4)


def test_the_instruction_that_is_best_on_one_half_is_judged_on_the_other(measured):
    """Beside the prompts as they are; what has no value does not compete."""
    found = {"fails": (np.nan, np.nan), "later": (0.5, 2.0), "first": (1.0, 0.0)}

    def metric(prompts: list[str], completions: list[str]) -> list[float]:
        values = []
        for prompt in prompts:
            judging = prompt.endswith(tuple(PROMPTS[8:10]))
            values.append(found.get(prompt.split()[0], (0.25, 0.25))[judging])
        return values

    rival = measured(metric=metric, next_token=False).rival(list(found))
    numbers = {name: value for name, value in rival.items() if name != "instruction"}
    assert rival["instruction"] == "first"
    assert numbers == {
        **dict.fromkeys(("mean", "low", "high"), -0.25),
        **dict.fromkeys(("more", "more low", "more high"), 0.25),
    }


def test_what_is_judged_was_not_chosen_on(choice):
    data = choice.card.data
    assert data["metric"].startswith("log p(wonderful or lovely or good or nice or great) - log p(")
    assert data["prompts to choose on"] == 8 and data["prompts to judge on"] == 16
    assert len(choice.card.slopes) == choice.card.effect["prompts"] == 16
    assert (data["pairs to train on"], data["pairs kept back"]) == (16, 8)


def test_the_choice_does_not_know_what_the_judgement_finds(model, tokenizer):
    """A metric that is turned round on the prompts of the judgement changes the judgement only."""
    split = split_at_random(tokenizer, pairs_of("good", 0), PROMPTS[:12], 4, seed=0)

    def found(turned: bool) -> VectorCard:
        def metric(prompts: list[str], completions: list[str]) -> list[int]:
            signs = [-1 if turned and prompt in split.judging else 1 for prompt in prompts]
            return [sign * len(text) for sign, text in zip(signs, completions)]

        budget = replace(SMALL, layers=2)
        return choose(model, tokenizer, pairs_of("good", 0), PROMPTS[:12], metric, budget).card

    card, turned = found(False), found(True)
    assert list(card.slopes) == split.judging
    assert (card.tried, card.place) == (turned.tried, turned.place)
    assert card.effect["mean"] == -turned.effect["mean"] != 0


@given(pairs=st.integers(2, 40), prompts=st.integers(8, 60), most=st.integers(4, 12))
def test_a_split_parts_everything(tokenizer, pairs, prompts, most):
    given_pairs = [(f"good {n}", f"bad {n}") for n in range(pairs)]
    given_prompts = [f"prompt {n}" for n in range(prompts)]
    split = split_at_random(tokenizer, given_pairs * 2, given_prompts, most, seed=prompts)
    used = [(one.positive_str, one.negative_str) for one in (*split.trained, *split.kept)]
    assert sorted(used) == sorted(given_pairs)
    assert len(split.kept) == (max(5, pairs // 3) if pairs >= 10 else 0)
    both = [*split.choosing, *split.judging]
    assert len(set(both)) == len(both) and set(both) <= set(given_prompts)
    half = min(most, prompts // 2)
    assert (len(split.choosing), len(split.judging)) == (half, min(2 * half, prompts - half))
    assert split.pairs_sha256 == hash_of_pairs(samples_of(given_pairs * 2))  # as they were given


TEXTS = st.lists(st.integers(0, 12), min_size=4, max_size=10, unique=True)


@given(positive=TEXTS, negative=TEXTS, count=st.integers(2, 60), blank=st.booleans())
def test_no_text_of_a_kept_pair_is_anywhere_else(positive, negative, count, blank):
    """Copies are no evidence, whoever shares them, and whatever blanks end them."""
    pairs = [(f"good {a}", f"good {b}" if a != b else "bad") for a in positive for b in negative]
    pairs = samples_of(pairs[:count] + [(f"{a} ", b) for a, b in pairs[: count * blank]])
    trained, kept = keep_back(pairs)
    if not kept:
        assert trained == pairs
        return
    assert 5 <= len(kept) <= max(5, len(pairs) // 3) and len(trained) >= len(kept)
    texts = [{one.positive_str.strip(), one.negative_str.strip()} for one in (*kept, *trained)]
    for number, mine in enumerate(texts[: len(kept)]):
        others = texts[:number] + texts[number + 1 :]
        assert not any(mine & other for other in others)


def test_another_seed_splits_otherwise(tokenizer):
    given = (tokenizer, pairs_of("good", 0), PROMPTS, 8)
    one, again, other = (split_at_random(*given, seed) for seed in (0, 0, 1))
    assert one == again
    assert one.judging != other.judging and one.kept != other.kept


def test_all_directions_have_the_same_settings_at_the_same_divergence(model, tokenizer, praise):
    subject = Subject(model, tokenizer, praise, True, SMALL, 0, None)
    vector = train_steering_vector(model, tokenizer, pairs_of("good", 0), [1, 4])
    directions = with_controls(subject, vector, PROMPTS[:8])
    tried = try_strength(subject, directions, PROMPTS[:8], 0.5)
    settings_ = tried.groupby("steering")[["layer", "target_kl"]].apply(lambda one: one.to_numpy())
    assert len(settings_) == 39 and all((one == settings_.iloc[0]).all() for one in settings_)
    assert (tried["kl"] - 0.5).abs().max() <= 0.06
    assert tried["kind"].value_counts().to_dict() == {"random": 38, "unrelated": 38, "vector": 2}
    first = tried.iloc[0]  # measured on as many prompts as the budget says: one
    of_it = directions.vectors[first["steering"]].select([first["layer"]])
    way = partial(of_it.apply, model, multiplier=first["multiplier"])
    kl = steering_kl(model, tokenizer, way, PROMPTS[:1], new_tokens=4)
    assert first["kl"] == pytest.approx(kl, rel=1e-4)

    chosen = gentlest_of_the_best(tried)
    split = Split([], [], PROMPTS[:8], PROMPTS[8:12])
    rows = Evidence.gather(subject, split, directions, chosen).rows
    assert set(rows["prompt"]) == set(split.judging)
    steered = rows[rows["kind"] != "unsteered"].drop_duplicates("steering")
    where = dict(zip(steered["steering"], steered["layer"]))
    assert where == dict(zip(chosen["steering"], chosen["layer"]))  # each where it chose itself
    assert set(where.values()) == {1, 4} and len(where) == 39


def test_completions_are_drawn_by_the_seed(model, tokenizer):
    """And more of them where it is judged, unless they are greedy."""
    grid = Grid({"v": a_vector(model.config.hidden_size, [1])})

    def written(seed: int, **changes) -> list[str]:
        budget = replace(SMALL, sampling=replace(SHORT, **changes))
        subject = Subject(model, tokenizer, vowels, False, budget, seed, None)
        return subject.rows(grid, PROMPTS[:2], judging=True)["completion"].tolist()

    drawn, again, other = (written(seed, temperature=1.0) for seed in (1, 1, 2))
    assert drawn == again != other and len(drawn) == 8
    assert written(1) == written(2) and len(written(1)) == 4


def test_controls_have_nothing_to_do_with_the_pairs(model, tokenizer, praise):
    """They are the same for other pairs, other ones for another seed, and all different."""

    def controls(seed: int, kind: str) -> torch.Tensor:
        subject = Subject(model, tokenizer, praise, True, SMALL, seed, None)
        vector = train_steering_vector(model, tokenizer, pairs_of(kind, 1), [2])
        found = with_controls(subject, vector, PROMPTS[:12]).vectors
        rows = [one.unit().layer_activations[2] for name, one in found.items() if name != "vector"]
        return torch.stack(rows)

    one, same, other = controls(0, "good"), controls(0, "unrelated"), controls(1, "good")
    assert torch.equal(one, same)
    alike = one @ torch.cat([one, other]).T - torch.eye(38, 76)
    assert alike.abs().max() < 0.999
    assert alike[:19, 38:57].abs().max() < 0.4  # random directions of 256 numbers


@pytest.mark.parametrize("blocks", [1, 2, 6, 12, 48])
def test_layers_are_spread_over_the_model(blocks):
    layers = layers_to_try(blocks, 4, None)
    assert len(set(layers)) == len(layers) == min(4, blocks)
    assert layers[0] >= 0 and layers[-1] < blocks
    assert len({b - a for a, b in pairwise(layers)}) <= 2


def test_layers_are_counted_from_either_end():
    assert layers_to_try(6, 4, [-1, 2]) == [5, 2]
    for wrong in ([-7], [6], []):
        with pytest.raises(ValueError, match="expected layers from 0 to 5"):
            layers_to_try(6, 4, wrong)


# --- files and pages ---


def test_the_card_is_in_the_file(choice, tmp_path):
    files = choice.save(tmp_path / "praise.safetensors")
    assert sorted(files) == sorted(tmp_path.iterdir())
    loaded = SteeringVector.load(files[0])
    assert VectorCard.of(loaded) == choice.card
    assert list(loaded.layer_activations) == [choice.layer]
    text = (tmp_path / "praise.md").read_text(encoding="utf-8")
    for name in re.findall(r"\((praise-\w+\.png)\)", text):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert choice.card.verdict in text and text.count("png") == 2
    loaded.save_folder(tmp_path / "folder")
    said = (tmp_path / "folder" / "README.md").read_text(encoding="utf-8")
    assert f"multiplier={choice.multiplier:.4g}):" in said and choice.card.name not in said


def test_what_is_there_stays(choice, tmp_path):
    (tmp_path / "praise.md").write_text("mine")
    with pytest.raises(FileExistsError, match="praise.md"):
        choice.save(tmp_path / "praise.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["praise.md"]
    assert (tmp_path / "praise.md").read_text() == "mine"
    choice.save(tmp_path / "praise.safetensors", overwrite=True)
    assert (tmp_path / "praise.md").read_text() != "mine"


def test_a_folder_is_not_overwritten(choice, tmp_path):
    (tmp_path / "praise.md").mkdir()
    (tmp_path / "praise.html").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"praise\.md' is a folder"):
            choice.save(tmp_path / "praise.safetensors", overwrite)
    assert {file.name for file in tmp_path.iterdir()} == {"praise.md", "praise.html"}
    assert (tmp_path / "praise.html").read_text() == "mine"


def test_pictures_are_found_whatever_the_vector_is_called(choice, tmp_path):
    """A link has no blanks or brackets, and no sign that an address would read."""
    name = "my 50% (très <b>) #2"
    choice.save(tmp_path / f"{name}.safetensors")
    links = re.findall(r"^!\[.*\]\((.*)\)$", (tmp_path / f"{name}.md").read_text("utf-8"), re.M)
    assert len(links) == 2 and all(re.fullmatch(r"[\w.%-]+", link) for link in links)
    assert all((tmp_path / unquote(link)).is_file() for link in links)


def test_a_picture_that_fails_does_not_lose_the_vector(choice, tmp_path, monkeypatch):
    def failing(card):
        raise OSError("no fonts")

    monkeypatch.setattr(VectorCard, "pictures", failing)
    with pytest.raises(OSError, match="no fonts"):
        choice.save(tmp_path / "praise.safetensors")
    assert VectorCard.of(SteeringVector.load(tmp_path / "praise.safetensors")) == choice.card


class Tags(HTMLParser):
    """Collects the tags of a page, and refuses what is closed in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_takes_texts_as_texts(choice):
    content = json.loads(choice.card.to_json())
    content.pop("format")
    wild = "<b>$\\foo$ | `y`</b>\n| z"
    content["data"]["metric"] = wild
    content |= {"name": wild, "examples": [dict.fromkeys(("prompt", "unsteered", "steered"), wild)]}
    card = VectorCard(**content)
    page = Tags()
    page.feed(card.html())
    assert not page.open and "b" not in dict(page.seen)
    sources = [attrs["src"] for tag, attrs in page.seen if tag == "img"]
    assert len(sources) == 2 and all(one.startswith("data:image/png;base64,") for one in sources)
    heading, _, below = card.markdown().splitlines()[:3]
    assert heading == f"# {' '.join(wild.split())}" and below == f"**{card.verdict}**"
    assert "![" not in card.markdown()  # there are no files
    for table in re.findall(r"(?:^\|.*\n)+", card.markdown(), flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_the_page_says_who_does_what_and_no_chance_is_nothing(choice):
    card = replace(choice.card, judged=[{**one, "p": 0.5**13} for one in choice.card.judged])
    texts = " ".join(table.text for table in card.tables())
    assert f"Steering makes {card.cost['what']} ({card.cost['texts']} texts)" in texts
    rise = f"{card.shares['slope']:.2f}"  # not the effect: that is of one direction
    assert f"at half and full strength in both directions, rises by {rise}" in texts
    chances = {row[2] for table in card.tables() if "p" in table.columns for row in table.rows}
    assert chances == {"< 0.001"}


def test_a_vector_has_an_ending_of_its_own(choice, tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        choice.save(tmp_path / "praise.md")


def test_a_vector_without_a_card_says_so(choice):
    vector = choice.vector
    for other in (-vector, 2 * vector, vector / 2, vector + vector, vector.unit()):
        assert other.metadata == {k: v for k, v in vector.metadata.items() if k != "card"}
    assert VectorCard.of(vector.to("cpu")) == choice.card
    with pytest.raises(ValueError, match="the card is of another vector"):
        VectorCard.of(replace(vector, layer_activations=(-vector).layer_activations))
    with pytest.raises(ValueError, match="no card"):
        VectorCard.of(SteeringVector({0: torch.ones(4)}))
    later = json.dumps(json.loads(choice.card.to_json()) | {"format": "2"})
    with pytest.raises(ValueError, match="format '2'"):
        VectorCard.of(SteeringVector({0: torch.ones(4)}, metadata={"card": later}))


@pytest.mark.parametrize(
    "more, says",
    [
        ((0.5, 0.2, 0.8), "It does more than prompting, by 0.50 (0.20 to 0.80)."),
        ((-0.5, -0.8, -0.2), "Prompting does more, by 0.50 (0.20 to 0.80)."),
        ((0.5, -0.1, 1.1), "It cannot be told from prompting: steering minus prompting is 0.50"),
        ((0.5, None, None), "Whether prompting does more is not known"),
        (None, "No prompt was tried beside it."),
    ],
)
def test_the_card_says_whether_a_prompt_does_more(choice, more, says):
    rival = None if more is None else dict(zip(("more", "more low", "more high"), more))
    if rival is not None:
        rival = {"instruction": "Be kind.", "mean": 1.0, "low": 0.5, "high": 1.5, **rival}
    card = replace(choice.card, rival=rival)
    assert card.beside_prompting.startswith(says)
    assert says in card.markdown() and says in card.html()


def test_a_vector_that_lowers_the_metric_less_than_prompting_is_not_praised(choice):
    rival = {"instruction": "Hm.", "mean": -2.0, "low": -3.0, "high": -1.0}
    rival |= {"more": 1.5, "more low": 1.0, "more high": 2.0}
    card = replace(choice.card, rival=rival, effect={**choice.card.effect, "mean": -0.5})
    assert card.beside_prompting.startswith("Prompting lowers the metric, and further than")


# --- other models, texts, few pairs, other settings ---


def vowels(texts: list[str]) -> list[int]:
    return [sum(text.count(one) for one in "aeiou") for text in texts]


@pytest.mark.parametrize("name", ["Llama", "OPT", "BART decoder", "RecurrentGemma"])
def test_any_model_gets_a_card_and_stays_as_it_was(tokenizer, name, capsys, monkeypatch):
    """With a metric that nothing trained for: the card does not believe in it."""
    for module in (progress, choosing):
        monkeypatch.setattr(module, "DELAY", 60.0)
    tiny = tiny_model(name, len(tokenizer))
    before = snapshot(tiny)
    given = (pairs_of("good", 0)[:10], PROMPTS[:8], vowels, replace(SMALL, instructions=1))
    bos = True if name == "OPT" else None
    others = {"aggregator": pca_aggregator()} if name == "Llama" else {}
    choice = choose(tiny, tokenizer, *given, prepend_bos=bos, **others)
    assert_pristine(tiny, before)
    assert "Choosing" not in capsys.readouterr().err  # no bar within the delay
    prompts = list(choice.card.slopes)
    found = {}
    for multiplier in (0.0, choice.multiplier):
        with choice.vector.apply(tiny, multiplier=multiplier):
            rows = complete(tiny, tokenizer, prompts, sampling=SHORT, seed=0, prepend_bos=bos)
            texts = rows["completions"].tolist()
        found[multiplier] = np.mean(vowels(texts))
    effect = found[choice.multiplier] - found[0.0]
    assert choice.card.effect["mean"] == pytest.approx(effect)
    assert choice.card.judged[0]["passed"] == (choice.card.effect["low"] > 0)
    assert choice.card.place["layer"] == 2 and not choice.card.better


def test_metrics_of_texts_and_few_pairs(model, tokenizer):
    """Few pairs: their labels cannot be checked, and the card says so."""
    budget = Budget(
        layers=1, strengths=(1.0,), prompts=4, calibrating=2, instructions=1, sampling=SHORT
    )
    given = (pairs_of("good", 0)[:6], PROMPTS[:9], tone_sign, budget)
    options = {"layers": [-2], "instructions": ["I love it."], "seed": 3}
    card = choose(model, tokenizer, *given, **options).card
    assert list(card.slopes) == split_at_random(tokenizer, *given[:2], 4, seed=3).judging
    assert card.data["pairs kept back"] == 0 and "too few pairs" in card.markdown()
    assert not card.better and "Better than random" not in card.verdict
    passed = [one | {"passed": True} if one["p"] is not None else one for one in card.judged]
    passed[0] |= {"passed": True}
    unasked = replace(card, judged=passed)
    assert unasked.verdict.startswith("Not shown to be better than random: ")
    assert card.place["layer"] == 4 and card.rival["instruction"] == "I love it."
    assert len(card.examples) == 4 and card.data["metric"] == "tone_sign"
    assert card.cost["texts"] >= 5 and card.cost["what"] == "what the unsteered model writes"


def test_messages_are_prompts_too(model, tokenizer, praise, monkeypatch):
    monkeypatch.setattr(
        tokenizer, "chat_template", "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    )
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:8]]
    given = (pairs_of("good", 0), prompts, praise, SMALL)
    card = choose(model, tokenizer, *given).card
    assert card.rival is None and card.effect["mean"] > 0 and card.effect["prompts"] == 4
    assert all(text.rstrip() in PROMPTS[:8] for text in card.slopes)  # as the template shows them
    given = {"instruction": "Be kind.", "prompt": prompts[0]}
    assert asked(**given) == [{"role": "user", "content": f"Be kind.\n\n{PROMPTS[0]}"}]


# --- refused ---


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"budget": "days"}, "expected a Budget, or one of minutes, hours, got 'days'"),
        ({"pairs": [("a", "b")] * 3}, "expected 2 different pairs or more, got 1"),
        ({"pairs": ["ab", "cd"]}, r"pair 0: expected \(positive_str, negative_str\), got 'ab'"),
        ({"prompts": PROMPTS[:7]}, "expected 8 prompts or more, got 7"),
        ({"prompts": [*PROMPTS[:8], PROMPTS[0]]}, "expected different prompts, got .* twice"),
        ({"prompts": "I think"}, "expected a list of prompts"),
        ({"seed": -1}, "expected an integer of 0 or more as seed"),
        ({"layers": [99]}, r"expected layers from 0 to 5, got \[99\]"),
        ({"layers": [1, -5]}, "layer 1 is given twice"),
        ({"layer_config": {}}, "expected of training .* got 'layer_config'"),
        ({"seed": 10**10}, "expected a seed of 1,000,000,000 at most"),
        ({"instructions": ["Be kind.", 2]}, "expected a list of texts as instructions"),
        ({"instructions": ["kind " * 300]}, "positions of the model"),
        ({"other_texts": ["kind " * 300]}, "positions of the model"),
        ({"prompts": [*PROMPTS[:8], "kind " * 300]}, "positions of the model"),
        ({"metric": "tone"}, "expected a function as metric, got 'tone'"),
        ({"instructions": "Be kind."}, "expected a list of texts as instructions"),
        ({"other_texts": "one text"}, "expected a list of prompts, got 'one text'"),
        ({"prompts": [{"role": "user", "content": "Hi"}]}, "the messages of one"),
    ],
)
def test_what_means_nothing_is_refused(model, tokenizer, praise, changes, message):
    given = {"pairs": pairs_of("good", 0), "prompts": PROMPTS, "metric": praise, "budget": SMALL}
    with pytest.raises(ValueError, match=message):
        choose(model, tokenizer, **(given | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"controls": 18}, "controls"),
        ({"prompts": 3}, "prompts"),
        ({"strengths": ()}, "strengths"),
        ({"strengths": (0.3, 0.3)}, "strengths"),
        ({"strengths": (0.0,)}, "strengths"),
        ({"strengths": 0.5}, "expected a list of strengths"),
        ({"sampling": None}, "expected a Sampling"),
        ({"sampling": SHORT, "per_prompt": 2}, "need a temperature above 0"),
    ],
)
def test_a_budget_that_can_prove_nothing_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Budget(**changes)


def test_prompts_without_a_value_count_nowhere(model, tokenizer):
    """The metric without and with steering is that of the prompts that the effect is of."""

    def metric(steered: torch.Tensor, plain: torch.Tensor) -> list[float]:
        found = plain.log_softmax(-1).max(-1).values
        moved = (steered - plain).abs().amax(-1) > 0
        return [NAN if one > -1.5 and hit else float(one) for one, hit in zip(found, moved)]

    given = (pairs_of("good", 0), PROMPTS[:16], metric, replace(SMALL, prompts=8))
    card = choose(model, tokenizer, *given).card
    known = [prompt for prompt, slope in card.slopes.items() if slope is not None]
    assert 0 < card.effect["prompts"] == len(known) < 8
    with torch.no_grad():
        logits = [model(**encode(tokenizer, [one], None)).logits[:, -1] for one in known]
    plain = np.mean([float(one.log_softmax(-1).max()) for one in logits])
    assert card.effect["unsteered"] == pytest.approx(plain, abs=1e-4)
    assert card.effect["steered"] == pytest.approx(plain + card.effect["mean"], abs=1e-4)


def test_a_completion_without_a_value_does_not_take_the_others_along(model, tokenizer):
    budget = replace(
        SMALL, per_prompt=2, instructions=2, sampling=Sampling(max_new_tokens=2, temperature=1.0)
    )

    def metric(texts: list[str]) -> list[float]:
        return [NAN if len(text) % 2 else float(len(text)) for text in texts]

    card = choose(model, tokenizer, pairs_of("good", 0), PROMPTS[:8], metric, budget).card
    assert card.rival["mean"] is not None and card.effect["prompts"] >= 3
    card = choose(
        model, tokenizer, pairs_of("good", 0), PROMPTS[:8], vanishing, replace(budget, per_prompt=1)
    ).card
    assert card.rival is None


def vanishing(prompts: list[str], completions: list[str]) -> list[float]:
    """A metric that knows nothing of prompts with something in front."""
    return [float(len(c)) if p in PROMPTS else NAN for p, c in zip(prompts, completions)]


def test_all_instructions_of_the_user_compete_and_of_the_pairs_those_that_fit(tokenizer):
    tiny = tiny_model("GPT-2", len(tokenizer))  # 64 positions
    subject = Subject(tiny, tokenizer, vowels, False, replace(SMALL, instructions=1), 0, None)
    samples = samples_of([("kind " * 70, "a"), ("good", "b"), ("nice", "c")])
    split = Split(samples, [], PROMPTS[:4], PROMPTS[4:8])
    assert competing(subject, split, None) == ["good"]
    assert competing(subject, split, ["x", "y", "x"]) == ["x", "y"]


def test_a_prompt_that_just_fits_gets_a_card(tokenizer):
    """Where there is no room for more in front, nothing is put there."""
    tiny = tiny_model("GPT-2", len(tokenizer))  # 64 positions
    long = [f"{prompt}{' kind' * 70}" for prompt in PROMPTS[:8]]
    ids = [tokenizer(text)["input_ids"][:61] for text in long]
    prompts = tokenizer.batch_decode(ids)
    assert [tokenizer(text)["input_ids"] for text in prompts] == ids
    given = (pairs_of("good", 0)[:10], prompts, vowels, replace(SMALL, instructions=2))
    card = choose(tiny, tokenizer, *given).card
    assert card.rival is None and card.effect["mean"] is not None
    assert card.cost["texts"] < 4 or card.cost["ratio"] is not None


def test_controls_are_never_made_of_rounding(tokenizer):
    tiny = tiny_model("Llama", len(tokenizer))
    prompts = [f"{prompt} is" for prompt in PROMPTS[:8]]
    pairs = [(f"w{number} good", f"w{number} bad") for number in range(10)]
    given = (pairs, prompts, vowels, SMALL)
    with pytest.raises(ValueError, match="activations of all prompts are the same"):
        choose(tiny, tokenizer, *given, layer_type="input_layernorm", layers=[0])


def test_a_metric_of_one_column_is_a_number_and_two_are_refused(model, tokenizer):
    given = (pairs_of("good", 0), iter(PROMPTS[:8]))

    def one(texts: list[str]) -> list[dict]:
        return [{"length": len(text)} for text in texts]

    def two(texts: list[str]) -> list[dict]:
        return [{"label": "long", "score": len(text)} for text in texts]

    card = choose(model, tokenizer, *given, lambda texts: one(texts), SMALL).card
    assert card.data["metric"] == "the metric"
    assert card.effect["unsteered"] > 4 and card.data["of"] == "completions"
    with pytest.raises(ValueError, match="got columns: label, score. Of a pipeline"):
        choose(model, tokenizer, given[0], PROMPTS[:8], two, SMALL)


def test_a_metric_without_values_is_refused(model, tokenizer):
    given = (pairs_of("good", 0), PROMPTS, lambda steered, plain: [NAN] * len(steered), SMALL)
    with pytest.raises(ValueError, match="no value"):
        choose(model, tokenizer, *given)


NAN = float("nan")
