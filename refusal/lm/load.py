"""A chat model, loaded: its weights and tokenizer, chats in its own template, and the hash that names its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from refusal.io.errors import UserError
from refusal.io.progress import progress
from refusal.lm.adapter import CONFIG, base_folder, merge
from refusal.lm.architecture import auto_class
from refusal.lm.batching import count_forwards
from refusal.lm.checkpoint import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_CHAT = 1_000_000  # characters of a prompt with its template
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Llama 3.2's template puts the day of the run into the system block: equal inputs must give equal bytes, so every day is
# the one that 3.1's template names. (The line break is eaten by the environment's trim_blocks.)
ONE_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"


@dataclass(frozen=True, eq=False)
class LM:
    """A model with all that running it needs.

    weights: `weights_hash` of its checkpoint. stop: the tokens that end an answer. pad_id: what padding is filled with.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: str
    stop: frozenset[int]
    pad_id: int
    system_prompt: str | None = None

    @property
    def n_layers(self) -> int:
        """How many decoder blocks it has."""
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def d_model(self) -> int:
        """The width of its residual stream."""
        return self.model.config.get_text_config().hidden_size

    @property
    def identity(self) -> dict[str, str]:
        """What of it determines a value, for a store's key."""
        return {"weights": self.weights, "dtype": str(self.model.dtype), "device": self.model.device.type}

    def encode(self, prompts: Sequence[str], max_new_tokens: int = 0) -> list[list[int]]:
        """Token ids of each prompt in the model's chat template. Raises UserError as `encode_chats` does, for ids that the
        embedding has no rows for, and for prompts and answers that reach where the rotary embedding changes by length."""
        ids = encode_chats(self.tokenizer, prompts, self.system_prompt, max_new_tokens)
        n_rows = _n_rows(self.model)
        if (highest := max((token for row in ids for token in row), default=0)) >= n_rows:
            raise UserError(
                f"{self.tokenizer.name_or_path}: the tokenizer gives token {highest} and the embedding has {n_rows} rows: "
                "tokenizer and weights are of different models; fetch both again"
            )
        longest, (kind, limit) = max(map(len, ids), default=0), _rope_limit(self.model.config)
        if limit is not None and longest + max_new_tokens > limit:
            raise UserError(
                f"{self.tokenizer.name_or_path}: a prompt of {longest} tokens with {max_new_tokens} new ones passes {limit}, "
                f"where this model's rotary embedding ({kind}) changes, and with it every row of the batch: use shorter prompts"
            )
        return ids

    def decode(self, completions: Sequence[Sequence[int]]) -> list[str]:
        """The text of each completion, without special tokens, from the `<think>` on that some chat templates open themselves."""
        texts = self.tokenizer.batch_decode([*map(list, completions)], skip_special_tokens=True)
        return [f"<think>{text}" for text in texts] if self.opens_thought else texts

    @property
    def opens_thought(self) -> bool:
        """Whether the chat template ends in a `<think>` of its own."""
        return render_chats(self.tokenizer, ["Hello."], self.system_prompt)[0].rstrip().endswith("<think>")


def load_lm(
    folder: Path,
    dtype: str = "float32",
    device: str = "cpu",
    system_prompt: str | None = None,
    thinking: bool | None = None,
) -> LM:
    """Load a checkpoint's folder. Raises UserError as `load_model` and `load_tokenizer` do.

    Padding is masked, so that any token will do where the tokenizer has none within the embedding.
    """
    tokenizer, model = load_tokenizer(folder, thinking), load_model(folder, dtype, device)
    model.name_or_path = str(folder)  # of an adapter, too: where a worker on another machine loads it from
    stop, n_rows = frozenset(stop_ids(model, tokenizer)), _n_rows(model)
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None and i < n_rows), 0)
    return LM(model, tokenizer, weights_hash(folder), stop, pad_id, system_prompt)


def _n_rows(model: PreTrainedModel) -> int:
    """How many tokens the embedding has a row for."""
    embedding: Any = model.get_input_embeddings()
    return embedding.weight.shape[0]


