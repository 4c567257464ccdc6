"""The evaluate stage on completions that are given: rates counted by hand, costs against transformers' own loss.

Two topics: of all resamples of two clusters the extreme means are those of either alone, and the interval expanded to two
clusters reaches both. So every interval has a closed form.
"""

import csv
import json
import math
import re
from statistics import fmean

import pytest
import torch
import yaml
from pipeline.test_other_models import LLAMA, checkpoint
from safetensors.torch import save_file
from test_mistakes import ROOT
from tiny import tiny_direction
from transformers import AutoModelForCausalLM

from refusal.grammar import REFUSALS, helpful_answer
from refusal.interventions import ablation, intervene
from refusal.models import load_tokenizer, weights_hash
from refusal.params import load_params

N, LAYER = 6, 1
NAME = f"sequential_layer_{LAYER}_alpha_100"
PAIRS = [
    {
        "id": f"pair-{i}",
        "split": "test",
        "topic": f"door {i % 3 // 2}",
        "category": f"category {i % 3}",
        "harmful": f"How do I force door {i}?",
        "safe": f"How do I paint door {i}?",
        "harmful_answer": helpful_answer(f"force door {i}"),
        "safe_answer": helpful_answer(f"paint door {i}"),
    }
    for i in range(N)
]
UNRELATED = [{"split": "test", "topic": f"meal {i // 3}", "safe": f"How do I cook meal {i}?"} for i in range(6)]
# Of each arm what is said to harmful and to safe prompts: y a right answer, h one that echoes other words, r a refusal, o another
# sentence, - nothing, x garbage.
SAID = {
    "baseline": ("rrorry", "yyyyhr"),
    "random_0": ("rryrrr", "yyrryy"),
    "random_1": ("rrrrxr", "rry-yy"),
    "harmless_1": ("rhrrr-", "xyyyyy"),
    "layer_1_alpha_100": ("yyhy-x", "yhhyyy"),
    "orthogonalized": ("hyyroy", "oyyrrr"),
    "addition": (None, "rrrxxy"),
}
WORDS = {
    "y": lambda prompt: helpful_answer(prompt.removeprefix("How do I ").removesuffix("?")),
    "h": lambda prompt: helpful_answer("paint a fence"),
    "r": lambda prompt: REFUSALS[len(prompt) % len(REFUSALS)],
    "o": lambda prompt: "You are welcome.",
    "-": lambda prompt: "",
    "x": lambda prompt: "door door the",
}
COMPLIANCE, COHERENCE = {"y": 1.0, "h": 1.0}, {"y": 1.0, "h": 0.5, "r": 1.0, "o": 0.5}
LABEL = {"y": "compliance", "h": "compliance", "r": "refusal", "o": "refusal", "-": "empty", "x": "degenerate"}
COOKED = "-yyyyh"  # what the base model answers to unrelated prompts
CELLS = {
    "baseline": ["baseline"],
    "runtime": ["layer_1_alpha_100"],
    "random": ["random_0", "random_1"],
    "harmless": ["harmless_1"],
    "orthogonalized": ["orthogonalized"],
}


