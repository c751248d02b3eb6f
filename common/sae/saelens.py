"""To and from the layout of SAELens, in memory: the dict of ``cfg.json`` and the arrays of ``sae_weights.safetensors``.

Written for SAELens 6 (``SAE.load_from_disk``), tried with 6.54. Its names: W_enc [d_in, d_sae], b_enc [d_sae],
W_dec [d_sae, d_out], b_dec [d_out]; architectures "topk", "standard" (ReLU), "transcoder" (ReLU), "jumprelu" and
"jumprelu_transcoder" (threshold [d_sae], in units of the latents, which folding leaves alone there as here), "gated"
(b_gate, r_mag, b_mag [d_sae], no b_enc). p-annealing is a ReLU once it is trained, and so is Wright's variant with its
scales folded into the encoder: both are "standard" there and come back as ReLU.
TopK and gated transcoders have no class of their own there: with equal widths SAELens' "topk" and "gated" without
``apply_b_dec_to_input`` compute the same, with different widths no SAELens class does, and the architecture is called
"topk_transcoder" or "gated_transcoder".
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from saex_pipe.common.errors import InputError
from saex_pipe.common.sae.contract import Params, Variant
from saex_pipe.common.sae.gated import Gated
from saex_pipe.common.sae.jumprelu import JumpRelu
from saex_pipe.common.sae.relu import Relu
from saex_pipe.common.sae.topk import TopK
from saex_pipe.common.sae.wright import Wright

SAELENS_VERSION = "6.54.12"  # from 6.0 on, SAELens reads cfg.json as written here
MATRICES = {"W_enc": "w_enc_DF", "W_dec": "w_dec_FD", "b_dec": "b_dec_D"}
BIAS = {"b_enc": "b_enc_F"}
# What an architecture has per latent where that is not a bias alone.
PER_LATENT = {
    "gated": {"b_gate": "b_enc_F", "r_mag": "r_mag_F", "b_mag": "b_mag_F"},
    "jumprelu": {**BIAS, "threshold": "threshold_F"},
}
EXACT_SETTINGS = {"normalize_activations": "none", "reshape_activations": "none", "rescale_acts_by_decoder_norm": False}


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
    variant: Variant, params: Params, metadata: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The contents of ``cfg.json`` and of ``sae_weights.safetensors`` (float32).

    Args:
        variant: what was trained.
        params: in raw units (see ``folding.fold``).
        metadata: JSON values about the origin; SAELens knows ``model_name``, ``hook_name`` (TransformerLens' names),
            ``hook_name_out`` (transcoders), ``context_size``, ``prepend_bos``, ``dataset_path`` and others.
    """
    width_in, width_out = params["w_enc_DF"].shape[0], params["w_dec_FD"].shape[1]
    cfg: dict[str, Any] = {
        "d_in": width_in,
        "d_sae": variant.latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": variant.subtracts_decoder_bias,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAELENS_VERSION, "sae_lens_training_version": None, **metadata},
    }
    if isinstance(variant, Wright):
        params = variant.as_relu(params)
    match variant:
        case TopK():
            cfg |= {"architecture": "topk", "k": variant.k, "rescale_acts_by_decoder_norm": False}
            if variant.transcoder:
                cfg |= {"architecture": "topk" if width_in == width_out else "topk_transcoder", "d_out": width_out}
        case Gated(transcoder=True):
            cfg |= {"architecture": "gated" if width_in == width_out else "gated_transcoder", "d_out": width_out}
        case Gated():
            cfg |= {"architecture": "gated"}
        case JumpRelu(transcoder=True):
            cfg |= {"architecture": "jumprelu_transcoder", "d_out": width_out}
        case JumpRelu():
            cfg |= {"architecture": "jumprelu"}
        case Variant(transcoder=True):
            cfg |= {"architecture": "transcoder", "d_out": width_out}
        case _:
            cfg |= {"architecture": "standard"}
    names = _tensor_names(cfg["architecture"])
    return cfg, {theirs: np.asarray(params[ours], np.float32) for theirs, ours in names.items()}


def from_saelens(cfg: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> tuple[Variant, Params]:
    """The variant and its parameters, in raw units.

    What only training needs (coefficients, constraints) is not in the layout and comes back as the default, the
    sparsity coefficient as 0. A transcoder that subtracts ``b_dec`` from its input comes back with the product moved
    into the encoder's biases.

    Raises:
        InputError: an architecture or setting that is not computed here, or missing or misshapen tensors.
    """
    _refuse_other_settings(cfg)
    params = _checked_params(cfg, tensors)
    latents, transcoder = int(cfg["d_sae"]), "transcoder" in cfg["architecture"]
    subtracts_b_dec = bool(cfg.get("apply_b_dec_to_input", not transcoder))
    if cfg["architecture"] in ("topk", "topk_transcoder"):
        return TopK(latents=latents, k=int(cfg["k"]), transcoder=not subtracts_b_dec), params
    family = {"gated": Gated, "jumprelu": JumpRelu}.get(_family(cfg["architecture"]), Relu)
    transcoder |= "d_out" in cfg
    if transcoder and subtracts_b_dec:
        shift_F = params["b_dec_D"] @ params["w_enc_DF"]
        params["b_enc_F"] -= shift_F
        if family is Gated:
            params["b_mag_F"] -= shift_F * jnp.exp(params["r_mag_F"])
    return family(latents=latents, sparsity_coefficient=0.0, transcoder=transcoder, centred=subtracts_b_dec), params


def _family(architecture: str) -> str:
    return architecture.removesuffix("_transcoder")


def _tensor_names(architecture: str) -> dict[str, str]:
    return MATRICES | PER_LATENT.get(_family(architecture), BIAS)


def _refuse_other_settings(cfg: Mapping[str, Any]) -> None:
    missing = sorted({"architecture", "d_in", "d_sae"} - cfg.keys())
    if missing:
        raise InputError(f"cfg.json lacks {', '.join(missing)}", "pass a folder written by SAELens 6 or saex-pipe")
    known = (
        *("standard", "topk", "topk_transcoder", "transcoder", "jumprelu", "jumprelu_transcoder"),
        *("gated", "gated_transcoder"),
    )
    if cfg["architecture"] not in known:
        raise InputError(f"architecture {cfg['architecture']!r} is not known", f"known are {', '.join(known)}")
    if cfg["architecture"].startswith("topk") and "k" not in cfg:
        raise InputError("cfg.json lacks k", "add the number of active latents per row")
    for name, value in EXACT_SETTINGS.items():
        if cfg.get(name, value) != value:
            raise InputError(f"{name} = {cfg[name]!r} is not supported", f"fold it in SAELens, leaving {value!r}")


def _checked_params(cfg: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Params:
    names = _tensor_names(cfg["architecture"])
    missing = sorted(names.keys() - tensors.keys())
    if missing:
        raise InputError(f"sae_weights lacks {', '.join(missing)}", "write the folder again")
    width_in, latents, width_out = int(cfg["d_in"]), int(cfg["d_sae"]), int(cfg.get("d_out", cfg["d_in"]))
    expected = {"W_enc": (width_in, latents), "W_dec": (latents, width_out), "b_dec": (width_out,)}
    for name in names:
        shape = expected.get(name, (latents,))
        if tensors[name].shape != shape:
            raise InputError(
                f"{name} has shape {tensors[name].shape}, cfg.json says {shape}", "both files must be of one SAE"
            )
    return {ours: jnp.asarray(tensors[theirs], jnp.float32) for theirs, ours in names.items()}
