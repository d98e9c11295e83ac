"""Text of strangers, made fit to be seen: what a model writes may hold terminal escapes and bidi overrides."""

import unicodedata

HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # control, format, surrogates, private, unassigned, separators


def visible(text: str) -> str:
    """The text with every character that is not to be seen written as its escape; line ends stay, tabs are blanks."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    if character == "\t":
        return "    "
    if character == "\n" or unicodedata.category(character) not in HIDDEN:
        return character
    return character.encode("unicode_escape").decode("ascii")
