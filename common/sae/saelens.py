"""To and from the layout of SAELens, in memory: the dict of ``cfg.json`` and the arrays of ``sae_weights.safetensors``.

Written for SAELens 6 (``SAE.load_from_disk``), tried with 6.54. Its names: W_enc [d_in, d_sae], b_enc [d_sae],
W_dec [d_sae, d_out], b_dec [d_out], W_skip [d_out, d_in]; of JumpReLU threshold [d_sae], in units of the latents, which
folding leaves alone there as here; of gated b_gate, r_mag, b_mag [d_sae] and no b_enc.

An architecture is an activation ("standard" is ReLU, and goes without saying before a kind) and a kind: "topk",
"transcoder", "jumprelu_skip_transcoder". What has no class there gets a name by the same rule, and SAELens refuses it:
"topk_skip_transcoder", "crosscoder" (with ``tap_widths``, the taps concatenated in every array; its layer_norm is of
each tap by itself). Only TopK and gated transcoders between equal widths are SAELens' "topk" and "gated" without
``apply_b_dec_to_input``, which compute the same. p-annealing is a ReLU once it is trained, and so is Wright's variant
with its scales folded into the encoder: both are "standard" there and come back as ReLU. BatchTopK and the Matryoshka
variants are JumpReLU once they are trained.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from saex_pipe.common.errors import InputError
from saex_pipe.common.sae.batchtopk import BatchTopK
from saex_pipe.common.sae.contract import Params, Variant
from saex_pipe.common.sae.gated import Gated
from saex_pipe.common.sae.jumprelu import JumpRelu
from saex_pipe.common.sae.relu import Relu
from saex_pipe.common.sae.topk import TopK
from saex_pipe.common.sae.wright import Wright

SAELENS_VERSION = "6.54.12"  # from 6.0 on, SAELens reads cfg.json as written here
MATRICES = {"W_enc": "w_enc_FD", "W_dec": "w_dec_FD", "b_dec": "b_dec_D"}
BIAS = {"b_enc": "b_enc_F"}
# What an activation has per latent.
PER_LATENT = {
    "standard": BIAS,
    "topk": BIAS,
    "jumprelu": {**BIAS, "threshold": "threshold_F"},
    "gated": {"b_gate": "b_enc_F", "r_mag": "r_mag_F", "b_mag": "b_mag_F"},
}
KINDS = ("skip_transcoder", "transcoder", "crosscoder")
SKIP = {"W_skip": "w_skip_DD"}
TRANSPOSED = ("W_enc", "W_skip")  # ours are the other way round
EXACT_SETTINGS = {"reshape_activations": "none", "rescale_acts_by_decoder_norm": False}
NORMALISATIONS = {"none": False, "layer_norm": True}  # whether rows are normalised where the SAE is used

# Our sites within a block, as TransformerLens calls them.
HOOKS = {
    "resid_pre": "hook_resid_pre",
    "attn_in": "ln1.hook_normalized",
    "attn_z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_in": "ln2.hook_normalized",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}


def hook_name(tap: str) -> str:
    """TransformerLens' name of a tap; the tap's own where it has none (synthetic activations)."""
    if tap in ("embed", "final_norm"):
        return {"embed": "hook_embed", "final_norm": "ln_final.hook_normalized"}[tap]
    block, _, site = tap.rpartition(".")
    return f"{block}.{HOOKS[site]}" if site in HOOKS else tap


def to_saelens(
    variant: Variant, params: Params, metadata: Mapping[str, Any], *, row_norm: bool = False
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The contents of ``cfg.json`` and of ``sae_weights.safetensors`` (float32).

    Args:
        variant: what was trained.
        params: in raw units (see ``folding.fold``).
        metadata: JSON values about the origin; SAELens knows ``model_name``, ``hook_name`` (TransformerLens' names),
            ``hook_name_out`` (transcoders), ``context_size``, ``prepend_bos``, ``dataset_path`` and others.
        row_norm: rows go through ``normalisation.layer_norm`` first.
    """
    if isinstance(variant, Wright):
        params = variant.as_relu(params)
    width_in, width_out = params["w_enc_FD"].shape[1], params["w_dec_FD"].shape[1]
    activation, settings = _activation(variant)
    cfg: dict[str, Any] = {
        "architecture": architecture(variant, same_width=width_in == width_out),
        "d_in": width_in,
        "d_sae": variant.latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": variant.subtracts_decoder_bias,
        "normalize_activations": "layer_norm" if row_norm else "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_VERSION, "sae_lens_training_version": None, **metadata},
        **settings,
    }
    if variant.transcoder:
        cfg["d_out"] = width_out
    if variant.tap_widths:
        cfg["tap_widths"] = list(variant.tap_widths)
    names = _tensor_names(activation, skip=variant.skip)
    return cfg, {theirs: _turned(theirs, np.asarray(params[ours], np.float32)) for theirs, ours in names.items()}


def architecture(variant: Variant, *, same_width: bool) -> str:
    """Its name in ``cfg.json``; ``same_width``: input and target have as many dimensions."""
    activation, _ = _activation(variant)
    kind = _kind(variant, activation, same_width=same_width)
    return f"{activation}_{kind}".removeprefix("standard_") if kind else activation


def _activation(variant: Variant) -> tuple[str, dict[str, Any]]:
    """SAELens' name of a variant's activation, and the settings that go with it."""
    match variant:
        case TopK():
            return "topk", {"k": variant.k, "rescale_acts_by_decoder_norm": False}
        case JumpRelu() | BatchTopK():
            return "jumprelu", {}
        case Gated():
            return "gated", {}
        case _:
            return "standard", {}


