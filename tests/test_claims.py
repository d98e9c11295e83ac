import json
import re

from markupsafe import Markup

from evaluate.claims import any_known, by_run, claims
from evaluate.compare import write_comparison
from evaluate.figures import Evaluation, Measured
from evaluate.report import environment, interval
from evaluate.visible import visible


def of(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 1, "high": value + 1}


LISTS = {
    "reason_score": {"top": [{"rank": i + 1, "feature": f, "score": 0.01 / (i + 1)} for i, f in enumerate((7, 3, 9))]},
    "token_injection": {
        "features": [{"feature": 3, "verdict": "token-driven", "verdict_single": "context-dependent", "d": 1.25}]
    },
    "explanations": {"features": [{"feature": 3, "label": "<b>sums</b>", "detection": of(0.75)}]},
    "counterexamples": {"features": [{"feature": 7, "verdict": "fires without reasoning"}]},
    "ablation": {"features": [{"feature": 9, "loss_change": of(0.5)}]},
    "steering": {
        "features": [
            {
                "feature": 7,
                "op": "set",
                "by_strength": [
                    {"strength": s if s < 9 else None, "words_per_100_tokens_change": of(s)} for s in (9.0, 4.0, 2.0)
                ],
            }
        ]
    },
}
SAE = Measured("", "h", {}, (), LISTS)


def test_each_line_gathers_what_is_known_of_its_feature():
    first, second, third = claims(SAE)
    assert [claim.feature for claim in (first, second, third)] == [7, 3, 9]
    assert (first.steered, first.falsified) == (
        {"op": "set", "strength": 4.0, **of(4.0)},
        "fires without reasoning",
    )
    assert (first.verdict, first.d, first.label, first.ablated) == ("", None, "", None)
    assert (second.verdict, second.d, second.label, second.detection) == ("token-driven", 1.25, "<b>sums</b>", of(0.75))
    assert (third.ablated, third.steered) == (of(0.5), None)
    assert len(claims(SAE, 2)) == 2


def test_a_score_alone_says_nothing():
    alone = Measured("", "h", {}, (), {"reason_score": LISTS["reason_score"]})
    assert not any_known(claims(alone))
    assert claims(Measured("", "h", {}, (), {})) == []


def test_the_table_of_the_report():
    filters = {"interval": interval, "visible": visible, "thousandths": lambda value: f"{1000 * value:.3f}"}
    html = (
        environment(filters, page_link=lambda sae, feature: Markup(f"<a>{feature}</a>"))
        .get_template("claims.html")
        .render(known=claims(SAE), sae=SAE, loop={"index": 1})
    )
    rows = [re.findall("<td>(.*?)</td>", row, re.DOTALL) for row in html.split("<tr>")[2:]]
    assert rows[0][5] == "–" and "set, strength 4" in rows[0][7] and rows[0][7].startswith("+4.00<small>+3.00 to +5.00")
    assert rows[1][2] == "&lt;b&gt;sums&lt;/b&gt;"
    assert rows[1][3] == "5.000"
    assert rows[1][5] == "token-driven<small>d = 1.25; single tokens: context-dependent</small>"
    assert rows[2][8].startswith("+0.5000<small>-0.5000 to +1.5000")


def test_runs_side_by_side(tmp_path):
    other = Measured("", "h", {"label": "theirs"}, (), {**LISTS, "ablation": {"features": []}})
    runs = [Evaluation(name, {}, "last", [], (sae,), {}) for name, sae in (("a", SAE), ("b", other))]
    known = by_run(runs)
    assert [name for name, _ in known] == ["a, h", "theirs, h"]
    write_comparison(tmp_path, [], known)
    found = json.loads((tmp_path / "compare.json").read_text())["claims"]
    assert [run["features"][2]["ablated"] for run in found] == [of(0.5), None]
    rows = (tmp_path / "compare.html").read_text().split("<h2>")[1].split("<tr>")[2:]
    assert [row.count("&lt;b&gt;sums") for row in rows] == [0, 2, 0]
    assert ["+0.5000" in row for row in rows] == [False, False, True]
