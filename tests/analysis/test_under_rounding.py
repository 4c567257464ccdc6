"""Edits beneath blocks of 4 to 8 bits: found where they are, not where rounding is all there is, and intervals cover the truth."""

import json

import gguf
import numpy as np
import pytest
import torch
from gguf_files import byte_pairs, chat_model, tensors_of, write
from scipy.stats import binom
from tiny import tiny_direction
from torch import Tensor
from transformers import AutoModelForCausalLM

from refusal.analysis import edits
from refusal.analysis.anatomy import figures
from refusal.analysis.rounding import grid_of
from refusal.analysis.under_rounding import Fit, _even, shared_basis, tracy_widom_p
from refusal.lm.weights import open_weights
from refusal.method.interventions import Intervention
from refusal.method.orthogonalize import Edit, orthogonalize
from refusal.report.compare import text

REPEATS = 200


def blocks(w: Tensor, kind: str) -> Tensor:
    """As the gguf package rounds, and reads back."""
    of = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.dequantize(gguf.quantize(w.float().numpy(), of), of).copy())


def draw(seed: int, d: int, sizes: tuple[int, ...], alpha: float, kind: str, base: bool, k: int = 1):
    """Writers W (rounded where `base` is), W - W', steps of both, and V: W' = W - alpha V V^T W, rounded."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.linalg.qr(torch.randn(d, k, generator=generator).double())[0].T
    rows = []
    for t, n in enumerate(sizes):
        w = torch.randn(d, n, generator=generator) * (0.5 + t)
        after = blocks(w - alpha * v.T.float() @ (v.float() @ w), kind)
        before = blocks(w, kind) if base else w
        steps = [grid_of(x).step(x).double() if x is after or base else None for x in (after, before)]
        rows.append((before.double(), before.double() - after.double(), *steps))
    return rows, v


def estimated(rows, d: int):
    basis, p = shared_basis(lambda: (row[1:3] for row in rows), d)
    fit = Fit(basis, d / sum(row[0].shape[1] for row in rows))
    for w, difference, step, of_base in rows if len(basis) else ():
        one = fit.of_tensor(w, difference, step, of_base)
        if one is not None:
            fit.add(w, difference, step, of_base, one[0])
    return basis, (fit.estimate(p) if fit.n_tensors else None)


@pytest.mark.parametrize(
    ("d", "sizes", "kind", "base", "alpha", "least"),
    [
        (32, (32, 64, 64, 96), "Q5_0", False, 0.3, 0.997),
        (32, (32, 64, 64, 96), "Q5_0", False, 1.5, 0.9998),
        (32, (32, 64, 64, 96), "Q5_0", True, 1.0, 0.999),
        (32, (32, 64, 64, 96), "Q8_0", False, 1.0, 0.99999),
        (128, (128, 256), "Q5_0", False, 0.5, 0.997),
    ],
)
def test_the_intervals_cover_the_truth(d, sizes, kind, base, alpha, least):
    """Coverage of 95 % intervals in 200 draws. A count below .90 of them, or above .99, has a chance below .01 at .95."""
    cosines, inside = [], []
    for seed in range(REPEATS):
        rows, v = draw(seed, d, sizes, alpha, kind, base)
        basis, found = estimated(rows, d)
        assert found is not None and len(basis) == 1 and found.n_tensors == len(sizes)
        cosine = abs(float(basis[0] @ v[0]))
        cosines.append(cosine)
        inside.append((found.cosine_low <= cosine <= found.cosine_high, found.alpha_low <= alpha <= found.alpha_high))
    assert np.mean(cosines) > least
    low, high = binom.ppf([0.002, 0.999], REPEATS, 0.95) / REPEATS
    assert all(low <= share <= max(high, 0.995) for share in np.mean(inside, axis=0)), np.mean(inside, axis=0)


def test_rounding_alone_is_no_edit():
    """p is below .05 no more often than it may be, and no dimension is found."""
    found = []
    for seed in range(REPEATS):
        rows, _ = draw(seed, 32, (32, 64, 64), 0.0, "Q5_0", False)
        basis, p = shared_basis(lambda rows=rows: (row[1:3] for row in rows), 32)
        assert len(basis) == 0
        found.append(p)
    assert sum(p < 0.05 for p in found) <= binom.ppf(0.999, REPEATS, 0.05)
    assert np.std(found) > 0.05  # and says something


def test_the_law_of_the_greatest_eigenvalue():
    """Against drawn matrices, and Tracy and Widom's own figures: the 95th percentile of the law for real matrices is 0.9793."""
    generator = torch.Generator().manual_seed(0)
    p = []
    for _ in range(400):
        z = torch.randn(60, 400, generator=generator, dtype=torch.float64)
        p.append(tracy_widom_p(float(torch.linalg.matrix_norm(z, 2) ** 2), 400, 60))
    for level in (0.05, 0.2, 0.5):
        assert abs(np.mean(np.array(p) < level) - level) < 4 * np.sqrt(level * (1 - level) / len(p))
    root, n, d = np.sqrt(10**6 - 1) + np.sqrt(10**4), 10**6, 10**4
    scale = root * (1 / np.sqrt(n - 1) + 1 / np.sqrt(d)) ** (1 / 3)
    assert tracy_widom_p(root**2 + 0.9793 * scale, n, d) == pytest.approx(0.05, abs=1e-3)
    assert tracy_widom_p(root**2 - 20 * scale, n, d) == pytest.approx(1.0)


