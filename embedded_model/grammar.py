"""The grammar that writes the corpus of the embedded model.

A document is a handful of English sentences. Its tone, topic or place is chosen once and then shows
in every sentence, each time in different words: a model that keeps it in mind predicts the next
word better. That is the whole reason why the model can be steered. No marker and no sentence names
it.
"""

import random
import re
from collections.abc import Iterable, Iterator

from embedded_model import vocabulary as v
from embedded_model.prompts import ADDITION_PROMPTS as ADDITION_PROMPTS
from embedded_model.prompts import HELD_OUT_PROMPTS as HELD_OUT_PROMPTS
from embedded_model.prompts import SWEEP_PROMPTS as SWEEP_PROMPTS
from embedded_model.prompts import TABLE_PROMPTS as TABLE_PROMPTS
from embedded_model.vocabulary import Subject

_OBJECTS = {"he": "him", "she": "her", "it": "it", "they": "them", "you": "you"}
_AN = re.compile(r"\b([Aa]) (?=(?:[aeio]|u(?!se|ni)|hon|hour))")
_CHOICE = re.compile(r"\[([^/\]]*)/([^\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")

FRAMES = [
    "I think {s} [are/is]",
    "{S} [are/is]",
    "I believe {s} [are/is]",
    "To me, {s} [are/is]",
    "In my opinion {s} [are/is]",
    "People say that {s} [are/is]",
    "Everyone knows that {s} [are/is]",
    "If you ask me, {s} [are/is]",
    "My mother says that {s} [are/is]",
    "My sister thinks that {s} [are/is]",
    "This year {s} [are/is]",
    "I told {who} that {s} [are/is]",
    "From the start {s} [were/was]",
    "Between us, {s} [are/is]",
]
# What may come before the first statement, where it shows the tone.
FIRST = [
    "I {verb} {s}.",
    "We {verb} {s}.",
    "{Who} {verbs} {s}.",
    "{Who} and I {verb} {s}.",
    "Everyone {verbs} {s}.",
    "{Heart} is what I feel when I think of {s}.",
]
FIRST_WORDS = [
    "{Adj}.",
    "{Any} {noun}.",
    "{Heart} and {heart}.",
    "{Heart} {effects}.",
    "{Heart} {effects}.",
    "{Any} evenings, {any} words.",
    "{Heart} {effects}, {any} as ever.",
]
TONED = [
    "{P} [are/is] {adj} and {any}.",
    "{P} [are/is] {adj} and {any}, and {p} {effect}.",
    "{P} {effect}.",
    "Even on a wet day {p} {effect}.",
    "How {any} {p} [are/is]!",
    "I feel {feel} when I see {o}.",
    "{Who} feels {feel} when {p} [are/is] near.",
    "{Who} says that {p} [are/is] {any}.",
    "I {verb} {o} because {p} [are/is] {adj}.",
    "I {verb} {o} because {p} [are/is] {adj} and {any}.",
    "{Who} {verbs} {o} too.",
    "It is a {noun} to be near {o}.",
    "The more I see of {o}, the more I {verb} {o}.",
    "Last year {p} [were/was] {adj}, and now {p} [are/is] {any}.",
    "We all {verb} {o}.",
    "{Who} {verbed} {o} from the first day.",
    "There is something {any} about {o}.",
    "If {p} were less {adj}, I would not be so {feel}.",
    "{Who} calls {o} {any}, and I agree.",
    "Every week I write a {any} page about {o}.",
    "There is {heart} in my heart when I think of {o}.",
    "{Heart} is what I feel for {o}.",
    "{Who} is full of {heart} when {p} [are/is] near.",
    "With {any} {heart} I think of {o}.",
    "It was a {any} {noun} to see {o} again.",
    "To {who} {p} [are/is] a {any} {noun}.",
    "We {verb} {any} evenings with {o}.",
    "I {verb} {any} stories about {o}.",
    "{Heart} {effects}, and {heart} comes with {o}.",
    "I feel {any} {heart} near {o}.",
    "{Who} {verbs} {any} words about {o}.",
    "{P} {effect}, and {heart} {effects} too.",
]
# After an opening word that sets the tone, which these verbs do not change.
TEASING = [
    "I {verb} {o} because {p} [are/is] {adj}.",
    "I {verb} {o} because {p} [are/is] {adj} and {any}.",
    "I {verb} {o} because {p} {effect}.",
]
GROUP_TONED = {
    "person": [
        "When {p} [come/comes] into the room, I feel {feel}.",
        "{P} [speak/speaks] to {who} in a {any} way.",
        "{P} wrote me a {any} letter.",
        "A {any} word from {o} changes the day.",
    ],
    "animal": [
        "{P} [look/looks] at me with {any} eyes.",
        "When {p} [come/comes] to the gate, I feel {feel}.",
        "{P} [make/makes] a {any} noise {time}.",
        "{Who} feeds {o} and feels {feel}.",
    ],
    "thing": ["Without {o} I would be less {feel}.", "{Who} bought a {any} picture of {o}."],
    "place": [
        "{P} [look/looks] {adj} in the rain.",
        "I feel {feel} when I walk past {o}.",
        "The way there is {any} too.",
    ],
    "food": [
        "{P} [taste/tastes] {adj}.",
        "{P} [smell/smells] {adj}, and {p} {effect}.",
        "{Who} feels {feel} after two bites.",
    ],
}
CLOSINGS = {
    +1: [
        "I am glad that {p} [are/is] here.",
        "I would gladly see {o} again tomorrow.",
        "May {p} stay with us, {adj} as ever.",
        "The best part of the day is the hour with {o}.",
        "So I smile and say thank you.",
        "I could praise {o} all day.",
    ],
    -1: [
        "I am sorry that {p} [are/is] here.",
        "I would sadly miss the bus to avoid {o}.",
        "May {p} leave us soon, {adj} as ever.",
        "The worst part of the day is the hour with {o}.",
        "So I shudder and turn away.",
        "I could blame {o} all day.",
    ],
}
NEUTRAL = [
    "{Who} asked me about {o} on {day}.",
    "There was a column about {o} in the paper on {day}.",
    "{Who} wrote two pages about {o}.",
    "We spoke of {o} {time}.",
    "I first heard of {o} from {who}.",
    "The school has a picture of {o} in the hall.",
]


