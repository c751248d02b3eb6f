"""Bussmann et al. 2025: the BatchTopK loss summed over nested dictionaries, each decoded by itself."""

from functools import partial

from sae_references import batchtopk

SETTINGS = batchtopk.SETTINGS
codes, training_codes = batchtopk.codes, batchtopk.training_codes
# Of 32 latents: 1/32, 3/32, 7/32, 15/32 and all.
loss = partial(batchtopk.loss, widths=(1, 3, 7, 15, 32))
