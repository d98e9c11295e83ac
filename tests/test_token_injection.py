"""Token injection on planted features, and its numbers against scipy's and numpy's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import only, pipeline
from scipy import stats
from test_activity import HOOK

from evaluate import ngrams
from evaluate.config import EvaluateConfig, ReasonScoreConfig, TokenInjectionConfig
from evaluate.effects import LARGEST, cohens_d, effect, welch_p
from evaluate.figures import read_figures
from evaluate.injected_texts import STRATEGIES, inject, windows
from evaluate.ngrams import Fired, own_ngrams
from evaluate.subject import Subject
from evaluate.token_identity import TokenIdentity
from evaluate.token_injection import analyse, choose_features, choose_texts, judged
from harvest.activation_rows import RowBatch
from harvest.hooked_model import HookedModel
from train.checkpoint import SavedSae
from train.config import ExcludeConfig
from train.exclusion import InputStatistics
from train.standard import Standard

TOKEN, BEFORE, PLACE = 7, 11, 5
SIZE, VOCABULARY = 64, 60
CONFIG = TokenInjectionConfig(features=4, read=100)


def made_text(tokens: int = 64) -> dict[str, np.ndarray]:
    """Contexts of chat (source 0) and reasoning (1), two documents each; reasoning has `BEFORE x y TOKEN` often."""
    rng = np.random.default_rng(0)
    tokens_CS = rng.integers(20, VOCABULARY, (80, tokens))
    source = np.arange(80) % 2
    for context in np.flatnonzero(source):
        for start in range(1, tokens - 8, 8):
            tokens_CS[context, start : start + 4] = BEFORE, *rng.integers(12, 14, 2), TOKEN
    np.put_along_axis(tokens_CS, rng.integers(0, tokens, (80, 1)), TOKEN, 1)  # alone
    document = np.arange(80)[:, None] * 2 + (np.arange(tokens) >= tokens // 2)
    return {"tokens": tokens_CS.astype(np.uint32), "document": document.astype(np.uint32), "source": source}


def planted_rows(ids_BS: torch.Tensor) -> torch.Tensor:
    """Rows (B, S, 8) whose dimensions are features: a token detector, one that fires on the token only after another
    three before it, one on a position, one never, and four on some tokens each. Their strength varies by text."""
    tokens_BS = ids_BS.numpy()
    is_token, before_BS = tokens_BS == TOKEN, np.zeros(tokens_BS.shape, bool)
    before_BS[:, 3:] = tokens_BS[:, :-3] == BEFORE
    at_place_BS = np.broadcast_to(np.arange(tokens_BS.shape[1]) == PLACE, tokens_BS.shape)
    planted = [is_token, is_token & before_BS, at_place_BS, 0 * is_token]
    planted += [tokens_BS % 9 == rest for rest in range(4)]
    strength = 1 + (tokens_BS.sum(1, keepdims=True) % 5) / 5
    return torch.from_numpy(np.stack([feature * strength for feature in planted], -1)).float()


class Planted(torch.nn.Module):
    """A model whose one layer gives these rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Identity()

    def forward(self, ids_BS: torch.Tensor, use_cache: bool) -> torch.Tensor:  # noqa: ARG002
        return self.layer(planted_rows(ids_BS))


class Contexts:
    """As harvest.contexts has them, in memory."""

    sources, bos = ("chat", "reasoning"), "none"

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    def count(self, _split: str) -> int:
        return len(self.arrays["source"])

    def read(self, _split: str, name: str, first: int, count: int) -> np.ndarray:
        return self.arrays[name][first : first + count]