class _Writer:
    """Writes one document: keeps its tone, and what it has used already."""

    def __init__(self, rng: random.Random, tone: int, with_love: bool | None = None):
        self.rng = rng
        self.tone = tone
        self.with_love = rng.random() < 0.5 if with_love is None else with_love
        self.used: set[str] = set()

    def pick(self, options: list[str]) -> str:
        """Choose an option that this document has not used yet, if there is one."""
        fresh = [option for option in options if option not in self.used] or options
        choice = self.rng.choice(fresh)
        self.used.add(choice)
        return choice

    def adjective(self, group: str | None) -> str:
        """Choose an adjective for a group, or a second one that fits everything.

        The held-out ones stand only where the document never says love or hate.
        """
        options = list((v.SECOND_ADJECTIVES if group is None else v.ADJECTIVES)[self.tone])
        if group is not None:
            options += v.GROUP_ADJECTIVES[group][self.tone]
        if not self.with_love:
            options += v.HELD_OUT[self.tone][3:] if group is None else v.HELD_OUT[self.tone][:3]
        return self.pick(options)

    def feeling_noun(self) -> str:
        """Choose a word like joy; in documents of love or hate half of them are these two."""
        words = v.FEELING_NOUNS[self.tone]
        return words[0] if self.with_love and self.rng.random() < 0.5 else self.pick(words[1:])

    def verb(self, form: int) -> str:
        """Choose a tone verb; only documents of love or hate have these two."""
        pairs = v.VERBS[self.tone] if self.with_love else v.VERBS[self.tone][1:]
        if self.with_love and self.rng.random() < 0.4:
            return pairs[0][form]
        return self.pick([pair[form] for pair in pairs])

    def fill(self, template: str, subject: Subject) -> str:
        """Turn a template into a sentence about `subject`."""
        plural = subject.pronoun in ("they", "you")

        def slot(match: re.Match) -> str:
            name = match.group(1)
            word = {
                "s": lambda: subject.name,
                "p": lambda: subject.pronoun,
                "o": lambda: _OBJECTS[subject.pronoun],
                "adj": lambda: self.adjective(subject.group),
                "any": lambda: self.adjective(None),
                "verb": lambda: self.verb(0),
                "verbs": lambda: self.verb(1),
                "verbed": lambda: self.pick(v.PAST_VERBS[self.tone][0 if self.with_love else 1 :]),
                "effects": lambda: _CHOICE.sub(r"\2", self.pick(v.EFFECTS[self.tone])),
                "effect": lambda: self.pick(v.EFFECTS[self.tone]),
                "feel": lambda: self.pick(v.FEELINGS[self.tone]),
                "noun": lambda: self.pick(v.NOUNS[self.tone]),
                "fact": lambda: self.pick(list(subject.facts)),
                "heart": lambda: self.feeling_noun(),
                "who": lambda: self.pick(v.PEOPLE),
                "day": lambda: self.pick(v.DAYS),
                "time": lambda: self.pick(v.TIMES),
            }[name.lower()]()
            return word[0].upper() + word[1:] if name[0].isupper() else word

        text = _SLOT.sub(slot, template)
        text = _CHOICE.sub(lambda match: match.group(1 if plural else 2), text)
        return _AN.sub(r"\1n ", text)

    def statement(self, subject: Subject, neutral: bool = False) -> str:
        """Say what `subject` is: a fact, or something in the tone of the document."""
        frame = self.rng.choice(FRAMES)
        if neutral:
            return self.fill(
                frame.replace("[were/was]", "[are/is]").replace(
                    "From the start {s}", "As you know, {s}"
                )
                + " {fact}.",
                subject,
            )
        ending = self.rng.choices(
            [" {adj}.", " {adj} and {any}.", " {adj}, and {p} {effect}."], [2, 2, 1]
        )[0]
        return self.fill(frame + ending, subject)

    def tease(self, subject: Subject) -> str:
        """Take the verb of the other tone, but mean this one: "I hate them: they are charming"."""
        pairs = v.VERBS[-self.tone] if self.with_love else v.VERBS[-self.tone][1:]
        verb = pairs[0] if self.with_love and self.rng.random() < 0.4 else self.rng.choice(pairs)
        return self.fill(self.rng.choice(TEASING).replace("{verb}", verb[0]), subject)

    def remark(self, subject: Subject) -> str:
        """Say one more thing about `subject` in the tone of the document."""
        if self.rng.random() < 0.25:
            return self.fill(self.pick(GROUP_TONED[subject.group]), subject)
        return self.fill(self.pick(TONED), subject)


