"""The processes of a run: who takes part, what they add up, and where their random numbers come from."""

from specforge.distributed.world import World

__all__ = ["World"]
