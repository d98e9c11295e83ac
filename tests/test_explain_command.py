"""What `pipeline explain` refuses, asks before it sends text, and how other commands see its directory."""

import socket

import pytest
from conftest import only, pipeline, start
from oracle_server import MODEL, serving
from oracles import oracle
from planted import EVALUATED, HOOK
from test_explain import explain, folder, options, planted, quick, run_of  # noqa: F401 - fixtures

from evaluate.explain_config import ExplainConfig, endpoint_of
from evaluate.explanations import Explanation, others
from harvest.files import UserError
from pipeline.explain import Request, is_here


def refused(*arguments: str) -> str:
    ran = pipeline(*arguments)
    assert ran.status in (1, 2), ran.out
    assert not list(run for run in __import__("pathlib").Path("runs/explain").glob("*/manifest.json"))
    return ran.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--feature", "500"], "explain.feature_ids: 500: the SAE has 128 features, 0 to 127"),
        (["--feature", "77"], f"explain.feature_ids: 77: it fires on no held-out row ({HOOK}); take it out"),
        (["explain.tokens=16", "--feature", "1"], "a test needs 4"),
        (["--feature", "1", "--feature", "1"], "feature_ids"),
        (["--model", "another"], "explain.model: 'another'"),
        (["evaluate.features=null"], "evaluate.features: null: explain reads what it writes"),
        (["explain.runtime.api_key_env=NO_SUCH_KEY"], "explain.runtime.api_key_env: NO_SUCH_KEY: this variable is not"),
        (["explain.runtime.api_key_env=sk-123"], "the name of an environment variable is meant"),
        (["explain.test=3"], "explain.test: unknown setting; did you mean 'tests'?"),
        (["evaluate.seed=1"], "unknown setting"),
        (["train.lr=3e-3"], "explain: the evaluate stage for these settings is not complete"),
    ],
)
def test_what_cannot_be_is_said(folder, arguments, says):  # noqa: F811
    with serving(oracle) as server:
        assert says in " ".join(refused(*options(server, *arguments)).split())
        assert not server.answered
