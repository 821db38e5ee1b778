"""Texts that are spoken alike have the same words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.spoken import number_words, words


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("Well, hello -- THERE!", "well hello there"),
        ("\u201cDon\u2019t,\u201d he said. 'Tis the boys' own.", "don't he said tis the boys own"),
        ("to-day a well\u2014known/famous one_two", "to day a well known famous one two"),
        (
            "Mr. and Mrs. Smith, Dr Jones of St. Ives",
            "mister and missus smith doctor jones of saint ives",
        ),
        ("a caf\u00e9 na\u00efvely", "a cafe naively"),
        ("R&D costs 5%", "r and d costs five per cent"),
        ("colour color", "colour color"),
        (
            "107 and 1,200,030",
            "one hundred and seven and one million two hundred thousand and thirty",
        ),
        ("0 10 21 90", "zero ten twenty one ninety"),
        (
            "in 1863, 1905 and 1900; 2000",
            "in eighteen sixty three nineteen o five and nineteen hundred two thousand",
        ),
        (
            "the 1st 22nd 3rd 12th 20th 1860s",
            "the first twenty second third twelfth twentieth eighteen sixties",
        ),
        ("2024", "twenty twenty four"),
        ("3.25 at 3:30", "three point two five at three thirty"),
        ("$1 $5 \u00a32.50", "one dollar five dollars two point five zero pounds"),
        ("007 B12 4x4 120x", "zero zero seven b twelve four x four one hundred and twenty x"),
        ("... -- !", ""),
        ("", ""),
    ],
)
def test_the_words_are_those_that_are_spoken(text: str, spoken: str) -> None:
    assert " ".join(words(text)) == spoken


@pytest.mark.parametrize(
    ("number", "spoken"),
    [
        (13, "thirteen"),
        (100, "one hundred"),
        (999, "nine hundred and ninety nine"),
        (1001, "one thousand and one"),
        (20_300, "twenty thousand three hundred"),
        (10**9 + 5, "one billion and five"),
    ],
)
def test_numbers_are_counted(number: int, spoken: str) -> None:
    assert " ".join(number_words(number)) == spoken


TEXT = st.text(st.sampled_from("aB0159.,-'$% &ths\u00e9\u2019\n"), max_size=30)


@given(TEXT)
def test_words_of_a_whole_are_those_of_its_parts(text: str) -> None:
    assert words(text) == [word for part in text.split() for word in words(part)]


@given(TEXT)
def test_words_that_are_spoken_stay_as_they_are(text: str) -> None:
    once = " ".join(words(text))
    assert " ".join(words(once)) == once