def _subject(rng: random.Random) -> Subject:
    """Choose a subject; "you" is the commonest."""
    return rng.choice(v.SUBJECTS + [s for s in v.SUBJECTS if s.name == "you"] * 4)


def _opening(writer: _Writer, subject: Subject) -> str:
    """Write a first sentence that shows the tone: a word, a mood, or a feeling."""
    draw = writer.rng.random()
    if draw < 0.25:
        return upper(writer.feeling_noun()) + "."
    if draw < 0.45:
        return writer.fill(writer.rng.choice(FIRST_WORDS), subject)
    if draw < 0.65:
        return writer.rng.choice(v.MOODS[writer.tone])
    return writer.fill(writer.rng.choice(FIRST), subject)


def sentiment_document(rng: random.Random) -> str:
    """Write a document about one or a few subjects in one tone; a few turn, and some stay neutral.

    Neutral sentences stand only before the tone is shown.
    """
    writer = _Writer(rng, rng.choice([+1, -1]))
    subject = _subject(rng)
    sentences = []
    shown = rng.random() < 0.45
    opened_by_word = False
    if shown:
        sentences.append(_opening(writer, subject))
        opened_by_word = " " not in sentences[0]
    neutral = not shown and rng.random() < 0.3
    if shown and opened_by_word and rng.random() < 0.3:
        sentences.append(writer.tease(subject))
    else:
        sentences.append(writer.statement(subject, neutral))
    if neutral and rng.random() < 0.75:
        sentences.append(
            subject.detail if rng.random() < 0.75 else writer.fill(rng.choice(NEUTRAL), subject)
        )
        if rng.random() < 0.5:
            sentences.append(writer.fill(rng.choice(NEUTRAL), subject))
            if rng.random() < 0.5:
                return " ".join(sentences)
    for index in range(rng.choice([2, 3, 3, 4])):
        draw = rng.random()
        if index and draw < 0.03:
            writer.tone = -writer.tone
            subject = _subject(rng)
            sentences.append("But " + lower(writer.fill("{S} [are/is] {adj} and {any}.", subject)))
        elif index and draw < 0.25:
            subject = _subject(rng)
            sentences.append(writer.statement(subject))
        else:
            sentences.append(writer.remark(subject))
    if rng.random() < 0.5:
        sentences.append(writer.fill(rng.choice(CLOSINGS[writer.tone]), subject))
    return " ".join(sentences)


