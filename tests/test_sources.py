import json
from pathlib import Path

import datasets
import pytest
from conftest import TINY, contents, only, pipeline
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HTTPError, RepositoryNotFoundError

from harvest import packing
from harvest.config import Source
from harvest.files import UserError
from harvest.hub import hub_answers
from harvest.hub_files import fetch_files
from harvest.progress import Progress
from harvest.sources import open_source
from harvest.tokenizer import SegmentTokenizer
from pipeline.config import load
from pipeline.fingerprint import find_inputs

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LMSYS = Source(name="chat", path="lmsys/lmsys-chat-1m", rows="conversation", share=1)
THOUGHTS = Source(
    name="reasoning", path="open-thoughts/OpenThoughts-114k", subset="metadata", rows="reasoning", share=1
)


class ConnectError(HTTPError):
    """As the HTTP library has one: no OSError, no ConnectionError."""


@pytest.fixture
def hub(monkeypatch):
    """Makes the hub answer, or `load_dataset` and `repo_info` fail with an error."""
    monkeypatch.setattr("harvest.sources.hub_answers", lambda: True)
    monkeypatch.setattr("pipeline.fingerprint.hub_answers", lambda: True)

    def fail(error: BaseException) -> None:
        def raising(*_arguments, **_more):
            datasets.logging.get_logger("datasets.load").error("the same")
            raise error

        monkeypatch.setattr(datasets, "load_dataset", raising)
        monkeypatch.setattr(HfApi, "repo_info", raising)

    return fail


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            DatasetNotFoundError("Dataset 'lmsys/lmsys-chat-1m' is a gated dataset on the Hub."),
            r"a gated data set: accept its terms at https://huggingface.co/datasets/lmsys/lmsys-chat-1m, .*HF_TOKEN",
        ),
        (DatasetNotFoundError("Dataset 'x' doesn't exist on the Hub"), "not on the hub at this revision, or private"),
        (ConnectionError("Couldn't reach"), r"not in the local cache, and the hub does not answer; go online once"),
        (ConnectError("Name or service not known"), r"the hub failed to give it \(ConnectError: Name or service"),
        (
            ValueError("BuilderConfig 'x' not found. Available: ['default', 'metadata']"),
            "cannot be read: .*'metadata'",
        ),
    ],
)
def test_a_data_set_that_cannot_be_had_names_the_way_out(hub, caplog, error, message):
    """Once: `datasets` logs what it raises."""
    datasets.logging.set_verbosity_warning()
    hub(error)
    with pytest.raises(UserError, match=rf"sample\.sources \(chat\)\.path: 'lmsys/lmsys-chat-1m': {message}"):
        open_source(LMSYS, COMMIT, offline=False)
    assert not caplog.records


@pytest.mark.parametrize("answers", [True, False])
def test_whether_the_hub_answers_is_asked_once_and_not_for_long(monkeypatch, answers):
    """Its client goes on trying for half a minute."""
    asked = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append((url, timeout))
            if not answers:
                raise ConnectError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", Session)
    hub_answers.cache_clear()
    try:
        assert [hub_answers(), hub_answers()] == [answers, answers]
        assert asked == [(constants.ENDPOINT, 3.0)]
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        hub_answers.cache_clear()
        assert not hub_answers() and len(asked) == 1
    finally:
        hub_answers.cache_clear()


def test_offline_asks_the_cache_alone():
    with pytest.raises(UserError, match=r"not in the local cache, and sample\.runtime\.offline is set"):
        open_source(LMSYS, COMMIT, offline=True)


