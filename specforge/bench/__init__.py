"""Measurements that a reader can repeat: times as ratios within one run, memory as growth within one process."""