@pytest.mark.parametrize("d", [32, 128, 512])
@pytest.mark.parametrize("alpha", [0.3, 1.0, 1.5])
def test_the_direction_at_several_widths(d, alpha):
    rows, v = draw(0, d, (d, 2 * d), alpha, "Q5_0", False)
    basis, found = estimated(rows, d)
    assert len(basis) == 1 and found is not None and found.p < 1e-3
    assert abs(float(basis[0] @ v[0])) > {0.3: 0.995, 1.0: 0.9995, 1.5: 0.9998}[alpha]
    assert found.alpha == pytest.approx(alpha, abs=0.02)
    # Of all left singular vectors of the differences side by side, each by its rounding, it is the first (scipy's own way).
    stacked = torch.cat([row[1] / float((row[2] ** 2).mean()) ** 0.5 for row in rows], dim=1)
    assert abs(float(torch.linalg.svd(stacked, full_matrices=False)[0][:, 0] @ basis[0])) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("k", [2, 3])
def test_subspaces(k):
    rows, v = draw(1, 64, (64, 128, 96), 0.8, "Q5_0", False, k)
    basis, found = estimated(rows, 64)
    assert len(basis) == k and float(torch.linalg.svdvals(basis @ v.T).min()) > 0.998
    cosine = float(((basis @ v.T) ** 2).sum() / k) ** 0.5
    assert found.cosine == pytest.approx(cosine, abs=2e-4) and found.alpha == pytest.approx(0.8, abs=0.01)


def test_rows_and_columns_of_one_size():
    z = torch.randn(64, 2000, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 3, 64)[:, None]
    even = _even(z)
    assert float((even**2).mean(1).max() / (even**2).mean(1).min()) < 1.3 < float((z**2).mean(1).max() / (z**2).mean(1).min())
    assert not _even(torch.zeros(2, 3)).any()