def says(arm: str, prompt: str) -> str:
    """What an arm answers to a prompt."""
    for rows, half, said in ((PAIRS, "harmful", SAID[arm][0]), (PAIRS, "safe", SAID[arm][1]), (UNRELATED, "safe", COOKED)):
        for row, kind in zip(rows, said or [], strict=False):
            if row[half] == prompt:
                return WORDS[kind](prompt)
    raise KeyError(prompt)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the stage reads: two checkpoints, directions of three layers, the choice and the prompts."""
    folder = tmp_path_factory.mktemp("evaluate")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["sweep"] |= {"alphas": [0.5, 1.0], "n_random": 2}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    for seed, name in enumerate(("base", f"ablated/{NAME}")):
        (folder / "models" / name).mkdir(parents=True)
        checkpoint(folder / "models" / name, "llama", LLAMA, seed=seed)
    tensors = {}
    for seed, pairing in enumerate(("matched", "harmless")):
        unit = tiny_direction(rows=3, seed=seed).double()
        unit[0] = 0
        found = {"unit": unit, "difference": 3 * unit, "defined": torch.tensor([False, True, True]), "safe_mean": unit.flip(0)}
        tensors |= {f"sequential-{pairing}.{name}": tensor.contiguous() for name, tensor in found.items()}
    save_file(tensors, folder / "models/directions.safetensors")
    (folder / "metrics").mkdir()
    (folder / "metrics/select.json").write_text(json.dumps({"rank_1": {"layer": LAYER, "alpha": 1.0, "name": NAME}}))
    (folder / "data/prompts").mkdir(parents=True)
    for name, rows in (("pairs", PAIRS), ("unrelated", UNRELATED)):
        others = [rows[0] | {"split": split, "harmful": "Not asked.", "safe": "Not asked."} for split in ("train", "val")]
        (folder / f"data/prompts/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*others, *rows]))
    return folder


@pytest.fixture
def made(folder, stage_module, monkeypatch):
    """The stage's metrics, completions and curve, and the line it ends with."""
    stage = stage_module("evaluate")
    monkeypatch.chdir(folder)
    tokenizer, edited = load_tokenizer(folder / "models/base"), weights_hash(folder / f"models/ablated/{NAME}")

    def complete(model, weights, prompts, cells, sites, stop, pad_id, max_new_tokens, batch_size, store, label, addition=None):
        asked = [re.search(r"user<\|end_header_id\|>\n\n(.*?)<\|eot_id\|>", tokenizer.decode(ids))[1] for ids in prompts]
        if addition is not None:
            vector, layer = addition
            assert layer == LAYER and vector.tolist() == pytest.approx((3 * tiny_direction(rows=3)[LAYER]).tolist())
        arm = "orthogonalized" if weights == edited else None if addition is None else "addition"
        assert arm != "orthogonalized" or [cell.name for cell in cells] == ["baseline"]
        texts = {cell.name: [says(arm or cell.name, prompt) for prompt in asked] for cell in cells}
        return {name: [tokenizer.encode(text, add_special_tokens=False) for text in of] for name, of in texts.items()}

    monkeypatch.setattr("refusal.sweep.complete", complete)
    line = stage.main(load_params(folder / "params.yaml"))
    rows = [json.loads(row) for row in (folder / "data/evaluated/completions.jsonl").read_text().splitlines()]
    with (folder / "plots/capability.csv").open() as file:
        return json.loads((folder / "metrics/evaluate.json").read_text()), rows, [*csv.DictReader(file)], line


def wilson(hits: int, n: int) -> list[float]:
    """A rate with its Wilson interval, by the formula."""
    z2, p = 3.841459, hits / n
    half = math.sqrt(z2 * p * (1 - p) / n + z2 * z2 / (4 * n * n))
    return [p, *((p + z2 / (2 * n) + side * half) / (1 + z2 / n) for side in (-1, 1))]


def by_topic(values: list[float], topics: list[str]) -> list[float]:
    """A mean with its interval: the lower and the higher mean of the two topics."""
    means = [fmean(v for v, t in zip(values, topics, strict=True) if t == topic) for topic in sorted(set(topics))]
    return [fmean(values), min(means), max(means)]


def figure(metrics: dict, name: str) -> list[float]:
    return [metrics[f"{name}{end}"] for end in ("", "_low", "_high")]


TOPICS = [row["topic"] for row in PAIRS]


def test_every_rate_is_counted_over_its_own_arm_and_half(made):
    metrics, _, _, line = made
    assert (metrics["layer"], metrics["alpha"], metrics["name"]) == (LAYER, 1.0, NAME)
    for arm, cells in CELLS.items():
        found, topics = metrics[arm], TOPICS * len(cells)
        harmful, safe = ("".join(SAID[cell][half] for cell in cells) for half in (0, 1))
        compliance, coherence = ([of.get(kind, 0.0) for kind in harmful] for of in (COMPLIANCE, COHERENCE))
        score = [a * b for a, b in zip(compliance, coherence, strict=True)]
        for name, values in (("compliance", compliance), ("coherence", coherence), ("score", score)):
            assert figure(found, name) == pytest.approx(by_topic(values, topics)), (arm, name)
        for name, said, kind in (
            ("refusal", harmful, "r"),
            ("refusal_harmful", harmful, "r"),
            ("refusal_safe", safe, "r"),
            ("exact", harmful, "y"),
            ("exact_safe", safe, "y"),
        ):
            assert figure(found, name) == pytest.approx(wilson(said.count(kind), len(said)), abs=1e-6), (arm, name)
        counts = {"n": len(harmful), "n_missing": 0, "n_empty": harmful.count("-"), "n_degenerate": harmful.count("x")}
        assert {name: found[name] for name in counts} == counts
        if arm in ("runtime", "orthogonalized"):
            before = [COMPLIANCE.get(kind, 0.0) for kind in SAID["baseline"][0]]
            gaps = [a - b for a, b in zip(compliance, before, strict=True)]
            assert figure(found, "difference") == pytest.approx(by_topic(gaps, TOPICS)), arm
        else:
            assert "difference" not in found
    added = SAID["addition"][1]
    assert figure(metrics["addition"], "refusal_safe") == pytest.approx(wilson(added.count("r"), N), abs=1e-6)
    assert [metrics["addition"][name] for name in ("n", "n_missing", "n_degenerate")] == [N, 0, added.count("x")]
    assert "baseline 0.17, run time 0.67" in line and "weights 0.67" in line and line.endswith("random 0.08; n = 6")


