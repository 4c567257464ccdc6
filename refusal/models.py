"""Loading a checkpoint, formatting chats with its own template, and the hash that names its weights."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from refusal.errors import RefusalError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_model(folder: Path, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """Load a causal language model from a local folder of safetensors, in eval mode, gradients off.

    Raises RefusalError where the folder is no checkpoint, or the device is not there.
    """
    if not (folder / "config.json").is_file():
        raise RefusalError(f"{folder}/config.json: no such file; model.id must name the folder of a checkpoint")
    if not any(folder.glob("*.safetensors")):
        raise RefusalError(f"{folder}: holds no .safetensors file; other formats can run code when loaded and are not read")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RefusalError(f"params.yaml: model.device is {device} but torch sees no CUDA device; set it to cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise RefusalError("params.yaml: model.device is mps but torch sees no MPS device; set it to cpu")
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise RefusalError(f"{folder}: transformers cannot load this checkpoint: {' '.join(str(error).split())[:300]}") from error
    # transformers fills what is missing with random numbers and says so in a log line alone.
    for what in ("missing_keys", "mismatched_keys"):
        if loading[what]:
            raise RefusalError(
                f"{folder}: config.json and weights disagree on {sorted(map(str, loading[what]))[0]}; fetch it again"
            )
    model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides nn.Module.to's signature
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer. Raises RefusalError where it has no chat template."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise RefusalError(f"{folder}: its tokenizer cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if tokenizer.chat_template is None:
        raise RefusalError(
            f"{folder}: the tokenizer has no chat template; this is a base model: set model.id to its chat version"
        )
    if tokenizer.pad_token_id is None:  # Llama has none; any token does, for padding is masked
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_chats(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], system_prompt: str | None = None) -> list[list[int]]:
    """Token ids of each prompt in the model's own chat template, up to where the answer begins."""
    head = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    chats = [[*head, {"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: the generation config's, the tokenizer's, and the template's end of turn."""
    listed = model.generation_config.eos_token_id
    ids = {*([] if listed is None else listed if isinstance(listed, list) else [listed]), tokenizer.eos_token_id}
    ends = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
    known = tokenizer.get_added_vocab()
    return {i for i in ids | {known[end] for end in ends if end in known} if i is not None}


def weights_hash(folder: Path) -> str:
    """SHA-256 over a checkpoint's config.json and safetensors files, by name and content."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
