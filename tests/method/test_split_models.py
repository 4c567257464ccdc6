"""A model whose blocks accelerate has spread: half of them in memory, half on the disk, from where it brings each to its forward.

So every block of the second half runs behind accelerate's own hooks, as on a second GPU; that tensors lie on devices which do not
mix is what `make cuda` sees alone.
"""

import pytest
import torch
from tiny import tiny_direction, tiny_model, tiny_prompts
from transformers import AutoModelForCausalLM

from refusal.io.store import Store
from refusal.lm.load import LM, load_model
from refusal.method.activations import last_token_resid_pre
from refusal.method.first_token import scores
from refusal.method.generate import Decoding
from refusal.method.interventions import BASELINE, Addition, Intervention
from refusal.method.sweep import complete


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe", "mixtral"])
def test_a_split_model_in_bfloat16_gives_what_the_whole_gives(tmp_path, kind):
    folder = tmp_path / "checkpoint"
    tiny_model(kind).save_pretrained(folder)
    whole = load_model(folder, "bfloat16")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "disk"}
    places |= {f"model.layers.{i}": "cpu" if i == 0 else "disk" for i in range(3)}
    split = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map=places, offload_folder=tmp_path / "offloaded", offload_buffers=True
    ).eval()
    assert {p.device.type for p in split.parameters()} == {"cpu", "meta"} and set(split.hf_device_map.values()) == {"cpu", "disk"}
    prompts, v = tiny_prompts((7, 3, 12, 7, 2, 9) * 3), tiny_direction(rows=4)
    acting = [Intervention(f"d{i}", v[i], 1.0, sites, layer=1) for i, sites in enumerate(("resid_pre", "paper", "writes"))]
    found = []
    for name, model in (("whole", whole), ("split", split)):
        lm, store = LM(model, None, "w", frozenset(), 0), Store(tmp_path / f"{name}.sqlite")
        answers = complete(lm, prompts, [BASELINE, *acting], Decoding(6, 4), store, "completions")
        rows = [last_token_resid_pre(lm, prompts, method).tolist() for method in ("sequential", "batched")]
        first = scores(lm, prompts[:6], prompts[6:12], [(acting[0], Addition(v[3], 1))], [3, 4], store)
        found.append((answers, rows, first))
    assert found[0] == found[1]
    answers = found[0][0]
    assert any(answers["d0"][i] != answers["baseline"][i] for i in range(len(prompts)))
