"""What a run measured, as one HTML file that needs nothing else."""
