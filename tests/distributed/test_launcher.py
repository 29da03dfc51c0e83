"""What torchrun, srun and mpirun write into the environment, and what is missing when they do not."""

import socket

import pytest

from specforge.distributed.launcher import Place, first_host, read_place
from specforge.errors import ConfigError

MASTER = {"MASTER_ADDR": "gpu07", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "2",
}  # fmt: skip
MPIRUN = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}


def test_nobody_launched() -> None:
    assert read_place({}) == Place("none", 0, 1, "", None)
    assert read_place({}).variables == {"RANK": "0", "WORLD_SIZE": "1"}


def test_torchrun() -> None:
    place = read_place({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **MASTER})
    assert place == Place("torchrun", 5, 8, "4", ("gpu07", 29500)), "ranks 4..7 share the node that begins with rank 4"
    assert place.variables == {"RANK": "5", "WORLD_SIZE": "8", **MASTER}


def test_rank_without_local_rank() -> None:
    assert read_place({"RANK": "5", "WORLD_SIZE": "8", **MASTER}).node == socket.gethostname()


def test_srun() -> None:
    """The port of step 2 of job 1234 is 12000 + (1234 * 31 + 2) % 16000 = 12000 + 38256 - 32000."""
    assert read_place(SRUN) == Place("srun", 9, 16, "1", ("gpu07", 18256))
    assert read_place({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}).master == ("10.0.0.1", 1)


def test_srun_with_only_the_older_variables() -> None:
    older = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", **MASTER}
    assert read_place(older) == Place("srun", 1, 2, socket.gethostname(), ("gpu07", 29500))


def test_a_batch_script_is_no_step() -> None:
    """sbatch gives the script itself SLURM_PROCID=0 and SLURM_NTASKS; waiting for the other tasks would never end."""
    assert read_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "1"}).size == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu07", "gpu07"), ("gpu[07-09,12],login1", "gpu07"), ("a,b", "a"), ("rack[2-3]n[10,12]", "rack2n10"), ("n[1,3]-ib", "n1-ib")],
)
def test_host_lists(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_mpirun_under_slurm() -> None:
    assert read_place({**SRUN, **MPIRUN, **MASTER}) == Place("mpirun", 3, 4, socket.gethostname(), ("gpu07", 29500))


def test_one_process_needs_no_meeting_place() -> None:
    assert read_place({"RANK": "0", "WORLD_SIZE": "1"}).master is None
    assert read_place({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}).size == 1


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT not set"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT not set"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"RANK": "1"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MASTER}, "RANK=2: must be less than WORLD_SIZE=2"),
        (MPIRUN, "MASTER_ADDR and MASTER_PORT not set: mpirun"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "MASTER_ADDR not set: srun"),
    ],
)
def test_what_is_missing_is_named(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_place(environment)
