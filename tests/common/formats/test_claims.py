import json
import subprocess
import sys
import threading
import time

import pytest

from saex_pipe.common.errors import SaexError, Superseded
from saex_pipe.common.formats import claims as module
from saex_pipe.common.formats.claims import Claims, Tenure
from saex_pipe.common.formats.folder import Folder

LEASE = 10.0


class Clock:
    """Stands in for the time of one machine."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)  # nothing else of the module is there: no wall clock is read
    return clock


@pytest.fixture
def local(tmp_path):
    """For what the machine's own clock or many requests decide, and no kind of store."""
    return Folder(str(tmp_path))


def worker(folder, name, lease=LEASE):
    return Claims(folder, name, lease)


def ledger(folder):
    return {name: json.loads(folder.read(name)) for name in folder.list("ledger/")}


def test_one_of_two_gets_a_shard(folder, clock):
    a, b = worker(folder, "a"), worker(folder, "b")
    assert a.claim(0)
    assert not b.claim(0)
    assert b.claim(1)
    assert [a.holds(0), a.holds(1), b.holds(0), b.holds(1)] == [True, False, False, True]


def test_a_claim_that_shows_no_life_for_its_lease_is_taken_over(folder, clock):
    a, b = worker(folder, "a"), worker(folder, "b", lease=1000.0)
    assert a.claim(0)
    assert not b.claim(0)  # first seen now
    clock.now = LEASE - 1
    assert not b.claim(0)
    clock.now = LEASE
    assert b.claim(0)
    assert not a.commit(0, {"by": "a"})
    assert ledger(folder) == {}
    assert b.commit(0, {"by": "b"})
    assert ledger(folder) == {"ledger/000000.json": {"by": "b"}}


def test_a_claim_that_is_renewed_is_not_taken_over(folder, clock):
    a, b = worker(folder, "a"), worker(folder, "b")
    a.claim(0)
    for _ in range(5):
        assert not b.claim(0)
        clock.now += LEASE - 1
        a.renew()
    assert a.commit(0, {"by": "a"})


@pytest.mark.parametrize("ahead", [3600.0, -3600.0])
def test_clocks_an_hour_apart_neither_take_over_early_nor_late(folder, clock, ahead):
    a, b = worker(folder, "a"), worker(folder, "b")
    passed = 0.0

    def by(one):
        clock.now = 10_000 + passed + (ahead if one is a else 0)
        return one

    assert by(a).claim(0)
    for _ in range(5):
        assert not by(b).claim(0)
        passed += LEASE - 1
        by(a).renew()
    assert not by(b).claim(0)  # the last sign of life, seen now
    passed += LEASE - 1
    assert not by(b).claim(0)
    passed += 1
    assert by(b).claim(0)
    assert not by(a).commit(0, {"by": "a"})
    assert by(b).commit(0, {"by": "b"})


def test_a_holder_learns_that_it_was_overtaken(folder, clock):
    a, b = worker(folder, "a"), worker(folder, "b")
    a.claim(0)
    b.claim(0)
    clock.now = LEASE
    b.claim(0)
    a.renew()
    assert not a.holds(0)
    assert b.holds(0)
    assert not a.commit(0, {"by": "a"})
    assert b.commit(0, {"by": "b"})
    assert ledger(folder) == {"ledger/000000.json": {"by": "b"}}


def test_a_finished_claim_is_nobodys_and_its_ledger_entry_is_made_good(folder, clock):
    a, b = worker(folder, "a"), worker(folder, "b")
    a.claim(0)
    assert a.commit(0, {"by": "a"})
    folder.delete("ledger/")  # as if a had died between the two writes
    assert not b.claim(0)
    assert ledger(folder) == {"ledger/000000.json": {"by": "a"}}


def test_what_was_not_finished_is_given_back_at_the_end(folder):
    with worker(folder, "a") as a:
        a.claim(0)
        a.claim(1)
        a.commit(1, {"by": "a"})
    b = worker(folder, "b")
    assert b.claim(0)
    assert not b.claim(1)


