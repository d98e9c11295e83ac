"""Kinds of SAE: what every kind must answer, TopK from training to export, and the one that
CONTRIBUTING.md prints."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import sae_lens
import torch
from conftest import ROOT, contents, only, pipeline
from torch import Tensor

from evaluate.operations import Operation, operated
from evaluate.steering import max_activations
from harvest.activation_store import ActivationStore
from harvest.files import UserError
from train import config
from train.checkpoint import SavedSae, load_sae
from train.config import ExcludeConfig, Kind, SaeConfig, TrainConfig
from train.dataloader import heldout_rows
from train.jumprelu import JumpRelu
from train.kinds import sae_class
from train.parallel import FeatureRanks
from train.sae import Dead, Sae
from train.sparse_step import SPARSE
from train.standard import Standard
from train.step import AUTOGRAD, autograd_step
from train.topk import TopK
from train.trainer import Trainer

HOOK = "model.layers.1"
K = 2


def printed() -> type[Sae]:
    """The class that CONTRIBUTING.md prints, run as it stands there."""
    names: dict[str, Any] = {"__name__": __name__}
    exec((ROOT / "CONTRIBUTING.md").read_text().split("```python\n")[1].split("```")[0], names)
    return names["Plain"]


Plain = printed()
SETTINGS = {
    "topk": ("train.sae.kind=topk", f"train.sae.k={K}", "train.sae.l1_coefficient=null"),
    "plain": ("train.sae.kind=plain", "train.sae.l1_coefficient=0.3"),
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.KINDS, "plain", Kind("test_kinds:Plain", ("l1_coefficient",)))


@pytest.fixture(scope="module")
def ran(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A folder for each kind, with a whole run of it and an export; the store is that of the finished run."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(config.KINDS, "plain", Kind("test_kinds:Plain", ("l1_coefficient",)))
        for kind, settings in SETTINGS.items():
            folders[kind] = tmp_path_factory.mktemp(kind) / "run"
            shutil.copytree(finished, folders[kind])
            for stage in ("train", "evaluate"):
                shutil.rmtree(folders[kind] / "runs" / stage)
            patch.chdir(folders[kind])
            every_feature = "evaluate.features.count=128"
            for command in (("run", every_feature), ("export", every_feature, "--to", "out")):
                found = pipeline(command[0], *settings, *command[1:])
                assert found.status == 0, found.out
        yield folders


def opened(folder: Path) -> tuple[SavedSae, ActivationStore]:
    return load_sae(only(folder, f"runs/train/*/{HOOK}")), ActivationStore.open(only(folder, "runs/harvest/*/store"))


def heldout(store: ActivationStore, saved: SavedSae) -> Tensor:
    """All kept held-out rows as stored."""
    return heldout_rows(store, HOOK, ExcludeConfig(), saved.statistics.norm_limit, 512)


@pytest.mark.parametrize("kind", SETTINGS)
def test_it_trains_and_says_so(ran, kind):
    saved, _ = opened(ran[kind])
    assert saved.about["architecture"] == saved.sae.kind == kind
    lines = [
        json.loads(line) for line in only(ran[kind], f"runs/train/*/{HOOK}/metrics.jsonl").read_text().splitlines()
    ]
    train = [line for line in lines if line["kind"] == "train"]
    assert {line["kernel"] for line in train} == {{"topk": "sparse", "plain": "autograd"}[kind]}
    assert train[-1]["mse"] < 0.7 * train[0]["mse"]
    assert train[-1].get("l1_coefficient") == {"topk": None, "plain": 0.3}[kind]
    for line in train:
        expected = line["mse"] + (line["l1_coefficient"] * line["l1"] if kind == "plain" else 0)
        expected += line.get("aux", 0) * line.get("aux_coefficient", 0)
        assert line["loss"] == pytest.approx(expected, rel=1e-6)
    validation = [line for line in lines if line["kind"] == "validation"]
    assert validation[-1]["explained_variance"] > validation[0]["explained_variance"]


@pytest.mark.parametrize("kind", SETTINGS)
def test_its_export_opens_in_saelens_with_equal_activations(ran, kind):
    saved, store = opened(ran[kind])
    theirs = sae_lens.SAE.load_from_disk(ran[kind] / "out/blocks.1.hook_resid_post")
    assert theirs.cfg.architecture() == {"topk": "topk", "plain": "standard"}[kind]
    x = heldout(store, saved)
    with torch.no_grad():
        f, x_hat = theirs.encode(x.float()), theirs(x.float())
    assert torch.allclose(saved.sae.encode(x), f, rtol=1e-5, atol=1e-5)
    assert torch.allclose(saved.sae.decode(f), x_hat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SETTINGS)
def test_report_and_pages_have_its_own_activations(ran, kind):
    """Of TopK, pages and steering once showed what the pre-activations would be without the rule."""
    saved, store = opened(ran[kind])
    f = saved.sae.encode(heldout(store, saved))
    evaluated = only(ran[kind], "runs/evaluate/*")
    assert (evaluated / "report.html").exists()
    index = (evaluated / "features" / HOOK / "index.html").read_text()
    of_pages = {int(n): float(d) for n, d in re.findall(r'data-number="(\d+)" data-density="([^"]+)"', index)}
    density = (f > 0).float().mean(0)
    assert set(of_pages) == set(density.nonzero().flatten().tolist())
    assert {n: density[n].item() for n in of_pages} == pytest.approx(of_pages, rel=1e-3)
    assert sum(of_pages.values()) == pytest.approx((f > 0).sum(1).float().mean().item(), rel=1e-5)
    if kind == "topk":
        assert 1 < sum(of_pages.values()) <= K
    chosen = list(of_pages)[:5]
    maxima = max_activations(store, saved, ExcludeConfig(), chosen)
    assert maxima == pytest.approx(f[:, chosen].amax(0).tolist(), rel=1e-5)
    adding = [Operation(feature, "add", 1.0) for feature in chosen]
    nothing = torch.zeros(len(chosen), saved.sae.d_in)
    vectors = operated(
        saved.sae, nothing, adding, dict(zip(chosen, maxima, strict=True)), torch.eye(len(chosen)).bool()
    )
    one_each = torch.zeros(len(chosen), saved.sae.d_sae)
    one_each[torch.arange(len(chosen)), chosen] = torch.tensor(maxima)
    assert torch.allclose(vectors, saved.sae.decode(one_each) - saved.sae.decode(0 * one_each), rtol=1e-3, atol=1e-5)


def test_topk_resumes_to_the_same_bytes(ran, tmp_path, monkeypatch):
    shutil.copytree(ran["topk"], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    folder = only(Path("runs"), f"train/*/{HOOK}").resolve()
    before = contents(folder, "**/*.safetensors")
    for done in (folder / "sae.json", folder / "sae_weights.safetensors", folder.parent / "manifest.json"):
        done.unlink()
    assert pipeline("train", *SETTINGS["topk"]).status == 0
    assert contents(folder, "**/*.safetensors") == before


def made(kind: str) -> Sae:
    """Of 24 rows and 50 features, with biases and thresholds that are not zero."""
    of_kind = {"standard": Standard, "topk": TopK, "jumprelu": JumpRelu, "plain": Plain}[kind]
    sae = of_kind.initial(24, 50, scale=1.7, **({"k": 7} if kind == "topk" else {}))
    generator = torch.Generator().manual_seed(5)
    for name, weight in sae.parameters.items():
        if weight.dim() == 1:
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator).abs() - (0.1 if name == "b_enc" else 0))
    return sae


@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu", "plain"])
def test_what_every_kind_answers(kind):
    sae, x = made(kind), torch.randn(33, 24, generator=torch.Generator().manual_seed(6)).bfloat16()
    f = sae.encode(x)
    assert (f >= 0).all() and 0.02 < (f > 0).float().mean() < 0.9
    ids = [3, 49, 0, 17]
    assert torch.allclose(sae.columns(x, ids), f[:, ids], rtol=1e-5, atol=1e-6)
    active = sae.nonzeros(x)
    row_N = torch.arange(len(x)).repeat_interleave(active.offset_B.diff())
    assert torch.equal(torch.zeros_like(f).index_put((row_N, active.feature_N.long()), active.f_N), f)
    W_enc, b_enc, W_dec, b_dec = (weight.double() for weight in list(sae.parameters.values())[:4])
    z = 1.7 * x.double() @ W_enc + b_enc
    assert torch.allclose(f.double()[f > 0], z[f > 0], rtol=1e-5, atol=1e-6)  # a kind chooses which, not how much
    assert torch.allclose(sae.decode(f).double(), (f.double() @ W_dec + b_dec) / 1.7, rtol=1e-5, atol=1e-6)
    assert torch.allclose(sae.direction(ids).double(), W_dec[ids] / 1.7)
    losses = sae.loss(x, x)
    error = sae.decode(f).double() * 1.7 - 1.7 * x.double()
    assert losses.terms["mse"].item() == pytest.approx(error.square().sum(1).mean().item(), rel=1e-5)
    other = torch.randn(33, 24)
    rebuilt = sae.loss(x, other).error_BD - losses.error_BD
    assert torch.allclose(rebuilt, 1.7 * (x.float() - other), rtol=1e-4, atol=1e-4)  # a transcoder's target


@pytest.mark.parametrize("kind", [*config.KINDS, "plain"])
def test_a_kind_and_its_line_of_kinds_have_the_same_words(kind):
    """A setting of no kind, or a coefficient of no term, would count for nothing, and no error would say so."""
    assert set(config.HYPERPARAMETERS) == SaeConfig.model_fields.keys() - {"kind", "d_sae", "expansion_factor"}
    of_kind, chosen = sae_class(kind), SaeConfig(kind=kind, d_sae=128)
    sae, x = of_kind.initial(24, 128, **chosen.hyperparameters()), torch.ones(33, 24)
    assert sae.kind == kind
    assert sae.coefficients.keys() <= sae.loss(x, x, Dead(torch.arange(5), 5)).terms.keys()


def test_a_step_by_autograd_has_the_gradients_of_topk_written_out():
    sae, x = made("topk"), torch.randn(33, 24, generator=torch.Generator().manual_seed(6))
    step = autograd_step(sae, x, {}, torch.float32)
    leaves = {name: weight.double().requires_grad_() for name, weight in sae.parameters.items()}
    z = 1.7 * x.double() @ leaves["W_enc"] + leaves["b_enc"]
    threshold = z.sort(1, descending=True).values[:, 6:7]
    f = torch.where((z >= threshold) & (z > 0), z, 0)
    loss = (f @ leaves["W_dec"] + leaves["b_dec"] - 1.7 * x.double()).square().sum(1).mean()
    for name, expected in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        assert (step.gradients[name] - expected).norm() <= 1e-5 * expected.norm(), name
    assert step.l0.item() == (f > 0).sum(1).double().mean().item() <= 7


def test_a_kind_made_from_another_does_not_take_its_fast_path():
    @dataclass(frozen=True, eq=False)
    class Other(Standard):
        """With another penalty, whose gradients the exact steps do not have."""

        kind = "other"

    settings = TrainConfig(sae=SaeConfig(d_sae=8), epochs=1)
    for of_kind, expected in ((Standard, "dense"), (Other, "autograd")):
        trainer = Trainer(of_kind.initial(4, 8), settings, 10, 100, torch.float32)
        assert trainer.step(torch.randn(16, 4)).kernel == expected


def test_a_class_that_would_be_wrong_without_an_error_is_refused():
    @dataclass(frozen=True, eq=False)
    class Signed(Plain):
        """Every stage would take its features below 0 for silent ones."""

        def activations(self, z_BF: Tensor) -> Tensor:
            return z_BF

    @dataclass(frozen=True, eq=False)
    class Fast(Plain):
        """The sparse step would train without its penalty."""

        kernels: ClassVar = {"dense": AUTOGRAD, "sparse": SPARSE}

    settings = TrainConfig(sae=SaeConfig(d_sae=8), epochs=1)
    for of_kind, message in ((Signed, "`activations` are below 0"), (Fast, "no gradients of its `penalties`")):
        with pytest.raises(UserError, match=message):
            Trainer(of_kind.initial(4, 8), settings, 10, 100, torch.float32)


@pytest.mark.parametrize(
    ("kind", "way_out"), [(Plain, r"choose train\.sae\.kind=standard"), (TopK, r"choose train\.kernel=sparse")]
)
def test_a_kind_without_a_fast_path_trains_in_one_process(kind, way_out):
    settings = TrainConfig(sae=SaeConfig(d_sae=8), epochs=1, kernel="dense")
    with pytest.raises(UserError, match=rf"trains in one process with kernel \w+, and 2 were started.*{way_out}"):
        Trainer(
            kind.initial(4, 8, **({"k": 2} if kind is TopK else {})),
            settings,
            10,
            100,
            torch.float32,
            FeatureRanks(0, 2),
        )


@pytest.mark.parametrize(
    ("given", "status", "message"),
    [
        (
            ["train.sae.kind=topk", "train.sae.k=2", "train.sae.l1_coefficient=1"],
            2,
            "sae.l1_coefficient = 1 is a setting of kind standard, .*and kind is topk",
        ),
        (
            ["train.sae.k=2"],
            2,
            "k = 2 is a setting of kind topk, batchtopk, matryoshka.*, and kind is standard; train.sae.k=null",
        ),
        (["train.sae.kind=topk", "train.sae.l1_coefficient=null", "train.sae.k=null"], 2, "kind topk needs k"),
        (["train.sae.kind=gated"], 2, "kind: 'gated': known kinds are standard, topk, batchtopk, jumprelu, matryoshka"),
        ([*SETTINGS["topk"], "train.sae.k=129"], 1, "train.sae.k: 129: the SAE has 128 features"),
        ([*SETTINGS["topk"], "train.sweep.l1_coefficient=[1,2]"], 2, "sweep.l1_coefficient: kind topk has no"),
    ],
)
def test_settings_of_another_kind_are_refused(run_folder, given, status, message):
    found = pipeline("train", *given)
    assert found.status == status, found.out
    assert re.search(message, " ".join(found.out.split()))


def test_an_sae_of_a_kind_that_is_not_known(ran, tmp_path, monkeypatch):
    monkeypatch.delitem(config.KINDS, "plain")
    with pytest.raises(UserError, match=r"sae\.json: architecture: 'plain': no kind of SAE that is known here"):
        load_sae(only(ran["plain"], f"runs/train/*/{HOOK}"))


def test_the_sweep_of_lr_trains_at_each(run_folder):
    """Each SAE of it is the one that its lr alone gives, and they differ."""
    rates = ("0.001", "0.003")
    for rate in rates:
        assert pipeline("train", f"train.lr={rate}", "--force", "--yes").status == 0

    def weights() -> dict[float, bytes]:
        found = {}
        for begun in Path("runs/train").glob("*/begun.json"):
            rate = json.loads(begun.read_text())["settings"]["lr"]
            found[rate] = (begun.parent / HOOK / "sae_weights.safetensors").read_bytes()
        return found

    alone = weights()
    assert pipeline("train", "train.sweep.lr=[0.001,0.003]", "--force", "--yes").status == 0
    assert weights() == alone
    assert set(alone) == {0.001, 0.003} and alone[0.001] != alone[0.003]


@pytest.mark.parametrize("kernel", ["dense", "sparse"])
def test_both_explained_variances_of_the_log_are_as_written_out(kernel):
    """Rows whose means are far from zero and whose spreads differ, so that the wrong formula gives another figure."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.linspace(0.1, 3, 40).unsqueeze(1)
    rows = 5 + spread * torch.randn(40, 12, generator=generator)
    sae = Standard.initial(12, 30, scale=0.5, l1_coefficient=0.3)
    sae.b_dec.fill_(2.3)
    trainer = Trainer(sae, TrainConfig(sae=SaeConfig(d_sae=30), epochs=1, kernel=kernel), 10, 100, torch.float32)
    validation = trainer.validate(rows)
    stepped = trainer.step(rows).result
    x = 0.5 * rows.double().numpy()
    start = Standard.initial(12, 30)
    f = np.maximum(x @ start.W_enc.double().numpy(), 0)
    error = np.square(f @ start.W_dec.double().numpy() + 2.3 - x).sum(1)
    spread = np.square(x - x.mean(0)).sum(1)
    expected = (1 - error.sum() / spread.sum(), (1 - error / spread).mean())
    assert abs(expected[0] - expected[1]) > 0.05
    for found in (stepped, validation):
        assert float(found.explained_variance) == pytest.approx(expected[0], rel=1e-5)
        assert float(found.explained_variance_legacy) == pytest.approx(expected[1], rel=1e-5)
