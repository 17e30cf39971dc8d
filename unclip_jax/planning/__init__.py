"""Costs of a training run, read from the programs that JAX compiles for TPU slices and GPUs."""