def test_claims_are_kept_alive_in_the_background(local):
    with worker(local, "a", lease=0.3) as a:
        a.claim(0)
        b = worker(local, "b", lease=0.3)
        for _ in range(12):
            assert not b.claim(0)
            time.sleep(0.05)
        assert a.commit(0, {})


def test_a_store_that_does_not_answer_for_a_while_costs_no_claim(local, monkeypatch):
    broken = iter([SaexError("down")] * 2)
    write_if = local.write_if

    def flaky(name, data, generation):
        for error in broken:
            raise error
        return write_if(name, data, generation)

    with worker(local, "a", lease=0.3) as a:
        a.claim(0)
        monkeypatch.setattr(local, "write_if", flaky)
        time.sleep(0.4)
        assert next(broken, None) is None
        assert a.commit(0, {"by": "a"})


def test_an_answer_that_is_lost_is_made_out(folder, clock, monkeypatch):
    a = worker(folder, "a")

    class Lossy:
        """Writes twice, as a client does that has not heard of its first success."""

        def __init__(self, objects):
            self.objects = objects

        def write(self, *arguments, **conditions):
            self.objects.write(*arguments, **conditions).result()
            return self.objects.write(*arguments, **conditions)

        def __getattr__(self, name):
            return getattr(self.objects, name)

    folder._opened = Lossy(folder.objects)
    assert a.claim(0)
    a.renew()
    assert a.holds(0)
    assert a.commit(0, {"by": "a"})
    assert not worker(folder, "b").claim(0)


def test_claims_of_the_same_share_are_taken_over_at_once_and_no_others(folder, clock):
    first, second = (Claims(folder, name, LEASE, "0-of-2") for name in ("first", "second"))
    other, elastic = Claims(folder, "other", LEASE, "1-of-2"), Claims(folder, "elastic", LEASE)
    assert first.claim(0)
    assert not other.claim(0)
    assert not elastic.claim(0)
    assert second.claim(0)
    assert not first.confirm(0)
    assert not first.commit(0, {"by": "first"})
    assert second.commit(0, {"by": "second"})
    assert ledger(folder) == {"ledger/000000.json": {"by": "second"}}
    assert not first.claim(0)
    assert elastic.claim(1)
    assert not first.claim(1)


def test_of_two_processes_of_one_share_the_one_that_started_last_goes_on(folder):
    with Tenure(folder, "first", "0-of-2") as first, Tenure(folder, "neighbour", "1-of-2") as neighbour:
        first.check()
        with Tenure(folder, "second", "0-of-2") as second:
            second.check()
            neighbour.check()
            with pytest.raises(Superseded, match=r"second has started on .* \(0-of-2\) and goes on"):
                first.check()
        first.check()  # the second has stopped, so that this one goes on
        assert json.loads(folder.read("workers/0-of-2.json")) == {"worker": "first"}
    assert folder.list("workers/") == []


def test_threads_that_race_win_every_shard_once(local):
    won = []

    def race(name):
        own = worker(Folder(local.uri), name)
        won.extend(shard for shard in range(40) if own.claim(shard))

    threads = [threading.Thread(target=race, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == list(range(40))


RACE = """
import sys
from saex_pipe.common.formats.claims import Claims
from saex_pipe.common.formats.folder import Folder
own = Claims(Folder(sys.argv[1]), sys.argv[2], 60.0)
print(" ".join(str(shard) for shard in range(60) if own.claim(shard) and own.commit(shard, {"by": sys.argv[2]})))
"""


def test_processes_that_race_commit_every_shard_once(local):
    command = [sys.executable, "-c", RACE, local.uri]
    running = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in range(3)]
    won = [[int(shard) for shard in process.communicate(timeout=60)[0].split()] for process in running]
    assert sorted(shard for part in won for shard in part) == list(range(60))
    assert ledger(local) == {f"ledger/{shard:06d}.json": {"by": str(n)} for n, part in enumerate(won) for shard in part}