def _kind(variant: Variant, activation: str, *, same_width: bool) -> str:
    if variant.tap_widths:
        return "crosscoder"
    if not variant.transcoder or (activation in ("topk", "gated") and same_width and not variant.skip):
        return ""
    return "skip_transcoder" if variant.skip else "transcoder"


def _tensor_names(activation: str, *, skip: bool) -> dict[str, str]:
    return MATRICES | PER_LATENT[activation] | (SKIP if skip else {})


def _turned(theirs: str, array: np.ndarray) -> np.ndarray:
    """Between our way round and theirs, either way."""
    return np.ascontiguousarray(array.T) if theirs in TRANSPOSED else array


def from_saelens(cfg: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> tuple[Variant, Params, bool]:
    """The variant, its parameters in raw units, and whether rows go through ``layer_norm`` first: an ``inference.Sae``.

    What only training needs (coefficients, constraints) is not in the layout and comes back as the default, the
    sparsity coefficient as 0. A transcoder that subtracts ``b_dec`` from its input comes back with the product moved
    into the encoder's biases.

    Raises:
        InputError: an architecture or setting that is not computed here, or missing or misshapen tensors.
    """
    activation, kind = _parsed(cfg)
    _refuse_other_settings(cfg, activation, kind)
    params = _checked_params(cfg, tensors, activation, kind)
    subtracts_b_dec = bool(cfg.get("apply_b_dec_to_input", not kind))
    row_norm = NORMALISATIONS[cfg.get("normalize_activations", "none")]
    transcoder = _is_transcoder(cfg, kind)
    settings: dict[str, Any] = {
        "latents": int(cfg["d_sae"]),
        # A transcoder between equal widths is a plain "topk" there; with layer_norm it can be none.
        "transcoder": transcoder or (activation == "topk" and not kind and not subtracts_b_dec and not row_norm),
        "skip": kind == "skip_transcoder",
        "tap_widths": tuple(cfg["tap_widths"]) if kind == "crosscoder" else (),
        "centred": subtracts_b_dec,
    }
    variant: Variant
    match activation:
        case "topk":
            variant = TopK(k=int(cfg["k"]), **settings)
        case "gated":
            variant = Gated(sparsity_coefficient=0.0, **settings)
        case "jumprelu":
            variant = JumpRelu(sparsity_coefficient=0.0, **settings)
        case _:
            variant = Relu(sparsity_coefficient=0.0, **settings)
    if transcoder and subtracts_b_dec:
        params = variant.shift_pre_activations(params, -(params["w_enc_FD"] @ params["b_dec_D"]))
    return variant, params, row_norm


def _parsed(cfg: Mapping[str, Any]) -> tuple[str, str]:
    """Activation and kind, the latter "" for an autoencoder."""
    missing = sorted({"architecture", "d_in", "d_sae"} - cfg.keys())
    if missing:
        raise InputError(f"cfg.json lacks {', '.join(missing)}", "pass a folder written by SAELens 6 or saex-pipe")
    name = str(cfg["architecture"])
    kind = next((kind for kind in KINDS if name.endswith(kind)), "")
    activation = name.removesuffix(kind).removesuffix("_") or "standard"
    if activation not in PER_LATENT:
        raise InputError(
            f"architecture {name!r} is not known", f"known are {', '.join(PER_LATENT)}, and of each {', '.join(KINDS)}"
        )
    return activation, kind


def _is_transcoder(cfg: Mapping[str, Any], kind: str) -> bool:
    return kind.endswith("transcoder") or "d_out" in cfg


def _refuse_other_settings(cfg: Mapping[str, Any], activation: str, kind: str) -> None:
    if activation == "topk" and "k" not in cfg:
        raise InputError("cfg.json lacks k", "add the number of active latents per row")
    if kind == "crosscoder" and sum(cfg.get("tap_widths", ())) != cfg["d_in"]:
        raise InputError(
            f"tap_widths = {cfg.get('tap_widths')} do not add up to d_in = {cfg['d_in']}", "write the folder again"
        )
    normalisation = cfg.get("normalize_activations", "none")
    if normalisation not in NORMALISATIONS:
        raise InputError(
            f"normalize_activations = {normalisation!r} is not supported", "fold it in SAELens, leaving 'none'"
        )
    if NORMALISATIONS[normalisation] and _is_transcoder(cfg, kind):
        raise InputError(
            f"normalize_activations = {normalisation!r} is not supported for a transcoder: the mean and spread to put "
            "back are the target's, which it does not see",
            "use one that was trained without",
        )
    for name, value in EXACT_SETTINGS.items():
        if cfg.get(name, value) != value:
            raise InputError(f"{name} = {cfg[name]!r} is not supported", f"fold it in SAELens, leaving {value!r}")


def _checked_params(cfg: Mapping[str, Any], tensors: Mapping[str, np.ndarray], activation: str, kind: str) -> Params:
    names = _tensor_names(activation, skip=kind == "skip_transcoder")
    missing = sorted(set(names) - tensors.keys())
    if missing:
        raise InputError(f"sae_weights lacks {', '.join(missing)}", "write the folder again")
    width_in, latents, width_out = int(cfg["d_in"]), int(cfg["d_sae"]), int(cfg.get("d_out", cfg["d_in"]))
    expected = {
        "W_enc": (width_in, latents),
        "W_dec": (latents, width_out),
        "b_dec": (width_out,),
        "W_skip": (width_out, width_in),
    }
    for name in names:
        shape = expected.get(name, (latents,))
        if tensors[name].shape != shape:
            raise InputError(
                f"{name} has shape {tensors[name].shape}, cfg.json says {shape}", "both files must be of one SAE"
            )
    return {ours: jnp.asarray(_turned(theirs, tensors[theirs]), jnp.float32) for theirs, ours in names.items()}
