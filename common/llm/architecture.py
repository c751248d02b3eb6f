"""What a decoder looks like: the numbers that a configuration file fixes, whatever the file calls them."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm.families import FAMILIES, Family


@dataclass(frozen=True)
class Architecture:
    """Shape and constants of a decoder-only transformer. Hashable, so that jit can take it as a static value."""

    family: str
    layers: int
    width: int  # of the residual stream (D)
    query_heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int  # rows of the embedding (V)
    max_positions: int  # the longest window the model was trained for, tokens
    norm_epsilon: float
    rope_theta: float
    tied_embeddings: bool

    def check_largest_id(self, largest_id: int) -> None:
        """Raise an ``InputError`` where a token id has no row in the embedding."""
        if largest_id >= self.vocabulary:
            raise InputError(
                f"the tokenizer's largest id {largest_id} does not fit the model's {self.vocabulary} embeddings",
                "use the model's own tokenizer",
            )

    def check_window_length(self, length: int) -> None:
        """Raise an ``InputError`` where a window of ``length`` tokens is longer than the model knows positions for."""
        if length > self.max_positions:
            raise InputError(
                f"window length {length} is above the {self.max_positions} positions of the model",
                f"use windows of at most {self.max_positions} tokens",
            )


def from_hugging_face(config: Mapping[str, Any], path: Path) -> Architecture:
    """Read an ``Architecture`` from the fields of a Hugging Face ``config.json``; ``path`` is for messages."""
    model_type = config.get("model_type")
    family = next((family for family in FAMILIES.values() if model_type in family.hf_model_types), None)
    if family is None:
        raise InputError(f"{path}: model_type {model_type!r} is not one this version runs", _known("hf_model_types"))
    config = {**config, **_default_rope(config, path)}
    _check_fixed(config, family.hf_fixed, path)
    known = {*family.hf_fields.values(), *family.hf_fixed, *family.hf_ignored, "model_type", "rope_parameters"}
    _check_known(config, known, path)
    values = {ours: config[theirs] for ours, theirs in family.hf_fields.items() if config.get(theirs) is not None}
    return _build(family, values, family.hf_fields, path)


def from_gguf(metadata: Mapping[str, Any], vocabulary: int, tied_embeddings: bool, path: Path) -> Architecture:
    """Read an ``Architecture`` from GGUF metadata; the embedding's rows and tying come from the tensor list."""
    name = metadata.get("general.architecture")
    family = next((family for family in FAMILIES.values() if name in family.gguf_architectures), None)
    if family is None:
        raise InputError(f"{path}: architecture {name!r} is not one this version runs", _known("gguf_architectures"))
    if int(metadata.get("split.count", 1)) > 1:
        raise InputError(f"{path} is one part of a split GGUF file", "join the parts with llama-gguf-split --merge")
    prefix = f"{name}."
    fields = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    other = {key for key in metadata if not key.startswith((prefix, "general.", "tokenizer.", "split.", "GGUF."))}
    _check_fixed(fields, family.gguf_fixed, path)
    known = {*family.gguf_fields.values(), *family.gguf_repeated, *family.gguf_fixed}
    _check_known({**fields, **dict.fromkeys(other)}, known, path)
    values = {ours: fields[theirs] for ours, theirs in family.gguf_fields.items() if theirs in fields}
    for theirs, ours in family.gguf_repeated.items():
        if theirs in fields and values.setdefault(ours, fields[theirs]) != fields[theirs]:
            raise InputError(
                f"{path}: {theirs} = {fields[theirs]!r} where {ours} = {values[ours]!r} is not run by this version",
                "only equal ones are",
            )
    stated = values.setdefault("vocabulary", vocabulary)
    if stated != vocabulary:
        raise InputError(f"{path}: vocab_size {stated} but {vocabulary} embedding rows", "get an intact copy of it")
    values["tied_embeddings"] = tied_embeddings
    return _build(family, values, family.gguf_fields, path)


def _build(family: Family, values: dict[str, Any], names: Mapping[str, str], path: Path) -> Architecture:
    """Fill in the family's defaults and check that the numbers make a model."""
    values = {**family.defaults, **values}
    values.setdefault("kv_heads", values.get("query_heads"))
    if "head_dim" not in values and {"width", "query_heads"} <= values.keys():
        values["head_dim"] = values["width"] // max(values["query_heads"], 1)
    for field, kind in Architecture.__annotations__.items():
        if field == "family":
            continue
        if field not in values:
            raise InputError(f"{path}: '{names.get(field, field)}' is missing", "get an intact copy of the model")
        value = values[field]
        if kind is int and (not isinstance(value, int) or value < 1):
            raise InputError(f"{path}: {names.get(field, field)} = {value!r}", "it must be a whole number above 0")
        if kind is float and (not isinstance(value, int | float) or not value > 0):
            raise InputError(f"{path}: {names.get(field, field)} = {value!r}", "it must be a number above 0")
        values[field] = kind(value)
    architecture = Architecture(family=family.name, **values)
    if architecture.query_heads % architecture.kv_heads:
        raise InputError(
            f"{path}: {architecture.query_heads} query heads do not divide over {architecture.kv_heads} key/value "
            "heads",
            "get an intact copy of the model",
        )
    if architecture.head_dim % 2:
        raise InputError(f"{path}: head_dim {architecture.head_dim} is odd", "rotary positions need an even head_dim")
    return architecture


def _default_rope(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """``rope_theta`` out of ``rope_parameters``, its home since transformers 5; any scaling is refused."""
    rope = config.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    extra = sorted(set(rope) - {"rope_type", "rope_theta"})
    if kind != "default" or extra:
        raise InputError(
            f"{path}: rope_parameters {dict(rope)!r} are not run by this version",
            "only rope_type 'default' with a rope_theta is",
        )
    return {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}


def _check_fixed(fields: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], path: Path) -> None:
    for name, allowed in fixed.items():
        if name in fields and fields[name] not in allowed:
            raise InputError(
                f"{path}: {name} = {fields[name]!r} changes the activations and is not run by this version",
                f"only {' or '.join(repr(value) for value in allowed)} is",
            )


def _check_known(fields: Mapping[str, Any], known: set[str], path: Path) -> None:
    unknown = sorted(set(fields) - known)
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" (near '{near[0]}')" if near else ""
        raise InputError(
            f"{path}: field {unknown[0]!r} = {fields[unknown[0]]!r} is neither handled nor known to be harmless{hint}",
            "use a model without it, or list it in common/llm/families.py with the reason why it may be ignored",
        )


def _known(attribute: str) -> str:
    names = sorted(name for family in FAMILIES.values() for name in getattr(family, attribute))
    return f"known ones are {', '.join(names)}"