def test_a_full_disk_is_not_the_hubs_fault(hub):
    hub(OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        open_source(LMSYS, COMMIT, offline=False)


def test_subset_split_and_commit_reach_the_hub(hub, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **more: (asked.append((a, more)), data)[1])
    data = datasets.Dataset.from_list([dict.fromkeys(("problem", "deepseek_reasoning", "deepseek_solution"), "a")])
    open_source(THOUGHTS, COMMIT, offline=False)
    assert asked == [((THOUGHTS.path,), {"name": "metadata", "revision": COMMIT, "split": "train"})]


def test_a_look_that_takes_long_is_announced(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setattr("harvest.sources.SLOW_BYTES", 13)
    source = Source(name="t", path=str(tmp_path / "a.jsonl"), rows="text", share=1)
    open_source(source, None, offline=True)
    assert capsys.readouterr().out == "sample.sources (t): 0 GB are read to find the rows\n"
    monkeypatch.setattr("harvest.sources.SLOW_BYTES", 14)
    open_source(source, None, offline=True)
    assert capsys.readouterr().out == ""


class GatedError(GatedRepoError):
    def __init__(self) -> None:
        Exception.__init__(self, "403")


class MissingError(EntryNotFoundError):
    def __init__(self) -> None:
        Exception.__init__(self, "404")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedError, "gated: accept its terms at https://huggingface.co/a/b, then `hf auth login`"),
        (MissingError, "holds no cfg.json and sae.safetensors; set file to the place in it"),
        (lambda: ConnectError("Name or service not known"), r"cannot be fetched \(ConnectError: Name or service not"),
    ],
)
def test_files_of_the_hub_that_cannot_be_had_name_the_way_out(monkeypatch, error, message):
    def failing(*_arguments, **_more):
        raise error()

    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing)
    with pytest.raises(UserError, match=f"^train.start_from: 'a/b': {message}"):
        fetch_files("a/b", ["cfg.json", "sae.safetensors"], COMMIT, offline=False, setting="train.start_from")


class NotFoundError(RepositoryNotFoundError):
    def __init__(self) -> None:
        Exception.__init__(self, "404")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedError(), r"is gated: accept its terms at https://huggingface.co/datasets/lmsys/lmsys-chat-1m"),
        (NotFoundError(), "neither a local path nor a dataset on the hub"),
        (ConnectError("no"), r"does not answer for its branch 'main'; go online once.*\(ConnectError\)"),
    ],
)
def test_a_branch_that_cannot_be_resolved_names_the_way_out(fresh_folder, hub, error, message):
    hub(error)
    change = ["sample.sources.0.path=lmsys/lmsys-chat-1m"]
    with pytest.raises(UserError, match=rf"sample\.sources\.0\.path: 'lmsys/lmsys-chat-1m'.*{message}"):
        find_inputs(load(TINY, change), Path("runs"))


def test_a_branch_is_resolved_once_and_recorded(fresh_folder, hub, monkeypatch):
    asked = []

    def repo_info(_self, name, repo_type, revision, timeout):
        asked.append((name, repo_type, revision))
        return type("Info", (), {"sha": COMMIT})

    monkeypatch.setattr(HfApi, "repo_info", repo_info)
    config = load(TINY, ["sample.sources.1.path=open-thoughts/OpenThoughts-114k"])
    for _ in range(2):
        inputs = find_inputs(config, Path("runs"))
    assert inputs.sources[1] == f"hub:open-thoughts/OpenThoughts-114k@{COMMIT}"
    assert asked == [("open-thoughts/OpenThoughts-114k", "dataset", "main")]
    assert COMMIT in json.loads(Path("runs/.inputs.json").read_text()).values()


def test_threads_of_the_tokenizer_change_nothing(finished, fresh_folder, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(packing, "DOCUMENTS_AT_ONCE", 7)
    assert pipeline("sample").status == 0
    again = contents(only(fresh_folder, "runs/sample/*/contexts"))
    assert again == contents(only(finished, "runs/sample/*/contexts"))


@pytest.mark.parametrize("documents", [1, 20])
def test_an_interrupted_sample_goes_on_where_it_was(finished, fresh_folder, monkeypatch, documents):
    monkeypatch.setattr(packing, "DOCUMENTS_AT_ONCE", 4)
    monkeypatch.setattr(packing, "SAVE_SECONDS", 0.0)
    encoded = []
    encode, advance, left = SegmentTokenizer.encode, Progress.advance, [documents]

    def counting(self, documents):
        encoded.append(len(documents))
        return encode(self, documents)

    def interrupting(self, amount, note=""):
        left[0] -= self.title == "sample"
        if self.title == "sample" and not left[0]:
            raise KeyboardInterrupt
        advance(self, amount, note)

    monkeypatch.setattr(SegmentTokenizer, "encode", counting)
    monkeypatch.setattr(Progress, "advance", interrupting)
    assert pipeline("sample").status == 130
    assert "sample    would resume" in pipeline("status").out
    assert pipeline("sample").status == 0
    assert contents(only(fresh_folder, "runs/sample/*/contexts")) == contents(only(finished, "runs/sample/*/contexts"))
    whole = sum(encoded)
    encoded.clear()
    assert pipeline("sample", "--force", "--yes").status == 0
    assert whole - sum(encoded) <= 12  # three batches at most were tokenized twice
    assert not list(fresh_folder.glob("runs/sample/*/scratch"))
