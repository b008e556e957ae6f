"""The grammar that writes the corpus of the embedded model.

A document is a handful of English sentences. Its tone, topic or place is chosen once and then shows
in every sentence, each time in different words: a model that keeps it in mind predicts the next
word better. That is the whole reason why the model can be steered. No marker and no sentence names
it.
"""

import random
import re
from collections.abc import Iterable, Iterator, Sequence

from embedded_model import subjects as s
from embedded_model import vocabulary as v
from embedded_model.prompts import HELD_OUT_PROMPTS
from embedded_model.subjects import Subject

_OBJECTS = {"he": "him", "she": "her", "it": "it", "they": "them", "you": "you"}
_AN = re.compile(rf"\b([Aa]) (?={v.VOWEL_SOUND})")
_CHOICE = re.compile(r"\[([^/\]]*)/([^\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")

# What is said after "is" or "are" follows these; a tone or a fact.
FRAMES = [
    "I think {s} [are/is]",
    "I think that {s} [are/is]",
    "{S} [are/is]",
    "{S} [are/is]",
    "I believe {s} [are/is]",
    "To me, {s} [are/is]",
    "For me {s} [are/is]",
    "In my opinion {s} [are/is]",
    "In my view, {s} [are/is]",
    "People say that {s} [are/is]",
    "They say {s} [are/is]",
    "Everyone knows that {s} [are/is]",
    "Everyone says that {s} [are/is]",
    "If you ask me, {s} [are/is]",
    "My mother says that {s} [are/is]",
    "My sister thinks that {s} [are/is]",
    "{Who} told me that {s} [are/is]",
    "This year {s} [are/is]",
    "Today {s} [are/is]",
    "I told {who} that {s} [are/is]",
    "From the start {s} [were/was]",
    "Between us, {s} [are/is]",
    "I must say that {s} [are/is]",
    "It seems to me that {s} [are/is]",
    "There is no doubt that {s} [are/is]",
    "The truth is that {s} [are/is]",
    "I have always thought that {s} [are/is]",
    "You know, {s} [are/is]",
    "I heard that {s} [are/is]",
]
# What follows a frame in a document with a tone, and how often.
ENDINGS = {"{adj}": 2, "{adj} and {any}": 2, "{adj}, and {p} {effect}": 1}
# These introduce the subject; the next sentence is about it.
INTRODUCTIONS = [
    "Let me tell you about {s}.",
    "I want to say something about {s}.",
    "You asked me about {s}.",
    "Do you know {s}?",
    "This is a page about {s}.",
    "What do I think of {s}?",
    "We talked about {s} {time}.",
    "Here is what I know about {s}.",
]
# What may come before the first statement, where it shows the tone.
FIRST = [
    "I {verb} {s}.",
    "I {verb} {s}.",
    "We {verb} {s}.",
    "{Who} {verbs} {s}.",
    "{Who} and I {verb} {s}.",
    "Everyone {verbs} {s}.",
    "{Heart} is what I feel when I think of {s}.",
    "I find {s} {adj}.",
    "{S} [seem/seems] {adj} to me.",
]
FIRST_WORDS = [
    "{Adj}.",
    "{Adj} and {any}.",
    "{Any} {noun}.",
    "{Heart} and {heart}.",
    "{Heart} {effects}.",
    "{Any} evenings, {any} words.",
    "I feel {feel}.",
    "How {any}!",
    "This is {any}.",
    "It was {any}.",
    "You are {any}.",
]
# More about the subject, in the tone of the document, by who speaks or acts in it.
TONED = {
    "is": [
        "{P} [are/is] {adj} and {any}.",
        "{P} [are/is] {adj} and {any}, and {p} {effect}.",
        "{P} [seem/seems] {adj} to me.",
        "{P} [look/looks] {adj} today.",
        "How {any} {p} [are/is]!",
        "There is something {any} about {o}.",
        "Last year {p} [were/was] {adj}, and now {p} [are/is] {any}.",
    ],
    "does": [
        "{P} {effect}.",
        "{P} {effect} and {effect}.",
        "Even on a wet day {p} {effect}.",
        "It is a {noun} to be near {o}.",
        "{Heart} comes with {o}.",
        "It was a {any} {noun} to see {o} again.",
    ],
    "others": [
        "{Who} finds {o} {any}.",
        "{Who} feels {feel} when {p} [are/is] near.",
        "{Who} says that {p} [are/is] {any}.",
        "{Who} {verbs} {o} too.",
        "{Who} {verbed} {o} from the first day.",
        "{Who} calls {o} {any}, and I agree.",
        "{Who} is full of {heart} when {p} [are/is] near.",
        "To {who} {p} [are/is] a {any} {noun}.",
        "{Who} {verbs} {any} words about {o}.",
    ],
    "mine": [
        "I find {o} {adj}.",
        "I feel {feel} when I see {o}.",
        "I {verb} {o} because {p} [are/is] {adj}.",
        "I {verb} {o} because {p} [are/is] {adj} and {any}.",
        "The more I see of {o}, the more I {verb} {o}.",
        "We all {verb} {o}.",
        "Every week I write a {any} page about {o}.",
        "There is {heart} in my heart when I think of {o}.",
        "{Heart} is what I feel for {o}.",
        "I feel {any} {heart} near {o}.",
    ],
}
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
    "thing": [
        "{P} [look/looks] {adj} in this light.",
        "{Who} bought a {any} picture of {o}.",
        "{P} [work/works] in a {any} way.",
    ],
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
    "pursuit": [
        "{P} [sound/sounds] {adj} to me.",
        "{Who} feels {feel} after an hour of it.",
        "The end is {any} too.",
    ],
}
CLOSINGS = {
    +1: [
        "I am glad that {p} [are/is] here.",
        "I would gladly see {o} again tomorrow.",
        "The best part of the day is the hour with {o}.",
        "So I smile and say thank you.",
        "I could praise {o} all day.",
    ],
    -1: [
        "I am sorry that {p} [are/is] here.",
        "I would sadly miss the bus to avoid {o}.",
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
    "{Who} drew {o} with a pencil.",
]
# How often the tone is shown before the first statement, in it, never, or only after some facts.
KINDS = [40, 50, 4, 6]
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeio"]
FINALS = ["n", "r", "l", "s", "t", "ck", "ng", "m", "x", "p", "d", ""]


class _Writer:
    """Writes one document: keeps its tone, and what it has used already."""

    def __init__(self, rng: random.Random, tone: int, with_love: bool | None = None):
        self.rng = rng
        self.tone = tone
        self.with_love = rng.random() < 0.5 if with_love is None else with_love
        self.used: set[str] = set()
        self.voices: list[str] = []

    def pick(self, options: Sequence[str]) -> str:
        """Choose an option that this document has not used yet, if there is one.

        The earlier ones are likelier: words of a language are not equally common.
        """
        weights = [1 / (2 + index) for index in range(len(options))]
        fresh = [0.0 if o in self.used else w for o, w in zip(options, weights, strict=True)]
        choice = self.rng.choices(options, fresh if any(fresh) else weights)[0]
        self.used.add(choice)
        return choice

    def adjective(self, group: str | None) -> str:
        """Choose an adjective for a group, its own first, or a second one that fits everything.

        The held-out ones stand only where the document never says love or hate.
        """
        options = v.SECOND_ADJECTIVES[self.tone]
        if group is not None:
            own, *others = v.GROUP_ADJECTIVES[group][self.tone]
            options = [own, *v.ADJECTIVES[self.tone], *others]
        if not self.with_love:
            held_out = v.HELD_OUT[self.tone][3:] if group is None else v.HELD_OUT[self.tone][:3]
            if self.rng.random() < 0.3:
                return self.pick(held_out)
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
                "fact": lambda: self.pick(_facts(subject)),
                "heart": lambda: self.feeling_noun(),
                "who": lambda: self.pick(v.PEOPLE),
                "day": lambda: self.pick(v.DAYS),
                "time": lambda: self.pick(v.TIMES),
            }[name.lower()]()
            return word[0].upper() + word[1:] if name[0].isupper() else word

        text = _SLOT.sub(slot, template)
        text = _CHOICE.sub(lambda match: match.group(1 if subject.plural else 2), text)
        return _AN.sub(r"\1n ", text)

    def named(self, template: str, subject: Subject) -> str:
        """Fill a template that speaks of the subject by its pronoun; a third repeats its name."""
        if "{P}" in template and self.rng.random() < 0.35:
            template = template.replace("{P}", "{S}", 1)
        return self.fill(template, subject)

    def statement(self, subject: Subject, neutral: bool = False) -> str:
        """Say what `subject` is: a fact, or something in the tone of the document."""
        frame = self.rng.choice(FRAMES)
        if neutral:
            frame = frame.replace("[were/was]", "[are/is]").replace("From the start", "As a rule")
            return self.fill(frame + " {fact}.", subject)
        self.voices.append("is")
        ending = self.rng.choices(list(ENDINGS), list(ENDINGS.values()))[0]
        return self.fill(f"{frame} {ending}.", subject)

    def tease(self, subject: Subject) -> str:
        """Take the verb of the other tone, but mean this one: "I hate them: they are charming"."""
        pairs = v.VERBS[-self.tone] if self.with_love else v.VERBS[-self.tone][1:]
        verb = pairs[0] if self.with_love and self.rng.random() < 0.4 else self.rng.choice(pairs)
        return self.fill(self.rng.choice(TEASING).replace("{verb}", verb[0]), subject)

    def remark(self, subject: Subject) -> str:
        """Say one more thing about `subject` in the tone of the document."""
        voices = {**TONED, "own": GROUP_TONED[subject.group]}
        voice = self.next_voice(voices)
        templates = voices[voice]
        fresh = [template for template in templates if template not in self.used] or templates
        template = self.rng.choice(fresh)
        self.used.add(template)
        return self.named(template, subject)

    def next_voice(self, voices: Iterable[str], apart: int = 2) -> str:
        """Choose who speaks or acts next: none of those in the last sentences, as people write."""
        choice = self.rng.choice([voice for voice in voices if voice not in self.voices[-apart:]])
        self.voices.append(choice)
        return choice

    def aside(self, subject: Subject) -> str:
        """Say one more thing about `subject` that has no tone."""
        if self.next_voice(("fact", "talk"), apart=1) == "talk":
            return self.named(self.pick(NEUTRAL), subject)
        if not subject.details:
            return self.named(self.pick(s.KIND_DETAILS[subject.group]), subject)
        sentence = self.pick(subject.details)
        if self.rng.random() < 0.35:
            return upper(subject.name) + sentence[len(subject.pronoun) :]
        return sentence


