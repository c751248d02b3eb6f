"""Floating-point operations that one training step cannot do without, from shapes alone.

Counted are the matrix products, a multiplication and an addition as two operations: the encoder over all F latents;
decoder, its gradient to the codes and the gradients of both weight matrices over the A latents of a row that can be
active, which is the k of a variant that has one and F otherwise; and the skip path with its gradient:

    2 B (D_in F + 3 A D_out + A D_in + 2 D_in D_out where there is a skip path)

Not counted is what differs from variant to variant or from step to step: losses for dead latents, Gated's second
reconstruction, selection, optimiser. A step that computes dense products with codes of which k are active is charged
for the k alone.
"""

from saex_pipe.common.sae.contract import Params, Variant


def step_flops(variant: Variant, params: Params, rows: int) -> float:
    """Of a step on ``rows`` rows. ``params`` may be shapes, and have leading axes, which do not count."""
    latents, width_in = params["w_enc_FD"].shape[-2:]
    width_out = params["w_dec_FD"].shape[-1]
    active = min(getattr(variant, "k", latents), latents)
    skip = 2 * width_in * width_out if variant.skip else 0
    return 2.0 * rows * (width_in * latents + active * (3 * width_out + width_in) + skip)
