"""What a run says: its numbers (`RunLog`, `read_metrics`) and how far it is (`progress`). Only rank 0 speaks."""

from specforge.log.progress import Progress, progress
from specforge.log.run_log import RunLog, read_metrics

__all__ = ["Progress", "RunLog", "progress", "read_metrics"]
