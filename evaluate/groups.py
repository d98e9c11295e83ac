"""Groups of contexts that figures are given for, beside all of them: each source, and each stratum of a source.

A stratum is named after its source, `reasoning/math`; no name of a source holds a slash. Groups overlap: what is
counted for a stratum is counted for its source too.

Shape suffixes: C contexts.
"""

from collections.abc import Sequence

import numpy as np

from evaluate.visible import visible
from harvest.contexts import Contexts

Groups = dict[str, np.ndarray]  # name -> bool (contexts,); a source stands before its strata


def context_groups(contexts: Contexts, split: str) -> Groups:
    """The groups of a split; none without text."""
    source_C = contexts.read(split, "source", 0, contexts.count(split))
    strata, stratum_C = contexts.strata, contexts.strata_of(split, 0, len(source_C))
    groups: Groups = {}
    for name, of_source_C in by_source(source_C, contexts.sources).items():
        groups[name] = of_source_C
        for number, stratum in enumerate(strata):
            if stratum["source"] == name:
                groups[_unused(f"{name}/{visible(str(stratum['value']))}", groups)] = of_source_C & (
                    stratum_C == number
                )
    return groups


def _unused(name: str, groups: Groups) -> str:
    """The name, with a number where values look the same, as 1 and "1" do."""
    names = (name, *(f"{name} ({number})" for number in range(2, len(groups) + 2)))
    return next(each for each in names if each not in groups)


def by_source(source_C: np.ndarray, names: Sequence[str]) -> Groups:
    """A group for each source. `source_C` is the index into `names` of each context."""
    return {name: source_C == number for number, name in enumerate(names)}


def finest(groups: Groups, contexts: int) -> tuple[list[str], np.ndarray]:
    """Names of groups that do not overlap, and the index into them of each context, int64 (contexts,).

    Those are the strata, and of a source the contexts that are in none of them.
    """
    names, index_C = list(groups), np.zeros(contexts, np.int64)
    for number, mask_C in enumerate(groups.values()):
        index_C[mask_C] = number  # a stratum comes after its source, and takes its contexts over
    used = [n for n, name in enumerate(names) if (index_C == n).any() or not _has_strata(name, names)]
    return [names[n] for n in used], np.searchsorted(used, index_C)


def _has_strata(name: str, names: list[str]) -> bool:
    return any(other.startswith(f"{name}/") for other in names)
