import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import sae_lens
import safetensors.torch
import torch
from conftest import only, pipeline
from sae_lens import JumpReLUSAEConfig, StandardSAEConfig, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata

from evaluate.config import PublishedSae
from evaluate.figures import read_figures
from harvest.activation_store import ActivationStore
from harvest.files import UserError
from train.exclusion import InputStatistics
from train.published import load_published

HOOK = "model.layers.1"
NAME = "blocks.1.hook_resid_post"
D, F = 32, 48


@pytest.fixture(scope="module")
def store(finished) -> ActivationStore:
    return ActivationStore.open(only(finished, "runs/harvest/*/store"))


@pytest.fixture(scope="module")
def rows(store) -> torch.Tensor:
    return torch.from_numpy(store.read_chunk("holdout", HOOK, 0)).view(torch.bfloat16).float()


def load(folder: Path, store: ActivationStore, **settings):
    published = PublishedSae(name="theirs", path=str(folder), **settings)
    statistics = {HOOK: InputStatistics(0.5, 1.0, None)}
    return load_published("evaluate.also (theirs)", published, None, store, statistics.__getitem__, offline=True)


def write_theirs(folder: Path, config, hook: str = NAME) -> sae_lens.SAE:
    """An SAE that SAELens wrote, with every weight drawn at random."""
    config.metadata = SAEMetadata(hook_name=hook, model_name="tiny", model_from_pretrained_kwargs={})
    sae = sae_lens.SAE.get_sae_class_for_architecture(config.architecture())(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sae.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(drawn.abs() if name == "threshold" else drawn * 0.3)
    sae.save_model(folder)
    return sae


def edit_cfg(folder: Path, **fields) -> None:
    path = folder / "cfg.json"
    cfg = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in cfg.items() if value != "absent"}))


def old_form(folder: Path, **fields) -> None:
    """Rewrite cfg.json as SAELens 5.5.2 did: one flat object."""
    path = folder / "cfg.json"
    cfg = json.loads(path.read_text())
    cfg.pop("metadata", None)
    old = {
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "finetuning_scaling_factor": False,
        "model_name": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "hook_name": NAME,
        "hook_layer": 1,
        "hook_head_index": None,
        "prepend_bos": True,
        "dataset_path": "lmsys",
        "dtype": "torch.float32",
        "sae_lens_training_version": "5.5.2",
        "seqpos_slice": [None],
    }
    path.write_text(json.dumps(cfg | old | fields))


def agrees(saved, theirs: sae_lens.SAE, x: torch.Tensor) -> None:
    scale = saved.statistics.scale
    with torch.no_grad():
        expected, rebuilt = theirs.encode(x * scale), theirs(x * scale) / scale
    f = saved.sae.encode(x)
    assert 0 < (expected > 0).float().mean() < 1
    assert torch.allclose(f, expected, rtol=1e-5, atol=1e-5 * expected.max().item())
    assert torch.allclose(saved.sae.decode(f), rebuilt, rtol=1e-5, atol=1e-5 * rebuilt.abs().max().item())


@pytest.mark.parametrize(
    "config",
    [
        StandardSAEConfig(d_in=D, d_sae=F, apply_b_dec_to_input=True),
        StandardSAEConfig(d_in=D, d_sae=F, apply_b_dec_to_input=False),
        JumpReLUSAEConfig(d_in=D, d_sae=F, apply_b_dec_to_input=True),
        TopKSAEConfig(d_in=D, d_sae=F, k=7),
    ],
    ids=["standard", "b_dec not subtracted", "jumprelu", "topk"],
)
def test_what_saelens_wrote_is_the_same_sae(tmp_path, store, rows, config):
    theirs = write_theirs(tmp_path / "sae", config)
    saved = load(tmp_path / "sae", store)
    assert saved.statistics.scale == 1
    agrees(saved, theirs, rows)
    agrees(saved._replace(sae=saved.sae.to("cpu")), theirs, rows)


def test_the_old_form_of_cfg(tmp_path, store, rows):
    theirs = write_theirs(tmp_path / "sae", StandardSAEConfig(d_in=D, d_sae=F, apply_b_dec_to_input=True))
    old_form(tmp_path / "sae", apply_b_dec_to_input="absent", normalize_activations=None)
    edit_cfg(tmp_path / "sae")  # apply_b_dec_to_input is true where it is absent
    reopened = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    assert reopened.cfg.apply_b_dec_to_input is True
    saved = load(tmp_path / "sae", store)
    agrees(saved, theirs, rows)
    assert saved.about["cfg"]["model_name"].startswith("deepseek-ai")


