"""The ``Architecture`` of a model from its ``config.json`` or its GGUF metadata, by the tables of the families.

A field that the tables do not know is refused by name: it might change the numbers.
"""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saex_pipe.common.errors import InputError
from saex_pipe.common.llm import rope as ropes
from saex_pipe.common.llm.architecture import Architecture, build
from saex_pipe.common.llm.families import FAMILIES
from saex_pipe.common.llm.families.family import Family
from saex_pipe.common.llm.rope import Rope

_ROPE_FIELDS = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
_ORIGINAL = "original_max_position_embeddings"
# Models that also see images keep their text part's configuration in here.
_TEXT_PART = "text_config"
_CAPS = ("attention_cap", "logit_cap")


def from_hugging_face(config: Mapping[str, Any], path: Path) -> Architecture:
    """Read an ``Architecture`` from the fields of a Hugging Face ``config.json``; ``path`` is for messages."""
    if config.get("model_type") == "gemma3" and isinstance(config.get(_TEXT_PART), Mapping):
        config = {"model_type": "gemma3_text", **config[_TEXT_PART]}
    family = _hf_family(config, path)
    config = {family.hf_renamed.get(name, name): value for name, value in config.items()}
    _check_fixed(config, family.hf_fixed, path)
    _check_known(config, _hf_known(family), path)
    values: dict[str, Any] = {ours: config.get(theirs) for ours, theirs in family.hf_fields.items()}
    for cap in _CAPS:  # null is said of a model without one, while silence means the family's
        if cap in family.hf_fields and family.hf_fields[cap] in config:
            values[cap] = values[cap] or 0.0
    for ours, theirs in {"layers": "num_hidden_layers", "width": "hidden_size"}.items():
        _require(values, ours, family.hf_fields.get(ours, theirs), path)
    values |= _derived(family.hf_derive, config, path)
    stated = {name: value for name, value in values.items() if value is not None}
    values = {**family.defaults, **family.hf_defaults, **stated, **family.traits}
    for ours in ("query_heads", "max_positions"):
        _require(values, ours, family.hf_fields[ours], path)
    partial = values.pop("partial_rotary_factor", None)
    if family.rope_theta is not None:
        head_dim = values.get("head_dim") or values["width"] // values["query_heads"]
        values |= _hf_ropes(config, family, head_dim, values["max_positions"], partial, str(path))
    return build(family.name, values, dict(family.hf_fields), str(path))


def from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray], path: Path
) -> Architecture:
    """Read an ``Architecture`` from GGUF metadata, and from what the tensors say: the vocabulary, ties and biases.

    Args:
        metadata: of the file.
        shapes: of its tensors, by name.
        read: gives a tensor by name, for the tables of rotary positions.
        path: for messages.
    """
    name = metadata.get("general.architecture")
    family = next((family for family in FAMILIES.values() if name == family.gguf_architecture), None)
    if family is None:
        known = ", ".join(sorted(family.gguf_architecture for family in FAMILIES.values()))
        raise InputError(f"{path}: architecture {name!r} is not one this version runs", f"known ones are {known}")
    prefix = f"{name}."
    fields = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    other = {key for key in metadata if not key.startswith((prefix, "general.", "tokenizer.", "split.", "GGUF."))}
    _check_fixed(fields, family.gguf_fixed, path)
    known_fields = {*family.gguf_fields.values(), *family.gguf_fixed, *family.gguf_read, *family.gguf_ignored}
    _check_known({**fields, **dict.fromkeys(other)}, known_fields | _GGUF_ROPE | {"attention.value_length"}, path)
    values: dict[str, Any] = {ours: fields.get(theirs) for ours, theirs in family.gguf_fields.items()}
    values = {**family.defaults, **{name: value for name, value in values.items() if value is not None}}
    for ours in ("layers", "width", "query_heads", "max_positions"):
        _require(values, ours, family.gguf_fields[ours], path)
    values = {**values, **_from_tensors(family, values, shapes, path)}
    head_dim = fields.get("attention.key_length") or values["width"] // values["query_heads"]
    values |= {"head_dim": head_dim, **family.traits}
    values |= _derived(family.gguf_derive, {**fields, "attention.key_length": head_dim}, path)
    values.pop("partial_rotary_factor", None)  # GGUF says it as a number of dimensions
    if fields.get("attention.value_length", head_dim) != head_dim:
        raise InputError(
            f"{path}: attention.value_length {fields['attention.value_length']} unlike attention.key_length {head_dim}",
            "only equal ones are run by this version",
        )
    if family.rope_theta is not None:
        values |= _gguf_ropes(fields, family, head_dim, values["max_positions"], shapes, read, path)
    return build(family.name, values, dict(family.gguf_fields), str(path))