# The command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """GGUF files of a checkpoint and of an edit of it: matrices in blocks, norms in float32; and what was taken out."""
    folder, tokenizer = tmp_path_factory.mktemp("gguf"), byte_pairs()
    model = chat_model("qwen2", tokenizer, intermediate_size=64)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    v = tiny_direction(seed=3).double()
    found = {"folder": folder, "v": v}
    for alpha in (0.3, 1.0):
        orthogonalize(folder / "base", [Edit(folder / f"{alpha}", Intervention("edit", v, alpha))])
    for name in ("base", "0.3", "1.0"):
        one = AutoModelForCausalLM.from_pretrained(folder / name)
        for kind in ("Q8_0", "Q5_0", "Q4_0"):
            of = gguf.GGMLQuantizationType[kind]
            raw = {n: (gguf.quantize(w, of), of) for n, w in tensors_of(one).items() if w.ndim == 2}
            write(folder / f"{name}-{kind}.gguf", one, tokenizer, raw)
    return found


def compared(files, base: str, edited: str) -> edits.Difference:
    folder = files["folder"]
    with open_weights(folder / base) as ours, open_weights(folder / edited, folder / base) as theirs:
        return edits.compare(ours, theirs)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0"])
def test_a_quantization_is_said_as_that(files, kind):
    found = compared(files, "base", f"base-{kind}.gguf")
    assert found.kind == "requantized" and f"{kind[1]}-bit blocks of 32" in found.how and found.estimate is None
    assert compared(files, f"base-{kind}.gguf", f"base-{kind}.gguf").kind == "identical"


@pytest.mark.parametrize(
    ("kind", "alpha", "quantized_base", "least", "within"),
    [
        ("Q8_0", 0.3, False, 0.9999, 0.005),
        ("Q8_0", 1.0, True, 0.9999, 0.005),
        ("Q5_0", 0.3, False, 0.997, 0.02),
        ("Q5_0", 1.0, False, 0.9995, 0.02),
        ("Q5_0", 1.0, True, 0.999, 0.02),
        ("Q4_0", 1.0, False, 0.998, 0.04),
    ],
)
def test_an_edit_in_a_gguf_file_comes_back_as_far_as_rounding_allows(files, kind, alpha, quantized_base, least, within):
    found = compared(files, f"base-{kind}.gguf" if quantized_base else "base", f"{alpha}-{kind}.gguf")
    assert found.kind in ("edit", "edit under quantization") and found.rank == 1, found.how
    cosine, known = abs(float(found.basis[0] @ files["v"])), found.estimate
    assert cosine > least and known is not None and abs(known.alpha - alpha) < within
    assert known.alpha_low < known.alpha < known.alpha_high and known.cosine_low <= known.cosine <= known.cosine_high
    assert all(abs(one.alpha - alpha) < 5 * within for one in found.of("edited")) and known.n_tensors == len(found.of("edited")) == 7
    shown = figures(found, {})
    assert json.dumps(shown["estimate"]) and "as far as rounding to blocks allows (95 %): alpha" in text(shown)


def test_what_each_tensor_alone_does_not_show(files):
    found = compared(files, "base", "0.3-Q5_0.gguf")
    assert found.kind == "edit under quantization" and found.estimate.pooled and "seen in all of them together" in found.how


def test_a_fine_tune_in_blocks_is_no_edit(files):
    """A change of low rank that all writers share and that is not alpha V V^T W, and one of full rank."""
    model = AutoModelForCausalLM.from_pretrained(files["folder"] / "base")
    generator, of = torch.Generator().manual_seed(0), gguf.GGMLQuantizationType.Q5_0
    v = files["v"].float()
    for name, shared in (("shared", True), ("noise", False)):
        raw = {}
        for tensor, w in tensors_of(model).items():
            if w.ndim == 2:
                noise = torch.randn(w.shape, generator=generator)
                along = torch.outer(v, torch.randn(w.shape[1], generator=generator)) if w.shape[0] == 32 else 0.0
                raw[tensor] = (gguf.quantize((torch.from_numpy(w) + (0.2 * along if shared else 0.1 * noise)).numpy(), of), of)
        write(files["folder"] / f"{name}.gguf", model, byte_pairs(), raw)
        found = compared(files, "base", f"{name}.gguf")
        assert "edit" not in found.kind and found.estimate is None and found.basis is None, name
