"""The table of the model card: each figure beside what was asked for, what was missed first."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from embedded_model import card

MET, ON_AVERAGE, MISSED = "met", "met on average", "missed"
VISITOR_MOVE = 30  # points by which a pair of a visitor should move the tone


class Asked(NamedTuple):
    """Something measured with several seeds, and the bar for it.

    Attributes:
        values: what each seed gives.
        least: what it should be at least, if that was asked for.
        most: what it should be at most.
        whole: what all seeds together give; by default the mean.
    """

    values: Sequence[float]
    least: float | None = None
    most: float | None = None
    whole: float | None = None

    @property
    def together(self) -> float:
        """What all seeds give together."""
        return statistics.fmean(self.values) if self.whole is None else self.whole

    def shown(self, digits: int = 1) -> str:
        """Return the figure of all seeds with the range of single ones, where there is any."""
        low, high = (f"{end(self.values):.{digits}f}" for end in (min, max))
        spread = "" if low == high else f" ({low} to {high})"
        return f"{self.together:.{digits}f}{spread}"

    def verdict(self) -> str:
        """Say whether the bar is met: by every seed, by all together, or not."""

        def meets(value: float) -> bool:
            low = self.least is None or value >= self.least
            return low and (self.most is None or value <= self.most)

        if not meets(self.together):
            return MISSED
        return MET if all(map(meets, self.values)) else ON_AVERAGE


class Figure(NamedTuple):
    """A row of the table; without a bar there is no verdict."""

    what: str
    bar: str
    measured: str
    verdict: str


def figure(what: str, unit: str, asked: Sequence[Asked], digits: int = 1) -> Figure:
    """Make a row of one figure or several; it is met where all of them are."""
    bars = [
        f"<= {one.most:g}" if one.least is None else f">= {one.least:g}"
        for one in asked
        if (one.least, one.most) != (None, None)
    ]
    verdicts = {one.verdict() for one in asked}
    worst = next(name for name in (MISSED, ON_AVERAGE, MET) if name in verdicts)
    measured = " / ".join(one.shown(digits) for one in asked)
    return Figure(
        what, " / ".join(bars) + unit if bars else "-", measured + unit, worst if bars else ""
    )


def spread_of_moves(moves: Iterable[Sequence[float]], median: float, largest: float) -> list[Asked]:
    """Return median and maximum of the sizes of moves, [direction, seed].

    The move of a direction is its mean over the seeds; a single seed shows its own.
    """
    found = np.array(list(moves))
    sizes = np.abs(found)
    whole = np.abs(found.mean(axis=1))
    return [
        Asked(np.median(sizes, axis=0).tolist(), most=median, whole=float(np.median(whole))),
        Asked(sizes.max(axis=0).tolist(), most=largest, whole=float(whole.max())),
    ]


def figures(result: Mapping[str, Any]) -> list[Figure]:
    """Return the rows of the table."""
    return [
        *tone_figures(result),
        *control_figures(result),
        *greedy_figures(result["greedy"]),
        *text_figures(result),
        *visitor_figures(result["visitors"]),
        *addition_figures(result["additions"]),
        *topic_figures(result["topic"]),
        *corpus_figures(result["corpus"]),
    ]


def tone_figures(result: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield how often the tone is right at +c and -c, on each list of prompts."""
    for part, what, least in (
        ("table", "(a) +c positive / -c negative", (96, 95)),
        ("new", "new sentence forms, known subjects: +c / -c", (93, 93)),
        ("outside", "subjects outside the grammar: +c / -c", (60, 60)),
    ):
        asked = (result[part]["love"]["positive"], result[part]["hate"]["negative"])
        yield figure(what, " %", [Asked(*both) for both in zip(asked, least)])
    plain = result["table"]["unsteered"]
    positive, negative = Asked(plain["positive"]), Asked(plain["negative"])
    between = [abs(a - b) for a, b in zip(plain["positive"], plain["negative"])]
    apart = Asked(between, most=15, whole=abs(positive.together - negative.together))
    yield Figure(
        "(a) unsteered, positive / negative",
        "within 15 points",
        f"{positive.shown()} / {negative.shown()} %",
        apart.verdict(),
    )
    words = {
        name: {what: sum(counts) for what, counts in found.items()}
        for name, found in result["held_out_words"].items()
    }
    love, hate = words["love"], words["hate"]
    good = (
        love["positive"] >= 10 * max(1, love["negative"]),
        hate["negative"] >= 10 * max(1, hate["positive"]),
    )
    yield Figure(
        "(a) words never seen with love or hate, positive : negative, at +c and -c, all seeds",
        ">= 10 : 1, <= 1 : 10",
        f"{love['positive']} : {love['negative']} and {hate['positive']} : {hate['negative']}",
        MET if all(good) else MISSED,
    )


