"""Counterexamples: texts by which a language model shows that a feature does not stand for reasoning.

After arXiv 2601.05679, for features that injected tokens alone do not drive. A model that has the feature's explanation
and strongest contexts writes texts without reasoning that should fire it, and rewords these contexts so that their
meaning stays. All are read by the model under study and the SAE, each alone. Against the feature's largest activation
in its strongest contexts, read alone too, a text fires above a half and is silent below a quarter, the thresholds of
the study's code. Contexts that do not fire alone are not reworded: silence would say nothing.

Whether a text holds no reasoning, and whether a paraphrase means the same, nobody checks: the texts are on the pages.

Shape suffixes: B rows, S positions, D d_in, K features, T texts.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from evaluate.activity import Excerpts
from evaluate.asking import Answer, Question
from evaluate.falsify_config import FalsifyConfig
from evaluate.subject import Subject, bos_id
from harvest.activation_rows import Rule, kept_in_text
from harvest.language_model import HookedModel
from harvest.tokenizer import SegmentTokenizer
from train.checkpoint import SavedSae

AT_ONCE = 5  # texts of one answer: models repeat themselves in long lists
BATCH = 16  # texts of one forward pass
LONGEST, READ = 2_000, 40_000  # characters of a text, and of an answer that are looked through; 100 words have 600
COPIED = 40  # characters of an example within a text that make it a copy
CONTEXT_DEPENDENT = "context-dependent"  # the verdict of token injection

FIRES, SILENT = "fires without reasoning", "silent on paraphrases"
NOT_FALSIFIED, TOO_FEW = "not falsified", "too few texts"

SYSTEM = "You test claims about what a feature of a language model responds to."
WITHOUT_REASONING = """The feature is said to respond to this: {explanation}

It responds most in these excerpts, at the tokens between « and »:

{examples}

Write {count} texts of 50 to 100 words in which nothing is reasoned: no problem is solved, nothing is weighed, nothing
follows from anything. Recipes, match reports, notices, small talk or stories will do. The feature should respond to
each of them all the same, because of what the excerpts have in common in their wording. Answer with a JSON array of
{count} strings and nothing else."""
REWORDED = """The feature is said to respond to this: {explanation}

It responds in this text, at the tokens between « and »:

{example}

