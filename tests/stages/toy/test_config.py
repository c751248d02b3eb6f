"""What the toy stage refuses."""

import pytest

from saex_pipe.common.errors import InputError
from saex_pipe.stages.toy.config import Config


def test_the_defaults_are_valid():
    config = Config.create({"out": "x"})
    assert config.width < config.latents
    assert config.folder == "activations"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"latents": 8, "active": 9, "frequency_decay": 1}, "active = 9 is above 8, the most that 8 latents with"),
        ({"latents": 100, "active": 3, "frequency_decay": 0.5}, r"above 2, .* frequency_decay = 0.5 can reach"),
        ({"rows": 1000, "window_length": 128}, "rows = 1000 is not a multiple of window_length = 128"),
        ({"active": 0}, "toy.active = 0: Input should be greater than 0"),
        ({"correlation": 1.5}, "toy.correlation = 1.5: Input should be less than or equal to 1"),
        ({"store_dtype": "int8"}, "Input should be 'float32' or 'bfloat16'"),
        ({"seed": -1}, "toy.seed = -1"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        Config.create({"out": "x"} | values)
