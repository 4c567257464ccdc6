"""A study's model by a second, naive path: transformers' own generate and forward passes in float64, under plain hooks."""

import json
import random
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import yaml
from place import ROOT
from safetensors.torch import load, load_file
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.naive_rates import bootstrap, triple, verdict


class Arm(NamedTuple):
    """x - alpha (x B^T - o) B at a site, in which model; or a vector added at a layer."""

    family: str = "baseline"
    layer: int | None = None
    alpha: float = 0.0
    basis: Any = None
    offset: Any = None
    site: str = "resid_pre"
    folder: str = "models/base"
    positions: str | None = None

    def __call__(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        if self.positions and layer == self.layer and (x.shape[1] > 1 or self.positions == "all"):
            at = torch.arange(x.shape[1]) >= (x.shape[1] - 1 if self.positions == "last_prompt_token" else 0)
            return x + at[:, None] * self.basis
        if self.positions or self.basis is None:
            return x
        basis = self.basis[layer] if self.basis.ndim == 3 else torch.atleast_2d(self.basis)
        return x - self.alpha * (x @ basis.T - (0 if self.offset is None else self.offset[layer])) @ basis


BASELINE = Arm()


@contextmanager
def changed(model: Any, arm: Arm) -> Iterator[None]:
    """At the input of every block, at what attention and MLP write, at the embedding, or in the matrices that write."""

    def written(out: Any, i: int) -> Any:
        return (arm(out[0], i), *out[1:]) if isinstance(out, tuple) else arm(out, i)

    blocks, hooks, embed = list(enumerate(model.model.layers)), [], model.model.embed_tokens
    before = {name: w.clone() for name, w in model.state_dict().items()} if arm.site == "weights" else {}
    for i, block in blocks if arm.site != "weights" else ():
        if arm.site != "writes":
            hooks.append(block.register_forward_pre_hook(lambda _, args, i=i: (arm(args[0], i), *args[1:])))
        for part in (block.self_attn, block.mlp) if arm.site != "resid_pre" else ():
            hooks.append(part.register_forward_hook(lambda _, args, out, i=i: written(out, i)))
    if arm.site == "writes":
        hooks.append(embed.register_forward_hook(lambda _, args, out: arm(out, 0)))
    if arm.site == "weights":
        writers = [w for _, block in blocks for w in (block.self_attn.o_proj.weight.T, block.mlp.down_proj.weight.T)]
        for w in [embed.weight, *writers]:
            w.data.copy_(arm(w.data, 0))
    yield
    for hook in hooks:
        hook.remove()
    if before:
        model.load_state_dict(before)


class Ran:
    """The study's files and its models, in float64."""

    def __init__(self, folder: Path):
        self.folder, self.params = folder, yaml.safe_load((folder / "params.yaml").read_text())
        self.rows = {name: self.table(f"data/prompts/{name}.jsonl") for name in ("pairs", "unrelated")}
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "models/base", padding_side="left")
        self.directions = load_file(folder / "models/directions.safetensors")
        self.first = self.json("select")["rank_1"]
        self.layer, self.alpha = self.first["layer"], self.first["alpha"]
        self.unit = self.directions["sequential-matched.unit"]
        self.model = cache(lambda name: AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64).eval())

    def table(self, name: str) -> pd.DataFrame:
        return pd.DataFrame([json.loads(line) for line in (self.folder / name).read_text().splitlines()])

    def json(self, name: str) -> Any:
        return json.loads((self.folder / f"metrics/{name}.json").read_text())

    def sample(self, split: str, n: int | None = None, of: str = "pairs") -> pd.DataFrame:
        rows = self.rows[of][self.rows[of].split == split]
        return rows if n is None else rows.iloc[some(len(rows), n)]

    def activations(self, method: str = "sequential", kept: bool = True) -> dict[str, torch.Tensor]:
        """By set, of train the prompts that are kept or all, in float64."""
        sets = load_file(self.folder / f"data/activations/{method}.safetensors")
        flags = self.table("data/behaviour/train.jsonl").groupby("set")["kept"] if kept else ()
        sets |= {name: sets[name][torch.tensor(of.to_numpy())] for name, of in flags}
        return {name: x.double() for name, x in sets.items()}

    def swept(self) -> pd.DataFrame:
        """The sweep's completions of val prompts, judged here; controls of one kind are one arm."""
        rows = self.table("data/sweep/completions.jsonl").merge(self.rows["pairs"][["id", "split", "topic", "harmful"]], on="id")
        assert [*rows["prompt"]] == [*rows["harmful"]] and set(rows["split"]) == {"val"}
        told = pd.DataFrame([verdict(*each) for each in zip(rows["prompt"], rows["completion"], strict=True)])
        arm = rows["cell"].where(rows["layer"].notna(), rows["cell"].str.split("_").str[0])
        return rows.drop(columns="completion").join(told).assign(arm=arm, member=rows["cell"])

    @torch.no_grad()
    def answers(self, prompts: list[str], arm: Arm, limit: int | None = None) -> list[list[int]]:
        """Token ids of greedy completions by transformers' own generate, without what ends them; by default to the study's limit."""
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        how = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
        inputs, model = self.tokenizer.apply_chat_template(chats, **how), self.model(arm.folder)
        with changed(model, arm):
            limit = limit or self.params["generation"]["max_new_tokens"]
            made = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
        special = set(self.tokenizer.all_special_ids)
        return [[i for i in row if i not in special] for row in made[:, inputs["input_ids"].shape[1] :].tolist()]

    def ask(self, rows: pd.DataFrame, half: str, arms: dict[str, list[Arm]], limit: int | None = None) -> pd.DataFrame:
        """A row for each completion of every intervention of every arm, judged."""
        found = []
        for name, members in arms.items():
            for member, arm in enumerate(members):
                made = self.answers([*rows[half]], arm, limit)
                texts = self.tokenizer.batch_decode(made)
                right = rows[f"{half}_answer"] if f"{half}_answer" in rows else [None] * len(rows)
                answers = zip(rows[half], texts, right, strict=True)
                judged = pd.DataFrame([verdict(*each) for each in answers])
                judged = judged.assign(n_tokens=[*map(len, made)])
                found.append(judged.assign(arm=name, member=member, id=[*rows["id"]], topic=[*rows["topic"]]))
        return pd.concat(found, ignore_index=True)

    @torch.no_grad()
    def log_probs(self, prompt: str, answer: list[int], arm: Arm) -> torch.Tensor:
        chat = [{"role": "user", "content": prompt}]
        ids = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        with changed(self.model(arm.folder), arm):
            return self.model(arm.folder)(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].log_softmax(-1)

    def costs(self, n: int | None, arms: dict[str, list[Arm]], reference: Arm = BASELINE) -> dict[str, dict[str, float]]:
        """Cross-entropy of the baseline's answers to harmless prompts and KL to the reference's predictions, a text alone."""
        rows = self.sample("test", n, "unrelated")
        texts = [*zip(rows["safe"], self.answers([*rows["safe"]], Arm()), strict=True)]
        assert all(answer for _, answer in texts)
        before, found = [self.log_probs(*text, reference) for text in texts], {}
        for name, members in arms.items():
            values = []
            for arm in members:
                for (prompt, answer), p in zip(texts, before, strict=True):
                    q = self.log_probs(prompt, answer, arm)
                    kl = (p.exp() * (p - q)).sum(-1).mean()
                    values.append((float(-q[range(len(answer)), answer].mean()), float(kl)))
            # Of several drawn interventions one is the unit; of one a topic is.
            clusters = np.repeat(range(len(members)), len(texts)) if len(members) > 1 else rows["topic"].to_numpy()
            three = (bootstrap(column, clusters, 200, 0) for column in np.array(values).T)
            found[name] = {k: x for key, t in zip(("cross_entropy", "kl"), three, strict=True) for k, x in triple(key, t).items()}
        return found


    def entropy_difference(self, n: int, arm: Arm) -> dict[str, float]:
        """Cross-entropy less the baseline's, text by text."""
        rows = self.sample("test", n, "unrelated")
        texts = [*zip(rows["safe"], self.answers([*rows["safe"]], Arm()), strict=True)]
        own, base = (
            np.array([float(-self.log_probs(*text, one)[range(len(text[1])), text[1]].mean()) for text in texts]) for one in (arm, BASELINE)
        )
        return triple("cross_entropy_difference", bootstrap(own - base, rows["topic"].to_numpy(), 200, 0))


