"""The Triton kernels against their plain torch twins, on a GPU where there is one, else interpreted.

tests/conftest.py chooses the interpreter before anything imports triton. The tiles are cut down so that small shapes
have several, and a short last one.

Shape suffixes: B rows of a batch, D d_in, F d_sae, N non-zeros.
"""

import pytest
import torch
from torch import Tensor

from train.adam import Adam, Update, plain_update
from train.kinds import sae_class
from train.nonzeros import PLAIN, ByFeature, ByRow, Rule, by_feature
from train.parallel import SINGLE
from train.sae import Dead, Sae
from train.selection import largest, largest_dense
from train.sparse_step import active_features, sparse_step
from train.standard import Standard

triton = pytest.importorskip("triton", reason="triton is not installed: it has no build for this platform")
from train import kernels  # noqa: E402
from train.kernels import TRITON  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
    pytest.skip(
        f"triton {triton.__version__}: its interpreter fails with NumPy 2.4, 3.9 does not", allow_module_level=True
    )
B, D, F = 6, 85, 23
L1 = {"l1": 5.0}


def batch(firing: str = "some") -> tuple[Sae, Tensor]:
    """Row 0 fires nothing, row 5 everything but feature 3, which never fires; or nothing fires at all."""
    generator = torch.Generator().manual_seed(0)
    sae, x_BD = Standard.initial(D, F, seed=1), torch.randn(B, D, generator=generator)
    sae.b_enc.fill_(-0.05)
    sae.b_dec.normal_(generator=generator)
    sae.W_enc[0] = 0.1
    x_BD[0] = 0
    x_BD[5] = 20 * torch.eye(D)[0]
    sae.b_enc[3] = -1e6
    if firing == "none":
        sae.b_enc.fill_(-1e6)
    return sae.to(DEVICE), x_BD.to(DEVICE)


def before_nan(tensor: Tensor) -> Tensor:
    """The same values, with NaN behind them in memory: a kernel that reads beyond the last one shows it."""
    behind = tensor.new_full((64,), float("nan"))
    return torch.cat([tensor.flatten(), behind])[: tensor.numel()].view(tensor.shape)


def entries(sae: Sae, x_BD: Tensor) -> tuple[ByRow, ByFeature]:
    active = active_features(sae.W_enc, sae.b_enc, x_BD, torch.float32, PLAIN)
    return active, by_feature(active, F)