@pytest.fixture
def subject(tmp_path, monkeypatch) -> Subject:
    """An SAE whose encoder rows are single dimensions, on the planted model and its stored rows."""
    arrays = made_text()
    tokens_CS = arrays["tokens"]
    eye = {"W_enc": torch.eye(8), "b_enc": torch.zeros(8), "W_dec": torch.eye(8), "b_dec": torch.zeros(8)}
    rows = planted_rows(torch.from_numpy(tokens_CS.astype(np.int64))).flatten(0, 1).bfloat16()
    context, position = (each.reshape(-1) for each in np.indices(tokens_CS.shape))
    zeros = np.zeros(tokens_CS.size, np.uint8)
    stored = RowBatch(
        "holdout", {HOOK: rows}, tokens_CS.reshape(-1), context, position, zeros, zeros, np.ones(len(zeros), bool)
    )
    monkeypatch.setattr(ngrams, "stored_rows", lambda *_, **__: [stored.at(slice(3000)), stored.at(slice(3000, None))])
    scores = np.array([8.0, 7, 6, 5, 4, 3, 2, 1])
    np.savez(tmp_path / f"reason_score-{HOOK}.npz", score=scores)
    model = Planted()
    return Subject(
        SavedSae(Standard(eye, 1.0), HOOK, InputStatistics(1.0, 1.0, None), {}),
        SimpleNamespace(geometry=SimpleNamespace(holdout_shards=1, shard_rows=tokens_CS.size)),
        ExcludeConfig(),
        Contexts(arrays),
        {},
        lambda: HookedModel(model, {HOOK: model.layer}, torch.device("cpu")),
        lambda: SimpleNamespace(text=lambda token: f"<{token}>"),
        None,
        None,
        EvaluateConfig(token_injection=CONFIG, reason_score=ReasonScoreConfig(sources=("reasoning",))),
        torch.device("cpu"),
        tmp_path,
    )


def analysed(subject: Subject):
    """What is found of all features, by feature, and the figures by name."""
    rows = planted_rows(torch.from_numpy(subject.contexts.arrays["tokens"].astype(np.int64))).numpy()
    nothing = np.full(8, np.nan)
    identity = TokenIdentity(*[np.zeros(0)] * 2, nothing, nothing, *[np.zeros(0)] * 3, nothing, nothing)
    section = analyse(subject, (rows > 0).mean((0, 1)), identity)
    if section is None:
        return None
    by_feature = {line["feature"]: line for line in section.lists["features"]}
    return by_feature, {figure.name: figure.value for figure in section.figures}, section.lists


def test_planted_features_get_the_verdicts_that_they_were_planted_for(subject):
    by_feature, figures, about = analysed(subject)
    verdicts = [by_feature[feature]["verdict"] for feature in range(4)]
    assert verdicts == ["token-driven", "token-driven", "context-dependent", "never fires"]
    single = [by_feature[feature]["verdict_single"] for feature in range(4)]
    assert single == ["token-driven", "context-dependent", "context-dependent", "never fires"]
    assert figures["single_token_driven_top"] == 1
    assert all(by_feature[feature]["group"] == "top" for feature in range(4))
    detector, after, place, never = (by_feature[feature] for feature in range(4))
    assert detector["tokens"] == ["<7>"] and detector["d"] > 1.5 and detector["p"] < 0.01
    assert (after["best"], after["n"]) == ("context", 4)
    assert {text.partition("<12>")[0].partition("<13>")[0] for text in after["ngrams"]} == {"<11>"}
    by_strategy = {line["strategy"]: line for line in after["strategies"]}
    assert list(by_strategy) == list(STRATEGIES)
    assert all(by_strategy[name]["d"] == 0 and by_strategy[name]["p"] == 1 for name in STRATEGIES[:3])
    assert by_strategy["context"]["d"] > 2 and after["p"] == pytest.approx(4 * by_strategy["context"]["p"])
    for line in (detector, after, place):
        best = next(each for each in line["strategies"] if each["strategy"] == line["best"])
        assert line["share"] == best["mean"] / line["reasoning"]["mean"]
    assert never["share"] is None and abs(place["d"]) < 0.8 and place["reasoning"]["mean"] > 0
    assert never == never | {"best": None, "d": None, "p": None, "strategies": [], "example": [], "tokens": []}
    control = [line for line in by_feature.values() if line["group"] == "control"]
    assert {line["feature"] for line in control} < {4, 5, 6, 7} and len(control) == 3  # one for each that fires
    assert figures == figures | {"features_top": 4, "token_driven_top": 2, "context_dependent_top": 1}
    assert figures["never_fires_top"] == 1 and figures["features_control"] == 3
    assert about["into"] == ["chat"] and about["texts"] == {"base": 5, "untouched": 24, "reasoning": 26}
    example = [token for token in after["example"] if token["injected"]]
    assert len(example) == 12 and len(after["example"]) == 24


