"""Training with Lightning and DeepSpeed."""