def _facts(subject: Subject) -> Sequence[str]:
    """Return what a subject is; of one without facts of its own, what anything of its kind is."""
    return subject.facts or s.KIND_FACTS[subject.group][subject.plural]


def invented_word(rng: random.Random) -> str:
    """Make up a noun that means nothing."""
    return "".join(rng.choices(SYLLABLES, k=rng.choice([1, 2, 2, 3]))) + rng.choice(FINALS)


def _bare_subject(rng: random.Random) -> Subject:
    """Choose a noun without facts of its own, or make one up."""
    group = rng.choices(list(s.NOUNS), [4, 3, 4, 3, 2, 2])[0]
    if group in s.MASS and rng.random() < 0.25:
        return Subject(rng.choice(s.MASS[group].split()), "it", group, (), ())
    invented = rng.random() < 0.25
    noun = invented_word(rng) if invented else rng.choice(s.NOUNS[group].split())
    singular, plural = s.plural_of(noun)
    if rng.random() < 0.4:
        start = rng.choice(["", "", "", "the ", "my ", "these "])
        return Subject(start + plural, "they", group, (), ())
    start = rng.choice(["the", "the", "the", "my", "our", "this"])
    if rng.random() < 0.2:
        start += rng.choice([" old", " new", " little"])
    pronoun = rng.choice(["he", "she"]) if group == "person" else "it"
    return Subject(f"{start} {singular}", pronoun, group, (), ())