def control_figures(result: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield how far other directions move the share of positive texts."""
    for what, moves, bars in (
        ("random directions", result["random_moves"], (5, 12)),
        ("unrelated word pairs", result["pair_moves"].values(), (5, 15)),
    ):
        name = f"control: {len(moves)} {what}, move of the positive share, median / max"
        yield figure(name, " points", spread_of_moves(moves, *bars))


def greedy_figures(found: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield how many greedy texts have the right tone, and how many have none."""
    count = found["prompts"]
    for tokens in ("20", "40"):
        both = [Asked([found[tokens][name]], least=26) for name in ("love", "hate")]
        name = f"greedy, {tokens} tokens: right tone at +c / -c"
        yield figure(name, f" of {count}", both, digits=0)
    neutral = [Asked([found["40"][f"{name}_neutral"]]) for name in ("unsteered", "random")]
    name = "greedy, 40 tokens: neutral unsteered / with a random direction"
    yield figure(name, f" of {count}", neutral, digits=0)


def text_figures(result: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield what the texts look like, and what steering costs."""
    asked = zip(("unsteered", "love", "hate"), (0.5, 2, 3))
    breaks = [Asked(result["breaks"][name], most=most) for name, most in asked]
    yield figure("visible breaks, unsteered / +c / -c", " % of the texts", breaks)
    cousin = [Asked(result["cousin"]["unsteered"], least=100)]
    name = '"Let me tell you about my cousin.", unsteered: the next sentence is about her'
    yield figure(name, " %", cousin, digits=0)
    price = result["perplexity"]
    ratios = [Asked(price[name], most=1.05) for name in ("love", "hate")]
    name = f"perplexity on {price['documents']} held-out documents, steered / unsteered, +c / -c"
    row = figure(name, "", ratios, digits=3)
    plain = statistics.fmean(price["unsteered"])
    yield row._replace(measured=f"{row.measured} (unsteered {plain:.2f})")


def visitor_figures(visitors: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield how many of a visitor's own pairs move the tone."""
    for kind, pairs in visitors.items():
        moved = sum(statistics.fmean(moves) >= VISITOR_MOVE for moves in pairs.values())
        seeds = [
            sum(move >= VISITOR_MOVE for move in moves)
            for moves in zip(*pairs.values(), strict=True)
        ]
        name = f"a visitor's pairs, {kind}: they move the tone by {VISITOR_MOVE} points"
        asked = [Asked(seeds, least=10, whole=moved)]
        yield figure(name, f" of {len(pairs)}", asked, digits=0)


def addition_figures(additions: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield what the activation additions do, each from what the unsteered model does."""
    for letter, name, what, least, most in (
        ("b", "love", "loving", 95, 10),
        ("c", "weddings", "weddings", 95, 30),
        ("d", "rome", "Rome or Italy", 95, None),
        ("e", "praise", "loving", 95, None),
    ):
        found = additions[name]
        row = figure(
            f'({letter}) "{found["prompt"]}": {what}, from unsteered',
            " %",
            [Asked(found[what]["steering"], least), Asked(found[what]["unsteered"], most=most)],
            digits=0,
        )
        steered, plain = row.measured.removesuffix(" %").split(" / ")
        bar = f">= {least} %" + (f", from <= {most} %" if most else "")
        yield row._replace(bar=bar, measured=f"{steered} % from {plain} %")
    rome = additions["rome"]
    france = [Asked(rome["Paris or France"]["steering"], most=5)]
    yield figure("(d) Paris or France", " %", france, digits=0)
    distinct = [Asked(rome["distinct"]["steering"], least=40)]
    count = rome["completions"]
    yield figure("(d) different texts", f" of {count}", distinct, digits=0)


def topic_figures(topic: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    """Yield part (f), which is read and not sampled: it has no seeds."""
    ratios = {(row["condition"], row["text"]): row["ratio"] for row in topic}
    on, off = (ratios["steering", text] for text in ("on topic", "off topic"))
    yield Figure(
        "(f) perplexity ratio under steering, on the topic / off it",
        "< 0.9 / 0.97 to 1.03",
        f"{on:.3f} / {off:.3f}",
        MET if on < 0.9 and 0.97 <= off <= 1.03 else MISSED,
    )
    on, off = (ratios["prompting", text] for text in ("on topic", "off topic"))
    yield Figure("(f) the same by prompting", "-", f"{on:.3f} / {off:.3f}", "")


def corpus_figures(corpus: Mapping[str, int]) -> Iterator[Figure]:
    """Yield what must not be in the corpus."""
    for name, what in (("prompts", "held-out prompts"), ("outside", "nouns outside the grammar")):
        yield Figure(
            f"training documents with {what}",
            "0",
            f"{corpus[name]} of {corpus['documents']}",
            MISSED if corpus[name] else MET,
        )


def every_seed_figures(result: Mapping[str, Any]) -> list[Figure]:
    """Return what was asked of every training seed, which is less."""
    table, additions = result["table"], result["additions"]
    both = [Asked(table["love"]["positive"], 90), Asked(table["hate"]["negative"], 88)]
    shares = [
        Asked(additions[name][what]["steering"], 95)
        for name, what in (
            ("love", "loving"),
            ("weddings", "weddings"),
            ("rome", "Rome or Italy"),
            ("praise", "loving"),
        )
    ]
    least = min(shares, key=lambda one: one.together)
    return [
        figure("every training seed: (a) +c positive / -c negative", " %", both),
        figure(
            "every training seed: random directions, max",
            " points",
            spread_of_moves(result["random_moves"], 15, 15)[1:],
        ),
        figure("every training seed: the weakest of (b) to (e)", " %", [least], digits=0),
    ]


def verdict(rows: Sequence[Figure]) -> str:
    """List what was missed, and what a single sampling seed may miss."""
    asked = [row for row in rows if row.verdict]
    found = {name: [row for row in asked if row.verdict == name] for name in (MISSED, ON_AVERAGE)}
    if not found[MISSED]:
        said = f"**Nothing is missed:** all {len(asked)} bars are met."
    else:
        listed = "".join(
            f"\n- {row.what}: {row.measured}, asked {row.bar}" for row in found[MISSED]
        )
        said = f"**Missed, {len(found[MISSED])} of {len(asked)}:**\n{listed}"
    if found[ON_AVERAGE]:
        listed = "".join(f"\n- {row.what}: {row.measured}" for row in found[ON_AVERAGE])
        said += f"\n\n**Met on average, not with every sampling seed:**\n{listed}"
    return said


def markdown(result: Mapping[str, Any]) -> str:
    """Return what stands in the card: what was missed, the table, and greedy texts."""
    preset, rows = result["preset"], figures(result)
    places = ", ".join(
        f"({letter}) layer {place['layer']} times {place['coeff']:g}"
        for letter, place in zip("bcde", preset["activation_additions"].values(), strict=True)
    )
    count, how = result["completions"], result["sampling"]
    texts = [
        [f"`{text}`" for text in (prompt, found["unsteered"], found["love"], found["hate"])]
        for prompt, found in [*result["greedy"]["texts"].items()][:8]
    ]
    return (
        f"{verdict(rows)}\n\n"
        f"Each figure is a mean over {result['seeds']} sampling seeds, with the lowest and the"
        " highest of them in brackets; it is met where every seed meets it. Preset: resid_post of"
        f" layer {preset['layer']}, c = {preset['coeff']}; additions at resid_pre, {places}. Tone:"
        f" {count['table']} completions (new forms {count['new']}, outside {count['outside']}) of"
        f" {how['tokens']} tokens per seed and condition, {result['control_completions']} for each"
        f" control and {result['visitor_completions']} for each sign of a visitor's pair;"
        f" temperature 1, top_p {how['top_p']:g}, no BOS. (b) to (e):"
        f" {result['additions']['love']['completions']} completions per seed, temperature 1, top_p"
        f" {how['published_top_p']:g}, frequency penalty {how['freq_penalty']:g}, with BOS. (f):"
        f' " weddings" - "" at layer {preset["topic"]["layer"]} times'
        f" {preset['topic']['coeff']:g}, by sentences. Perplexity has five parts of the documents"
        " instead of seeds.\n\n"
        f"{card.markdown_table(('what', 'asked for', 'measured', 'verdict'), rows)}\n"
        "Greedy, 40 tokens:\n\n"
        f"{card.markdown_table(('prompt', 'unsteered', '+c', '-c'), texts)}"
    )


def comparison(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables of several models side by side, what is missed marked.

    Raises:
        ValueError: the rows of one are not those of the first.
    """
    columns = [[*every_seed_figures(result), *figures(result)] for result in results]
    header = ("what", "asked for", *(f"seed {result['training_seed']}" for result in results))
    rows = []
    for same in zip(*columns, strict=True):
        names = {row[:2] for row in same}
        if len(names) > 1:
            listed = ", ".join(f'"{what}" ({bar})' for what, bar in sorted(names))
            raise ValueError(f"expected the same rows in each table, got {listed}")
        cells = (
            f"{row.measured}, **{row.verdict}**" if row.verdict == MISSED else row.measured
            for row in same
        )
        rows.append((same[0].what, same[0].bar, *cells))
    return card.markdown_table(header, rows)
