"""Which tensors of a model write into the residual stream, found by its structure: no list of names.

A decoder is a list of blocks, `config.num_hidden_layers` long, beside an embedding. The children of a block that hold matrices
are its parts (attention or another mixer, MLP or experts). A part writes by its last projection onto d_model, and each of its
experts by its own (`refusal.lm.structure`). What is found so is a claim, and `refusal.method.intake` proves it on a few tokens.

Interventions ask for modules of the model (`refusal.lm.stream`), weight edits for tensor names on disk. The two differ where
transformers renames what it loads, or fuses the matrices of experts into one 3-D parameter: its own table of that is asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from refusal.io.errors import UserError
from refusal.lm.structure import has_matrices, norms_of, writers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST_LAYERS = 1000  # beyond it a config.json is broken: it would be built for ever


class TensorNames:
    """What the tensors of a checkpoint's files are called in the model, by transformers' own table of it."""

    def __init__(self, model: PreTrainedModel):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        table = get_model_conversion_mapping(model)
        self._renamings = [one for one in table if isinstance(one, WeightRenaming)]
        self._converters = [one for one in table if isinstance(one, WeightConverter)]
        self._prefix, self._names = model.base_model_prefix, dict.fromkeys(model.state_dict(), True)
        self._known: dict[str, tuple[str, bool]] = {name: (name, False) for name in self._names}

    def in_model(self, name: str) -> tuple[str, bool]:
        """(the tensor of the model that one of the file becomes, or becomes a part of; whether its last two axes are swapped).

        A name that no rule changes is its own.
        """
        from transformers.core_model_loading import rename_source_key

        if name in self._known:
            return self._known[name]
        live, source = rename_source_key(name, self._renamings, self._converters, self._prefix, self._names)
        rules = [one for one in self._converters if source in one.source_patterns]
        self._known[name] = live, any(type(step).__name__ == "Transpose" for one in rules[:1] for step in one.operations)
        return self._known[name]

    def __contains__(self, name: str) -> bool:
        """Whether a tensor of a file is one of the model's, or becomes a part of one."""
        return self.in_model(name)[0] in self._names

    def on_disk(self, name: str, n: int) -> list[str]:
        """What transformers saves a tensor as: of a fused one of `n` experts that is saved in parts, each part."""
        from transformers.core_model_loading import rename_source_key

        renamings: Any = [one.reverse_transform() for one in self._renamings[::-1]]
        converters: Any = [one.reverse_transform() for one in self._converters[::-1]]
        saved, _ = rename_source_key(name, renamings, converters, reverse=True)
        return [saved.replace("*", str(i)) for i in range(n)] if "*" in saved else [saved]


