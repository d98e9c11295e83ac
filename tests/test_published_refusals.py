"""Published SAEs that do not fit, and those that SAELens reads by release and id."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import only, pipeline
from sae_lens import JumpReLUSAEConfig, StandardSAEConfig
from sae_lens.loading import pretrained_sae_loaders
from test_published import HOOK, NAME, D, F, edit_cfg, write_theirs
from test_published_stage import PATH, SETTINGS

from train import saelens_releases
from train.checkpoint import load_sae


@pytest.fixture
def theirs_folder(fresh_folder) -> Path:
    """An SAE and no runs, as the current folder."""
    write_theirs(fresh_folder / "theirs", StandardSAEConfig(d_in=D, d_sae=F))
    return fresh_folder


@pytest.mark.parametrize(
    ("settings", "status", "said"),
    [
        (["train.lr=1e-3", PATH], 2, "train: not together with published, an SAE that is there"),
        (["train=null"], 2, "train: this setting is required"),
        (["sample.train_tokens=0"], 2, "sample.train_tokens: 0: leaves nothing to train on"),
        ([*SETTINGS, "evaluate.sae=best"], 2, "evaluate.sae: 'best': a published SAE is one"),
        (
            [*SETTINGS, "harvest.hooks=[model.layers.0,model.layers.1]"],
            2,
            "harvest.hooks: model.layers.0, model.layers.1:",
        ),
        ([*SETTINGS, "harvest.hooks=[model.layers.0]"], 1, f"belongs to '{NAME}'; harvest.hooks has model.layers.0"),
        ([*SETTINGS, "published.hook=model.layers.0"], 1, f"'model.layers.0': theirs/cfg.json says '{NAME}'"),
        ([*SETTINGS, "published.revision=main"], 1, "published.revision: 'main': a local path has none"),
        ([*SETTINGS, "published.exclude.token_ids=[5000]"], 1, "published.exclude.token_ids: 5000: never occurs"),
        (
            [*SETTINGS, f"evaluate.features.include=[{F}]"],
            1,
            f"evaluate.features.include: {F}: the SAE has {F} features",
        ),
        (
            ["train=null", "published.path=./nowhere"],
            1,
            "published.path: './nowhere': there is no file nowhere/cfg.json",
        ),
        (["train=null", "published.release=a"], 2, "a release of SAELens takes release and id"),
        (["train=null", PATH, "published.release=a", "published.id=b"], 2, "set either path, or release and id"),
        (["train=null", "published.release=a", "published.id=b"], 1, "'a': SAELens knows no such release"),
        (
            ["train=null", "published.release=gemma-scope-2b-pt-res", "published.id=b"],
            1,
            "published.id: 'b': not in the release 'gemma-scope-2b-pt-res', which has ",
        ),
        (
            ["train=null", "published.release=gemma-scope-2b-pt-res", "published.id=embedding/width_4k/average_l0_6"],
            1,
            "the hub does not answer",
        ),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_runs(theirs_folder, settings, status, said):
    ran = pipeline("run", *settings)
    assert ran.status == status, ran.out
    assert said in ran.out
    assert not list(Path().glob("runs/*/*"))


def test_another_width_or_damage_is_said_before_anything_runs(theirs_folder):
    write_theirs(Path("wide"), StandardSAEConfig(d_in=2 * D, d_sae=F))
    ran = pipeline("run", *SETTINGS, "published.path=wide")
    assert (ran.status, f"wide/cfg.json: an SAE of d_in {2 * D}; assets/tiny-llama has {D}" in ran.out) == (1, True)
    assert not list(Path().glob("runs/*/*"))
    path = Path("theirs/sae_weights.safetensors")
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors | {"b_enc": torch.full((F,), torch.nan)}, path)
    ran = pipeline("run", *SETTINGS)
    assert (ran.status, "b_enc holds a NaN or an infinity" in ran.out) == (1, True)
    assert not list(Path().glob("runs/train/*/manifest.json"))
    assert pipeline("stream", *SETTINGS).out.startswith("error: published: nothing is trained")


def test_a_release_by_saelens(theirs_folder, monkeypatch):
    """SAELens' own loaders, its hub a local folder; what they fetch is that of the commit."""
    theirs = write_theirs(Path("hub/sae"), JumpReLUSAEConfig(d_in=D, d_sae=F, apply_b_dec_to_input=False))
    commit, asked = "0" * 40, []

    def download(repo_id: str, filename: str, revision: str, local_files_only: bool, **_options) -> str:
        asked.append((repo_id, revision, local_files_only))
        return str(Path("hub") / filename) if Path("hub", filename).exists() else missing()

    def missing():
        from huggingface_hub.utils import EntryNotFoundError

        raise EntryNotFoundError("none")

    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", download)
    settings = ("train=null", "published.release=some/body", "published.id=sae", f"published.revision={commit}")
    ran = pipeline("run", *settings, "sample.train_tokens=0", "evaluate.features=null", "evaluate.steering=null")
    assert ran.status == 0, ran.out
    assert {*asked} == {("some/body", commit, False)}
    assert pretrained_sae_loaders.hf_hub_download is download
    saved = load_sae(only(Path(), f"runs/train/*/{HOOK}"))
    x = torch.randn(32, D, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert 0 < (theirs.encode(x) > 0).float().mean() < 1
        assert torch.allclose(saved.sae.encode(x), theirs.encode(x), rtol=1e-5, atol=1e-5)
    assert "some/body/sae" in only(Path(), "runs/evaluate/*/report.html").read_text()
    edit_cfg(Path("hub/sae"), architecture="gated")
    ran = pipeline("train", *settings, "published.exclude.positions=[0]", "sample.train_tokens=0")
    assert ran.status == 1
    assert (
        "published.release: some/body/sae: SAELens cannot load it" in ran.out or "'gated' is not supported" in ran.out
    )


def test_without_saelens_a_release_says_what_to_install(theirs_folder, monkeypatch):
    saelens_releases._releases.cache_clear()
    monkeypatch.setattr(saelens_releases, "find_spec", lambda _name: None)
    ran = pipeline("status", "train=null", "published.release=some/body", "published.id=sae")
    saelens_releases._releases.cache_clear()
    assert (ran.status, "needs SAELens; `pip install -e '.[saelens]'` installs it" in ran.out) == (1, True)
