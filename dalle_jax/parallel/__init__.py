"""The device mesh, sharding, and processes of a distributed training."""