class TestKernels:
    @pytest.fixture(autouse=True)
    def small_tiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, size in {"EXTRACT_TILE": 16, "D_TILE": 64, "N_TILE": 4, "F_TILE": 8, "ADAM_TILE": 128}.items():
            monkeypatch.setattr(kernels, name, size)
        assert kernels.D_TILE < D and F > kernels.F_TILE and F > kernels.EXTRACT_TILE

    def test_the_batch_is_what_it_says(self) -> None:
        active, by = entries(*batch())
        count_B, count_F = active.offset_B.diff(), by.offset_F.diff()
        assert count_B[0] == 0 and count_B[5] == F - 1 and count_F[3] == 0
        assert len(active.f_N) > 40
        assert len(entries(*batch("none"))[0].f_N) == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("firing", ["some", "none"])
    def test_extract(self, firing: str, dtype: torch.dtype) -> None:
        sae, x_BD = batch(firing)
        pre_BF = (x_BD @ sae.W_enc).to(dtype)
        pre_BF[2, 7] = float("nan")
        triple, twin = (ops.extract(pre_BF, sae.b_enc) for ops in (TRITON, PLAIN))
        assert triple.kept == twin.kept
        for ours, plain in zip(triple[:3], twin[:3], strict=True):
            assert torch.equal(ours.nan_to_num(-1).long(), plain.nan_to_num(-1).long())
            torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0, equal_nan=True, check_dtype=False)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_extract_above_thresholds(self, dtype: torch.dtype) -> None:
        sae, x_BD = batch()
        pre_BF, above_F = (x_BD @ sae.W_enc).to(dtype), torch.linspace(-0.1, 0.3, F, device=DEVICE)
        ours, plain = (ops.extract(pre_BF, sae.b_enc, Rule(above_F=above_F)) for ops in (TRITON, PLAIN))
        assert 0 < len(ours.f_N) < (pre_BF > 0).sum()
        assert all(torch.equal(a.long(), b.long()) for a, b in zip(ours[:2], plain[:2], strict=True))
        torch.testing.assert_close(ours.f_N, plain.f_N, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("of_batch", [False, True])
    @pytest.mark.parametrize("count", [1, 3, 20])
    def test_the_largest_entries(self, dtype: torch.dtype, of_batch: bool, count: int) -> None:
        """Bounds may differ between the twins: what is chosen after them may not."""
        sae, x_BD = batch()
        pre_BF, weight_F = (x_BD @ sae.W_enc).to(dtype), torch.linspace(0.5, 2, F, device=DEVICE)
        rule = Rule(largest=count, of_batch=of_batch, weight_F=weight_F)
        chosen = []
        for ops in (TRITON, PLAIN):
            least = ops.least_of_rows(pre_BF, sae.b_enc, weight_F, count)
            reached_B = ((pre_BF + sae.b_enc) * weight_F >= least[:, None]).sum(1)
            assert ((reached_B >= count) | (least == 0)).all()
            if ops is TRITON and count <= F:  # in groups of one; a bound too low would be right, and slow
                kth_B = ((pre_BF + sae.b_enc) * weight_F).topk(count).values[:, -1].clamp_min(0)
                torch.testing.assert_close(least, kth_B, rtol=1e-6, atol=1e-7)
            entries = ops.extract(pre_BF, sae.b_enc, rule, least.amin() if of_batch else None)
            if of_batch:
                score_BF = (pre_BF + sae.b_enc) * weight_F
                assert entries.kept == int((score_BF >= least.amin().clamp_min(1e-30)).sum())
                entries = entries._replace(kept=min(len(entries.f_N), B * count))
            chosen.append(largest(entries, rule, 0, SINGLE))
        (ours, least), (plain, least_plain) = chosen
        assert torch.equal(ours.offset_B, plain.offset_B) and torch.equal(ours.feature_N, plain.feature_N)
        torch.testing.assert_close(ours.f_N, plain.f_N, rtol=1e-6, atol=0)
        torch.testing.assert_close(least, least_plain, rtol=1e-6, atol=0)
        dense_BF = largest_dense((pre_BF + sae.b_enc) * weight_F, count, of_batch)
        assert torch.equal(ours.offset_B.diff().long(), dense_BF.sum(1))
        assert torch.equal(ours.feature_N.long(), dense_BF.nonzero()[:, 1])

    @pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka", "jumprelu"])
    def test_every_kinds_step_equals_the_plain_one(self, kind: str) -> None:
        hyperparameters = {
            "jumprelu": {"l0_coefficient": 0.3, "bandwidth": 0.4, "target_l0": 5.0},
            "matryoshka": {"k": 4, "prefixes": (5, F), "aux_coefficient": 0.2, "aux_k": 2},
        }.get(kind, {"k": 4, "aux_coefficient": 0.2, "aux_k": 2})
        sae = sae_class(kind).initial(D, F, seed=1, device=DEVICE, **hyperparameters)
        x_BD, dead = batch()[1], Dead(torch.tensor([3, 9, 20], device=DEVICE), 3)
        ours, plain = (
            sparse_step(sae, x_BD, sae.coefficients, torch.float32, dead=dead, operations=ops)
            for ops in (TRITON, PLAIN)
        )
        torch.testing.assert_close(ours.terms, plain.terms, rtol=1e-5, atol=0)
        assert torch.equal(ours.fired_F, plain.fired_F)
        for name, gradient in plain.gradients.items():
            assert gradient.any()
            assert (ours.gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name

    def test_a_rank_without_dead_features(self) -> None:
        sae = sae_class("topk").initial(D, F, seed=1, device=DEVICE, k=4, aux_coefficient=0.2, aux_k=2)
        x_BD, dead = batch()[1], Dead(torch.tensor([], dtype=torch.int64, device=DEVICE), 3)
        ours, plain = (
            sparse_step(sae, x_BD, sae.coefficients, torch.float32, dead=dead, operations=ops)
            for ops in (TRITON, PLAIN)
        )
        torch.testing.assert_close(ours.terms, plain.terms, rtol=1e-5, atol=0)
        assert float(ours.terms["aux"]) == pytest.approx(float(ours.terms["mse"]), rel=1e-5)

    def test_extract_holds_every_entry_when_all_are_active(self) -> None:
        pre_BF = torch.rand(B, F, device=DEVICE) + 1
        count_B, feature_N, f_N, *_ = TRITON.extract(pre_BF, torch.zeros(F, device=DEVICE))
        assert (count_B == F).all()
        assert torch.equal(feature_N.view(B, F), torch.arange(F, device=DEVICE).expand(B, F).int())
        assert torch.equal(f_N.view(B, F), pre_BF)

    @pytest.mark.parametrize("firing", ["some", "none"])
    def test_gathers(self, firing: str) -> None:
        sae, x_BD = batch(firing)
        active, by = entries(sae, x_BD)
        error_BD = PLAIN.residual(active, sae.W_dec, sae.b_dec, x_BD)
        f_N, scale_F = active.f_N[by.order_N], torch.rand(F, device=DEVICE)
        calls = {
            "residual": (active, sae.W_dec, sae.b_dec, x_BD),
            "row_dots": (active, error_BD, sae.W_dec),
            "decoder_sums": (by, f_N, error_BD, sae.W_dec, scale_F),
            "encoder_sums": (by, f_N, x_BD),
        }
        for name, arguments in calls.items():
            arguments = [before_nan(each) if isinstance(each, Tensor) else each for each in arguments]
            ours, plain = (getattr(ops, name)(*arguments) for ops in (TRITON, PLAIN))
            assert ours.is_contiguous() and ours.dtype == torch.float32, name
            assert torch.allclose(ours, plain, rtol=1e-5, atol=1e-5), name

    def test_gathers_from_bf16_operands_sum_in_float32(self) -> None:
        sae, x_BD = batch()
        active, by = entries(sae, x_BD)
        W_dec, x, f_N = sae.W_dec.bfloat16(), x_BD.bfloat16(), active.f_N[by.order_N]
        calls = {
            "residual": lambda W_dec, x: (active, W_dec, sae.b_dec, x_BD),
            "row_dots": lambda W_dec, x: (active, x, W_dec),
            "encoder_sums": lambda W_dec, x: (by, f_N, x),
        }
        for name, arguments in calls.items():
            ours = getattr(TRITON, name)(*arguments(W_dec, x))
            plain = getattr(PLAIN, name)(*arguments(W_dec.float(), x.float()))
            assert torch.allclose(ours, plain, rtol=1e-5, atol=1e-5), name

    @pytest.mark.parametrize("firing", ["some", "none"])
    def test_the_step_on_kernels_equals_the_plain_step(self, firing: str) -> None:
        sae, x_BD = batch(firing)
        ours, plain = (sparse_step(sae, x_BD, L1, torch.float32, operations=ops) for ops in (TRITON, PLAIN))
        torch.testing.assert_close(ours.terms, plain.terms, rtol=1e-5, atol=0)
        assert torch.equal(ours.fired_F, plain.fired_F)
        for name, gradient in plain.gradients.items():
            assert (ours.gradients[name] - gradient).norm() <= 1e-5 * gradient.norm()

    def test_the_update_equals_torchs(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def state() -> Adam:
            return Adam(batch()[0].parameters, torch.bfloat16)

        ours, plain = state(), state()
        for step, divisor in enumerate([1.0, 3.0, float("nan"), float("inf"), 1.0], start=1):
            gradients = {n: torch.randn(w.shape, generator=generator).to(DEVICE) for n, w in ours.parameters.items()}
            numbers = Update(1e-2, (0.9, 0.999), step, torch.tensor(divisor, device=DEVICE))
            for apply, adam in ((kernels.adam_update, ours), (plain_update, plain)):
                copies = {name: gradient.clone() for name, gradient in gradients.items()}
                apply(adam.parameters, copies, adam.exp_avg, adam.exp_avg_sq, adam.operands, numbers)
            # On a GPU torch takes 1 − β₂ in float32, which is 1.3e-5 off.
            rtol = 1e-5 if DEVICE == "cpu" else 2e-5
            for tensors, atol in (("parameters", 1e-7), ("exp_avg", 1e-7), ("exp_avg_sq", 0)):
                torch.testing.assert_close(getattr(ours, tensors), getattr(plain, tensors), rtol=rtol, atol=atol)
            # The interpreter cuts bits off where a GPU rounds.
            torch.testing.assert_close(ours.operands["W_dec"].float(), ours.parameters["W_dec"], rtol=2**-7, atol=0)
            assert ours.operands["b_dec"] is ours.parameters["b_dec"]
        assert not torch.equal(ours.parameters["W_dec"], state().parameters["W_dec"])

    @pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs one program at a time: no order to depend on")
    def test_same_input_gives_the_same_bytes(self) -> None:
        generator = torch.Generator().manual_seed(0)
        sae, x_BD = Standard.initial(256, 4096, device=DEVICE), torch.randn(1024, 256, generator=generator)
        first, *others = (sparse_step(sae, x_BD.to(DEVICE), L1, torch.bfloat16) for _ in range(4))
        for other in others:
            assert all(torch.equal(first.terms[name], term) for name, term in other.terms.items())
            assert all(torch.equal(first.gradients[name], gradient) for name, gradient in other.gradients.items())