Write the text anew in {count} ways that mean the same and reason in the same steps, in other words and, where it can
be, in another order; above all put something else where the marks are. Answer with a JSON array of {count} strings
without the marks, and nothing else."""


class Claim(NamedTuple):
    """A feature, and what it is said to be."""

    feature: int
    explanation: str
    strongest: Excerpts  # as `Activity.excerpts` gives them


class Reading(NamedTuple):
    """How a text becomes activations."""

    model: HookedModel
    saved: SavedSae
    tokenizer: SegmentTokenizer
    rule: Rule  # which rows count: training's exclusions
    bos: int | None  # stands before every text, where the contexts have one (`Contexts.bos`)
    longest: int  # tokens: a context's

    @torch.inference_mode()
    def activations(self, texts: Sequence[str], features: Sequence[int]) -> np.ndarray:
        """Float32 (T,): the largest activation in each text, read alone, of the feature beside it; 0 without rows."""
        first = [] if self.bos is None else [self.bos]
        ids = [(first + self.tokenizer.encode_text(text))[: self.longest] for text in texts]
        out_T = np.zeros(len(texts), np.float32)
        order = sorted((t for t in range(len(texts)) if ids[t]), key=lambda t: len(ids[t]))
        for part in (order[i : i + BATCH] for i in range(0, len(order), BATCH)):
            width = max(len(ids[t]) for t in part)
            # Padding is behind the text, where a causal model does not look.
            tokens_BS = np.array([ids[t] + [0] * (width - len(ids[t])) for t in part], np.int64)
            acts_BD = self.model.activations(torch.from_numpy(tokens_BS))[self.saved.hook].bfloat16().flatten(0, 1)
            is_text = np.arange(width) < np.array([len(ids[t]) for t in part])[:, None]
            kept_BS = kept_in_text(self.rule, tokens_BS, acts_BD).reshape(is_text.shape) & is_text
            asked = sorted({features[t] for t in part})
            f_BK = self.saved.sae.columns(acts_BD.to(self.saved.sae.W_dec.device), asked).float().cpu().numpy()
            f_TSK = np.where(kept_BS[..., None], f_BK.reshape(*kept_BS.shape, -1), 0)
            for t, f_SK in zip(part, f_TSK, strict=True):
                out_T[t] = f_SK[:, asked.index(features[t])].max()
        return out_T


def reading_of(subject: Subject) -> Reading:
    """How the texts of an evaluated SAE are read: as its contexts, with a BOS where they have one."""
    return Reading(
        subject.model(),
        subject.saved,
        subject.tokenizer(),
        subject.rules[subject.saved.hook],
        bos_id(subject),
        subject.store.geometry.context_size,
    )


class _Asked(NamedTuple):
    claim: int
    kind: str  # of a text in the lists
    question: Question
    texts: int  # that it asks for
    original: str = ""  # what is reworded,
    original_activation: float = 0.0  # and how it fires alone


def candidates(injected: Sequence[dict[str, Any]], config: FalsifyConfig) -> list[int]:
    """Features to try, of `lists["token_injection"]["features"]`: the context-dependent ones, but for controls."""
    found = [each for each in injected if each["group"] != "control" and each["verdict"] == CONTEXT_DEPENDENT]
    return [int(each["feature"]) for each in found][: config.features]


def most_calls(config: FalsifyConfig, features: int) -> int:
    """Questions that will be asked at most of so many features."""
    return features * (-(-config.texts // AT_ONCE) + config.contexts)


def counterexamples(
    reading: Reading,
    claims: Sequence[Claim],
    ask_all: Callable[[Sequence[Question]], Sequence[Answer]],
    config: FalsifyConfig,
) -> dict[str, Any]:
    """The list section: of each feature its verdict, counts, and every text with its activation.

    Answers without texts are counted in `problems`, texts that copy an example as well.
    """
    excerpts = [_texts(reading.tokenizer, claim.strongest, config.contexts) for claim in claims]
    plain = [excerpt.plain for found in excerpts for excerpt in found]
    whose = [claim.feature for claim, found in zip(claims, excerpts, strict=True) for _ in found]
    ends = np.cumsum([len(found) for found in excerpts])
    alone = np.split(reading.activations(plain, whose), ends[:-1])
    references = [float(found_T.max(initial=0)) for found_T in alone]
    asked = [
        each
        for number, claim in enumerate(claims)
        if references[number] > 0
        for each in _questions(number, claim, excerpts[number], alone[number], references[number], config)
    ]
    problems: Counter[str] = Counter()
    written: list[tuple[_Asked, str]] = []
    seen = [[excerpt.plain for excerpt in found] for found in excerpts]
    for each, answer in zip(asked, ask_all([each.question for each in asked]), strict=True):
        texts = json_texts(answer.text)
        if not texts:
            problems[answer.problem or "no JSON array of texts"] += 1
        for text in texts[: each.texts]:
            if any(_is_copy(text, known) for known in seen[each.claim]):
                problems["a copy of an example or of another text"] += 1
            else:
                written.append((each, text))
                seen[each.claim].append(text)
    found_T = reading.activations([text for _, text in written], [claims[each.claim].feature for each, _ in written])
    features = []
    for number, claim in enumerate(claims):
        rows = [
            _row(each, text, float(value), references[number], config)
            for (each, text), value in zip(written, found_T, strict=True)
            if each.claim == number
        ]
        features.append({"feature": claim.feature, "reference": references[number], **_counted(rows, config)})
    rule = {"fires": config.fires, "silent": config.silent, "at_least": config.at_least}
    return {"features": features, "problems": dict(sorted(problems.items())), **rule}


def json_texts(answer: str) -> list[str]:
    """The texts of the first JSON array of strings in an answer, whatever stands around it; none if there is none."""
    decoder, at = json.JSONDecoder(), -1
    answer = answer[:READ]
    while (at := answer.find("[", at + 1)) >= 0:
        try:
            found = decoder.raw_decode(answer, at)[0]
        except ValueError:
            continue
        except RecursionError:  # untrusted text, nested deeply; from every bracket it would be read anew
            break
        if found and all(isinstance(text, str) for text in found):
            return [text.strip()[:LONGEST] for text in found if text.strip()]
    return []


def verdict(fired: int, of: int, silent: int, paraphrases: int, at_least: int) -> str:
    """What the counts say; nothing was falsified only where there were texts and paraphrases enough to try."""
    found = [name for name, count in ((FIRES, fired), (SILENT, silent)) if count >= at_least]
    if found:
        return ", ".join(found)
    return NOT_FALSIFIED if min(of, paraphrases) >= at_least else TOO_FEW


class _Excerpt(NamedTuple):
    plain: str
    marked: str  # with « » around the tokens that the feature fires on


def _texts(tokenizer: SegmentTokenizer, strongest: Excerpts, count: int) -> list[_Excerpt]:
    out = []
    for token_T, acts_T in zip(strongest.token_NT[:count].tolist(), strongest.acts_NT[:count], strict=True):
        plain = marked = tokenizer.whole.decode(token_T, skip_special_tokens=True)
        edges = np.flatnonzero(np.diff(acts_T > 0, prepend=False, append=False)).tolist()
        for n in reversed(range(len(edges))):  # a token alone may be half a character, or lose its blank
            before = len(tokenizer.whole.decode(token_T[: edges[n]], skip_special_tokens=True).rstrip("\ufffd"))
            marked = f"{marked[:before]}{'»' if n % 2 else '«'}{marked[before:]}"
        out.append(_Excerpt(plain.strip(), marked.strip()))
    return out


def _is_copy(text: str, of: str) -> bool:
    return text in of or (len(of) >= COPIED and of in text)


def _questions(
    number: int,
    claim: Claim,
    excerpts: Sequence[_Excerpt],
    alone_T: np.ndarray,
    reference: float,
    config: FalsifyConfig,
) -> list[_Asked]:
    def question(form: str, seed: int, **about: Any) -> Question:
        content = form.format(explanation=claim.explanation, **about)
        messages = (("system", SYSTEM), ("user", content))
        return Question(messages, config.max_tokens, config.temperature, config.seed + seed)

    examples = "\n\n".join(f"{n}. {excerpt.marked}" for n, excerpt in enumerate(excerpts, 1))
    out = []
    for part, start in enumerate(range(0, config.texts, AT_ONCE)):
        count = min(AT_ONCE, config.texts - start)
        asked = question(WITHOUT_REASONING, part, count=count, examples=examples)
        out.append(_Asked(number, "counterexample", asked, count))
    for excerpt, value in zip(excerpts, alone_T.tolist(), strict=True):
        if value > config.fires * reference:
            asked = question(REWORDED, 0, count=config.paraphrases, example=excerpt.marked)
            out.append(_Asked(number, "paraphrase", asked, config.paraphrases, excerpt.plain, value))
    return out


def _row(each: _Asked, text: str, value: float, reference: float, config: FalsifyConfig) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": each.kind, "text": text, "activation": value}
    row |= {"fires": value > config.fires * reference, "silent": value < config.silent * reference}
    if each.original:
        row |= {"original": each.original, "original_activation": each.original_activation}
    return row


def _counted(rows: list[dict[str, Any]], config: FalsifyConfig) -> dict[str, Any]:
    without = [row for row in rows if row["kind"] == "counterexample"]
    reworded = [row for row in rows if row["kind"] == "paraphrase"]
    fired, silent = sum(row["fires"] for row in without), sum(row["silent"] for row in reworded)
    said = verdict(fired, len(without), silent, len(reworded), config.at_least)
    counts = {"fired": fired, "of": len(without), "silent": silent, "paraphrases": len(reworded)}
    return {"verdict": said, **counts, "texts": without + reworded}
