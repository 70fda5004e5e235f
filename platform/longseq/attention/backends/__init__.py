"""Who computes the operations: PyTorch, native kernels on CPUs, Triton kernels on GPUs."""