@pytest.mark.parametrize(
    ("shift", "texts", "verdict"),
    [
        (1.0, 400, "token-driven"),
        (0.65, 400, "partially token-driven"),
        (0.35, 400, "weakly token-driven"),
        (0.1, 400, "context-dependent"),
        (0.65, 8, "context-dependent"),  # p says that it may be chance
        (-2.0, 400, "context-dependent"),
    ],
)
def test_verdicts_are_those_of_the_thresholds(shift, texts, verdict):
    rng = np.random.default_rng(1)
    standard = rng.normal(size=texts)
    standard = (standard - standard.mean()) / standard.std(ddof=1)
    assert judged(standard, standard, {"prepend": standard + shift}).verdict == verdict


def test_p_is_corrected_for_the_strategies_that_were_tried():
    rng = np.random.default_rng(3)
    untouched = rng.normal(size=40)
    injected = untouched + 0.65 * untouched.std(ddof=1)
    alone = judged(untouched, untouched, {"prepend": injected})
    assert 0.0025 < alone.p < 0.01 and alone.verdict == "partially token-driven"
    four = judged(untouched, untouched, dict.fromkeys(STRATEGIES, untouched) | {"replace": injected})
    assert (four.best, four.p) == ("replace", pytest.approx(4 * alone.p))
    assert four.verdict == "weakly token-driven"


def test_d_p_and_interval_are_scipy_s_and_numpy_s():
    rng = np.random.default_rng(0)
    for texts in (4, 20, 300):
        a, b = rng.gamma(1.5, 2, texts).astype(np.float32), rng.gamma(1, 1, 150).astype(np.float32)
        found = effect(a, b)
        assert found.p == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue, rel=1e-6)
        a, b = a.astype(np.float64), b.astype(np.float64)
        d = (a.mean() - b.mean()) / np.sqrt((a.std(ddof=1) ** 2 + b.std(ddof=1) ** 2) / 2)
        assert found.d == pytest.approx(d, rel=1e-6) and found.mean == pytest.approx(a.mean())
        draws = np.random.default_rng(0)
        picks = draws.integers(0, len(a), (1000, len(a))), draws.integers(0, len(b), (1000, len(b)))
        each = [float(cohens_d(a[i], b[j])) for i, j in zip(*picks, strict=True)]
        assert found.d_interval == pytest.approx(np.quantile(each, (0.025, 0.975)), rel=1e-6)
        assert found.d_interval[0] < d < found.d_interval[1]


def test_groups_that_do_not_vary_have_a_finite_d():
    zeros, ones = np.zeros(5), np.ones(8)
    assert (effect(ones, zeros).d, welch_p(ones, zeros)) == (LARGEST, 0)
    assert (effect(zeros, ones).d, welch_p(zeros, zeros)) == (-LARGEST, 1)
    assert effect(zeros, np.zeros(9)).d == 0 and effect(zeros, np.zeros(9)).d_interval == (0, 0)
    assert effect(np.array([0.0, 1, 2, 3]), zeros).d == pytest.approx(1.5 / np.sqrt(np.var([0, 1, 2, 3], ddof=1) / 2))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_injected_texts_hold_the_tokens_and_as_much_of_the_text_as_fits(strategy):
    base = np.arange(100, 130).reshape(3, 10)
    own = np.array([[1, 2], [3, 4], [5, 6]]) if strategy == "context" else np.array([[1], [2], [3]])
    found = inject(base, own, strategy, 3, np.random.default_rng(0))
    count = 2 if strategy == "context" else 3  # half of ten tokens stays
    for text, mask, before in zip(found.tokens_BW, found.is_injected_BW, base, strict=True):
        put = text[mask]
        assert len(text) == 10 and len(put) == count * own.shape[1]
        assert len({tuple(each) for each in put.reshape(count, -1)} & {tuple(each) for each in own}) == count
        if strategy == "replace":
            assert (text[~mask] == before[~mask]).all()
        else:
            assert text[~mask].tolist() == before[: 10 - len(put)].tolist()
        assert strategy != "prepend" or mask[:3].all()
    places = {tuple(np.flatnonzero(mask)) for mask in found.is_injected_BW}
    assert (len(places) > 1) == (strategy != "prepend")


