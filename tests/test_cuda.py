"""A GPU gives what the CPU gives, in float32, and runs out of memory as is foreseen. `make cuda`."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import PRE_NORM, tiny_direction, tiny_lm, tiny_model, tiny_prompts

from refusal.analysis.estimators import optimised
from refusal.analysis.harmless_kl import Texts, harmless_kl
from refusal.analysis.sensitivity import collect as collect_at_end
from refusal.analysis.subspaces import random_subspaces
from refusal.io.errors import UserError
from refusal.io.params import Optimised
from refusal.io.store import Store
from refusal.lm import batching
from refusal.lm.load import load_model
from refusal.method.activations import collect
from refusal.method.generate import Decoding
from refusal.method.interventions import BASELINE, POSITIONS, SITES, Addition, Intervention
from refusal.method.sweep import complete

pytestmark = pytest.mark.cuda
PROMPTS = [[11, 12, *tokens] for tokens in tiny_prompts((3, 9, 5, 5, 1), 2)]
V = tiny_direction()
SIZES = SimpleNamespace(activations=SimpleNamespace(batch_size=2))


def both(tmp_path, model_type="qwen2", **how):
    """A model on the CPU and on the GPU, each with a store of its own."""
    for device in ("cpu", "cuda"):
        model = tiny_model(model_type).requires_grad_(False).to(device)
        yield tiny_lm(model, **how), Store(tmp_path / f"{device}.sqlite")


@pytest.mark.parametrize("method", ["sequential", "batched", "batched_unmasked"])
def test_activations(tmp_path, method):
    found = []
    for lm, store in both(tmp_path):
        path = tmp_path / f"{lm.model.device.type}.safetensors"
        collect(lm, {"a": PROMPTS, "b": PROMPTS[:2]}, method, 2, store, path)
        found.append(load_file(path) | {"at end": collect_at_end(SimpleNamespace(lm=lm, params=SIZES, store=store), PROMPTS, "test")})
    for name in ("a", "b", "at end"):
        torch.testing.assert_close(*(of[name] for of in found), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sites", [*SITES, "weights"])
@pytest.mark.parametrize("model_type", PRE_NORM)
def test_completions_of_directions_subspaces_and_layers(tmp_path, model_type, sites):
    a_layer = tiny_direction(rows=3).double()[:, None] * torch.tensor([1, 0, 1])[:, None, None]
    interventions = [
        BASELINE,
        Intervention("one", V.double(), 0.7, sites),
        *(Intervention(f"span of {k}", random_subspaces(32, k, 1, 0)[0], 1.0, sites) for k in (2, 3)),
        *([] if sites == "weights" else [Intervention("each", a_layer, 1.0, sites)]),
    ]
    cpu, gpu = (
        complete(lm, PROMPTS, interventions, Decoding(8, 2), store, "test")
        for lm, store in both(tmp_path, model_type, stop={5, 17})
    )
    assert cpu == gpu and len({str(rows) for rows in cpu.values()}) > 1


def test_additions(tmp_path):
    added = [Addition(3 * V, 1, positions) for positions in POSITIONS]
    cpu, gpu = (
        [complete(lm, PROMPTS, [BASELINE], Decoding(6, 8), store, "test", one)["baseline"] for one in added]
        for lm, store in both(tmp_path, stop={5})
    )
    assert cpu == gpu and len({str(rows) for rows in cpu}) > 1


def test_costs_of_hooks_and_of_weights(tmp_path):
    texts, found = Texts(PROMPTS, tiny_prompts((4, 9, 1, 6, 4), 1), range(5)), []
    for lm, store in both(tmp_path):
        edited = {sites: (lm, Intervention("one", V.double(), 1.0, sites)) for sites in ("writes", "weights")}
        found.append(harmless_kl(lm, edited, texts, 2, store, "test"))
    for name in edited:
        for cpu, gpu in zip(found[0][name], found[1][name], strict=True):
            assert gpu == pytest.approx(cpu, rel=1e-3, abs=1e-5)


def test_the_optimised_direction(tmp_path):
    (cpu, its_loss), (gpu, loss) = (
        optimised(lm, PROMPTS, PROMPTS[::-1], "resid_pre", Optimised(steps=10, batch_size=4), 0, store)
        for lm, store in both(tmp_path)
    )
    assert float(cpu @ gpu) > 0.999 and loss == pytest.approx(its_loss, rel=1e-2)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "auto"])
def test_a_checkpoint_loads_onto_the_device_asked_for(tmp_path, device):
    tiny_model("qwen2").save_pretrained(tmp_path / "base")
    wanted, found = load_model(tmp_path / "base"), load_model(tmp_path / "base", device=device)
    ids = torch.tensor([PROMPTS[1]])
    assert found.device.type == "cuda"
    with torch.inference_mode():
        torch.testing.assert_close(found(ids.cuda()).logits.cpu(), wanted(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_done_in_parts_and_a_row_that_does_not_fit_is_said():
    batching._fits.clear()
    share = torch.cuda.get_device_properties(0).total_memory // 3

    def most_of(rows):
        return rows, torch.empty(rows * share, dtype=torch.uint8, device="cuda").numel()

    assert batching.fitting(most_of, 8, "thirds")[0] == 2
    torch.cuda.empty_cache()
    with pytest.raises(UserError, match="single row of everything"):
        batching.fitting(lambda rows: most_of(4 * rows), 2, "everything")
    assert batching.rows_at_once("auto", tiny_model("qwen2").cuda(), 9, "sweep") == batching.MAX_ROWS
    batching._fits.clear()
