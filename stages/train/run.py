"""Activation store to a sparse autoencoder."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.formats.checkpoint import SavedSae, TrainingState, write_sae
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.stage_output import StageOutput, stage_output
from saex_pipe.common.metrics_log import progress
from saex_pipe.common.preemption import graceful_stop
from saex_pipe.common.sae.contract import DataStats, Variant
from saex_pipe.common.sae.folding import fold
from saex_pipe.common.sae.optimiser import adam
from saex_pipe.common.sae.saelens import hook_name, to_saelens
from saex_pipe.common.sae.train_step import StepTerms, TrainState, init_state, make_step
from saex_pipe.common.sae.variants import build
from saex_pipe.stages.train.config import Config
from saex_pipe.stages.train.rows import Returns, Rows, make_reader, open_rows

_LOG_EVERY_STEPS = 10
_DEFAULT_K = 32


class Normalisation(NamedTuple):
    """Factors that bring raw rows to the units of training."""

    input_scale: float
    output_scale: float


def run(config: Config, *, force: bool = False) -> Manifest:
    """Train the SAE at ``config.out``."""
    with stage_output(config, force=force) as output, graceful_stop() as stop:
        if output.manifest is not None:
            return output.manifest
        store, taps = open_rows(config, stop)
        tap, target = taps[0], taps[-1]
        variant = _variant(config, store.info.taps[tap], transcoder=tap != target)
        scales = Normalisation(_scale(config, store, tap), _scale(config, store, target))
        steps = math.ceil(config.rows / config.batch_rows)
        optimiser = adam(config.learning_rate or variant.default_learning_rate(), steps)
        step_fn = _compiled_step(config, variant, optimiser, scales)
        state = init_state(variant.init(jax.random.key(config.seed), _data_stats(store, taps, scales)), optimiser)

        reader = make_reader(config, store, taps)
        given_back = Returns(config, store, reader, output.digest)
        with reader, TrainingState(output.folder) as saves:
            terms = StepTerms(*(jnp.zeros(()) for _ in StepTerms._fields))
            start, (state, terms) = saves.restore((state, terms)) or (0, (state, terms))
            total, done = steps * config.batch_rows, start * config.batch_rows
            with progress("training", total, "rows", done=done, log=output.metrics) as bar:
                for step in range(start, steps):
                    if given_back.is_due(step):
                        saves.save(step, (state, terms))
                        saves.wait()
                        given_back.release(step)
                    waited = reader.waiting_seconds
                    batch = reader.batch(step)
                    state, terms = step_fn(state, batch[tap], batch[target])
                    shown = _shown(terms, step) if (step + 1) % _LOG_EVERY_STEPS == 0 or step + 1 == steps else {}
                    size = sum(rows_BD.nbytes for rows_BD in batch.values())
                    bar.advance(config.batch_rows, bytes=size, waiting_seconds=reader.waiting_seconds - waited, **shown)
                    if stop.requested or (step + 1) % config.checkpoint_every_steps == 0 or step + 1 == steps:
                        saves.save(step + 1, (state, terms))
                    if step + 1 < steps:
                        stop.raise_if_requested()
        write_sae(output.folder, _exported(config, store, variant, state, scales, taps))
        return _finish(output, variant, config, state, terms)


def _variant(config: Config, width: int, *, transcoder: bool) -> Variant:
    if (config.latents is None) == (config.expansion is None):
        raise InputError(
            f"train.latents = {config.latents} and train.expansion = {config.expansion}", "set exactly one of the two"
        )
    latents = config.latents or max(1, round(width * (config.expansion or 0)))
    k = _DEFAULT_K if config.k is None and config.variant == "topk" else config.k
    return build(config.variant, latents, k, config.sparsity_coefficient, transcoder, config.auxiliary_stride)


def _scale(config: Config, store: Rows, tap: str) -> float:
    if store.rows == 0:
        raise InputError(f"{config.store} has no training rows", "harvest again with more text or fewer drop_* rules")
    if config.normalise == "none":
        return 1.0
    mean_square = store.statistics(tap).mean_square_norm / store.info.taps[tap]
    if mean_square == 0:
        raise InputError(f"every row of {tap} in {config.store} is zero", "harvest another tap")
    return float(1 / np.sqrt(mean_square))


def _data_stats(store: Rows, taps: tuple[str, ...], scales: Normalisation) -> DataStats:
    means = [store.statistics(tap).mean_D.astype(np.float32) for tap in taps]
    return DataStats(jnp.asarray(means[0] * scales.input_scale), jnp.asarray(means[-1] * scales.output_scale))


def _compiled_step(config: Config, variant: Variant, optimiser: Any, scales: Normalisation) -> Callable[..., Any]:
    step = make_step(variant, optimiser, config.dead_after_rows, config.compute_dtype, config.sparsity_warmup_steps)

    def normalised_step(state: TrainState, x_BD: jax.Array, target_BD: jax.Array) -> tuple[TrainState, StepTerms]:
        scaled = x_BD.astype(jnp.float32) * scales.input_scale, target_BD.astype(jnp.float32) * scales.output_scale
        return step(state, *scaled)

    return jax.jit(normalised_step, donate_argnums=0)


def _shown(terms: StepTerms, step: int) -> dict[str, float]:
    """Loss terms for the log; a loss that is not finite ends the run."""
    values = {name: float(value) for name, value in jax.device_get(terms)._asdict().items()}
    if not math.isfinite(values["total"]):
        raise SaexError(
            f"the loss is {values['total']} at step {step + 1}: training has diverged; "
            "lower train.learning_rate, or look for outliers with a smaller harvest.drop_norm_multiple"
        )
    return {"step": step + 1, "loss": values.pop("total"), **values}


def _exported(
    config: Config,
    store: Rows,
    variant: Variant,
    state: TrainState,
    scales: Normalisation,
    taps: tuple[str, ...],
) -> SavedSae:
    """The SAE in units of the raw activations."""
    source = store.info.source
    metadata = {
        "model_name": source.get("model"),
        "hook_name": hook_name(taps[0]),
        "context_size": store.info.window_length,
    }
    if len(taps) > 1:
        metadata["hook_name_out"] = hook_name(taps[1])
    params = fold(variant, state.params, scales.input_scale, scales.output_scale)
    cfg, tensors = to_saelens(variant, params, metadata)
    saex = {
        "tap": taps[0],
        "target_tap": taps[-1],
        "row_policy": store.info.row_policy.to_json(),
        "source": dict(source),
        "store_digest": store.digest,
        "normalisation": scales._asdict(),
        "config": config.result_fields(),
    }
    return SavedSae(cfg, tensors, saex)


def _finish(output: StageOutput, variant: Variant, config: Config, state: TrainState, terms: StepTerms) -> Manifest:
    since_fired_F = np.asarray(state.tokens_since_fired_F)
    contents = {
        "variant": config.variant,
        "latents": variant.latents,
        "dead_fraction": float((since_fired_F >= config.dead_after_rows).mean()),
        "last_step": {k: float(v) for k, v in jax.device_get(terms)._asdict().items()},
    }
    steps = int(state.step)
    size = sum(array.nbytes for array in state.params.values())
    return output.finish(contents=contents, totals={"steps": steps, "rows": steps * config.batch_rows, "bytes": size})
