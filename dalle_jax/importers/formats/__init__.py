"""File formats of foreign checkpoints: torch.save, safetensors and Flax msgpack to lazily read tensors."""
