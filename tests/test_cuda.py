"""A GPU gives what the CPU gives, in float32, and runs out of memory as is foreseen. `make cuda`."""

import pytest
import torch
from refusal.method.arms import BASELINE_ARM, complete_arms, direction_arm, edit, fingerprint, per_layer_arm, subspace_arm
from refusal.method.collection import collect
from safetensors.torch import load_file
from test_harmless_kl import ANSWERS, sequences
from tiny import PRE_NORM, tiny_direction, tiny_model

from refusal.analysis.estimators import optimised
from refusal.analysis.harmless_kl import Edited, costs
from refusal.analysis.sensitivity import collect as collect_at_end
from refusal.analysis.strength import edited_weights
from refusal.analysis.subspaces import random_subspaces
from refusal.io.errors import UserError
from refusal.io.store import Store
from refusal.lm import memory
from refusal.lm.load import load_model
from refusal.lm.resident import SwappableLM
from refusal.method.generate import WHERE
from refusal.method.sweep import BASELINE, complete

pytestmark = pytest.mark.cuda
PROMPTS = [[11, 12, *tokens] for tokens in sequences((3, 9, 5, 5, 1), 2)]
V = tiny_direction()


def both(model_type="qwen2"):
    return [tiny_model(model_type).requires_grad_(False).to(device) for device in ("cpu", "cuda")]


@pytest.mark.parametrize("method", ["sequential", "batched", "batched_unmasked"])
def test_activations(tmp_path, method):
    found = []
    for model in both():
        store, path = Store(tmp_path / model.device.type), tmp_path / f"{model.device.type}.safetensors"
        collect(model, "w", {"a": PROMPTS, "b": PROMPTS[:2]}, method, 0, 2, store, path)
        found.append(load_file(path))
    for name in ("a", "b"):
        torch.testing.assert_close(*(of[name] for of in found), rtol=1e-4, atol=1e-4)
    at_end = [collect_at_end(model, PROMPTS, 1, 0, 2) for model in both()]
    torch.testing.assert_close(*at_end, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sites", ["resid_pre", "paper", "writes"])
@pytest.mark.parametrize("model_type", PRE_NORM)
def test_completions_of_directions_subspaces_and_layers(tmp_path, model_type, sites):
    arms = [
        BASELINE_ARM,
        direction_arm("one", "difference", V.double(), 0.7),
        *(subspace_arm(f"span of {k}", "subspace", random_subspaces(32, k, 1, 0)[0]) for k in (2, 3)),
        per_layer_arm("each", "per_layer", tiny_direction(rows=3).double(), [0, 2], sites),
    ]
    cpu, gpu = (
        complete_arms(model, "w", PROMPTS, arms, sites, {5, 17}, 0, 8, 2, Store(tmp_path / model.device.type), "test")
        for model in both(model_type)
    )
    assert cpu == gpu and len({str(rows) for rows in cpu.values()}) > 1


def test_additions(tmp_path):
    found = []
    for model in both():
        store = Store(tmp_path / model.device.type)
        rest = ("resid_pre", {5}, 0, 6, 8, store, "test", (3 * V, 1))
        found.append([complete(model, "w", PROMPTS, [BASELINE], *rest, where)["baseline"] for where in WHERE])
    assert found[0] == found[1] and len({str(rows) for rows in found[0]}) > 1


def test_costs_of_hooks_and_of_weights(tmp_path):
    found = []
    for model in both():
        arm = direction_arm("one", "difference", V.double())
        edits = {"hooks": edit(arm, "writes"), "weights": lambda of: edited_weights(of, direction=V.double(), alpha=1.0)}
        edited = {name: Edited(model, [name, *fingerprint(arm, name)], how) for name, how in edits.items()}
        found.append(costs(edited, model, PROMPTS, ANSWERS, 0, 2, Store(tmp_path / model.device.type), ["w"], "test"))
    for name in edits:
        for cpu, gpu in zip(found[0][name], found[1][name], strict=True):
            assert gpu == pytest.approx(cpu, rel=1e-3, abs=1e-5)


def test_the_optimised_direction(tmp_path):
    (cpu, its_loss), (gpu, loss) = (
        optimised(model, "w", PROMPTS, PROMPTS[::-1], "resid_pre", 0, 10, 4, 0, Store(tmp_path / model.device.type))
        for model in both()
    )
    assert float(cpu @ gpu) > 0.999 and loss == pytest.approx(its_loss, rel=1e-2)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "auto"])
def test_a_checkpoint_loads_onto_the_device_asked_for(tmp_path, device):
    tiny_model("qwen2").save_pretrained(tmp_path / "base")
    wanted, found = load_model(tmp_path / "base"), load_model(tmp_path / "base", device=device)
    resident = SwappableLM(tmp_path / "base", "float32", device)
    ids = torch.tensor([PROMPTS[1]])
    for model in (found, resident.model):
        assert model.device.type == "cuda"
        with torch.inference_mode():
            torch.testing.assert_close(model(ids.cuda()).logits.cpu(), wanted(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_done_in_parts_and_a_row_that_does_not_fit_is_said():
    memory._fits.clear()
    share = torch.cuda.get_device_properties(0).total_memory // 3

    def most_of(rows):
        return rows, torch.empty(rows * share, dtype=torch.uint8, device="cuda").numel()

    assert memory.fitting(most_of, 8, "thirds")[0] == 2
    torch.cuda.empty_cache()
    with pytest.raises(UserError, match="single row of everything"):
        memory.fitting(lambda rows: most_of(4 * rows), 2, "everything")
    assert memory.rows_at_once("auto", tiny_model("qwen2").cuda(), 9, "sweep") == memory.MOST
    memory._fits.clear()