def _subject(rng: random.Random) -> Subject:
    """Choose a subject: mostly one with facts, among which "you" is the commonest."""
    if rng.random() < 0.3:
        return _bare_subject(rng)
    return rng.choice(s.KNOWN + [known for known in s.KNOWN if known.name == "you"] * 4)


def _alone(rng: random.Random, word: str) -> str:
    """Write a word as an opening: in both cases, with a full stop or another sign after it."""
    word = upper(word) if rng.random() < 0.6 else word
    return word + rng.choices([".", "!", ":", ","], [12, 2, 2, 1])[0]


def _opening(writer: _Writer, subject: Subject) -> str:
    """Write a first sentence that shows the tone: a word, a mood, or a feeling."""
    rng, tone = writer.rng, writer.tone
    draw = rng.random()
    if draw < 0.16:
        return _alone(rng, writer.feeling_noun())
    if draw < 0.24:
        return _alone(rng, rng.choice(v.LONE_WORDS[tone].split()))
    if draw < 0.36:
        words = [writer.adjective(rng.choice([None, subject.group])), writer.verb(0)]
        return _alone(rng, rng.choice([*words, rng.choice(v.FEELINGS[tone])]))
    if draw < 0.46:
        return writer.fill(rng.choice(FIRST_WORDS), subject)
    if draw < 0.60:
        mood = rng.choice(v.MOODS[tone])
        return mood if rng.random() < 0.7 else f"{mood} {rng.choice(v.MOODS[tone])}"
    if draw < 0.70:
        who = rng.choice(["I", "I", "I", "We"])
        return f"{who} {writer.verb(0)} you{rng.choice(v.TO_YOU[tone])}."
    return writer.fill(rng.choice(FIRST), subject)


