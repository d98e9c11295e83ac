import json
import shutil
import stat
from pathlib import Path

import pytest
import real
import sae_lens
import torch
import yaml
from conftest import TINY, contents, only, pipeline, unlisted
from huggingface_hub import HfApi
from huggingface_hub.hf_api import DatasetInfo
from sae_lens.load_model import load_model
from transformer_lens.loading_from_pretrained import make_model_alias_map

from evaluate.figures import read_figures
from harvest import language_model
from harvest.activation_store import ActivationStore
from harvest.config import ModelConfig
from harvest.files import write_sealed
from harvest.language_model import saelens_hook
from pipeline.config import load
from pipeline.export import TRANSFORMER_LENS, Exported, _metadata, source_terms
from pipeline.stages import find_runs
from train.checkpoint import load_sae
from train.standard import Standard

HOOK = "model.layers.1"
FOLDER = "blocks.1.hook_resid_post"


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture
def exported(run_folder) -> Path:
    ran = pipeline("export", "--model-name", "tiny/llama")
    assert ran.status == 0, ran.out
    return Path(ran.out.strip())


def test_saelens_opens_it_and_agrees_on_real_rows(real_folder):
    """10,000 held-out rows of SmolLM2; the rows without outliers too, which would hide all others in a norm."""
    ran = pipeline("export", *real.SETTINGS, config=real.CONFIG)
    assert ran.status == 0, ran.out
    theirs = sae_lens.SAE.load_from_disk(Path(ran.out.strip()) / "blocks.2.hook_resid_post")
    ours = load_sae(only(real_folder, f"runs/train/*/{real.HOOK}"))
    store = ActivationStore.open(only(real_folder, "runs/harvest/*/store"))
    chunks = [torch.from_numpy(store.read_chunk("holdout", real.HOOK, chunk)) for chunk in range(10)]
    x = torch.cat(chunks).view(torch.bfloat16).float()[:10_000]
    assert x.shape == (10_000, 576)
    usual = x.norm(dim=1) <= ours.statistics.norm_limit
    f = ours.sae.encode(x)
    x_hat = ours.sae.decode(f)
    assert 0.01 < (f > 0).float().mean() < 0.5
    for rows in (usual, slice(None)):
        with torch.no_grad():
            assert relative(theirs.encode(x[rows]), f[rows]) < 1e-5
            assert relative(theirs(x[rows]), x_hat[rows]) < 1e-5
    theirs.load_state_dict(ours.sae.parameters)  # the scale is not folded in: other features by far
    with torch.no_grad():
        assert relative(theirs.encode(x[usual]), f[usual]) > 0.5
        assert relative(theirs(x[usual]), x_hat[usual]) > 1e-3  # through the biases alone, as ReLU(s·x) = s·ReLU(x)


def test_the_fields_that_saelens_would_guess_wrong(exported):
    theirs = sae_lens.SAE.load_from_disk(exported / FOLDER).cfg
    assert theirs.architecture() == "standard"
    assert theirs.apply_b_dec_to_input is False
    assert theirs.normalize_activations == "none"
    assert theirs.metadata.hf_hook_name == HOOK
    assert theirs.metadata.model_name == "tiny/llama"
    assert theirs.metadata.dataset_path == "tiny-chat.jsonl, tiny-reasoning.jsonl"
    assert theirs.metadata.context_size == 16