@dataclass(frozen=True)
class Architecture:
    """Where the residual stream of one model begins and what is added to it, by the names of the model in memory.

    parts: of each block, its children that write, in the block's order. writers: the axis of each writer's tensor that is
    d_model, counted from the end. n_experts: of each writer that is fused, how many experts it holds. norms: the gains
    [d_model] of the norms of the stream, each with what is added to it before it scales (1 in Gemma and Qwen3-Next).
    """

    model_type: str
    n_layers: int
    d_model: int
    tied: bool  # the unembedding shares the embedding's tensor
    blocks_name: str
    embedding_module: str
    unembedding_name: str  # [vocab, d_model]
    parts: tuple[tuple[str, ...], ...]
    writers: Mapping[str, int]
    n_experts: Mapping[str, int]
    norms: Mapping[str, float]
    names: TensorNames = field(compare=False, repr=False)
    config: Any = field(compare=False, repr=False)

    @property
    def embedding_name(self) -> str:
        """The embedding's tensor [vocab, d_model] in the model."""
        return f"{self.embedding_module}.weight"

    def saved_as(self, name: str, names: set[str] | Mapping[str, Any]) -> str:
        """What a checkpoint of these tensor names calls a tensor of the model; the model's own name where it has none."""
        return name if name in names else next((one for one in names if self.names.in_model(one)[0] == name), name)

    def holds_unembedding(self, names: set[str] | Mapping[str, Any]) -> bool:
        """Whether a checkpoint of these tensor names has an unembedding of its own."""
        return self.saved_as(self.unembedding_name, names) in names

    def layer_of(self, name: str) -> int | None:
        """The block that a tensor lies in; None for one outside of them."""
        inside = self.names.in_model(name)[0].removeprefix(f"{self.blocks_name}.").partition(".")[0]
        return int(inside) if inside.isdecimal() else None

    def reads(self, name: str) -> bool:
        """Whether a matrix that is no writer is known: it embeds or unembeds, is in a part of a block, or another modality's."""
        live = self.names.in_model(name)[0]
        if name not in self.names or live in (self.embedding_name, self.unembedding_name):
            return name in self.names
        layer, decoder = self.layer_of(name), self.blocks_name.rpartition(".")[0]
        if layer is None:
            return not live.startswith(f"{decoder}.")
        return live.removeprefix(f"{self.blocks_name}.{layer}.").partition(".")[0] in self.parts[layer]

    def writer_axis(self, name: str, include_embedding: bool = False) -> int | None:
        """The axis of tensor `name`, of the model or of a checkpoint, that is d_model, counted from the end, or None if it
        doesn't write to the stream.

        -2 for weights ([d_model, in] or fused experts [expert, d_model, in]); -1 for those that are kept transposed, for biases,
        and for the embedding where `include_embedding`.
        """
        live, swapped = self.names.in_model(name)
        if live == self.embedding_name:
            return -1 if include_embedding else None
        axis = self.writers.get(live)
        return axis if axis is None or not swapped else -3 - axis

    def missing_writers(self, names: set[str]) -> list[str]:
        """Writers that every checkpoint of this architecture has and `names` lacks (one that is quantized, say)."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self.names.in_model(name)[0], []).append(name)
        missing = []
        for writer in self.writers:
            parts = self.names.on_disk(writer, self.n_experts.get(writer, 1))
            if writer not in names and len(found.get(writer, [])) < len(parts):
                missing += [name for name in parts if name not in names]
        return missing


def architecture_of(model: Any, folder: Path | None = None) -> Architecture:
    """The architecture of a model, of what a transformers config describes, or of a config.json's dictionary (of `folder`).

    Of a config the model is built without weights. Raises UserError for a `model_type` that transformers has no causal language
    model of, quantized weights, a config that it cannot read, and a model without such a structure.
    """
    where = "config.json" if folder is None else f"{folder}/config.json"
    if isinstance(model, nn.Module):
        return _read(model, where)
    config = model
    if isinstance(model, dict):
        from transformers import CONFIG_MAPPING  # slow to import

        kind = model.get("model_type")
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            raise UserError(f"{where}: model_type {kind!r} is not supported: transformers has no model of it: use another one.")
        if model.get("quantization_config") is not None:
            raise UserError(f"{where}: quantization_config: quantized weights cannot be edited: use an unquantized checkpoint.")
        try:
            readable = CONFIG_MAPPING[kind]._decode_special_floats(model)  # infinity is written as a word
            config = CONFIG_MAPPING[kind].from_dict(readable)  # with what config.json leaves to the defaults
            json.dumps(config.to_dict(), default=str)
        except Exception as error:  # any value of config.json meets code that assumes another
            why = " ".join(str(error).split())[:300]
            raise UserError(f"{where}: transformers cannot read it as {kind} ({why}): fetch it again.") from None
    return _of_config(_Key(config, where))


class _Key:
    """A config, equal to another where all of its values are."""

    def __init__(self, config: Any, where: str):
        self.config, self.where = config, where
        self._text = type(config).__name__ + json.dumps(config.to_dict(), sort_keys=True, default=str)

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._text == other._text


@lru_cache(maxsize=64)
def _of_config(key: _Key) -> Architecture:
    config, where = key.config, key.where
    n_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(n_layers, int) or not 0 < n_layers <= _MOST_LAYERS:
        raise UserError(f"{where}: num_hidden_layers is {n_layers!r}, and 1 to {_MOST_LAYERS} are read: fetch it again.")
    try:
        skeleton = without_weights(config, where)
    except UserError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(f"{where}: transformers cannot build a {config.model_type} of it ({why}): fetch it again.") from None
    return _read(skeleton, where)


def without_weights(config: Any, where: str = "config.json") -> Any:
    """The model that a config describes, on no device. Raises UserError as `auto_class` does."""
    auto, config = auto_class(config, where), deepcopy(config)  # a copy, for the model notes its dtype in it
    config._experts_implementation = None  # no kernel is needed of those that a checkpoint may name
    with torch.device("meta"):
        # In bfloat16, experts can be run without weights.
        return auto.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")


def auto_class(config: Any, where: str = "config.json") -> Any:
    """What loads this model: transformers' class of causal language models, or that of models that take images too, whose
    language part is used."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping and not getattr(config, "is_encoder_decoder", False):
            return auto
    raise UserError(
        f"{where}: model_type {config.model_type!r} is not supported: transformers has no causal language model of it: "
        "use another one."
    )