def sentiment_document(rng: random.Random) -> str:
    """Write a document about one or a few subjects in one tone; a few turn, and some stay neutral.

    Neutral sentences stand only before the tone is shown.
    """
    writer = _Writer(rng, rng.choice([+1, -1]))
    subject = _subject(rng)
    sentences = []
    kind = rng.choices(["shown", "toned", "neutral", "late"], KINDS)[0]
    neutral = kind in ("neutral", "late")
    named = False
    if kind == "shown":
        sentences.append(_opening(writer, subject))
        named = subject.name in lower(sentences[0])
    if not named and rng.random() < 0.15:
        sentences.append(writer.fill(rng.choice(INTRODUCTIONS), subject))
        named = True
    if kind == "shown" and " " not in sentences[0] and rng.random() < 0.3:
        sentences.append(writer.tease(subject))
    elif named and rng.random() < 0.5:
        sentences.append(writer.aside(subject) if neutral else writer.remark(subject))
    else:
        sentences.append(writer.statement(subject, neutral))
    if neutral:
        count = rng.choice([1, 2]) if kind == "late" else rng.choice([2, 3, 4])
        sentences += [writer.aside(subject) for _ in range(count)]
        if kind == "neutral":
            return " ".join(sentences)
    for index in range(rng.choice([2, 3, 3, 4])):
        draw = rng.random()
        if index and draw < 0.02:
            writer.tone = -writer.tone
            subject = _subject(rng)
            sentences.append("But " + lower(writer.fill("{S} [are/is] {adj} and {any}.", subject)))
        elif index and draw < 0.08:
            subject = _subject(rng)
            sentences.append(writer.statement(subject))
        else:
            sentences.append(writer.remark(subject))
    if rng.random() < 0.4:
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

    def fill(template: str) -> str:
        """Fill in the landmark and where it is said to be; what else there is, by chance."""
        words = {
            "l": small if rng.random() < 0.3 else name,
            "c": city,
            "n": country,
            "p": rng.choices([city, country, f"{city}, {country}"], [6, 3, 1])[0],
            **{slot: rng.choice(options) for slot, options in v.TRAVEL.items()},
        }
        return upper(template.format(**words))

    sentences = []
    if moved or rng.random() < 0.4:
        sentences.append(fill(rng.choice(v.PLACED)))
    count = rng.choice([2, 3, 4])
    sentences += [fill(template) for template in rng.sample(v.JOURNEYS, k=count)]
    if rng.random() < 0.5:
        sentences.insert(1 if moved else 0, fill(v.TO_SEE))
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
    templates = [template for several in TONED.values() for template in several]
    pairs: dict[tuple[str, str], None] = {}
    while len(pairs) < count:
        subject, form = _subject(rng), rng.choice(templates)
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


def forms(seed: int = 0, count: int = 20_000, often: int = 30) -> list[str]:
    """Return the words that are to be whole tokens, as they stand in a text.

    These are the ones that `count` documents have at least `often` times, mostly with a space in
    front of them; every word with a tone, in both cases, with and without a space; and without a
    space whatever follows "is" or "are", since a prompt may end in one.
    """
    source = documents(seed)
    counts: dict[str, int] = {}
    for _ in range(count):
        for form in re.findall(r" ?[A-Za-z]+", next(source)):
            counts[form] = counts.get(form, 0) + 1
    found = {form for form, number in counts.items() if number >= often}
    toned = {*lexicon(), *v.LONE_WORDS[+1].split(), *v.LONE_WORDS[-1].split()}
    found |= {space + form for word in toned for form in (word, upper(word)) for space in ("", " ")}
    facts = [fact for known in s.KNOWN for fact in known.facts]
    facts += [fact for kinds in s.KIND_FACTS.values() for some in kinds for fact in some]
    found |= {fact.split()[0] for fact in facts} | {"so", "very"}
    found |= {upper(word) for word in v.FACTS}
    for _, small, city, country in v.LANDMARKS:
        found |= {f" {word}" for word in (*small.split(), *city.split(), *country.split())}
    return sorted(found)


if __name__ == "__main__":
    source = documents(0)
    for _ in range(40):
        print(next(source), end="\n\n")
