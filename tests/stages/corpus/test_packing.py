import numpy as np
import pytest

from saex_pipe.stages.corpus.packing import Marks, fill_windows, lay_out

COUNTS = np.array([5, 0, 7, 3, 9, 2, 4])
NUMBERS = np.array([3, 0, 5, 1, 6, 2, 4])  # of the documents, in the order they are taken


def tokens_of(place):
    """Token ids that say where they come from: 100 * place + index, one more for the separator."""
    return np.arange(COUNTS[place], dtype=np.int32) + 100 * place


NO_BOS = Marks(None, 9999)


def fill(layout, length, marks=NO_BOS):
    return fill_windows(layout, tokens_of, range(layout.windows), length, marks)


def arrange(**changes):
    settings = {"slots": 4, "packed": True, "max_windows": None, "holdout_fraction": 0.0}
    return lay_out(NUMBERS, COUNTS, **(settings | changes))


def test_packed_windows_hold_the_documents_end_to_end():
    layout = arrange()
    tokens_NL, documents_NL = fill(layout, 4)
    stream = np.concatenate([tokens_of(place) for place in range(len(COUNTS))])
    assert layout.windows == layout.train_windows == len(stream) // 4
    np.testing.assert_array_equal(tokens_NL.ravel(), stream[: layout.windows * 4])
    np.testing.assert_array_equal(documents_NL.ravel(), np.repeat(NUMBERS, COUNTS)[: layout.windows * 4])


def test_padded_windows_start_with_a_document_each_and_end_in_padding():
    layout = arrange(packed=False)
    tokens_NL, documents_NL = fill(layout, 4)
    assert layout.windows == sum(-(-count // 4) for count in COUNTS)
    np.testing.assert_array_equal(tokens_NL[:2], [[0, 1, 2, 3], [4, 9999, 9999, 9999]])
    np.testing.assert_array_equal(documents_NL[:2], [[3, 3, 3, 3], [3, -1, -1, -1]])
    for row in documents_NL:
        assert len(set(row[row >= 0])) == 1
    assert (documents_NL >= 0).sum() == COUNTS.sum()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("max_windows", [None, 2, 5])
def test_no_document_is_on_both_sides(packed, fraction, max_windows):
    layout = arrange(packed=packed, holdout_fraction=fraction, max_windows=max_windows)
    tokens_NL, documents_NL = fill(layout, 4)
    train, held_out = documents_NL[: layout.train_windows], documents_NL[layout.train_windows :]
    assert set(train[train >= 0]).isdisjoint(held_out[held_out >= 0])
    assert layout.train_windows >= 1
    assert max_windows is None or layout.windows <= max_windows
    if packed:
        assert (documents_NL >= 0).all()
    # Whatever was laid out is a run of its document from the first token on.
    for place, number in enumerate(NUMBERS):
        found = tokens_NL[documents_NL == number]
        np.testing.assert_array_equal(found, tokens_of(place)[: len(found)])


def test_the_share_of_held_out_windows_is_the_one_asked_for():
    counts = np.full(100, 37)
    layout = lay_out(np.arange(100), counts, slots=8, packed=True, max_windows=200, holdout_fraction=0.25)
    assert (layout.windows, layout.train_windows) == (200, 150)


def test_bos_takes_the_first_place_of_every_window():
    layout = arrange(slots=3)
    tokens_NL, documents_NL = fill(layout, 4, Marks(7777, 9999))
    assert (tokens_NL[:, 0] == 7777).all()
    np.testing.assert_array_equal(documents_NL[:, 0], documents_NL[:, 1])
    plain, _ = fill(layout, 3)
    np.testing.assert_array_equal(tokens_NL[:, 1:], plain)


def test_any_range_of_windows_is_filled_alone():
    layout = arrange(holdout_fraction=0.3)
    tokens_NL, documents_NL = fill(layout, 4)
    for start in range(layout.windows):
        found = fill_windows(layout, tokens_of, range(start, start + 1), 4, Marks(None, 9999))
        np.testing.assert_array_equal(found[0], tokens_NL[start : start + 1])
        np.testing.assert_array_equal(found[1], documents_NL[start : start + 1])


def test_one_document_leaves_nothing_to_hold_out():
    layout = lay_out(np.array([0]), np.array([50]), slots=4, packed=True, max_windows=None, holdout_fraction=0.5)
    assert layout.windows == layout.train_windows == 6


def test_too_little_text_fills_no_window():
    layout = lay_out(np.array([0]), np.array([3]), slots=4, packed=True, max_windows=None, holdout_fraction=0)
    assert layout.windows == 0
