"""The dimension key. Array names end in their axes: ``acts_BD``, ``codes_BF``, ``w_enc_FD``.

Public arguments carry the same letters as jaxtyping annotations, ``Float[Array, "B D"]``.
"""

AXES = {
    "B": "batch rows",
    "N": "windows",
    "L": "window length in tokens",
    "D": "activation width",
    "F": "latents",
    "K": "active latents of a row",
    "V": "vocabulary",
    "H": "query heads",
    "G": "key/value heads",
    "T": "taps",
    "S": "SAEs trained together",
}
