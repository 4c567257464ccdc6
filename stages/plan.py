"""plan: what a run with these parameters will take, before anything is computed, downloaded or paid for (`make plan`), or with
those of a study (`make plan STUDY=<name>`).

No stage of the pipeline. Of a hub model, configuration and tokenizer (megabytes) are fetched and kept, so that layers and
tokens are counted rather than guessed; no weight is.
"""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from refusal.io.errors import UserError
from refusal.io.params import Params
from refusal.io.params_file import load_params
from stages import OWN_HARMLESS, ROOT, STORE, stage
from stages.record import cpu_name
from stages.studies import parameters

TRAINED = Path("models/base/training.json")


def main(params: Params, *study: str) -> str:
    from refusal.report.plan import Step, steps

    tokenizer, size, folder = model_of(params)
    for line in looked_at(folder):
        print(line)
    pairs, unrelated = prompts_of(params)
    prompts = counted(params, tokenizer, pairs, unrelated)
    found = steps(params, size, prompts)
    passes, tokens = (sum(getattr(step, name) or 0 for step in found) for name in ("passes", "tokens"))
    calls, n_bytes, free = sum(step.calls for step in found), sum(step.n_bytes for step in found), shutil.disk_usage(ROOT).free
    depth, weights = f"{size.architecture.n_layers} layers", f"{gigabytes(size.n_bytes)} of weights"
    print(f"{params.model.id}: {size.n_parameters:,} parameters, {depth}, {weights}")
    if size.downloaded:
        print(f"to download: {gigabytes(size.downloaded)}")
    rows = [["stage", "forward passes", "tokens", "judge calls", "disk", ""]]
    for s in [*found, Step("at most", passes, tokens, calls, n_bytes)]:
        disk = gigabytes(s.n_bytes) if s.n_bytes else "-"
        rows.append([s.stage, number(s.passes), number(s.tokens), number(s.calls), disk, s.note])
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for name, *cells, note in rows:
        figures = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print(f"{name.ljust(widths[0])}  {figures}  {note}".rstrip())
    print(time_of(params, found))
    room = "" if n_bytes < free else ", too little: make room, or lower select.top"
    return (
        f"{2 * size.n_parameters * tokens:.1e} floating-point operations, 2 a parameter and token; {gigabytes(free)} of disk are "
        f"free{room}; what is stored already is not computed again"
    )


def time_of(params: Params, found: list[Any]) -> str:
    """How long the stages take at most, at the rates of this model's runs on this processor with as many threads."""
    from refusal.report.plan import hours

    log, c = STORE / "runs.jsonl", params.compute
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    alike = {"model": params.model.model_dump(), "threads": c.threads}
    runs = [{"workers": 1} | line for line in lines if alike.items() <= line.items() and line["machine"]["cpu"] == cpu_name()]
    if (known := hours(found, runs, c.workers)) is None:
        return f"time: not known: no stage has run this model here on {c.threads} threads yet"
    one, several = known
    more = f"; with {c.workers} (compute.workers): {several:.2g}, where units are handed out whole" if c.workers > 1 else ""
    without = "".join(f", without {step.stage}" for step in found if step.tokens is None)
    return f"time{without}: at most {one:.2g} hours with 1 worker, at the rates of {len(runs)} runs in {log.name}{more}"


def prompts_of(params: Params) -> tuple[list[dict], list[dict]]:
    """The rows that the prompts stage would write; the grammar's stand in for those that an API is still to write."""
    from refusal.data.prompts import prompts_of as rows_of
    from refusal.io.prompts import WITHOUT_PAIRS, is_paired

    written = {name: getattr(params.prompts, name) for name in ("source", "unrelated")}
    for name in (name for name, source in written.items() if source == "api"):
        print(f"prompts.{name}: these are not written yet, so as many of the grammar's are counted in their place")
        written[name] = "grammar"
    pairs, unrelated, said = rows_of(params.prompts.model_copy(update=written), OWN_HARMLESS)
    for sentence in said:
        print(f"prompts: {sentence}")
    if not is_paired(pairs):
        print(f"prompts: no pairs: {WITHOUT_PAIRS}")
    return pairs, unrelated