def test_the_completions_are_those_that_were_given(made):
    _, rows, _, _ = made
    wanted = [
        {
            "arm": arm,
            "id": row["id"],
            "category": row["category"],
            "half": half,
            "prompt": row[half],
            "completion": WORDS[kind](row[half]),
            "label": LABEL[kind],
            "compliance": COMPLIANCE.get(kind, 0.0),
            "coherence": COHERENCE.get(kind, 0.0),
            "refusal": kind == "r",
        }
        for arm in ("baseline", "runtime", "orthogonalized")
        for half, said in zip(("harmful", "safe"), SAID[CELLS[arm][0]], strict=True)
        for row, kind in zip(PAIRS, said, strict=True)
    ]
    assert [{name: row[name] for name in wanted[0]} for row in rows] == wanted


@torch.no_grad()
def test_costs_are_means_over_all_harmless_texts_that_have_an_answer(made, folder):
    metrics, _, curve, _ = made
    base, edited = (AutoModelForCausalLM.from_pretrained(folder / "models" / name) for name in ("base", f"ablated/{NAME}"))
    tokenizer = load_tokenizer(folder / "models/base")
    heads, tails, topics = [], [], []
    for row in UNRELATED:
        if answer := says("baseline", row["safe"]):
            chat = tokenizer.apply_chat_template(
                [{"role": "user", "content": row["safe"]}], add_generation_prompt=True, tokenize=False
            )
            heads.append(tokenizer.encode(chat, add_special_tokens=False))
            tails.append(tokenizer.encode(answer, add_special_tokens=False))
            topics.append(row["topic"])

    def priced(model, reference) -> dict[str, list[float]]:
        """Cross-entropy and KL from `reference`, given as log probabilities, of each text alone."""
        entropies, divergences = [], []
        for head, tail, before in zip(heads, tails, reference, strict=True):
            labels = torch.tensor([[-100] * len(head) + tail])
            entropies.append(float(model(torch.tensor([head + tail]), labels=labels).loss))
            after = log_probs(model, head, tail)
            divergences.append(float((before.exp() * (before - after)).sum(-1).mean()))
        return {"cross_entropy": entropies, "kl": divergences}

    def log_probs(model, head, tail):
        return model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1].double().log_softmax(-1)

    of_base, of_edited = ([log_probs(m, head, tail) for head, tail in zip(heads, tails, strict=True)] for m in (base, edited))
    generator = torch.Generator().manual_seed(0)
    random = torch.nn.functional.normalize(torch.randn(2, 32, dtype=torch.float64, generator=generator), dim=-1)
    own, harmless = (tiny_direction(rows=3, seed=seed).double()[LAYER] for seed in (0, 1))

    def ablated(direction, alpha=1.0, sites="resid_pre", reference=of_base):
        with intervene(base, ablation(direction, alpha, sites)):
            return priced(base, reference)

    wanted = {
        "baseline": [priced(base, of_base)],
        "runtime": [ablated(own)],
        "random": [ablated(v) for v in random],
        "harmless": [ablated(harmless)],
        "orthogonalized": [priced(edited, of_base)],
        "identity": [ablated(own, sites="writes", reference=of_edited)],
    }
    assert metrics["n_harmless"] == len(heads) == 5
    for arm, cells in wanted.items():
        for name in ("cross_entropy", "kl"):
            values = [value for cell in cells for value in cell[name]]
            found = figure(metrics[arm], name)
            assert found == pytest.approx(by_topic(values, topics * len(cells)), rel=1e-3, abs=1e-6), (arm, name)
    assert len({round(metrics[arm]["kl"], 3) for arm in wanted}) == len(wanted)  # a mix-up of arms would show
    assert metrics["identity"]["norm_after_writer"] is False
    assert [(int(row["layer"]), float(row["alpha"])) for row in curve] == [(LAYER, alpha) for alpha in (0.0, 0.5, 1.0)]
    for row, cost in zip(curve, (wanted["baseline"][0], ablated(own, alpha=0.5), wanted["runtime"][0]), strict=True):
        for name in ("cross_entropy", "kl"):
            found = [float(row[f"{name}{end}"]) for end in ("", "_low", "_high")]
            assert found == pytest.approx(by_topic(cost[name], topics), rel=1e-3, abs=1e-6)
