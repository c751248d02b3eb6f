"""A trained SAE to one tuned end to end: through the language model that its reconstructions go back into."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from saex_pipe.common import resources
from saex_pipe.common.errors import InputError, SaexError
from saex_pipe.common.formats.checkpoint import SavedSae, TrainingState, read_sae, write_sae
from saex_pipe.common.formats.manifest import Manifest
from saex_pipe.common.formats.row_policy import RowPolicy
from saex_pipe.common.formats.stage_output import stage_output
from saex_pipe.common.formats.tokens import TokenStore
from saex_pipe.common.llm import taps as tap_names
from saex_pipe.common.llm.load import load_model
from saex_pipe.common.llm.params import LanguageModel
from saex_pipe.common.llm.splice import Taps, make_capture, resume_place
from saex_pipe.common.metrics_log import progress
from saex_pipe.common.preemption import graceful_stop
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.contract import Variant
from saex_pipe.common.sae.folding import fold, unfold
from saex_pipe.common.sae.inference import Sae
from saex_pipe.common.sae.normalisation import Normaliser, Normalisers
from saex_pipe.common.sae.optimiser import adam
from saex_pipe.common.sae.saelens import from_saelens, to_saelens
from saex_pipe.stages.tune.config import Config
from saex_pipe.stages.tune.step import Splice, TuneState, TuneTerms, Windows, lengths_of_rows, make_step

_LOG_EVERY_STEPS = 5
_OF_A_FULL_RATE = 0.1  # how fast an SAE that is nearly done learns


def run(config: Config, *, force: bool = False) -> Manifest:
    """Write the tuned SAE at ``config.out``."""
    with stage_output(config, force=force) as output, graceful_stop() as stop:
        if output.manifest is not None:
            return output.manifest
        saved, corpus = read_sae(config.sae), TokenStore(config.tokens)
        batches = Batches(config, corpus)
        model = load_model(resources.fetch(config.model), dtype=config.compute_dtype)
        model.architecture.check_largest_id(corpus.info.tokenizer["largest_id"])
        sae = _imported(config, saved)
        variant = _with_penalty(sae.variant, config, saved)
        reader = Reader(model, saved, batches)
        _check_widths(reader.splice, saved, model)
        normalisers = _normalisers(reader, row_norm=sae.row_norm)
        params = unfold(variant, sae.params, normalisers)
        optimiser = adam(batches.steps)
        step_fn = _compiled(config, variant, lengths_of_rows(params), reader.splice, normalisers, batches.steps)
        state = TuneState(params, optimiser.init(params), jnp.zeros((), jnp.int32))
        terms = TuneTerms(*(jnp.zeros(()) for _ in TuneTerms._fields))

        with TrainingState(output.folder) as saves:
            start = saves.steps()[-1]
            state, terms = saves.restore(start, (state, terms)) if start else (state, terms)
            done, total = start * batches.tokens, batches.steps * batches.tokens
            with progress("tuning", total, "tokens", done=done, log=output.metrics) as bar:
                for step in range(start, batches.steps):
                    windows, found = reader.read(step)
                    state, terms = step_fn(model, state, windows, found)
                    last, due = step + 1 == batches.steps, (step + 1) % config.checkpoint_every_steps == 0
                    shown: dict[str, float] = {}
                    if stop.requested or due or last or (step + 1) % _LOG_EVERY_STEPS == 0:
                        shown = _shown(terms, step)
                    bar.advance(batches.tokens, bytes=0, waiting_seconds=0.0, **shown)
                    if stop.requested or due or last:
                        saves.save(step + 1, (state, terms))
                    if not last:
                        stop.raise_if_requested()
        tuned = replace(sae, variant=variant, params=fold(variant, state.params, normalisers))
        write_sae(output.folder, _exported(config, saved, tuned))
        values = {name: float(value) for name, value in jax.device_get(terms)._asdict().items()}
        size = sum(array.nbytes for array in tuned.params.values())
        return output.finish(
            contents={"variant": type(variant).__name__, "latents": variant.latents, "last_step": values},
            totals={"steps": batches.steps, "tokens": batches.steps * batches.tokens, "bytes": size},
        )


def _imported(config: Config, saved: SavedSae) -> Sae:
    sae = Sae(*from_saelens(saved.cfg, saved.tensors))
    if sae.variant.tap_widths:
        raise InputError(
            f"{config.sae} is a crosscoder, and within one pass of the model its taps feed one another: there is no "
            "one place to splice it in",
            "tune an SAE of one tap",
        )
    return sae


class Batches:
    """Which windows a step reads: neighbouring ones, in an order that is a permutation each epoch."""

    def __init__(self, config: Config, corpus: TokenStore) -> None:
        self.corpus, self._seed, self._size = corpus, config.seed, config.batch_windows
        self._per_epoch = corpus.info.train_windows // config.batch_windows
        if self._per_epoch == 0:
            raise InputError(
                f"{config.tokens} has {corpus.info.train_windows} windows to train on, fewer than "
                f"tune.batch_windows = {config.batch_windows}",
                "lower it or give more text",
            )
        self.tokens = config.batch_windows * corpus.info.window_length  # of a step
        self.steps = math.ceil(config.tokens_seen / self.tokens)

    def windows(self, step: int) -> range:
        """Those of ``step``, a pure function."""
        epoch, place = divmod(step, self._per_epoch)
        batch = int(np.random.default_rng((self._seed, epoch)).permutation(self._per_epoch)[place])
        return range(batch * self._size, (batch + 1) * self._size)


class Reader:
    """The windows of a step and what the model as it is makes of them."""

    def __init__(self, model: LanguageModel, saved: SavedSae, batches: Batches) -> None:
        taps = Taps(saved.saex["tap"], saved.saex["target_tap"])
        self.splice = Splice(*taps, resume_place(taps, model.architecture))
        self._model, self._batches = model, batches
        self._policy = RowPolicy.from_json(saved.saex["row_policy"])
        base = [] if self.splice.base is None else [self.splice.base]
        self._capture = make_capture([*base, *taps, tap_names.FINAL_NORM, *(self._policy.norm_limits or {})])

    def read(self, step: int) -> tuple[Windows, Mapping[str, jax.Array]]:
        """Both for ``step``."""
        windows = self._batches.windows(step)
        tokens_NL = self._batches.corpus.tokens(windows)
        padding_NL = self._batches.corpus.documents(windows) < 0
        found = self._capture(self._model, jnp.asarray(tokens_NL))
        norms = {tap: np.linalg.norm(np.asarray(found[tap]), axis=-1) for tap in self._policy.norm_limits or {}}
        keep_NL = self._policy.keep(tokens_NL, padding_NL, norms)
        rows = np.flatnonzero(keep_NL)
        if not len(rows):
            raise InputError(f"windows {windows.start} to {windows.stop - 1} hold no row", "raise tune.batch_windows")
        real_NL1 = ~padding_NL[:, 1:] & ~padding_NL[:, :-1]
        # As many places as there are tokens, so that every batch compiles to the same program.
        rows_B = np.resize(rows, keep_NL.size).astype(np.int32)
        return Windows(*map(jnp.asarray, (tokens_NL, keep_NL, rows_B, real_NL1))), found


def _with_penalty(variant: Variant, config: Config, saved: SavedSae) -> Variant:
    """With the sparsity coefficient, which the layout of SAELens does not hold."""
    if "sparsity_coefficient" not in {field.name for field in fields(variant)}:
        if config.sparsity_coefficient is not None:
            raise InputError(
                f"tune.sparsity_coefficient = {config.sparsity_coefficient}: this SAE has no sparsity penalty",
                "leave it unset",
            )
        return variant
    of_training = saved.saex.get("config", {}).get("sparsity_coefficient")
    coefficient = of_training if config.sparsity_coefficient is None else config.sparsity_coefficient
    if coefficient is None:
        raise InputError(f"{config.sae} does not say its sparsity_coefficient", "set tune.sparsity_coefficient")
    return replace(variant, sparsity_coefficient=float(coefficient))  # type: ignore[call-arg]


class _Widths(NamedTuple):
    tap: str
    size: str


def _check_widths(splice: Splice, saved: SavedSae, model: LanguageModel) -> None:
    for tap, size in (_Widths(splice.tap, "d_in"), _Widths(splice.target, "d_out")):
        width, expected = tap_names.width(tap, model.architecture), saved.cfg.get(size, saved.cfg["d_in"])
        if width != expected:
            raise InputError(
                f"{tap} has width {width}, the SAE was trained on width {expected}", "give the model it was trained on"
            )


def _normalisers(reader: Reader, *, row_norm: bool) -> Normalisers:
    """Rows of the first step to unit mean square: a learning rate then means what it meant in training.

    With ``row_norm`` every row is brought to its own units, which are those of training already.
    """
    windows, found = reader.read(0)

    def side(tap: str) -> Normaliser:
        acts_NLD = np.asarray(found[tap], np.float64)
        rows_BD = acts_NLD.reshape(-1, acts_NLD.shape[-1])[np.asarray(windows.rows_B)]
        mean_square = float(np.square(rows_BD).mean())
        if not mean_square > 0:
            raise InputError(f"every row of {tap} is zero", "tune an SAE of another tap")
        scale = 1.0 if row_norm else mean_square**-0.5
        return Normaliser(jnp.full(rows_BD.shape[1], scale, jnp.float32), per_row=row_norm)

    return Normalisers(side(reader.splice.tap), side(reader.splice.target))


def _compiled(
    config: Config, variant: Variant, lengths_F: jax.Array, splice: Splice, normalisers: Normalisers, steps: int
) -> Callable[..., tuple[TuneState, TuneTerms]]:
    step = make_step(
        variant,
        lengths_F,
        splice,
        normalisers,
        adam(steps),
        learning_rate=config.learning_rate or _OF_A_FULL_RATE * variant.published_learning_rate(),
        objective=config.objective,
        balance=config.balance,
        compute=Compute(dtype=config.compute_dtype),
    )
    return jax.jit(step, donate_argnums=1)


def _shown(terms: TuneTerms, step: int) -> dict[str, float]:
    """Terms for the log; a loss that is not finite ends the run."""
    values = {name: float(value) for name, value in jax.device_get(terms)._asdict().items()}
    if not (math.isfinite(values["total"]) and math.isfinite(values["gradient_norm"])):
        raise SaexError(
            f"the loss is {values['total']} and the gradient {values['gradient_norm']} at step {step + 1}: tuning has "
            "diverged; lower tune.learning_rate"
        )
    return {"step": step + 1, "loss": values.pop("total"), **values}


def _exported(config: Config, saved: SavedSae, sae: Sae) -> SavedSae:
    """In the files of a trained SAE, with what it was tuned for."""
    metadata: dict[str, Any] = saved.cfg["metadata"]
    cfg, tensors = to_saelens(sae.variant, sae.params, metadata, row_norm=sae.row_norm)
    saex = {**saved.saex, "tuned": json.loads(json.dumps(config.result_fields()))}
    return SavedSae(cfg, tensors, saex)
