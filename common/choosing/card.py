"""The vector card: what was chosen, how well it works, for whom it fails, and what was tried.

A card is kept in the file of its vector, as JSON, and shown as a page: Markdown, or HTML with its
pictures inside.
"""

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple
from urllib.parse import quote

import matplotlib.pyplot as plt
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from common.choosing.judging import shown
from common.identity import hash_of_tensors
from common.plots import plot_beside_controls, plot_steerability
from common.vectors.layer_vectors import CARD
from common.vectors.steering_vector import SteeringVector

FORMAT = "1"
HASH = "vector, SHA-256"  # of the data
Number = float | None  # None where there is none: JSON has no NaN


class Table(NamedTuple):
    """A part of a page: a heading, sentences, and a table below them."""

    heading: str
    text: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    picture: str | None = None


@dataclass(frozen=True)
class VectorCard:
    """What is known of a steering vector.

    Effects are moves of the metric from unsteered, means over the prompts that nothing was chosen
    on, with their 95 % intervals.

    Attributes:
        name: of the vector.
        better: whether it is better than random: all tests were asked, and say so.
        judged: the tests: `question`, `found`, `p`, `passed`.
        place: `layer`, `layer_type`, `multiplier`, `kl` (on the prompts of the judgement, in nats),
            `target_kl`.
        effect: `mean`, `low`, `high`, `unsteered`, `steered`, `prompts`.
        controls: the effects of the controls by kind, each at the setting that it chose itself.
        cost: perplexity of other text, steered by unsteered: `ratio`, `random` (the median of the
            random directions), `texts` (how many), `what` they are.
        slopes: of each prompt, over the multiplier in units of the chosen one.
        shares: `slope`, `low`, `high`, `anti` (the share of prompts with a negative slope),
            `anti low`, `anti high`, `prompts`.
        rival: prompting: `instruction`, `mean`, `low`, `high`, and how much more steering does:
            `more`, `more low`, `more high`; None where there was none.
        examples: `prompt`, `unsteered`, `steered`; of completions.
        tried: every setting of the vector: `layer`, `target_kl`, `multiplier`, `kl`, `effect`,
            `error`, on the prompts that the choice was made on.
        data: the model, how many pairs and prompts there were and for what, the budget, the
            metric; hashes (SHA-256) of model, pairs, prompts and vector.
        versions: of the packages.
    """

    name: str
    better: bool
    judged: list[dict[str, Any]]
    place: dict[str, Any]
    effect: Mapping[str, Number]
    controls: Mapping[str, Sequence[Number]]
    cost: dict[str, Any]
    slopes: Mapping[str, Number]
    shares: Mapping[str, Number]
    rival: dict[str, Any] | None
    examples: list[dict[str, str]]
    tried: Sequence[Mapping[str, Number]]
    data: dict[str, Any]
    versions: dict[str, str]

    # --- kept with the vector ---

    def to_json(self) -> str:
        """Return all of it as JSON, for the metadata of a file."""
        return json.dumps({"format": FORMAT, **_plain(asdict(self))}, allow_nan=False)

    @classmethod
    def of(cls, vector: SteeringVector) -> "VectorCard":
        """Return the card that a vector carries.

        Raises:
            ValueError: it has none, as `-vector` and `2 * vector` have none, one of a later format,
                or that of other numbers.
        """
        if CARD not in vector.metadata:
            raise ValueError("this vector has no card: expected one that `choose` returned")
        content = json.loads(vector.metadata[CARD])
        if (version := content.pop("format", None)) != FORMAT:
            raise ValueError(f"the card has format {version!r}; this version reads {FORMAT!r}")
        card = cls(**content)
        if card.data[HASH] != hash_of_tensors(vector.layer_activations.values()):
            raise ValueError(
                "the card is of another vector: this one has other numbers, and nobody judged it"
            )
        return card

    # --- the page ---

    @property
    def verdict(self) -> str:
        """Say in a sentence whether the vector is better than random, and why not."""
        unasked = [one["found"] for one in self.judged if one["passed"] is None]
        failed = [one["found"] for one in self.judged if one["passed"] is False]
        if self.better:
            return f"Better than random: {_signed(self.effect)}."
        if failed:
            return f"No better than random: {'; '.join(failed)}."
        return f"Not shown to be better than random: {'; '.join(unasked)}; {_signed(self.effect)}."

    @property
    def beside_prompting(self) -> str:
        """Say in a sentence whether steering does more than prompting, each as strong as it is."""
        if self.rival is None:
            return "No prompt was tried beside it."
        more, low, high = (self.rival[name] for name in ("more", "more low", "more high"))
        if more is None or low is None or high is None:
            return "Whether prompting does more is not known: the metric has too few values."
        if low <= 0 <= high:
            by = f"{_value(more)} ({_value(low)} to {_value(high)})"
            return f"It cannot be told from prompting: steering minus prompting is {by}."
        what = "It does more than prompting" if low > 0 else "Prompting does more"
        if low > 0 and not (self.effect["mean"] or 0) > 0:
            what = "Prompting lowers the metric, and further than steering does"
        ends = sorted((abs(low), abs(high)))
        return f"{what}, by {_value(abs(more))} ({_value(ends[0])} to {_value(ends[1])})."

    def markdown(self, pictures: str = "") -> str:
        """Return the page in Markdown.

        Args:
            pictures: what the names of the pictures begin with ("love-": love-controls.png, …);
                without it there are none.
        """
        links = {name: quote(f"{pictures}{name}.png") for name in PICTURES if pictures}
        return _render("card.md.j2", self, links)

    def html(self) -> str:
        """Return the page in HTML, in one piece."""
        sources = {
            name: f"data:image/png;base64,{base64.b64encode(picture).decode()}"
            for name, picture in self.pictures().items()
        }
        return _render("card.html.j2", self, sources)

    def pictures(self) -> dict[str, bytes]:
        """Return the pictures by name, as PNG."""
        drawn = {"controls": self.plot(), "slopes": self.plot_slopes()}
        return {name: _png(figure) for name, figure in drawn.items()}

    def plot(self) -> Figure:
        """Draw the effect beside those of the controls and of prompting."""
        rows: list[dict[str, Any]] = [{"kind": "vector", "name": self.name, **self.effect}]
        if self.rival is not None:
            rows.append({"kind": "prompting", "name": "prompting", **self.rival})
        for kind, effects in self.controls.items():
            rows += [{"kind": kind, "name": CONTROLS[kind], "mean": effect} for effect in effects]
        frame = pd.DataFrame(rows)
        label = (
            f"{self.data['metric']}: move from unsteered, mean of {self.effect['prompts']} prompts"
        )
        title = f"{self.name}: {self.data['model']}, layer {self.place['layer']}"
        return plot_beside_controls(frame, label, title)

    def plot_slopes(self) -> Figure:
        """Draw the slope of every prompt."""
        frame = pd.DataFrame({"slope": list(self.slopes.values())})
        frame = frame.assign(steering=self.name, kind="steering", layer=self.place["layer"])
        title = f"{self.data['metric']}: rise of each prompt up to the chosen multiplier"
        return plot_steerability(frame, self.place["layer"], title)

    def tables(self) -> Iterator[Table]:
        """Return the parts of the page."""
        yield self._setting()
        yield Table(
            "Is it better than random?",
            "Each control had the same choice of layer and strength as the vector, on the same"
            " prompts; all are judged on prompts that none of them chose on.",
            ("question", "found", "p", "answer"),
            [
                (one["question"], one["found"], _chance(one["p"]), ANSWERS[one["passed"]])
                for one in self.judged
            ],
            "controls",
        )
        yield self._beside()
        yield self._reliability()
        if self.examples:
            rows = [tuple(repr(text) for text in one.values()) for one in self.examples]
            yield Table("What it writes", "", ("prompt", "unsteered", "steered"), rows)
        yield self._tried()
        known = [(name, str(value)) for name, value in (self.data | self.versions).items()]
        yield Table("What it was made of", "", ("", ""), known)

    def _setting(self) -> Table:
        place = self.place
        return Table(
            "The setting",
            "",
            ("layer", "part", "multiplier", "divergence from unsteered", "asked"),
            [
                (
                    str(place["layer"]),
                    place["layer_type"],
                    f"{place['multiplier']:.4g}",
                    f"{_number(place['kl'])} nats",
                    f"{place['target_kl']:g} nats",
                )
            ],
        )

    def _beside(self) -> Table:
        rows: list[tuple[str, ...]] = [("steering", *_with_interval(self.effect))]
        if self.rival is not None:
            rows.append(("prompting", *_with_interval(self.rival)))
            more = {name: self.rival[f"more{name}"] for name in ("", " low", " high")}
            rows.append(("steering minus prompting", *map(_value, more.values())))
        for kind, effects in self.controls.items():
            known = sorted(effect for effect in effects if effect is not None)
            if known:
                ends = known[len(known) // 2], known[0], known[-1]
                title = f"{CONTROLS[kind]}: median, least, most"
                rows.append((title, *map(_value, ends)))
        said = (
            ""
            if self.rival is None
            else f" The best of the prompts was {self.rival['instruction']!r}."
        )
        text = (
            f"The metric is {_value(self.effect['unsteered'])} unsteered and"
            f" {_value(self.effect['steered'])} steered.{self._cost()}{said}"
        )
        return Table("Effect and cost", text, ("", "effect", "low", "high"), rows)

    def _cost(self) -> str:
        cost = self.cost
        if cost["ratio"] is None:
            return ""
        return (
            f" Steering makes {cost['what']} ({cost['texts']} texts) {_number(cost['ratio'])}"
            f" times as perplexing, random directions {_number(cost['random'])} times."
        )

    def _reliability(self) -> Table:
        shares = self.shares
        text = (
            f"In the mean of {_number(shares['prompts'], 0)} prompts a line fitted to the metric,"
            " at half and full strength in both directions, rises by"
            f" {_value(shares['slope'])} ({_value(shares['low'])} to {_value(shares['high'])})"
            " from 0 to the chosen multiplier. Of the prompts"
            f" {_percent(shares['anti'])} go the wrong way ({_percent(shares['anti low'])} to"
            f" {_percent(shares['anti high'])})."
        )
        return Table("For whom it fails", text, picture="slopes")

    def _tried(self) -> Table:
        rows = [
            (
                _number(one["layer"], 0),
                _number(one["target_kl"], 1),
                f"{one['multiplier']:.4g}",
                _value(one["effect"]),
                _value(one["error"]),
                "chosen" if self._is_chosen(one) else "",
            )
            for one in self.tried
        ]
        return Table(
            "What was tried",
            "Chosen was the gentlest strength whose effect is within one standard error of the"
            f" largest, on {self.data['prompts to choose on']} prompts. Each of the"
            f" {sum(map(len, self.controls.values()))} controls had as many settings.",
            ("layer", "nats", "multiplier", "effect", "error", ""),
            rows,
        )

    def _is_chosen(self, one: Mapping[str, Number]) -> bool:
        return all(one[name] == self.place[name] for name in ("layer", "target_kl", "multiplier"))


PICTURES = ("controls", "slopes")
CONTROLS = {"random": "random directions", "unrelated": "unrelated vectors"}
ANSWERS = {True: "yes", False: "no", None: "not asked"}


def _plain(value: Any) -> Any:
    """The same, as JSON can hold it: what is not a finite number is None."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _number(value: Number, decimals: int = 2) -> str:
    return "" if value is None else f"{round(value, decimals) + 0.0:.{decimals}f}"


def _chance(p: Number) -> str:
    return "< 0.001" if p is not None and p < 0.001 else _number(p, 3)


def _value(value: Number) -> str:
    """A number in units of the metric."""
    return "" if value is None else shown(value)


def _percent(value: Number) -> str:
    return "" if value is None else f"{value:.0%}"


def _with_interval(found: Mapping[str, Any]) -> tuple[str, str, str]:
    mean, low, high = (_value(found[name]) for name in ("mean", "low", "high"))
    return mean, low, high


def _signed(effect: Mapping[str, Number]) -> str:
    mean, low, high = _with_interval(effect)
    return f"the effect is {mean} (95 % interval {low} to {high})"


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    plt.close(figure)
    return file.getvalue()


def _render(template: str, card: VectorCard, pictures: dict[str, str]) -> str:
    pages = Environment(
        loader=PackageLoader("common.choosing"),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    pages.filters["cell"] = lambda text: " ".join(text.replace("|", r"\|").split())
    found = pages.get_template(template)
    return found.render(card=card, tables=list(card.tables()), pictures=pictures)
