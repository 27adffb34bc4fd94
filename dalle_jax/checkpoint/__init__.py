"""Run directories: their files, Orbax checkpoints, safetensors, remote directories and the lock of a run."""