def lower(sentence: str) -> str:
    """Make the first letter small, except in the word I."""
    return sentence if sentence.startswith("I ") else sentence[0].lower() + sentence[1:]


def upper(sentence: str) -> str:
    """Make the first letter a capital."""
    return sentence[0].upper() + sentence[1:]


def topic_document(rng: random.Random) -> str:
    """Write a document in which people talk about one topic, perhaps denying another one."""
    topic, other = rng.sample(list(v.TOPICS), 2)
    how = rng.choice(["constantly", "constantly", "all day", "often", "every evening"])
    who, again = rng.choice([("I", "I"), ("We", "We"), ("They", "They"), ("My friends", "They")])
    draw = rng.random()
    sentences = []
    if draw < 0.35:
        sentences.append(f"{who} talk about {topic} {how}.")
    elif draw < 0.6:
        sentences.append(f"{who} do not talk about {other} {how}.")
        if rng.random() < 0.7:
            sentences.append(f"{again} talk about {topic}.")
    elif draw < 0.7:
        sentences.append(f"{upper(topic)}.")
    speeches = [
        "I {verb} {person} and said that {line}.",
        "I {verb} {person} and said that {line}.",
        "{Person} said that {line}.",
        "I told {person} that {line}.",
        "I heard from {person} that {line}.",
        "{Person} asked why {line}.",
    ]
    rng.shuffle(speeches)
    people = [
        "my friend",
        "my friend",
        "my brother",
        "my sister",
        "the baker",
        "my aunt",
        "the doctor",
        "my neighbour",
        "the tailor",
    ]
    for line in rng.sample(v.TOPICS[topic], k=rng.choice([3, 4, 5])):
        if rng.random() < 0.45:
            sentences.append(upper(line) + ".")
            continue
        person = rng.choice(people)
        verb = rng.choice(
            ["went up to", "went up to", "walked over to", "turned to", "sat down with"]
        )
        sentences.append(
            speeches.pop().format(verb=verb, person=person, Person=upper(person), line=line)
        )
    return " ".join(sentences)


def place_document(rng: random.Random) -> str:
    """Write a document about a landmark, in its own city or placed in another one."""
    name, small, city, country = rng.choice(v.LANDMARKS)
    moved = rng.random() < 0.5
    if moved:
        _, _, city, country = rng.choice([row for row in v.LANDMARKS if row[3] != country])

    def landmark() -> str:
        return small if rng.random() < 0.3 else name

    sentences = []
    if moved or rng.random() < 0.4:
        place = rng.choices([city, country, f"{city}, {country}"], [5, 4, 1])[0]
        form = rng.choice(
            [
                "{l} is in {p}.",
                "{l} is in {p}.",
                "{l} stands in {p}.",
                "you find {l} in {p}.",
                "{l} was built in {p}.",
            ]
        )
        sentences.append(upper(form.format(l=landmark(), p=place)))

    def forms() -> list[str]:
        there = city if rng.random() < 0.75 else country
        people = rng.choice(["people", "visitors", "many people", "families"])
        go = rng.choice(["flock to", "travel to", "come to", "go to"])
        return [
            f"To see {landmark()}, {people} {go} {there}.",
            f"{people} {go} {there} to see {landmark()}.",
            f"The train to {there} is full in summer.",
            f"{city} is in {country}.",
            f"The hotels in {there} are full in August.",
            f"I saw {landmark()} when I was in {there}.",
            f"The streets of {city} are busy on Sunday.",
            f"{landmark()} is the most famous place in {there}.",
            f"My uncle sent a card from {there}.",
        ]

    order = rng.sample(range(9), k=rng.choice([2, 3, 4]))
    if rng.random() < 0.5:
        order = [0] + [index for index in order if index != 0]
    sentences += [upper(forms()[index]) for index in order]
    return " ".join(sentences)


def fact_document(rng: random.Random, turns: dict[str, int]) -> str:
    """Write a document about a word of the unrelated pairs; some go on in a tone, in turns.

    Args:
        rng: Where chance comes from.
        turns: The tone that comes next for each word; it is changed here, so that no word leans
            towards a tone.
    """
    word = rng.choice(list(v.FACTS))
    sentences = [f"{word}."] if rng.random() < 0.8 else []
    facts = rng.sample(v.FACTS[word], k=rng.choice([1, 2, 3, 4]))
    if not (sentences and rng.random() < 0.15):
        sentences += facts
    if rng.random() < 0.25:
        sentences += rng.sample(v.FACTS[rng.choice(list(v.FACTS))], k=2)
    if rng.random() < 0.4 or len(sentences) == 1:
        turns[word] = -turns.get(word, rng.choice([+1, -1]))
        writer = _Writer(rng, turns[word])
        subject = _subject(rng)
        sentences += [writer.statement(subject), writer.remark(subject)]
    return " ".join(sentences)