def some(n_items: int, n: int) -> list[int]:
    """Which of so many items a seed of 0 draws."""
    return sorted(random.Random(0).sample(range(n_items), n))


def unit_rows(n: int, d: int, seed: int) -> torch.Tensor:
    """Random directions, as they are drawn."""
    drawn = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm(dim=-1, keepdim=True)


def stored_direction(ran: Ran) -> torch.Tensor:
    """The direction found by gradient, which only the resume store holds."""
    store = sqlite3.connect(ran.folder / ".refusal-store/store.sqlite")
    values = [value for (value,) in store.execute("SELECT value FROM blobs")]
    (learned,) = (load(value) for value in values if b'"unit"' in value[:200] and b'"loss"' in value[:200])
    return learned["unit"]


def single_directions(ran: Ran) -> dict[str, Arm]:
    """Of rank 1, by every estimator, from the directions and activations on disk."""
    d = {name: ran.directions[f"sequential-{name}"] for name in ("matched.safe_mean", "unrelated.unit")}
    acts = ran.activations()
    few = some(len(acts["train.harmful"]), ran.params["science"]["n_fit"])
    arms = {"rank_1": Arm("difference", ran.layer, ran.alpha, ran.unit[ran.layer])}
    arms |= {f"difference.{i}": Arm("difference", i, 1.0, ran.unit[i]) for i in (2, 5)}
    for i in (2, 5):
        harmful, safe = (acts[f"train.{half}"][:, i] for half in ("harmful", "safe"))
        x, z = harmful[few], safe[few]
        both, labels = torch.cat([x, z]), [1] * len(x) + [0] * len(z)
        fitted = LogisticRegression(max_iter=10_000, tol=1e-10).fit((both - both.mean(0)) / both.std(0), labels)
        within = ledoit_wolf(torch.cat([x - x.mean(0), z - z.mean(0)]).numpy(), assume_centered=True)[0]
        fisher = np.linalg.solve(within, (x.mean(0) - z.mean(0)).numpy())
        found = {
            "unrelated": d["unrelated.unit"][i],
            "logistic": torch.tensor(fitted.coef_[0]) / both.std(0),
            "lda": torch.tensor(fisher),
            "paired_svd": torch.tensor(np.linalg.svd((harmful - safe).numpy())[2][0]),
            "affine": ran.unit[i],
        }
        arms |= {f"{name}.{i}": Arm(name, i, 1.0, v / v.norm()) for name, v in found.items()}
        arms[f"affine.{i}"] = arms[f"affine.{i}"]._replace(offset=(d["matched.safe_mean"] @ ran.unit[i])[:, None])
    return arms | {"optimised": Arm("optimised", None, 1.0, stored_direction(ran))}