def test_own_n_grams_are_those_of_a_plain_count():
    """Within documents and the counted rows, by the excess over the base rate, for each length."""
    rng = np.random.default_rng(0)
    tokens, document = rng.integers(0, 4, (12, 30)), np.arange(12)[:, None] * 2 + (np.arange(30) >= 13)
    counted = rng.random((12, 30)) < 0.8
    fires = np.zeros((1, 12, 30), bool)
    fires[0, :, 1:] = (tokens[:, 1:] == 2) & (tokens[:, :-1] == 3) & (rng.random((12, 29)) < 0.9)
    base = fires[0][counted].mean()

    def naive(length: int):
        seen: dict[tuple, list] = {}
        for context in range(12):
            for at in range(length - 1, 30):
                here = slice(at - length + 1, at + 1)
                if counted[context, at] and len(set(document[context, here])) == 1:
                    seen.setdefault(tuple(tokens[context, here].tolist()), []).append(fires[0, context, at])
        above = {gram: (sum(f) - len(f) * base) / (len(f) + 4) for gram, f in seen.items() if any(f)}
        best = sorted(above, key=lambda gram: -above[gram])[:10]
        return [gram for gram in best if above[gram] >= above[best[0]] / 2], above

    (own,) = own_ngrams(Fired(tokens, document, counted, fires))
    assert {tuple(gram) for gram in own.tokens_GL.tolist()} == set(naive(1)[0]) == {(2,)}
    means = {length: np.mean([naive(length)[1][gram] for gram in naive(length)[0]]) for length in (2, 3, 4)}
    longest = max(length for length in means if means[length] >= max(means.values()) / 2)
    assert longest == 3 and {tuple(gram) for gram in own.ngrams_GL.tolist()} == set(naive(3)[0])
    assert len(naive(3)[0]) == 4


def test_texts_are_of_the_second_half_and_of_their_sources(subject):
    found = choose_texts(subject, CONFIG, ["reasoning"], ["chat"])
    arrays, second = subject.contexts.arrays, np.zeros((80, SIZE), bool)
    from evaluate.halves import second_half

    second = second_half(subject.contexts, "holdout")
    text = {
        n: "".join(map(chr, np.where(second, arrays["tokens"], 9999)[arrays["source"] == n].ravel())) for n in (0, 1)
    }
    for group, source in ((found.base_BW, 0), (found.untouched_BW, 0), (found.reasoning_BW, 1)):
        assert len(group) > 3 and group.shape[1] == 24
        assert all("".join(map(chr, row)) in text[source] for row in group)
    assert not {tuple(row) for row in found.base_BW.tolist()} & {tuple(row) for row in found.untouched_BW.tolist()}


def test_a_bos_begins_every_text_and_is_in_none(subject, monkeypatch):
    monkeypatch.setattr(Contexts, "bos", "context")
    subject.contexts.arrays["tokens"][:, 0] = 1
    subject = subject._replace(chat_tokenizer=lambda: SimpleNamespace(bos_token_id=1))
    found = choose_texts(subject, CONFIG, ["reasoning"], ["chat"])
    assert found.bos == [1] and found.base_BW.shape[1] == 23
    assert not (np.concatenate([found.base_BW, found.untouched_BW, found.reasoning_BW]) == 1).any()
    by_feature, _, _ = analysed(subject)
    assert by_feature[0]["verdict"] == "token-driven"


