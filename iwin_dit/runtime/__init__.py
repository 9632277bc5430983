"""Files, checkpoints, run directories and seeds: bytes on disk and nothing else."""