def test_scaled_rows_take_the_scale_of_this_store(tmp_path, store, rows):
    theirs = write_theirs(tmp_path / "sae", StandardSAEConfig(d_in=D, d_sae=F, apply_b_dec_to_input=False))
    for form in ("expected_average_only_in", True):
        old_form(tmp_path / "sae", normalize_activations=form)
        saved = load(tmp_path / "sae", store)
        assert saved.statistics.scale == 0.5
        agrees(saved, theirs, rows)


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_post", "blocks.2.hook_resid_pre", "model.layers.1"])
def test_names_of_the_same_hook(tmp_path, store, hook):
    write_theirs(tmp_path / "sae", StandardSAEConfig(d_in=D, d_sae=F), hook)
    assert load(tmp_path / "sae", store).hook == HOOK


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "gated"}, "architecture: 'gated' is not supported"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn: 'tanh-relu' is not supported"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations: 'layer_norm' is not supported"),
        ({"reshape_activations": "hook_z"}, "reshape_activations: 'hook_z' is not supported"),
        ({"hook_head_index": 3}, "hook_head_index: 3 is not supported"),
        ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input: 'yes' is not supported"),
        ({"d_in": 64}, "an SAE of d_in 64; the store"),
        ({"d_sae": 64}, "W_enc is (32, 48); cfg.json says (32, 64)"),
        ({"d_sae": "many"}, "d_sae: 'many': a whole number above 0 expected"),
        ({"metadata": {"hook_name": "blocks.0.hook_resid_post"}}, "belongs to 'blocks.0.hook_resid_post'; the store"),
        ({"metadata": {}}, "names no hook"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(tmp_path, store, fields, message):
    write_theirs(tmp_path / "sae", StandardSAEConfig(d_in=D, d_sae=F))
    edit_cfg(tmp_path / "sae", **fields)
    with pytest.raises(UserError) as error:
        load(tmp_path / "sae", store)
    assert message in str(error.value)


def test_a_hook_that_contradicts_cfg(tmp_path, store):
    write_theirs(tmp_path / "sae", StandardSAEConfig(d_in=D, d_sae=F))
    with pytest.raises(UserError, match=r"'blocks.0.hook_resid_post': .* says 'blocks.1.hook_resid_post'"):
        load(tmp_path / "sae", store, hook="blocks.0.hook_resid_post")


def test_a_hook_of_the_settings_is_that_of_an_sae_that_names_none(tmp_path, store):
    write_theirs(tmp_path / "sae", TopKSAEConfig(d_in=D, d_sae=F, k=7))
    edit_cfg(tmp_path / "sae", metadata={})
    assert load(tmp_path / "sae", store, hook=NAME).hook == "model.layers.1"
    edit_cfg(tmp_path / "sae", k=F + 1)
    with pytest.raises(UserError, match=rf"cfg.json: k: {F + 1}: more than d_sae = {F}"):
        load(tmp_path / "sae", store, hook=NAME)


def header(shape: list[int], length: int) -> bytes:
    text = json.dumps({"W_enc": {"dtype": "F32", "shape": shape, "data_offsets": [0, length]}}).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a safetensors file at all",
        struct.pack("<Q", 1 << 45) + b"{}",
        header([1 << 20, 1 << 20], 4 << 40) + b"\0" * 64,
        header([D, F], D * F * 4) + b"\0" * 64,
    ],
    ids=["empty", "text", "header of terabytes", "tensor of terabytes", "cut short"],
)
def test_damaged_weights(tmp_path, store, content):
    write_theirs(tmp_path / "sae", StandardSAEConfig(d_in=D, d_sae=F))
    (tmp_path / "sae/sae_weights.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"sae_weights.safetensors: damaged, or not a safetensors file"):
        load(tmp_path / "sae", store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b_enc": torch.zeros(F - 1)}, "b_enc is"),
        ({"b_dec": torch.full((D,), torch.nan)}, "b_dec holds a NaN"),
        ({"scaling_factor": torch.full((F,), 2.0)}, "finetuning_scaling_factor"),
        ({"W_dec": None}, "holds no W_dec"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, store, change, message):
    write_theirs(tmp_path / "sae", StandardSAEConfig(d_in=D, d_sae=F))
    path = tmp_path / "sae/sae_weights.safetensors"
    tensors = safetensors.torch.load_file(path) | change
    safetensors.torch.save_file({name: t for name, t in tensors.items() if t is not None}, path)
    with pytest.raises(UserError, match=message):
        load(tmp_path / "sae", store)


def linear_state() -> dict[str, torch.Tensor]:
    """What qresearch's class of two Linear layers saves."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"decoder.weight": (D, F), "decoder.bias": (D,), "encoder.weight": (F, D), "encoder.bias": (F,)}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def test_two_linear_layers(tmp_path, store, rows):
    state = linear_state()
    torch.save(state, tmp_path / "sae.pt")
    saved = load(tmp_path / "sae.pt", store, format="linear", hook=NAME)
    encoder, decoder = torch.nn.Linear(D, F), torch.nn.Linear(F, D)
    encoder.load_state_dict({"weight": state["encoder.weight"], "bias": state["encoder.bias"]})
    decoder.load_state_dict({"weight": state["decoder.weight"], "bias": state["decoder.bias"]})
    with torch.no_grad():
        f = torch.relu(encoder(rows))
        assert torch.allclose(saved.sae.encode(rows), f, rtol=1e-5, atol=1e-4)
        assert torch.allclose(saved.sae.decode(f), decoder(f), rtol=1e-5, atol=1e-3)
    assert (saved.hook, saved.statistics.scale) == (HOOK, 1)


class Code:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, store, zipped):
    path, target = tmp_path / "sae.pt", tmp_path / "was-run"
    torch.save(linear_state() | {"code": Code(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="it was not run"):
        load(path, store, format="linear", hook=NAME)
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"W": torch.zeros(3)}, "holds 'W'; expected encoder.weight"),
        (torch.zeros(3), "holds Tensor; expected"),
        (linear_state() | {"encoder.bias": torch.zeros(F + 1)}, "do not fit each other"),
        (linear_state() | {"encoder.bias": torch.tensor(1.0)}, "do not fit each other"),
    ],
)
def test_a_pt_of_something_else(tmp_path, store, content, message):
    torch.save(content, tmp_path / "sae.pt")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "sae.pt", store, format="linear", hook=NAME)
    (tmp_path / "sae.pt").write_bytes((tmp_path / "sae.pt").read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path / "sae.pt", store, format="linear", hook=NAME)


def test_ours_exported_and_read_back_has_our_figures(run_folder):
    assert pipeline("export", "--to", "out").status == 0
    torch.save(linear_state(), "linear.pt")
    also = (
        "evaluate.also=[{name: again, path: out, file: blocks.1.hook_resid_post},"
        f" {{name: linear, path: linear.pt, format: linear, hook: {NAME}}}]"
    )
    before = pipeline("path", "evaluate").out
    assert pipeline("path", "evaluate", also).out != before
    ran = pipeline("evaluate", also)
    assert ran.status == 0, ran.out
    folder = Path(pipeline("path", "evaluate", also).out.strip())
    ours, again, _ = read_figures(folder).saes
    for section in ("fidelity", "downstream"):
        a, b = (
            {(*key, name): f.value for key, by in sae.table(section).items() for name, f in by.items()}
            for sae in (ours, again)
        )
        assert a == pytest.approx(b, rel=1e-4)
    html = (folder / "report.html").read_text()
    assert "Beside third-party SAEs" in html
    assert html.count('<h3 id="also-') == 2
    assert (folder / "density-also-again.npy").exists()

    weights = Path("linear.pt")  # by content: the same file elsewhere is the same, another one is not
    Path("elsewhere").mkdir()
    shutil.copy(weights, "elsewhere")
    assert pipeline("path", "evaluate", also.replace("linear.pt", "elsewhere/linear.pt")).out == f"{folder}\n"
    torch.save(linear_state() | {"encoder.bias": torch.zeros(F)}, weights)
    assert pipeline("path", "evaluate", also).out != f"{folder}\n"


@pytest.mark.parametrize(
    ("also", "status", "message"),
    [
        ("{name: a, path: ./nowhere}", 1, "evaluate.also.0.path: './nowhere': there is no file nowhere/cfg.json"),
        ("{name: a, path: x.pt, format: linear}", 2, "format linear needs hook"),
        ("{name: a, path: a/b, file: ../c}", 2, "must stay within path"),
        ("{name: a, path: a/b}", 1, "the hub does not answer"),
        (
            "{name: a, path: a/b, revision: 0123456789012345678901234567890123456789}",
            1,
            "the hub cannot be reached and its cache lacks",
        ),
    ],
)
def test_what_is_not_there(run_folder, also, status, message):
    ran = pipeline("evaluate", f"evaluate.also=[{also}]")
    assert ran.status == status, ran.out
    assert message in " ".join(ran.out.split())
