"""model: train the organism, or bring in a checkpoint; then see on val whether it refuses what it should."""

import shutil
import sys
from functools import partial
from pathlib import Path

from refusal.io.errors import UserError
from refusal.io.files import read_jsonl
from refusal.io.params import Params
from refusal.io.prompts import prompt_sets, safe_rows
from refusal.io.store import Store
from stages import STORE, hashes, read_json, stage, use_transformers, write_json

BASE, TWIN, TRUTH, METRICS = Path("models/base"), Path("models/twin"), Path("models/truth"), Path("metrics/model.json")
TRAINING = BASE / "training.json"  # which training gave the weights


def main(params: Params) -> str:
    use_transformers(params)
    pairs, unrelated = (read_jsonl(Path(f"data/prompts/{name}.jsonl")) for name in ("pairs", "unrelated"))
    given = Path(params.model.id).resolve()
    if params.model.revision is None and any(given.is_relative_to(folder.resolve()) for folder in (BASE, TWIN, TRUTH)):
        raise UserError(f"params.yaml: model.id: {params.model.id} is what this stage writes: give a folder elsewhere")
    named: dict = {}
    if params.model.id == "organism":
        train(params, {prompt for prompts in prompt_sets(pairs, unrelated, ("val", "test")).values() for prompt in prompts})
    else:
        clear()
        named = {"id": params.model.id} | bring_in(params)
    halves = {"harmful": pairs, "safe": safe_rows(pairs, unrelated)}
    return measure(params, named, {half: [row for row in rows if row["split"] == "val"] for half, rows in halves.items()})


def clear() -> None:
    for folder in (BASE, TWIN, TRUTH):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def train(params: Params, held_out: set[str]) -> None:
    """models/base, its helpful-only twin and the planted direction, if there is one.

    Training gives other weights on another processor. So those that are here already, such as pulled ones, stay where they come
    from this very training (models/base/training.json), whatever file of the code a comment has changed in.
    """
    from safetensors.torch import save_file

    from refusal.organism.train import train_organism, training_key

    key = training_key(params.organism, held_out)
    if TRAINING.is_file() and read_json(TRAINING) == {"key": key, "sha256": weights_here()}:
        return
    clear()
    trained = train_organism(params.organism, held_out, STORE / "training", params.compute.threads)
    for folder, weights in ((BASE, trained.model.state_dict()), (TWIN, trained.twin)):
        trained.model.save_pretrained(folder, state_dict={name: tensor.contiguous() for name, tensor in weights.items()})
        trained.tokenizer.save_pretrained(folder)
    if trained.planted is None:
        (TRUTH / "none.txt").write_text("No direction was planted in this model.\n")
    else:
        save_file({"direction": trained.planted}, TRUTH / "planted.safetensors")
    write_json(TRAINING, {"key": key, "sha256": weights_here()})


def weights_here() -> dict[str, str]:
    files = sorted(path for folder in (BASE, TWIN, TRUTH) if folder.is_dir() for path in folder.iterdir())
    return hashes((path for path in files if path != TRAINING), "model")


def bring_in(params: Params) -> dict[str, str | list[str] | None]:
    """models/base from a folder, a GGUF file, or a revision on the hub, whose `commit` is in what is returned; Qwen-1 becomes
    Qwen2 layout, and GGUF is dequantized (`gguf`: from which types).

    Safetensors, configuration and tokenizer are copied, and nothing that could run.
    """
    from refusal.io.progress import progress
    from refusal.lm import download as hub
    from refusal.lm import qwen1, validate

    m = params.model
    source, commit = Path(m.id), None
    ready = partial(validate.validate_checkpoint, system_prompt=m.system_prompt, thinking=m.thinking)
    if m.file is not None and m.revision is not None:
        source, commit = hub.fetch_file(m.id, m.revision, m.file, BASE)
    elif m.revision is not None:
        source, commit = hub.fetch(m.id, m.revision, ready, BASE)
    elif not source.exists() or not (source.is_dir() or source.suffix == ".gguf"):
        raise UserError(
            f"params.yaml: model.id: {m.id} is neither organism nor a folder; give the path of a checkpoint, or a hub id "
            "with model.revision, a commit hash or tag, or a .gguf file"
        )
    named: dict[str, str | list[str] | None] = {"commit": commit}
    if source.is_file():
        from refusal.lm import gguf

        named |= {"file": source.name, "gguf": gguf.convert(source, BASE, m.dtype, ready)}
        validate.check_weights(BASE, m.dtype)
    else:
        ready(source)
        shards = validate.check_weights(source, m.dtype)
        if qwen1.is_qwen1(source):
            qwen1.convert(source, BASE)
        else:
            files = validate.small_files(source) | {shard.name: shard.path for shard in shards}
            with progress(len(files), "copy to models/base", "file") as bar:
                for name, path in sorted(files.items()):
                    shutil.copyfile(path, BASE / name)
                    bar.update()
    (TWIN / "none.txt").write_text("A model that was not trained here has no helpful-only twin.\n")
    (TRUTH / "none.txt").write_text("No direction was planted in this model.\n")
    return named


def measure(params: Params, named: dict, val: dict[str, list]) -> str:
    """Does it refuse what it should, on val; of an organism, what its helpful-only twin and its facts say too."""
    from refusal.judges.behaviour import behaviour
    from refusal.lm.checkpoint import make_loadable
    from refusal.lm.load import load_lm, read_at, render_chats
    from refusal.method import bridge
    from refusal.method.generate import Decoding
    from refusal.method.intake import N_PROVED, prove

    for changed in make_loadable(BASE):
        print(f"model: {BASE}/{changed}", file=sys.stderr)
    base, twin = (
        load_lm(folder, **params.model.loading) if (folder / "config.json").is_file() else None for folder in (BASE, TWIN)
    )
    assert base is not None
    prompts = {half: [row[half] for row in rows] for half, rows in val.items()}
    topics = {half: [row["topic"] for row in rows] for half, rows in val.items()}
    texts = [*prompts["harmful"][:N_PROVED], *prompts["safe"][:N_PROVED]]
    proof = prove(base, base.encode(texts), params.model.id).figures
    named = named | {"rendered_prompt": render_chats(base.tokenizer, prompts["harmful"][:1], base.system_prompt)[0]}
    named = named | {"read_at": read_at(base), "architecture": proof}
    metrics = named | behaviour(base, twin, prompts, topics, params.generation, Store(STORE / "store.sqlite"))
    decoding = Decoding(params.generation.max_new_tokens, bridge.N_PROMPTS)
    try:
        engine = bridge.compare(BASE, base, prompts["harmful"], prompts["safe"], decoding)
    except bridge.Unbridged as error:
        print(f"model: TransformerLens cannot run this model, so nothing is compared with it ({error})", file=sys.stderr)
        engine = None
    write_json(METRICS, metrics | {"transformer_lens": engine})
    return (
        f"{params.model.id}, {metrics['n_parameters']:,} parameters; refuses {metrics['refusal_harmful']:.1%} of harmful "
        f"and {metrics['refusal_safe']:.1%} of safe val prompts"
    )


stage(main, online=lambda params: params.model.revision is not None)
