"""Published SAEs that do not fit, and those that SAELens reads by release and id."""

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import only, pipeline
from huggingface_hub.utils import EntryNotFoundError
from sae_lens import JumpReLUSAEConfig, StandardSAEConfig
from sae_lens.loading import pretrained_sae_loaders
from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor
from test_published import HOOK, NAME, D, F, edit_cfg, linear_state, write_theirs
from test_published_stage import PATH, SETTINGS

from evaluate.figures import read_figures
from harvest.files import UserError
from train import published, saelens_releases
from train.checkpoint import load_sae
from train.published_config import PublishedFiles
from train.saelens import SaelensConfig


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
        (
            ["train=null", "published.release=a", "published.id=b", "published.file=c"],
            2,
            "file and format belong to path; a release has id alone",
        ),
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


def test_two_linear_layers_name_no_hook_and_the_settings_hook_must_fit(theirs_folder):
    torch.save(linear_state(), "sae.pt")
    linear = ("train=null", "sample.train_tokens=0", "published.path=sae.pt", "published.format=linear")
    ran = pipeline("sample", *linear, "published.hook=model.layers.0")
    assert (ran.status, "belongs to 'model.layers.0'; harvest.hooks has" in ran.out) == (1, True), ran.out
    ran = pipeline("sample", *linear, f"published.hook={NAME}")
    assert (ran.status, "sample    complete" in ran.out) == (0, True), ran.out


COMMIT = "0" * 40
RELEASE = ("train=null", "sample.train_tokens=0", "evaluate.features=null", "evaluate.steering=null")


@pytest.fixture
def asked(theirs_folder, monkeypatch) -> set[tuple[str, str, bool]]:
    """What SAELens' own loaders asked of the hub, which is the folder `hub`."""
    found = set()

    def download(repo_id: str, filename: str, revision: str, local_files_only: bool, subfolder: str = "", **_options):
        found.add((repo_id, revision, local_files_only))
        path = Path("hub", subfolder, filename)
        if not path.exists():
            raise EntryNotFoundError(filename)
        return str(path)

    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", download)
    return found


def test_tensors_of_a_release_that_do_not_fit_what_is_said_of_it(theirs_folder):
    about = SaelensConfig(Path("theirs/cfg.json"))
    tensors = safetensors.torch.load_file("theirs/sae_weights.safetensors")
    with pytest.raises(UserError, match=rf"a/b: b_enc is \(1,\); cfg.json says \({F},\)"):
        about.sae(Path("a/b"), tensors | {"b_enc": torch.zeros(1)}, 1.0)


def test_what_is_said_of_an_sae_is_read_without_its_weights(theirs_folder, monkeypatch):
    files, wanted = published._files, []
    monkeypatch.setattr(published, "_files", lambda *place: wanted.append(place[-1]) or files(*place))
    found = published.read_config("published", PublishedFiles(path="theirs"), None, True)
    assert found and found.fields["d_sae"] == F
    assert wanted == [("cfg.json",)]
    linear = PublishedFiles(path="nowhere.pt", format="linear", hook=HOOK)
    assert published.read_config("published", linear, None, True) is None


def test_a_release_that_cannot_be_loaded_is_said(theirs_folder, monkeypatch):
    def download(*_place, **_options):
        raise OSError("503 of the hub")

    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", download)
    settings = (*RELEASE, "published.release=some/body", "published.id=sae", f"published.revision={COMMIT}")
    ran = pipeline("run", *settings)
    assert ran.status == 1
    assert "some/body/sae: SAELens cannot load it (OSError: 503 of the hub)" in ran.out
    monkeypatch.setitem(sys.modules, "sae_lens.loading", None)
    ran = pipeline("run", *settings)
    assert ran.status == 1
    assert "some/body/sae: needs SAELens (" in ran.out and saelens_releases.EXTRA in ran.out