def _rope_limit(config: Any) -> tuple[str, int | None]:
    """The kind of a rotary embedding that depends on the longest row of a batch, and the number of tokens up to which it doesn't.

    Phi-3's LongRoPE takes other factors beyond, and dynamic NTK scaling other frequencies at every length.
    """
    config = config.get_text_config()
    if (chunk := getattr(config, "attention_chunk_size", None)) is not None:  # a row's chunks would begin where its batch begins
        return "chunked attention", chunk
    rope = getattr(config, "rope_parameters", None) or {}
    for each in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if (kind := each.get("rope_type")) in ("longrope", "dynamic"):
            return kind, each.get("original_max_position_embeddings") or config.max_position_embeddings
    return "", None


def load_model(folder: Path, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """Load a causal language model from a local folder of safetensors, in eval mode, gradients off.

    An adapter's folder gives its base with the adapter merged (`refusal.lm.adapter`).
    `device` is torch's name of one, or `auto`: accelerate spreads the layers over the devices there are.
    Raises UserError where the folder is no checkpoint, or the device is not there.
    """
    if (base := base_folder(folder)) is not None:
        merged = load_model(base, dtype, device)
        merge(merged, folder, base)
        return merged
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}/config.json: no such file; model.id must name the folder of a checkpoint")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: holds no .safetensors file; other formats can run code when loaded and are not read")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"params.yaml: model.device is {device} but torch sees no CUDA device; set it to cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("params.yaml: model.device is mps but torch sees no MPS device; set it to cpu")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        loaded: Any = auto_class(config, f"{folder}/config.json").from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            local_files_only=True,
            trust_remote_code=False,  # by default it asks at the terminal
            use_safetensors=True,
            device_map="auto" if device == "auto" else None,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(f"{folder}: transformers cannot load this checkpoint: {' '.join(str(error).split())[:300]}") from error
    model, loading = loaded
    # transformers fills what is missing with random numbers and says so in a log line alone.
    # What is left over is said nowhere else either, and would be a part of the model that no figure saw.
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if loading[what]:
            raise UserError(f"{folder}: config.json and weights disagree on {sorted(map(str, loading[what]))[0]}; fetch it again")
    if device != "auto":
        model.to(device)
    model.config.return_dict = True  # some checkpoints were saved with tuples
    count_forwards(model)
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path, thinking: bool | None = None) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer (an adapter's: its base's), its `model_max_length` the longest input that config.json allows.

    A tokenizer without a padding token (Llama's) pads with its end of sequence, and a template that prints the date
    prints one date. `thinking` sets the template's own switch, `enable_thinking`. Raises UserError where there is no chat
    template, several and none called default, or none with that switch.
    """
    folder = base_folder(folder) or folder
    try:
        # False, not None: None asks on the terminal whether the checkpoint's code may run.
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"{folder}: its tokenizer cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if tokenizer.chat_template is None and (folder / "chat_template.json").is_file():  # where processors keep it
        tokenizer.chat_template = read_json(folder, "chat_template.json").get("chat_template")
    if tokenizer.chat_template is None:
        raise UserError(
            f"{folder}: the tokenizer has no chat template; this is a base model: set model.id to its chat version, or put the "
            "template it was tuned with into the folder as chat_template.jinja"
        )
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        raise UserError(
            f"{folder}: the tokenizer has the chat templates {', '.join(sorted(tokenizer.chat_template))} and none called "
            "default: put the one to use into the folder as chat_template.jinja"
        )
    template = tokenizer.get_chat_template()
    if thinking is not None:
        if "enable_thinking" not in template:
            raise UserError(f"params.yaml: model.thinking: the chat template of {folder} has no enable_thinking: set it to null")
        tokenizer.chat_template = template = f"{{% set enable_thinking = {str(thinking).lower()} %}}\n{template}"
    if "strftime_now" in template:
        tokenizer.chat_template = ONE_DAY + template
    tokenizer.model_max_length = config.get_text_config().max_position_embeddings
    if tokenizer.pad_token_id is None:  # Llama has none; any token does, for padding is masked
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def render_chats(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], system_prompt: str | None = None) -> list[str]:
    """Each prompt in the model's own chat template, up to where the answer begins.

    Raises UserError for a system prompt that the template refuses, and for a template that fails or writes without end.
    """
    head = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    chats = [[*head, {"role": "user", "content": prompt}] for prompt in prompts]
    try:
        texts: Any = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    except (MemoryError, TimeoutError):
        raise
    except Exception as error:  # a template is a program, and fails as programs do
        why = " ".join(str(error).split())[:200]
        if system_prompt is not None and isinstance(error, TemplateError):
            raise UserError(
                f"params.yaml: model.system_prompt: the model's chat template refuses it ({why}); set it to null"
            ) from None
        raise UserError(
            f"{tokenizer.name_or_path}: the chat template cannot format a prompt ({why}): fix chat_template.jinja or "
            "tokenizer_config.json there, or use another checkpoint"
        ) from None
    if (longest := max(map(len, texts))) > MAX_CHAT:
        raise UserError(
            f"{tokenizer.name_or_path}: the chat template makes {longest:,} characters of a prompt, and {MAX_CHAT:,} are the "
            "most: fix chat_template.jinja or tokenizer_config.json there, or use another checkpoint"
        )
    return texts


def read_at(lm: LM) -> dict[str, Any]:
    """The position of a chat that directions are read at: its last token (of `activations.n_positions`, the last of them), and
    what the model writes from there on: the `answer`, which is judged, or a `thought` that its template opens before it."""
    last = lm.encode(["Hello."])[0][-1]
    return {"position": -1, "token": lm.tokenizer.decode([last]), "before": "thought" if lm.opens_thought else "answer"}


def encode_chats(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], system_prompt: str | None = None, max_new_tokens: int = 0
) -> list[list[int]]:
    """Token ids of `render_chats`.

    Raises UserError as it does, for a prompt that holds the text of a control token, which would end the user's turn or begin
    another, and for a prompt that leaves no room for `max_new_tokens` within
    `tokenizer.model_max_length` (what lies beyond was never trained, and Qwen-1 would change its attention there).
    """
    texts = render_chats(tokenizer, prompts, system_prompt)
    control = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and len(t.content) > 2]
    for i, prompt in enumerate(prompts):
        if held := next((text for text in control if text in prompt), None):
            raise UserError(f"prompt {i} (from 0) holds {held}, a control token of the model: delete it, or write it otherwise")
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if len(ids[longest]) + max_new_tokens > tokenizer.model_max_length:
        more = f" with {max_new_tokens} to generate" if max_new_tokens else ""
        raise UserError(
            f"prompt {longest} (from 0) has {len(ids[longest])} tokens{more}, and the model takes {tokenizer.model_max_length} "
            "(config.json: max_position_embeddings): shorten it, or lower max_new_tokens (of generation or of long_answers)"
        )
    return ids


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: the generation config's, the tokenizer's, and the template's end of turn."""
    listed = model.generation_config.eos_token_id
    listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if not all(type(i) is int for i in listed):
        raise UserError(f"{model.name_or_path}/generation_config.json: eos_token_id is {listed}, not numbers: fetch it again")
    ids = {*listed, tokenizer.eos_token_id}
    ends = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
    known = tokenizer.get_added_vocab()
    return {i for i in ids | {known[end] for end in ends if end in known} if i is not None}


def weights_hash(folder: Path) -> str:
    """SHA-256 over a checkpoint's config.json and safetensors files, by name and content; an adapter's base is part of it."""
    base = base_folder(folder)
    digest = hashlib.sha256(b"" if base is None else weights_hash(base).encode())
    paths = sorted([folder / ("config.json" if base is None else CONFIG), *folder.glob("*.safetensors")])
    with progress(sum(path.stat().st_size for path in paths), f"hash of {folder.name}", "B") as bar:
        for path in paths:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
                    bar.update(len(chunk))
    return digest.hexdigest()
