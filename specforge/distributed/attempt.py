"""A fresh corner of the launcher's store for each start of the workers.

torchrun restarts workers on the store of their predecessors (torch 2.13), where the addresses of dead processes still lie:
gloo then connects to nobody and waits for its time-out. Restart counts differ between nodes, so the ranks agree by themselves.
"""

import secrets
import time
from datetime import timedelta

import torch.distributed as dist

_POLL_S = 0.02


def fresh_store(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """`store` below a prefix that rank 0 chose for those ranks that are alive now. All ranks call it together.

    Every rank says hello under a token of its own, and rank 0 answers to the token; so an earlier start is never answered for.

    Raises:
        TimeoutError: a rank did not come.
    """
    deadline_s = time.monotonic() + timeout.total_seconds()
    if rank > 0:
        token = secrets.token_hex(8)
        store.set(f"hello/{rank}", token)
        store.wait([f"welcome/{token}"], timeout)
        prefix = store.get(f"welcome/{token}").decode()
        store.set(f"{prefix}/entered/{rank}", "")
        return dist.PrefixStore(prefix, store)
    prefix = f"start/{secrets.token_hex(8)}"
    absent = set(range(1, size))
    while absent:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"ranks {sorted(absent)} did not join within {timeout.total_seconds():.0f} s.")
        for other in sorted(absent):
            if store.check([f"{prefix}/entered/{other}"]):
                absent.remove(other)
            elif store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", prefix)
        time.sleep(_POLL_S)
    return dist.PrefixStore(prefix, store)