def _read(model: Any, where: str) -> Architecture:
    config = model.config.get_text_config()
    kind, n_layers, d_model = config.model_type, config.num_hidden_layers, config.hidden_size
    name_of = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    decoder = model.get_submodule(name_of.get(id(embedding), "").rpartition(".")[0])  # blocks lie beside the embedding
    blocks = [
        one for one in decoder.children() if isinstance(one, nn.ModuleList) and len(one) == n_layers and has_matrices(one[0])
    ]
    if len(blocks) != 1 or head is None or tuple(embedding.weight.shape)[1:] != (d_model,):
        raise UserError(
            f"{where}: {kind}: no list of {n_layers} decoder blocks beside an embedding of {d_model} components is found in "
            "it, and so no residual stream: use another model."
        )
    parts: list[tuple[str, ...]] = []
    writers: dict[str, int] = {}
    fused: dict[str, int] = {}
    for i, block in enumerate(blocks[0]):
        parts.append(tuple(name for name, child in block.named_children() if has_matrices(child)))
        for part in parts[-1]:
            module, place = block.get_submodule(part), f"{name_of[id(block)]}.{part}"
            found = dict(writers_of(module, d_model))
            if not found:
                raise UserError(f"{where}: {kind}: layer {i}: {part} has no matrix of {d_model} outputs: use another model.")
            writers |= {f"{place}.{name}": axis for name, axis in found.items()}
            fused |= {f"{place}.{name}": len(p) for name, p in module.named_parameters() if p.ndim == 3 and name in found}
    return Architecture(
        model_type=model.config.model_type,
        n_layers=n_layers,
        d_model=d_model,
        tied=head.weight is embedding.weight,
        blocks_name=name_of[id(blocks[0])],
        embedding_module=name_of[id(embedding)],
        unembedding_name=f"{name_of[id(head)]}.weight",
        parts=tuple(parts),
        writers=writers,
        n_experts=fused,
        norms=norms_of(decoder, d_model, name_of),
        names=TensorNames(model),
        config=model.config,
    )


def untied_config(fields: dict) -> dict:
    """A config.json's dictionary that says that the unembedding is a tensor of its own; a multimodal one says it of its language
    part, too."""
    text = fields.get("text_config")
    more = {"text_config": text | {"tie_word_embeddings": False}} if isinstance(text, dict) else {}
    return fields | more | {"tie_word_embeddings": False}


def same_model(edited: Architecture, where: Path, ours: Architecture, base: Path) -> None:
    """Raises UserError where an architecture is another one than the base's."""
    for what in ("model_type", "n_layers", "d_model"):
        if getattr(ours, what) != getattr(edited, what):
            raise UserError(
                f"{where}: its {what} is {getattr(edited, what)}, and that of {base} is {getattr(ours, what)}: "
                "give the base that the edit was made of."
            )
