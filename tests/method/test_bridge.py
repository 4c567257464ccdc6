"""TransformerLens on the model at hand: it agrees, and would not if what it is compared with were another's."""

import pytest
from tiny import text_lm

from refusal.method import bridge
from refusal.method.generate import Decoding

HARMFUL, SAFE = ([f"{word} {i}{'?' * i}" for i in range(9)] for word in ("How to break it", "What to paint it"))


def compared(tmp_path, lm, safe=SAFE):
    lm.model.save_pretrained(tmp_path)
    return bridge.compare(tmp_path, lm, HARMFUL, safe, Decoding(6, 4))


def test_both_engines_read_and_ablate_the_same(tmp_path):
    found = compared(tmp_path, text_lm())
    assert found["n_prompts"] == 8 and 0 < found["n_tokens"] <= 48 and found["n_same"] == found["n_tokens"]
    assert found["n_changed"] > 0 and found["resid_pre_max_difference"] < 1e-5 < found["resid_pre_max"]


def test_another_ablation_and_other_activations_would_show(tmp_path, monkeypatch):
    real = bridge.last_token_resid_pre
    monkeypatch.setattr(bridge, "_ablated", lambda r, hook, **how: r)
    monkeypatch.setattr(bridge, "last_token_resid_pre", lambda *args: real(*args) + 0.01)
    found = compared(tmp_path, text_lm())
    assert found["n_same"] < found["n_tokens"] and found["resid_pre_max_difference"] == pytest.approx(0.01, rel=1e-2)


def test_without_a_direction_activations_alone_are_compared(tmp_path):
    found = compared(tmp_path, text_lm(), HARMFUL)
    assert found["n_tokens"] is found["n_same"] is found["n_changed"] is None and found["resid_pre_max_difference"] < 1e-5


def test_only_their_failures_are_taken_for_theirs(tmp_path, monkeypatch):
    def fails(*_):
        raise ValueError("no such architecture")

    monkeypatch.setattr(bridge, "_bridge", fails)
    with pytest.raises(bridge.Unbridged, match="ValueError: no such architecture"):
        compared(tmp_path, text_lm())
    monkeypatch.setattr(bridge, "generate", fails)
    with pytest.raises(ValueError, match="no such"):
        compared(tmp_path, text_lm())
