"""Public checkpoints (HuggingFace safetensors names) to and from Flax parameters."""
