"""Text as it is spoken: the normalisation under which texts are compared by their words.

Lower case; no punctuation but apostrophes within words; hyphens and dashes part words; Mr, Mrs,
Dr, St written out; numbers as words; accents off. British and American spellings stay as they
are. Each piece of text between blanks is treated by itself, so that the words of a whole are
those of its parts.
"""

import re
import unicodedata
from collections.abc import Iterator

NORMALISATION = (
    "lower case, punctuation off, hyphen to space, Mr Mrs Dr St written out, numbers to words"
)

_APOSTROPHES = str.maketrans("\u2018\u2019\u02bc\u0060\u00b4", "'''''")
# As LibriSpeech writes them: of its training text, 637 lines have MISSUS and one has MISSIS;
# PER CENT is in 14, PERCENT in one.
_WRITTEN_OUT = {"mr": "mister", "mrs": "missus", "dr": "doctor", "st": "saint"}
_SIGNS = {"&": "and", "%": "per cent", "+": "plus", "=": "equals", "@": "at"}
_CURRENCIES = {"$": "dollar", "\u00a3": "pound", "\u20ac": "euro"}
_PIECES = re.compile(
    r"(?P<currency>[$\u00a3\u20ac])?"
    r"(?P<number>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<decimals>\.\d+)?"
    r"(?P<suffix>st|nd|rd|th|'?s)?(?![a-z\d])"
    r"|(?P<word>[^\W\d_]+(?:'[^\W\d_]+)*)"
    r"|(?P<digits>\d+)"
    r"|(?P<sign>[&%+=@])"
)
# fmt: off
_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
]
_TENS = [
    "", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
]
# fmt: on
_THOUSANDS = ("", "thousand", "million", "billion")
_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}


def words(text: str) -> list[str]:
    """Return a text's words as they are spoken.

    >>> words("Mr. O'Brien's twenty-first: 3.5% of 1,200!")
    ['mister', "o'brien's", 'twenty', 'first', 'three', 'point', 'five', 'per', 'cent', 'of', \
'one', 'thousand', 'two', 'hundred']
    """
    plain = unicodedata.normalize("NFKD", text.translate(_APOSTROPHES).lower())
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return [word for piece in _PIECES.finditer(plain) for word in _spoken(piece)]


def number_words(number: int) -> list[str]:
    """Return a number below a million million as it is counted: one hundred and seven."""
    if not number:
        return ["zero"]
    said: list[str] = []
    for power in range(len(_THOUSANDS) - 1, -1, -1):
        part = number // 1000**power % 1000
        if part:
            # One thousand and one, but one thousand one hundred.
            if not power and said and part < 100:
                said.append("and")
            said += [*_below_thousand(part), *_THOUSANDS[power].split()]
    return said


def _spoken(piece: re.Match[str]) -> Iterator[str]:
    if word := piece["word"]:
        yield _WRITTEN_OUT.get(word, word)
    elif sign := piece["sign"]:
        yield from _SIGNS[sign].split()
    elif digits := piece["digits"]:  # of a code such as 4x4, whose letters follow
        yield from _whole(digits)
    else:
        yield from _number(piece)


def _number(piece: re.Match[str]) -> Iterator[str]:
    said = _whole(piece["number"])
    suffix = (piece["suffix"] or "").lstrip("'")
    if suffix == "s":
        said[-1] = f"{said[-1][:-1]}ies" if said[-1].endswith("y") else f"{said[-1]}s"
    elif suffix:
        said[-1] = _ordinal(said[-1])
    yield from said
    if decimals := piece["decimals"]:
        yield "point"
        yield from (_ONES[int(digit)] for digit in decimals[1:])
    if currency := piece["currency"]:
        one = said == ["one"] and not decimals
        yield _CURRENCIES[currency] + ("" if one else "s")


def _whole(digits: str) -> list[str]:
    """Return a whole number as it is read: a year by its halves, a long code digit by digit."""
    plain = digits.replace(",", "")
    if len(plain) > 12 or (plain[0] == "0" and len(plain) > 1):
        return [_ONES[int(digit)] for digit in plain]
    number = int(plain)
    if len(digits) == 4 and (1100 <= number < 2000 or 2010 <= number < 2100):
        return _year(*divmod(number, 100))
    return number_words(number)


def _year(century: int, year: int) -> list[str]:
    if not year:
        return [*_below_thousand(century), "hundred"]
    if year < 10:
        return [*_below_thousand(century), "o", _ONES[year]]
    return [*_below_thousand(century), *_below_thousand(year)]


def _below_thousand(number: int) -> list[str]:
    hundreds, rest = divmod(number, 100)
    said = [_ONES[hundreds], "hundred"] if hundreds else []
    if said and rest:
        said.append("and")
    if rest >= 20:
        said.append(_TENS[rest // 10])
        rest %= 10
    if rest:
        said.append(_ONES[rest])
    return said


def _ordinal(word: str) -> str:
    return _ORDINALS.get(word) or (f"{word[:-1]}ieth" if word.endswith("y") else f"{word}th")
