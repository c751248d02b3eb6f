import json

import numpy as np
import pytest

from saex_pipe.common.formats.int8 import LEVELS, Channels
from saex_pipe.common.formats.statistics import ActivationStatistics

RANDOM = np.random.Generator(np.random.Philox(key=11))
# Like a residual stream: some channels a hundred times as large as the others, and off zero.
SPREAD = np.exp(RANDOM.normal(0, 1.5, 256))
ROWS = (RANDOM.normal(0, SPREAD, (2000, 256)) + 5 * SPREAD * RANDOM.normal(0, 1, 256)).astype(np.float32)
CHANNELS = Channels.of(ActivationStatistics.of_rows(ROWS[:500]))


def added_error(channels, rows_BD):
    decoded_BD = channels.decode(*channels.encode(rows_BD))
    return float(np.square(decoded_BD - rows_BD).sum() / np.square(rows_BD - rows_BD.mean(axis=0)).sum())


def test_the_added_error_is_below_a_ten_thousandth_of_the_variance():
    assert added_error(CHANNELS, ROWS[500:]) < 1e-4
    bare = Channels(np.zeros(256, np.float32), np.ones(256, np.float32))
    assert added_error(bare, ROWS[500:]) > 1e-3, "standardising the channels is what makes one byte enough"


def test_decoding_follows_the_formula():
    values_BD, scale_B = CHANNELS.encode(ROWS[:50])
    q = values_BD.astype(np.float64)
    standard = scale_B[:, None] * np.sign(q) * np.abs(q) ** 1.5
    expected = CHANNELS.mean_D + CHANNELS.std_D * standard
    np.testing.assert_allclose(CHANNELS.decode(values_BD, scale_B), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(values_BD).max(axis=1).tolist() == [LEVELS] * 50


def test_every_value_is_one_of_the_two_levels_around_it():
    values_BD, scale_B = CHANNELS.encode(ROWS[:50])
    wanted = (ROWS[:50] - CHANNELS.mean_D) / CHANNELS.std_D / scale_B[:, None]
    levels = np.sign(np.arange(-128, 129)) * np.abs(np.arange(-128.0, 129)) ** 1.5
    q = values_BD.astype(int)
    below, above = levels[q + 128 - (q > -128)], levels[np.minimum(q + 129, 255)]
    slack = 1e-4 * np.abs(wanted) + 1e-3
    assert ((wanted >= below - slack) & (wanted <= above + slack)).all()


def test_rows_without_spread_and_channels_that_never_change_come_back():
    channels = Channels.of(ActivationStatistics.of_rows(np.full((3, 4), 2, np.float32)))
    np.testing.assert_array_equal(channels.decode(*channels.encode(np.full((2, 4), 2, np.float32))), 2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_does_not_come_back_as_a_number(value):
    rows_BD = ROWS[:3].copy()
    rows_BD[1, 7] = value
    found = CHANNELS.decode(*CHANNELS.encode(rows_BD))
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()


def test_json_keeps_every_bit():
    found = Channels.from_json(json.loads(json.dumps(CHANNELS.to_json())))
    np.testing.assert_array_equal(found.mean_D, CHANNELS.mean_D)
    np.testing.assert_array_equal(found.std_D, CHANNELS.std_D)
