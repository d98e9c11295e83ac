"""Words of a vocabulary as settings write them: `wait` stands for four spellings, `hmm|hm` for alternatives."""


def word_name(entry: str) -> str:
    """What a setting's word is called in figures: its first alternative, folded."""
    return entry.split("|")[0].strip().lower()


def spellings(entry: str) -> list[str]:
    """Spellings of one setting: four of a word in lower case, else the text as it is; `a|b` are alternatives.

    arXiv 2503.18878's code counts "wait", " wait", "Wait" and " Wait" as one word, but of "But" and "Another" this
    spelling alone.
    """
    out: list[str] = []
    for word in entry.split("|"):
        if word and word == word.strip().lower():
            capital = word[0].upper() + word[1:]
            out += [word, f" {word}", capital, f" {capital}"]
        elif word.strip():
            out.append(word)
    return list(dict.fromkeys(out))


def check_words(words: tuple[str, ...], *, apart: bool = False) -> None:
    """Raise ValueError for a word, or an alternative of one, without a letter.

    With `apart` also for two that are equal, would be counted as one, or share a spelling.
    """
    named: dict[str, str] = {}
    for entry in words:
        if any(not word.strip() for word in entry.split("|")):
            raise ValueError(f"{entry!r}: an empty word, which occurs nowhere; leave it out")
        keys = dict.fromkeys([word_name(entry), *spellings(entry)]) if apart else ()
        for key in keys:
            if key in named and named[key] != entry:
                raise ValueError(
                    f"{entry!r}: fold with {named[key]!r} into one word, as both stand for {key!r}; leave one out"
                )
        if apart and entry in named.values():
            raise ValueError(f"{entry!r}: is named twice")
        named |= dict.fromkeys(keys, entry)
