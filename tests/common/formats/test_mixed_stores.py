import numpy as np
import pytest
from small_store import whole_store

from saex_pipe.common.errors import InputError
from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.mixed_stores import MixedReader, MixedStores

BATCH = 20


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    place = tmp_path_factory.mktemp("stores")
    return [
        whole_store(place / "a"),
        whole_store(place / "b", first_token=1000, windows=9),
        whole_store(place / "c", first_token=2000, dtype="bfloat16"),
    ]


def opened(stores):
    return [ActivationStore(store.uri, ("a",)) for store in stores]


def read(mixture, steps, **settings):
    with MixedReader(mixture, ("a",), seed=1, batch_rows=BATCH, pool_bytes=1 << 16) as reader:
        return [reader.batch(step, **settings)["a"] for step in range(steps)]


def test_every_batch_holds_the_share_of_each_store(stores):
    mixture = MixedStores(opened(stores[:2]), ("a",), (1, 3))
    ids = np.stack([rows[:, 0] for rows in read(mixture, 10)])
    assert ((ids < 1000).sum(axis=1) == 5).all()
    uneven = MixedStores(opened(stores[:2]), ("a",), (1, 2))
    ids = np.stack([rows[:, 0] for rows in read(uneven, 30)])
    shares = (ids < 1000).sum(axis=1)
    assert set(shares) <= {6, 7}
    assert shares.sum() == 30 * BATCH // 3


def test_every_row_of_each_store_comes_once_an_epoch(stores):
    mixture = MixedStores(opened(stores[:2]), ("a",))
    ids = np.concatenate([rows[:, 0].astype(int) for rows in read(mixture, 40)])
    for store, own in ((stores[0], ids[ids < 1000]), (stores[1], ids[ids >= 1000])):
        wanted = store.kept_ids()
        assert len(own) > len(wanted)
        assert sorted(own[: len(wanted)].tolist()) == wanted


def test_weights_are_the_rows_where_none_are_given(stores):
    mixture = MixedStores(opened(stores[:2]), ("a",))
    rows = [len(store.kept_ids()) for store in stores[:2]]
    assert [float(weight) for weight in mixture.weights] == pytest.approx([n / sum(rows) for n in rows])
    assert mixture.rows == sum(rows)


def test_statistics_are_of_the_mixture(stores):
    mixture = MixedStores(opened(stores[:2]), ("a",), (1, 3))
    rows = [store.acts_NLD[store.keep_NL].astype(np.float64) for store in stores[:2]]
    found = mixture.statistics("a")
    np.testing.assert_allclose(found.mean_D, 0.25 * rows[0].mean(axis=0) + 0.75 * rows[1].mean(axis=0), rtol=1e-6)
    squares = [np.square(part).sum(axis=1).mean() for part in rows]
    assert found.mean_square_norm == pytest.approx(0.25 * squares[0] + 0.75 * squares[1], rel=1e-6)


def test_stores_of_several_dtypes_come_as_float32(stores):
    mixture = MixedStores(opened([stores[0], stores[2]]), ("a",))
    rows = read(mixture, 1)[0]
    assert rows.dtype == np.float32
    every = np.concatenate([store.acts_NLD.reshape(-1, 8).astype(np.float32) for store in (stores[0], stores[2])])
    assert all((every == row).all(axis=1).any() for row in rows)


def test_hosts_read_their_part_of_a_batch(stores):
    mixture = MixedStores(opened(stores[:2]), ("a",), (1, 2))
    whole = read(mixture, 3)
    parts = [read(mixture, 3, part=part) for part in (slice(0, 4), slice(4, 13), slice(13, None))]
    for step in range(3):
        np.testing.assert_array_equal(np.concatenate([part[step] for part in parts]), whole[step])


@pytest.mark.parametrize(
    ("weights", "line"),
    [((1,), "1 weights for 2 stores"), ((1, 0), "are not all positive"), ((1, -2), "are not all positive")],
)
def test_weights_that_make_no_sense_are_refused(stores, weights, line):
    with pytest.raises(InputError, match=line):
        MixedStores(opened(stores[:2]), ("a",), weights)
