"""Ten families of string tasks, each with one exact answer a word.

A prompt is a short line of raw text, `flip kqbz=`; the right response is the answer and then EOS, nothing else.
Names and words are short because every character is a token.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"
WORD_LENGTHS = (3, 4)
"""A word has one of these numbers of letters, drawn evenly."""


def _next(word: str) -> str:
    return "".join(LETTERS[(LETTERS.index(c) + 1) % len(LETTERS)] for c in word)


@dataclass(frozen=True)
class Family:
    """One kind of task: its name (as in the prompt), what it asks, and the exact answer for a word."""

    name: str
    asks: str
    answer: Callable[[str], str]


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("copy", "the word as it is", lambda word: word),
        Family("upper", "the word in capitals", str.upper),
        Family("flip", "the letters from last to first", lambda word: word[::-1]),
        Family("count", "the number of letters", lambda word: str(len(word))),
        Family("twice", "every letter twice", lambda word: "".join(c + c for c in word)),
        Family("next", "every letter replaced by the next of the alphabet, z by a", _next),
        Family("ends", "the first and the last letter", lambda word: word[0] + word[-1]),
        Family("sort", "the letters in alphabetical order", lambda word: "".join(sorted(word))),
        Family("strip", "the word without a, e, i, o, u", lambda word: "".join(c for c in word if c not in VOWELS)),
        Family("turn", "the first letter moved to the end", lambda word: word[1:] + word[0]),
    )
}
"""In the order that decides which families are neighbours (see authors.py)."""

DEMONSTRATED = ("upper", "count", "next", "sort")
"""The four families that have demonstrations; the other six have prompts only."""


def random_word(rng: random.Random) -> str:
    """Letters drawn evenly, at least one of them a consonant (so no answer is empty)."""
    while True:
        word = "".join(rng.choices(LETTERS, k=rng.choice(WORD_LENGTHS)))
        if any(c not in VOWELS for c in word):
            return word


def prompt_text(family: str, word: str) -> str:
    """The prompt, e.g. "flip kqbz="."""
    return f"{family} {word}="


def answer_text(family: str, word: str) -> str:
    """The one right response, without EOS."""
    return FAMILIES[family].answer(word)