def test_the_model_card_is_filled(exported):
    card = (exported / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "tiny/llama"
    assert "datasets" not in front  # local files are no data sets of the hub
    measured = read_figures(only(exported.parent.parent, "evaluate/*")).own(HOOK)
    row = next(line for line in card.splitlines() if line.startswith(f"| `{FOLDER}`"))
    forms = {"l0": ".1f", "explained_variance": ".3f", "explained_variance_legacy": ".3f", "ce_loss_score": ".3f"}
    written = [format(measured.value(name), form) for name, form in forms.items()]
    assert row.split("|")[-6:-1] == [f" {text} " for text in [*written, f"{measured.value('dead_fraction'):.2%}"]]
    assert "10 times the median" in card
    assert "assets/" not in card  # paths tell of the machine


def test_an_sae_that_was_not_evaluated(run_folder):
    shutil.rmtree(run_folder / "runs" / "evaluate")
    ran = pipeline("export", "--to", "out")
    assert ran.status == 0, ran.out
    assert "were not evaluated" in Path("out/README.md").read_text()


def test_each_sae_of_a_sweep_gets_a_folder(run_folder):
    sweep = ("train.sweep.l1_coefficient=[1,2]", "train.epochs=0.5")
    assert pipeline("train", *sweep).status == 0
    ran = pipeline("export", *sweep, "--to", "out")
    assert ran.status == 0, ran.out
    folders = {f"{FOLDER}/l1_coefficient-{value}" for value in (1, 2)}
    assert {sae["folder"] for sae in json.loads(Path("out/export.json").read_text())["saes"]} == folders
    for folder in folders:
        sae_lens.SAE.load_from_disk(f"out/{folder}")
    assert all(f"`{folder}`" in Path("out/README.md").read_text() for folder in folders)


def test_a_foreign_folder_is_never_touched(run_folder):
    out = Path("out")
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for options in ((), ("--force",)):
        ran = pipeline("export", "--to", "out", *options)
        assert ran.status == 1
        assert "not an export of this project" in ran.out
        assert contents(Path("out")) == {"thesis.txt": b"mine"}


def test_a_marker_that_is_not_of_an_export_is_named(run_folder):
    out = Path("out")
    out.mkdir()
    for marker in ({"schema": 2, "files": []}, {"schema": 1, "files": "all"}):
        write_sealed(out / "export.json", marker)
        before = contents(out)
        ran = pipeline("export", "--to", "out", "--force")
        assert ran.status == 1
        assert "out/export.json: not the marker of an export of this project" in ran.out
        assert contents(out) == before


def test_an_sae_that_saelens_has_not_is_not_exported(run_folder, monkeypatch):
    monkeypatch.setattr(Standard, "saelens", None)
    ran = pipeline("export", "--to", "out")
    assert ran.status == 1
    assert "an SAE of kind standard cannot be exported: SAELens has none with the same activations" in ran.out
    assert not list(Path().glob("*out*"))


def test_an_export_is_written_anew_only_with_force_and_alone(run_folder):
    assert pipeline("export", "--to", "out").status == 0
    before = contents(Path("out"))
    ran = pipeline("export", "--to", "out")
    assert ran.status == 1
    assert "--force" in ran.out
    assert pipeline("export", "--to", "out", "--force").status == 0
    assert contents(Path("out")) == before
    Path("out/notes.txt").write_text("mine")
    ran = pipeline("export", "--to", "out", "--force")
    assert ran.status == 1
    assert "notes.txt" in ran.out
    assert contents(Path("out")) == before | {"notes.txt": b"mine"}
    assert not list(Path().glob(".out*"))


def test_an_export_needs_a_trained_sae(run_folder):
    shutil.rmtree(run_folder / "runs" / "train")
    ran = pipeline("export", "--to", "out")
    assert ran.status == 1
    assert "not complete" in ran.out
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model-name", "./llama"], "--model-name './llama': a hub id is owner/name"),
        (["evaluate.sae=best"], f"{HOOK}/best does not exist; evaluate.sae=last exports the last one"),
    ],
)
def test_what_cannot_be_exported(run_folder, arguments, says):
    best = only(run_folder, f"runs/train/*/{HOOK}/best")
    shutil.rmtree(best)
    unlisted(best.parents[1])  # as of a training that validated nothing
    ran = pipeline("export", *arguments, "--to", "out")
    assert ran.status == 1 and says in ran.out, ran.out
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("about", "terms"),
    [
        ({"cardData": {"license": "mit"}}, ("mit", "open")),
        ({"cardData": {"license": ["mit", "cc0-1.0"]}}, ("mit, cc0-1.0", "open")),
        ({"cardData": {}}, (None, "open")),
        ({}, (None, "open")),
        ({"gated": "auto", "cardData": {"license": "other"}}, ("other", "gated")),
        ({"private": True}, (None, "private")),
    ],
)
def test_terms_are_those_of_the_hub(monkeypatch, about, terms):
    said = {"private": False, "gated": False, "downloads": 0, "likes": 0, "tags": []}
    monkeypatch.setattr(HfApi, "dataset_info", lambda _self, name, **_: DatasetInfo(id=name, **said | about))
    assert source_terms("some/set") == terms


def test_terms_that_the_hub_does_not_tell_are_not_open():
    assert source_terms("some/set") == (None, "not looked up (OfflineModeIsEnabled)")  # the tests are offline