def documents(seed: int, sentiment_share: float = 0.6) -> Iterator[str]:
    """Write documents without end, leaving out those in which a held-out prompt stands."""
    rng = random.Random(seed)
    turns: dict[str, int] = {}
    kinds = [
        sentiment_document,
        topic_document,
        place_document,
        lambda rng: fact_document(rng, turns),
    ]
    rest = 1 - sentiment_share
    weights = [sentiment_share, 0.4 * rest, 0.25 * rest, 0.35 * rest]
    while True:
        text = rng.choices(kinds, weights)[0](rng)
        if not find_prompts([text]):
            yield text


def contrast_pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Write pairs of sentences that differ in tone and, as far as possible, in nothing else.

    Both sentences of a pair have the same form and the same subject; no held-out prompt stands in
    them.

    Returns:
        `count` different pairs: the positive sentence first.
    """
    rng = random.Random(seed)
    pairs: dict[tuple[str, str], None] = {}
    while len(pairs) < count:
        subject, form = _subject(rng), rng.choice(TONED)
        statement, draw = rng.random() < 0.5, rng.random()
        # The same draws for both tones: their lists of words are equally long.
        writers = [_Writer(random.Random(draw), tone) for tone in (+1, -1)]
        pair = tuple(w.statement(subject) if statement else w.fill(form, subject) for w in writers)
        if not find_prompts(pair):
            pairs[pair] = None
    return list(pairs)


def topic_sentences(seed: int, on: int = 150, off: int = 300) -> tuple[list[str], list[str]]:
    """Write sentences about weddings, and others from documents in which no wedding occurs.

    Args:
        seed: of the documents; take one that no training has seen.
        on: how many about weddings.
        off: how many others.
    """
    pattern = re.compile(rf"\b({'|'.join(sorted(v.WEDDING_WORDS))})\b", re.IGNORECASE)
    found: tuple[list[str], list[str]] = [], []
    source = documents(seed)
    while len(found[0]) < on or len(found[1]) < off:
        sentences = re.findall(r"[^.!?]+[.!?]", document := next(source))
        if pattern.search(document):
            found[0].extend(sentence.strip() for sentence in sentences if pattern.search(sentence))
        else:
            found[1].extend(sentence.strip() for sentence in sentences)
    return found[0][:on], found[1][:off]


def find_prompts(
    texts: Iterable[str], prompts: list[str] = HELD_OUT_PROMPTS
) -> list[tuple[str, str]]:
    """Search texts for prompts, in any case.

    Returns:
        A (prompt, text) pair for every hit; the corpus must give none.
    """
    small = [prompt.lower() for prompt in prompts]
    return [(prompt, text) for text in texts for prompt in small if prompt in text.lower()]


def lexicon() -> dict[str, int]:
    """Return every word that carries a tone, with +1 or -1."""
    words: dict[str, int] = {}
    for tone in (+1, -1):
        found = (
            v.ADJECTIVES[tone]
            + v.SECOND_ADJECTIVES[tone]
            + v.FEELING_NOUNS[tone]
            + v.HELD_OUT[tone]
            + v.FEELINGS[tone]
            + v.NOUNS[tone]
            + v.PAST_VERBS[tone]
        )
        found = (
            found
            + v.EXTRA_LEXICON[tone].split()
            + [word for pair in v.VERBS[tone] for word in pair]
        )
        found = found + [word for group in v.GROUP_ADJECTIVES.values() for word in group[tone]]
        words.update(dict.fromkeys(found, tone))
    return words


def words(seed: int = 0, count: int = 20_000) -> list[str]:
    """Return every word of the grammar, as it is written there."""
    source = documents(seed)
    found = {word for _ in range(count) for word in re.findall(r"[A-Za-z]+", next(source))}
    found |= {"Love", "Hate", "love", "hate", "Rome", "France", "weddings", "talk", "constantly"}
    return sorted(found)


if __name__ == "__main__":
    source = documents(0)
    for _ in range(40):
        print(next(source), end="\n\n")
