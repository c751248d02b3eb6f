import pytest

from saex_pipe.common.errors import InputError
from saex_pipe.common.worker import Share, read_share


@pytest.mark.parametrize(
    ("text", "environment", "share"),
    [
        ("0/1", {}, Share(0, 1)),
        ("3/4", {}, Share(3, 4)),
        ("auto", {"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "5"}, Share(2, 5)),
        (
            "auto",
            {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "8"},
            Share(6, 8),
        ),
        (
            "auto",
            {
                "SLURM_ARRAY_TASK_ID": "14",
                "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            Share(2, 4),
        ),
        ("auto", {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, Share(1, 2)),
        ("jax", {}, Share(0, 1)),
    ],
)
def test_shares(text, environment, share, monkeypatch):
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    assert read_share(text, environment) == share


@pytest.mark.parametrize(
    ("text", "environment", "line"),
    [
        ("4/4", {}, "worker 4 of 4 does not exist; count from 0 to 3"),
        ("0/0", {}, "worker 0 of 0 does not exist"),
        ("1-4", {}, "worker '1-4' is not of the form i/n; write 0/4"),
        ("auto", {}, "neither a Kubernetes indexed job nor a SLURM job"),
        ("auto", {"JOB_COMPLETION_INDEX": "2"}, "JOB_COMPLETIONS is not set; set it in the job's manifest"),
        ("auto", {"JOB_COMPLETION_INDEX": "x", "JOB_COMPLETIONS": "3"}, "JOB_COMPLETION_INDEX = 'x' is no number"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "7"}, "SLURM_ARRAY_TASK_MIN is not set"),
    ],
)
def test_what_names_no_share_is_refused(text, environment, line):
    with pytest.raises(InputError, match=line):
        read_share(text, environment)


def test_shares_are_disjoint_and_cover_everything():
    shards = list(range(11))
    parts = [Share(index, 4).of(shards) for index in range(4)]
    assert sorted(shard for part in parts for shard in part) == shards
    assert {len(part) for part in parts} == {2, 3}
