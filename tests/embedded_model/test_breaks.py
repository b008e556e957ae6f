"""Breaks that a reader sees are found, good English is not taken for one."""

import pytest

from embedded_model.breaks import BREAKS, has_break, stays_on, visible_breaks
from embedded_model.subjects import KNOWN

BROKEN = {
    "I think dogs are are kind.": "doubled word",
    "My my mother is kind.": "doubled word",
    "Dogs are kind. they make me smile.": "lower case after a full stop",
    "Dogs  are kind.": "double space",
    "My sister bought an.": "dangling article",
    "I feel the and go home.": "dangling article",
    "The and the other.": "dangling article",
    "Did you see the?": "dangling article",
    "Are they kind? they are.": "lower case after a full stop",
    "A ugly play.": "a before a vowel",
    "An pleasant hour.": "an before a consonant",
    "She is a honest woman.": "a before a vowel",
    "It is a ugly play.": "a before a vowel",
    "It is an pleasant hour.": "an before a consonant",
    "It is an useful hour.": "an before a consonant",
}
SOUND = [
    "I know that that is true. She had had enough.",
    "It is an honest hour with a useful, a one-eyed and an ugly dog from a university.",
    "An unusual and an unimportant day; a unique one.",
    "Dogs are kind. They make me smile! I",
    "In my opinion the baker is a",  # cut off where the tokens end
    "The theatre is an old and the only one.",
    "This is his island. I can see that the sofa is old.",  # nothing begins within a word
    "That that is true is in notes.txt, for an 8-hour day.",
]


@pytest.mark.parametrize("text", BROKEN)
def test_a_break_is_found(text: str):
    """Each kind of break, and no other one."""
    assert visible_breaks(text) == [BROKEN[text]]


def test_every_break_has_an_example():
    """A pattern that finds nothing would be missed here."""
    assert {*BROKEN.values()} == BREAKS.keys()


def test_good_english_has_no_break():
    """Exceptions of spelling, and a text that stops in mid-sentence."""
    assert [visible_breaks(text) for text in SOUND] == [[]] * len(SOUND)


def test_each_kind_of_break_is_told():
    assert visible_breaks("Dogs are are kind.  they") == [
        "doubled word",
        "lower case after a full stop",
        "double space",
    ]


def test_share_of_broken_texts_counts_each_once():
    """Two breaks in a text are one broken text."""
    assert has_break(["Dogs are are kind. they", "Dogs are kind."]) == [True, False]


@pytest.mark.parametrize(
    ("completion", "stays"),
    [
        (" She is a student.", True),
        (" I have known her for years.", True),
        (" My cousin is kind.", True),
        (" He is a man. She is kind.", False),
        (" It hangs by the door.", False),
        (" There are others here.", False),
        (" What a day! She is kind.", False),
        (" My brother is kind.", False),
    ],
)
def test_next_sentence_has_the_pronoun_of_the_subject(completion: str, stays: bool):
    """In the grammar the cousin is a woman; only the first sentence counts."""
    assert stays_on("my cousin", completion) is stays


FORMS = ("he him his", "she her hers", "it its", "they them their", "you your")


@pytest.mark.parametrize("forms", FORMS)
def test_every_form_of_the_pronoun_counts(forms: str):
    """Those of its own subject, and of no other one."""
    for known in KNOWN:
        mine = known.pronoun == forms.split()[0]
        assert {stays_on(known.name, f" And {form} too.") for form in forms.split()} == {mine}