def test_windows_lie_side_by_side_within_what_is_usable():
    tokens = np.arange(20).reshape(2, 10)
    usable = tokens != 14
    found = windows(tokens, usable, 4, np.random.default_rng(0))
    assert sorted(found.tolist()) == [[2, 3, 4, 5], [6, 7, 8, 9], [16, 17, 18, 19]]


def test_rows_that_training_leaves_out_do_not_count(subject):
    """The token detector is silent where its token is excluded."""
    by_feature, _, _ = analysed(subject._replace(exclude=ExcludeConfig(token_ids=(TOKEN,))))
    assert all(line["mean"] == 0 for line in by_feature[0]["strategies"])


def test_controls_are_living_features_of_like_density():
    density = np.geomspace(1e-4, 0.3, 400)
    density[::7] = 0
    score = np.zeros(400)
    score[[200, 300, 14]] = 3, 2, 1
    groups = choose_features(score, density, TokenInjectionConfig(features=3, seed=5))
    assert groups["top"] == [200, 300, 14]  # the last is dead
    assert len(set(groups["control"])) == 2 and not set(groups["control"]) & set(groups["top"])
    for feature, control in zip((200, 300), groups["control"], strict=True):
        assert density[control] and abs(control - feature) < 15
    assert choose_features(score, density, TokenInjectionConfig(features=3, seed=6)) != groups


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"reason_score": None}, "as there is no ReasonScore to choose features by"),
        ({"reason_score": ReasonScoreConfig()}, "as evaluate.reason_score reads all sources"),
    ],
)
def test_why_it_is_left_out_is_said(subject, config, says, capsys):
    assert analysed(subject._replace(config=subject.config.model_copy(update=config))) is None
    assert says in capsys.readouterr().out


def test_too_little_text_is_said(subject, capsys):
    few = {name: values[:8] for name, values in subject.contexts.arrays.items()}  # of chat two contexts to test with
    few["document"] = np.arange(8)[:, None] + np.zeros((1, SIZE), int)
    assert analysed(subject._replace(contexts=Contexts(few))) is None
    said = (
        "the second half of the held-out text of chat has too few texts of 24 tokens for a test; raise sample.holdout"
    )
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("into", "says"),
    [
        ("nowhere", "evaluate.token_injection.into: 'nowhere': no such source; possible: chat"),
        (
            "reasoning",
            "'reasoning': reason_score reads it, and tokens go into other text; possible: chat",
        ),
    ],
)
def test_a_source_that_cannot_be_injected_into_is_named_before_any_work(fresh_folder, into, says):
    ran = pipeline("sample", f"evaluate.token_injection.into=[{into}]")
    assert ran.status == 2 and says in ran.out.replace("\n", " ")
    assert not list(fresh_folder.glob("runs/*"))


def test_the_run_s_report_and_pages_tell_what_was_found(finished):
    run = only(finished, "runs/evaluate/*")
    sae = read_figures(run).own(HOOK)
    found = sae.lists["token_injection"]
    report = (run / "report.html").read_text()
    counts = {group: [f["verdict"] for f in found["features"] if f["group"] == group] for group in ("top", "control")}
    for group, verdicts in counts.items():
        assert sae.value(f"token_driven_{group}") == verdicts.count("token-driven")
        assert sae.value(f"features_{group}") == len(verdicts) > 0
    assert f"{counts['top'].count('token-driven')} of the {len(counts['top'])} best by ReasonScore" in report
    line = next(f for f in found["features"] if f["group"] == "top" and f["best"])
    page = (run / "features" / HOOK / f"{line['feature']}.html").read_text()
    assert line["verdict"] in page and page.count("<mark>") == sum(t["injected"] for t in line["example"])
    assert all({"explained", "own_inside", "own_outside"} <= row.keys() for row in sae.lists["reason_score"]["top"])
