"""Building a variant from settings: what is refused, and in which words."""

from typing import Any

import pytest

from saex_pipe.common.errors import InputError
from saex_pipe.common.sae.relu import Relu
from saex_pipe.common.sae.topk import TopK
from saex_pipe.common.sae.variants import build


def test_build() -> None:
    assert build("topk", 64, k=8) == TopK(latents=64, k=8)
    assert build("topk", 64, k=64, transcoder=True) == TopK(latents=64, k=64, transcoder=True)
    assert build("topk", 64, k=8, auxiliary_stride=4) == TopK(latents=64, k=8, auxiliary_stride=4)
    assert build("relu", 64, sparsity_coefficient=5.0) == Relu(latents=64, sparsity_coefficient=5.0)
    assert build("relu", 64, sparsity_coefficient=5.0, decoder_rows="unit") == Relu(
        latents=64, sparsity_coefficient=5.0, decoder_rows="unit", centred=True, weighted_by_decoder_norms=False
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant_name": "topj", "k": 8}, "variant 'topj' is unknown; did you mean topk? choose one of"),
        ({"variant_name": "zzz", "k": 8}, "variant 'zzz' is unknown; choose one of"),
        ({"variant_name": "topk", "latents": 0, "k": 8}, "latents = 0 is below 1"),
        ({"variant_name": "topk"}, "topk needs k"),
        ({"variant_name": "topk", "k": 0}, "k = 0 is outside 1 to 64"),
        ({"variant_name": "topk", "k": 65}, "k = 65 is outside 1 to 64"),
        ({"variant_name": "topk", "k": 8, "sparsity_coefficient": 5.0}, "topk takes no sparsity_coefficient"),
        ({"variant_name": "topk", "k": 8, "auxiliary_stride": 0}, "auxiliary_stride = 0 is below 1"),
        ({"variant_name": "batchtopk"}, "batchtopk needs k"),
        ({"variant_name": "batchtopk", "k": 8, "k_start": 65}, "k_start = 65 is outside 1 to 64"),
        ({"variant_name": "matryoshka_batchtopk", "k": 8, "levels": (8, 65)}, "levels = (8, 65) are outside 1 to 64"),
        (
            {"variant_name": "jumprelu", "sparsity_coefficient": 1.0, "target_l0": 70.0},
            "target_l0 = 70.0 is outside 0 to 64",
        ),
        ({"variant_name": "relu", "k": 8}, "relu takes no k"),
        ({"variant_name": "p_annealing", "sparsity_coefficient": 1.0, "penalty": "tanh"}, "takes no penalty"),
        ({"variant_name": "p_annealing", "sparsity_coefficient": 1.0, "p_end": 0.0}, "p_end = 0.0 is outside 0"),
        (
            {"variant_name": "relu", "sparsity_coefficient": 1.0, "penalty": "hoyer", "penalty_scale": 2.0},
            "penalty_scale = 2.0 with penalty = hoyer, which has no scale",
        ),
        ({"variant_name": "relu"}, "relu needs sparsity_coefficient"),
        ({"variant_name": "relu", "sparsity_coefficient": -1.0}, "sparsity_coefficient = -1.0 is below 0"),
        ({"variant_name": "relu", "sparsity_coefficient": float("nan")}, "sparsity_coefficient = nan"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refusal:
        build(**{"latents": 64, **settings})
    assert message in str(refusal.value)
    assert refusal.value.remedy