def test_a_release_in_saelens_own_form(asked):
    theirs = write_theirs(Path("hub/sae"), JumpReLUSAEConfig(d_in=D, d_sae=F, apply_b_dec_to_input=False))
    settings = (*RELEASE, "published.release=some/body", "published.id=sae", f"published.revision={COMMIT}")
    also = f"evaluate.also=[{{name: again, release: some/body, id: sae, revision: '{COMMIT}'}}]"
    fetch = pretrained_sae_loaders.hf_hub_download
    ran = pipeline("run", *settings, also)
    assert ran.status == 0, ran.out
    assert asked == {("some/body", COMMIT, False)}
    assert pretrained_sae_loaders.hf_hub_download is fetch
    saved = load_sae(only(Path(), f"runs/train/*/{HOOK}"))
    x = torch.randn(32, D, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert 0 < (theirs.encode(x) > 0).float().mean() < 1
        assert torch.allclose(saved.sae.encode(x), theirs.encode(x), rtol=1e-5, atol=1e-5)
    own, again = read_figures(only(Path(), "runs/evaluate/*")).saes
    assert own.value("l0") == again.value("l0") > 0
    assert "the published SAE <code>some/body/sae</code>" in only(Path(), "runs/evaluate/*/report.html").read_text()
    edit_cfg(Path("hub/sae"), normalize_activations="layer_norm")
    ran = pipeline("train", *settings, "published.exclude.positions=[0]", "published.runtime.offline=true")
    assert ran.status == 1
    assert "error: some/body/sae: normalize_activations: 'layer_norm' is not supported" in ran.out
    assert ("some/body", COMMIT, True) in asked


def test_a_release_that_saelens_converts(asked):
    """Llama Scope R1's form, in which thresholds are logarithms; a scale that SAELens knows is folded in by it."""
    folder = Path("hub/800M-Slimpajama-0-OpenR1-Math-220k/L1R")
    folder.mkdir(parents=True)
    cfg = {"d_model": D, "expansion_factor": 2, "hook_point_in": NAME}
    (folder / "config.json").write_text(json.dumps(cfg))
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "decoder.weight": (D, 2 * D),
        "decoder.bias": (D,),
        "encoder.weight": (2 * D, D),
        "encoder.bias": (2 * D,),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["log_jumprelu_threshold"] = torch.randn(2 * D, generator=generator)
    safetensors.torch.save_file(tensors, folder / "sae_weights.safetensors")
    release = ("published.release=llama_scope_r1_distill", "published.id=l1r_800m_slimpajama")
    ran = pipeline("run", *RELEASE, *release, f"published.revision={COMMIT}")
    assert ran.status == 0, ran.out
    said = "l1r_800m_slimpajama says that it is of 'meta-llama/Llama-3.1-8B', and model.name is 'assets/tiny-llama'"
    assert said in ran.out
    assert asked == {("fnlp/Llama-Scope-R1-Distill", COMMIT, False)}
    saved = load_sae(only(Path(), f"runs/train/*/{HOOK}"))
    assert (saved.sae.kind, saved.statistics.scale) == ("jumprelu", 1)
    scale = get_norm_scaling_factor("llama_scope_r1_distill", "l1r_800m_slimpajama")
    assert scale > 2
    x = torch.randn(32, D, generator=generator) / scale
    z = x * scale @ tensors["encoder.weight"].T + tensors["encoder.bias"]
    f = z * (z > tensors["log_jumprelu_threshold"].exp())
    assert torch.allclose(saved.sae.encode(x), f, rtol=1e-4, atol=1e-4)
    rebuilt = (f @ tensors["decoder.weight"].T + tensors["decoder.bias"]) / scale
    assert torch.allclose(saved.sae.decode(f), rebuilt, rtol=1e-4, atol=1e-4)


def test_without_saelens_a_release_says_what_to_install(theirs_folder, monkeypatch):
    saelens_releases._releases.cache_clear()
    monkeypatch.setattr(saelens_releases, "find_spec", lambda _name: None)
    ran = pipeline("status", "train=null", "published.release=some/body", "published.id=sae")
    saelens_releases._releases.cache_clear()
    assert (ran.status, "needs SAELens; `pip install -e '.[saelens]'` installs it" in ran.out) == (1, True)
