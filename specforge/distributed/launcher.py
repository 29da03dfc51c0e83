"""What the launcher says about this process: torchrun's variables, or those of srun and mpirun told in torchrun's words."""

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from specforge.errors import ConfigError

_FIRST_PORT, _PORTS = 12_000, 16_000
"""Where the port of a Slurm step is chosen from its number: below the range that Linux hands out by default."""


@dataclass(frozen=True)
class Place:
    """This process among those that were started together."""

    launcher: str
    rank: int
    size: int
    node: str
    """The same text on ranks of one node, different on ranks of different nodes."""
    master: tuple[str, int] | None
    """Address and port where rank 0 is met; None in a world of one."""

    @property
    def variables(self) -> dict[str, str]:
        """The same in the variables of torchrun, which torch and other libraries read."""
        found = {"RANK": str(self.rank), "WORLD_SIZE": str(self.size)}
        return found | ({"MASTER_ADDR": self.master[0], "MASTER_PORT": str(self.master[1])} if self.master else {})


def read_place(environment: Mapping[str, str]) -> Place:
    """The place that the environment describes; without a launcher, a world of this process alone.

    RANK (torchrun) comes before Open MPI's variables and these before Slurm's, since mpirun is often started by Slurm.

    Raises:
        ConfigError: naming the variable that is missing or makes no sense.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _place("torchrun", environment, "RANK", "WORLD_SIZE")
    if "OMPI_COMM_WORLD_RANK" in environment:
        return _place("mpirun", environment, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    # A batch script has SLURM_PROCID and SLURM_NTASKS too, but no step: nobody else was started beside it.
    if "SLURM_PROCID" in environment and ("SLURM_STEP_NUM_TASKS" in environment or "MASTER_ADDR" in environment):
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
        return _place("srun", environment, "SLURM_PROCID", tasks)
    return Place("none", 0, 1, "", None)


def _place(launcher: str, environment: Mapping[str, str], rank_name: str, size_name: str) -> Place:
    rank, size = (_number(environment, name, launcher) for name in (rank_name, size_name))
    if rank >= size:
        raise ConfigError(f"{rank_name}={rank}: must be less than {size_name}={size}; start every process with the same {size_name}.")
    return Place(launcher, rank, size, _node(launcher, environment, rank), _master(launcher, environment) if size > 1 else None)


def _number(environment: Mapping[str, str], name: str, launcher: str) -> int:
    text = environment.get(name)
    if text is None or not text.isdigit():
        given = "is not set" if text is None else f"is {text!r}"
        raise ConfigError(
            f"{name} {given}: must be a number where {launcher}'s other variables are set; start with torchrun, or unset those."
        )
    return int(text)


def _node(launcher: str, environment: Mapping[str, str], rank: int) -> str:
    if launcher == "torchrun" and "LOCAL_RANK" in environment:
        return str(rank - _number(environment, "LOCAL_RANK", launcher))  # the first rank of the node
    return environment.get("SLURM_NODEID", socket.gethostname()) if launcher == "srun" else socket.gethostname()


def _master(launcher: str, environment: Mapping[str, str]) -> tuple[str, int]:
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if launcher == "srun":
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
        address = address or (first_host(nodes) if nodes else None)
        port = port or str(_step_port(environment))
    missing = [name for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if not value]
    if missing or address is None:
        raise ConfigError(
            f"{' and '.join(missing)} not set: {launcher} started several processes, which meet at rank 0; export "
            "MASTER_ADDR (its host) and MASTER_PORT (a free port there) to all of them, or start with torchrun."
        )
    return address, _number({"MASTER_PORT": port or ""}, "MASTER_PORT", launcher)


def first_host(nodes: str) -> str:
    """The first name of a Slurm host list: `gpu[07-09,12],login1` begins with gpu07."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodes).split(",")[0]


def _step_port(environment: Mapping[str, str]) -> int:
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return _FIRST_PORT + (job * 31 + step) % _PORTS
