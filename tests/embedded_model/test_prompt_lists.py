"""The prompts of choice and table: known subjects with their pronouns, and unknown ones."""

import itertools
import re

import pytest

from embedded_model import grammar, prompts, subjects

ABOUT_SUBJECTS = [*prompts.TABLE_PROMPTS, *prompts.NEW_PROMPTS, *prompts.SWEEP_PROMPTS]
# "it" may be of nobody in particular: "is it true".
PRONOUN = re.compile(r"\b(he|him|she|her|they|them)\b")
FORMS = {"he": "he him", "she": "she her", "they": "they them"}


def outside_nouns(texts) -> list[str]:
    """Return the texts that have a noun of `OUTSIDE`, in any form."""
    pattern = re.compile(rf"\b({'|'.join(prompts.OUTSIDE)})s?\b", re.IGNORECASE)
    return [text for text in texts if pattern.search(text)]


def test_outside_nouns_are_not_in_the_corpus():
    """No document has one; the search finds one that is planted."""
    documents = list(itertools.islice(grammar.documents(0), 4000))
    assert outside_nouns([*documents, "I saw two Penguins."]) == ["I saw two Penguins."]


def test_outside_nouns_are_not_in_the_vocabulary(tokenizer):
    """Each is spelled in pieces; each of their prompts has one, no other prompt does."""
    assert all(len(tokenizer(f" {noun}")["input_ids"]) > 1 for noun in prompts.OUTSIDE)
    assert outside_nouns(prompts.OUTSIDE_PROMPTS) == prompts.OUTSIDE_PROMPTS
    others = {*prompts.HELD_OUT_PROMPTS} - {*prompts.OUTSIDE_PROMPTS}
    assert outside_nouns(others) == []


@pytest.mark.parametrize("prompt", ABOUT_SUBJECTS)
def test_prompts_are_about_known_subjects(prompt: str):
    """The subject is the grammar's, and a pronoun agrees with it."""
    found = [
        subject
        for subject in subjects.KNOWN
        if re.search(rf"\b{subject.name.lower()}\b", prompt.lower())
        or (subject.name.startswith("the ") and subject.name[4:] in prompt)
    ]
    assert found, prompt
    subject = max(found, key=lambda one: len(one.name))
    for pronoun in PRONOUN.findall(prompt):
        assert pronoun in FORMS[subject.pronoun].split()


def test_lists_share_nothing():
    """What is chosen on one prompt is measured on another, and greedy texts are of the table's."""
    lists = (
        prompts.TABLE_PROMPTS,
        prompts.NEW_PROMPTS,
        prompts.OUTSIDE_PROMPTS,
        prompts.SWEEP_PROMPTS,
        prompts.SHOWN_PROMPTS,
        [*prompts.ADDITION_PROMPTS.values()],
        *prompts.ADDITION_SWEEP_PROMPTS.values(),
    )
    assert len({*prompts.HELD_OUT_PROMPTS}) == sum(map(len, lists)) + 1
    assert prompts.COUSIN in {*prompts.HELD_OUT_PROMPTS}.difference(*lists)
    measured = {*prompts.TABLE_PROMPTS, *prompts.NEW_PROMPTS, *prompts.OUTSIDE_PROMPTS}
    assert {*prompts.GREEDY_PROMPTS} < measured and len({*prompts.GREEDY_PROMPTS}) == 27


def test_a_prompt_ends_where_a_word_ends():
    """A space at the end would be a token of its own."""
    assert all(prompt == prompt.strip() for prompt in prompts.HELD_OUT_PROMPTS)