def subspaces(ran: Ran) -> dict[str, Arm]:
    """Singular vectors of paired differences, the span of the swept layers' directions, and each of these at its layer."""
    acts = ran.activations()
    differences = (acts["train.harmful"] - acts["train.safe"])[:, ran.layer].numpy()
    right = torch.tensor(np.linalg.svd(differences)[2])
    both = torch.tensor(np.linalg.qr(ran.unit[[1, 2]].T.numpy())[0].T)
    own = torch.zeros(len(ran.unit), 1, ran.unit.shape[1], dtype=torch.float64)
    own[[1, 2], 0] = ran.unit[[1, 2]]
    arms = {f"svd_{k}": Arm("subspace", ran.layer, 1.0, right[:k]) for k in (2, 3, 5)}
    return arms | {"qr_2": Arm("subspace", None, 1.0, both), "per_layer": Arm("per_layer", None, 1.0, own)}


def random_arms(ran: Ran) -> dict[str, list[Arm]]:
    """The harmless difference; random directions and subspaces; random directions ablated as affine and as per_layer are."""
    d, other = ran.unit.shape[1], ran.directions["sequential-harmless.unit"][ran.layer]
    arms = {"harmless": [Arm(alpha=1.0, basis=other)], "random_1": [Arm(alpha=1.0, basis=v) for v in unit_rows(2, d, 0)]}
    for k in (2, 3, 5):
        drawn = torch.randn(2, d, k, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        arms[f"random_{k}"] = [Arm(alpha=1.0, basis=torch.linalg.qr(each)[0].T) for each in drawn]
    safe_mean, defined = (ran.directions[f"sequential-matched.{of}"] for of in ("safe_mean", "defined"))
    drawn = unit_rows(3 * (1 + len(ran.unit)), d, 1).reshape(3, 1 + len(ran.unit), 1, d)  # of each: one, then one a layer
    arms["random_per_layer"] = [Arm(alpha=1.0, basis=own * defined[:, None, None]) for own in drawn[:, 1:]]
    arms["random_affine"] = [Arm(alpha=1.0, basis=v, offset=safe_mean @ v.T) for v in drawn[:, 0]]
    return arms


def document_scores(ran: Ran, folder: str, task: str) -> list[float]:
    """Of each document of a task whether the right choice is the likeliest answer to its question, each asked alone."""
    lines = (ROOT / f"refusal/analysis/tasks/{task}.jsonl").read_text().splitlines()
    documents = [json.loads(line) for line in lines[: ran.params["benchmark"]["limit"]]]
    scores, arm = [], Arm(folder=folder)
    for document in documents:
        ids = [ran.tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in document["choices"]]
        told = [ran.log_probs(document["question"], choice, arm)[range(len(choice)), choice].sum() for choice in ids]
        scores.append(float(int(np.argmax(told)) == document["label"]))
    return scores