def test_an_export_that_breaks_off_leaves_nothing(run_folder):
    weights = only(run_folder, f"runs/train/*/{HOOK}/sae_weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "sae_weights.safetensors: missing, or changed" in pipeline("export", "--to", "out").out
    unlisted(weights.parents[1])
    ran = pipeline("export", "--to", "out")
    assert ran.status == 1
    assert "damaged" in ran.out
    assert not list(Path().glob("*out*")) and not list(Path().glob(".out*"))


@pytest.mark.parametrize(
    ("hook", "name"),
    [
        ("model.layers.17", "blocks.17.hook_resid_post"),
        ("transformer.h.3", "blocks.3.hook_resid_post"),
        ("blocks.3.hook_resid_post", "blocks.3.hook_resid_post"),
        ("model.layers.3.mlp", None),
        ("model.layers.3.mlp.experts.7", None),
    ],
)
def test_saelens_names(hook, name):
    assert saelens_hook(hook) == name


def test_an_export_never_goes_through_a_link(run_folder):
    Path("target").mkdir()
    Path("link").symlink_to("target")
    ran = pipeline("export", "--to", "link", "--force")
    assert ran.status == 1
    assert "link: is a link; choose the folder itself" in ran.out
    assert not list(Path("target").iterdir())


def test_every_file_has_the_mode_of_the_umask(exported):
    usual = exported.parent / "usual"
    usual.write_text("")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in exported.rglob("*") if path.is_file()}
    assert set(modes) == {"README.md", "cfg.json", "export.json", "sae_weights.safetensors"}
    assert set(modes.values()) == {stat.S_IMODE(usual.stat().st_mode)}


def test_the_models_that_transformer_lens_loads_by_name():
    """Exports read a list, since the library need not be installed."""
    assert {name for name in make_model_alias_map() if "/" in name} == TRANSFORMER_LENS


@pytest.mark.parametrize(
    ("model", "hook", "class_name", "name"),
    [
        ("EleutherAI/Pythia-70m", HOOK, "HookedTransformer", FOLDER),
        ("EleutherAI/pythia-70m", "model.layers.1.mlp", "AutoModelForCausalLM", "model.layers.1.mlp"),
        ("tiny/llama", HOOK, "AutoModelForCausalLM", HOOK),
        ("tiny/llama", FOLDER, "AutoModelForCausalLM", HOOK),  # the settings may name it as SAELens does
        ("EleutherAI/pythia-70m", FOLDER, "HookedTransformer", FOLDER),
    ],
)
def test_the_hook_is_named_as_the_model_class_has_it(fresh_folder, model, hook, class_name, name):
    runs = find_runs(load(TINY, [f"harvest.hooks=[{hook}]"]), Path("runs"))[0]
    metadata = _metadata(Exported(runs, hook, "", Path()), model)
    assert (metadata["model_class_name"], metadata["hook_name"]) == (class_name, name)
    assert metadata["hf_hook_name"] == (HOOK if hook == FOLDER else hook)
    assert metadata["hook_layer"] == 1
    assert metadata["transformer_lens_hook_name"] == (None if "mlp" in hook else FOLDER)


def test_the_fields_that_sae_bench_and_sae_dashboard_ask_for(exported):
    """sae-bench 0.6.0's `load_and_format_sae` and core evaluation, and SAEDashboard 0.8.0, read these of the cfg."""
    cfg = sae_lens.SAE.load_from_disk(exported / FOLDER).cfg
    asked = ("hook_name", "hook_layer", "model_name", "context_size", "prepend_bos", "model_from_pretrained_kwargs")
    assert {name: cfg.metadata.get(name, "absent") for name in asked} == {
        "hook_name": HOOK,
        "hook_layer": 1,
        "model_name": "tiny/llama",
        "context_size": 16,
        "prepend_bos": False,
        "model_from_pretrained_kwargs": {},
    }
    assert (cfg.dtype, cfg.d_in, cfg.d_sae, cfg.metadata.hook_head_index) == ("float32", 32, 128, None)
    json.dumps(cfg.to_dict())  # sae-bench writes it beside its figures


def test_sae_lens_reads_the_hook_that_was_exported(exported):
    """As sae-bench does: the class and the hook of the cfg, and rows as our model gives them."""
    cfg = sae_lens.SAE.load_from_disk(exported / FOLDER).cfg
    model = load_model(cfg.metadata.model_class_name, "assets/tiny-llama", "cpu", {}, [cfg.metadata.hook_name])
    tokens = torch.arange(20).view(2, 10)
    _, cache = model.run_with_cache(
        tokens, prepend_bos=False, names_filter=[cfg.metadata.hook_name], stop_at_layer=cfg.metadata.hook_layer + 1
    )
    here = language_model.load_model(
        ModelConfig(name="assets/tiny-llama"), None, [HOOK], torch.float32, torch.device("cpu")
    )
    expected = here.activations(tokens)[HOOK]
    assert relative(cache[cfg.metadata.hook_name].float(), expected) < 0.02  # SAELens keeps the weights' bfloat16
