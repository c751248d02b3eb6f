import json

import numpy as np

from saex_pipe.common.formats.row_policy import RowPolicy

TOKENS = np.int32([[5, 1, 7, 7], [5, 6, 2, 7]])
NO_PADDING = np.zeros((2, 4), bool)


def test_each_rule_drops_its_tokens():
    padding = NO_PADDING.copy()
    padding[1, 3] = True
    norms = {"a": np.float32([[1, 1, 1, 99], [1, 1, 1, 1]]), "b": np.float32([[1, 1, 1, 1], [1, 30, 1, 1]])}
    np.testing.assert_array_equal(
        RowPolicy(special_ids=(1, 2)).keep(TOKENS, padding, {}),
        [[True, False, True, True], [True, True, False, False]],
    )
    np.testing.assert_array_equal(
        RowPolicy(positions=(0,), norm_limits={"a": 10.0, "b": 20.0}).keep(TOKENS, NO_PADDING, norms),
        [[False, True, True, False], [False, False, True, True]],
    )


def test_no_rules_keep_everything():
    assert RowPolicy().keep(TOKENS, NO_PADDING, {}).all()


def test_a_norm_that_is_not_a_number_is_no_row():
    norms = {"a": np.float32([[np.nan, 1, 1, 1], [1, 1, 1, 1]])}
    assert not RowPolicy(norm_limits={"a": 10.0}).keep(TOKENS, NO_PADDING, norms)[0, 0]


def test_json_round_trip():
    policy = RowPolicy((1, 2), (0,), {"a": 12.5})
    assert RowPolicy.from_json(json.loads(json.dumps(policy.to_json()))) == policy