def looked_at(folder: Path | None) -> list[str]:
    """What `refusal check` says of weights alone, of a folder of them."""
    if folder is None:
        return ["weights: not here as safetensors, so not looked at; `refusal check` does once `dvc repro model` has run"]
    from refusal.analysis.check import look_at_weights
    from refusal.lm.weights import open_weights
    from refusal.report.check import short

    with open_weights(folder) as weights:
        return short(look_at_weights(weights))


def model_of(params: Params) -> tuple[Any, Any, Path | None]:
    """(tokenizer, refusal.report.plan.Size, the folder of its weights where it has one here) from configuration and tokenizer
    alone: parameters are counted on an empty model."""
    import torch
    from transformers import AutoConfig

    from refusal.lm import download as hub
    from refusal.lm import qwen1, validate
    from refusal.lm.architecture import architecture_of, auto_class
    from refusal.lm.checkpoint import read_shards
    from refusal.lm.load import load_tokenizer
    from refusal.organism.train import Corpus, new_model, train_tokenizer
    from refusal.report.plan import Size

    missing, m, folder = 0, params.model, None
    ready = partial(validate.validate_checkpoint, system_prompt=m.system_prompt, thinking=m.thinking)
    if m.id == "organism":
        o = params.organism
        tokenizer: Any = train_tokenizer(Corpus(o.corpus_seed, ()), o.vocab_size)
        config: Any = new_model(o.model_dump(), tokenizer, o.seed).config
        folder = TRAINED.parent if TRAINED.is_file() else None
    elif m.file is not None or Path(m.id).is_file():
        from refusal.lm import gguf

        file = Path(m.id) if m.file is None or m.revision is None else hub.peek_file(m.id, m.revision, m.file)[0]
        if not file.exists():
            raise UserError(
                f"{m.id}: model.file: {m.file} holds the tokenizer too, and is not here yet: `dvc repro model` fetches it"
            )
        with TemporaryDirectory() as read:
            config = gguf.peek(file, Path(read), m.dtype, ready)[1]
            tokenizer = load_tokenizer(Path(read), m.thinking)
    else:
        if params.model.revision is not None:
            folder, _, weights = hub.peek(params.model.id, params.model.revision)
            missing = sum(size for name, size in weights.items() if not (folder / name).exists())
        else:
            folder = Path(params.model.id)
            read_shards(folder)
        ready(folder)
        if qwen1.is_qwen1(folder):
            (tokenizer, config), folder = qwen1.peek(folder), None
        else:
            tokenizer = load_tokenizer(folder, params.model.thinking)
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = auto_class(config).from_config(config, attn_implementation="eager")  # no kernel is needed to count
    n = sum(p.numel() for p in model.parameters())
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return tokenizer, Size(n, n_bytes, architecture_of(config), missing), None if missing else folder


def counted(params: Params, tokenizer: Any, pairs: list[dict], unrelated: list[dict]) -> Any:
    """refusal.report.plan.Prompts: how many prompts and tokens each split of each half has."""
    from refusal.data.prompts import SPLITS
    from refusal.io.prompts import is_paired, prompt_sets
    from refusal.lm.load import encode_chats
    from refusal.organism.grammar import facts
    from refusal.report.plan import Prompts

    texts = prompt_sets(pairs, unrelated, SPLITS)
    if params.model.id == "organism":
        texts["facts"] = [question for fact in facts() for question in fact.questions]
    ids = {
        name: encode_chats(tokenizer, some, params.model.system_prompt, params.generation.max_new_tokens)
        for name, some in texts.items()
    }
    paired = is_paired(pairs)
    if not paired:
        ids |= {f"{split}.safe": ids[f"{split}.unrelated"] for split in SPLITS}
    n, tokens = ({name: of(some) for name, some in ids.items()} for of in (len, lambda some: sum(map(len, some))))
    return Prompts(n, tokens, paired)


def number(n: int | None) -> str:
    return "?" if n is None else f"{n:,}" if n else "-"


def gigabytes(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"


def chosen() -> Params:
    """The parameters of the study that is named, or of params.yaml."""
    return Params.model_validate(parameters(*sys.argv[1:])) if sys.argv[1:] else load_params(Path("params.yaml"))


stage(main, online=lambda params: params.model.revision is not None, read=chosen)
