import json
import shutil
from pathlib import Path

import pytest
import real
import sae_lens
import torch
import yaml
from conftest import contents, only, pipeline, unlisted

from harvest.activation_store import ActivationStore
from harvest.language_model import saelens_hook
from train.checkpoint import load_sae

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
    x, scale = torch.cat(chunks).view(torch.bfloat16).float()[:10_000], ours.statistics.scale
    assert x.shape == (10_000, 576)
    usual = x.norm(dim=1) <= ours.statistics.norm_limit
    f = ours.sae.encode(x * scale)
    x_hat = ours.sae.decode(f) / scale
    assert 0.01 < (f > 0).float().mean() < 0.5
    for rows in (usual, slice(None)):
        with torch.no_grad():
            assert relative(theirs.encode(x[rows]), f[rows]) < 1e-5
            assert relative(theirs(x[rows]), x_hat[rows]) < 1e-5
    theirs.load_state_dict(ours.sae._asdict())  # the scale is not folded in: other features by far
    with torch.no_grad():
        assert relative(theirs.encode(x[usual]), f[usual]) > 0.5
        assert relative(theirs(x[usual]), x_hat[usual]) > 1e-3  # through the biases alone, as ReLU(s·x) = s·ReLU(x)


def test_the_fields_that_saelens_would_guess_wrong(exported):
    theirs = sae_lens.SAE.load_from_disk(exported / FOLDER).cfg
    assert theirs.architecture() == "standard"
    assert theirs.apply_b_dec_to_input is False
    assert theirs.normalize_activations == "none"
    assert theirs.metadata.hook_name == FOLDER
    assert theirs.metadata.hf_hook_name == HOOK
    assert theirs.metadata.model_name == "tiny/llama"
    assert theirs.metadata.dataset_path == "tiny-chat.jsonl, tiny-reasoning.jsonl"
    assert theirs.metadata.context_size == 16


def test_the_model_card_is_filled(exported):
    card = (exported / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "tiny/llama"
    assert "datasets" not in front  # local files are no data sets of the hub
    metrics = json.loads(only(exported.parent.parent, "evaluate/*/metrics.json").read_text())["saes"][HOOK]
    row = next(line for line in card.splitlines() if line.startswith(f"| `{FOLDER}`"))
    assert f"{metrics['fidelity']['outliers_excluded']['all']['explained_variance']:.3f}" in row
    assert f"{metrics['downstream']['all']['ce_loss_score']:.3f}" in row
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
