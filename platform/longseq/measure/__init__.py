"""Time, FLOPs and memory, for training and benchmarks alike."""