def _hf_family(config: Mapping[str, Any], path: Path) -> Family:
    model_type = config.get("model_type")
    family = next((family for family in FAMILIES.values() if model_type in family.hf_model_types), None)
    if family is None:
        known = ", ".join(sorted(name for family in FAMILIES.values() for name in family.hf_model_types))
        raise InputError(f"{path}: model_type {model_type!r} is not one this version runs", f"known ones are {known}")
    return family


def _hf_known(family: Family) -> set[str]:
    known = {*family.hf_fields.values(), *family.hf_fixed, *family.hf_ignored, *family.hf_read, "model_type"}
    if family.rope_theta is not None:
        known |= {*_ROPE_FIELDS, _ORIGINAL}
    if family.local_rope_theta is not None:
        known.add("rope_local_base_freq")
    return known


def _hf_ropes(
    config: Mapping[str, Any], family: Family, head_dim: int, max_positions: int, partial: float | None, where: str
) -> dict[str, Rope]:
    """``rope``, and ``local_rope`` where sliding layers have their own, from either generation of field names."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    by_kind = {"full_attention": given, "sliding_attention": {}}
    if isinstance(given.get("full_attention"), Mapping):
        by_kind = {kind: given.get(kind) or {} for kind in by_kind}
    elif family.local_rope_theta is not None and "rope_local_base_freq" in config:
        by_kind["sliding_attention"] = {"rope_theta": config["rope_local_base_freq"]}
    beside = {
        "rope_theta": config.get("rope_theta"),
        "partial_rotary_factor": config.get("partial_rotary_factor", partial),
        _ORIGINAL: config.get(_ORIGINAL),
    }
    beside = {name: value for name, value in beside.items() if value is not None}

    def rope(parameters: Mapping[str, Any], theta: float) -> Rope:
        return ropes.from_hugging_face(
            parameters, head_dim=head_dim, max_positions=max_positions, default_theta=theta, where=where
        )

    assert family.rope_theta is not None
    found = {"rope": rope({**beside, **by_kind["full_attention"]}, family.rope_theta)}
    if family.local_rope_theta is not None:
        found["local_rope"] = rope(by_kind["sliding_attention"], family.local_rope_theta)
    return found


_SCALING = "rope.scaling."
_GGUF_ROPE = {
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.dimension_count",
    "rope.dimension_count_swa",
    *(
        _SCALING + name
        for name in ("type", "factor", "original_context_length", "attn_factor", "finetuned", "yarn_log_multiplier")
    ),
    *(_SCALING + name for name in ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")),
    "rope.scale_linear",
}
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


def _gguf_ropes(
    fields: Mapping[str, Any],
    family: Family,
    head_dim: int,
    max_positions: int,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    path: Path,
) -> dict[str, Rope]:
    """As llama.cpp reads them: tables of divisors come as tensors, scalings that need none by name."""
    theta = float(fields.get("rope.freq_base", family.rope_theta))
    dims = int(fields.get("rope.dimension_count", head_dim))
    original = int(fields.get(_SCALING + "original_context_length", max_positions))
    kind, factor = fields.get(_SCALING + "type", "none"), fields.get(_SCALING + "factor")
    if kind == "none" and "rope.scale_linear" in fields:
        kind, factor = "linear", fields["rope.scale_linear"]
    freqs, short, long = ROPE_TENSORS
    if freqs in shapes:
        found = Rope(theta, dims, tuple(read(freqs).tolist()))
    elif long in shapes and short in shapes:
        magnitude = fields.get(_SCALING + "attn_factor") or ropes.longrope_magnitude(max_positions / original, original)
        found = ropes.longrope(theta, dims, read(short).tolist(), read(long).tolist(), original, magnitude)
    elif kind == "linear" and factor:
        found = ropes.linear(theta, dims, factor)
    elif kind == "yarn" and factor:
        slow, fast = fields.get(_SCALING + "yarn_beta_slow", 1), fields.get(_SCALING + "yarn_beta_fast", 32)
        if others := {"yarn_ext_factor", "yarn_attn_factor", "yarn_log_multiplier"} & {
            name.removeprefix(_SCALING) for name in fields
        }:
            raise InputError(f"{path}: {_SCALING}{min(others)} is not run by this version", "use a model without it")
        found = ropes.yarn(theta, dims, factor, original, slow, fast)
    elif kind == "none":
        found = Rope(theta, dims)
    else:
        raise InputError(
            f"{path}: {_SCALING}type = {kind!r} with factor {factor!r} and no table of factors",
            "known ones are none, linear, yarn, and longrope with its tensors",
        )
    if len(found.divisors) not in (0, dims // 2):
        raise InputError(
            f"{path}: {len(found.divisors)} rotary factors for {dims} dimensions", "get an intact copy of the model"
        )
    if family.local_rope_theta is None:
        return {"rope": found}
    local = float(fields.get("rope.freq_base_swa", family.local_rope_theta))
    return {"rope": found, "local_rope": Rope(local, int(fields.get("rope.dimension_count_swa", dims)))}


def _from_tensors(
    family: Family, values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> dict[str, Any]:
    """What GGUF leaves to the list of tensors: rows of the embedding, ties, biases, the activation."""
    embed = family.gguf_tensors["embed"]
    if embed not in shapes:
        raise InputError(f"{path} lacks tensor {embed}", "use a GGUF file that holds a language model")
    vocabulary = shapes[embed][0]
    stated = values.get("vocabulary") or vocabulary
    if stated != vocabulary:
        raise InputError(f"{path}: vocab_size {stated} but {vocabulary} embedding rows", "get an intact copy of it")

    def has_bias(*roles: str) -> bool:
        names = (family.gguf_tensors[role].format(0) for role in roles if role in family.gguf_tensors)
        return any(bias_name(name) in shapes for name in names)

    return {
        "vocabulary": vocabulary,
        "tied_embeddings": "unembed" not in family.gguf_tensors or family.gguf_tensors["unembed"] not in shapes,
        "qkv_bias": has_bias("query", "qkv"),
        "attn_out_bias": has_bias("attn_out"),
        "mlp_bias": has_bias("up", "gate_up"),
    }


def bias_name(weight: str) -> str:
    """What a file calls the bias that goes with a matrix or norm."""
    return weight.removesuffix("weight") + "bias"


def _derived(derive: Callable[[Mapping[str, Any]], Mapping[str, Any]], fields: Mapping[str, Any], path: Path) -> Any:
    try:
        return derive(fields)
    except InputError as error:
        raise InputError(f"{path}: {error.problem}", error.remedy) from None
    except (TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error!r})", "get an intact copy of the model") from None


def _require(values: Mapping[str, Any], ours: str, theirs: str, path: Path) -> None:
    value = values.get(ours)
    if value is None:
        raise InputError(f"{path}: '{theirs}' is missing", "get an intact copy of the model")
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{path}: {theirs} = {value!r}", "it must be a whole number above 0")


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
            "use a model without it, or list it in common/llm/families with the reason why it may be ignored",
        )
