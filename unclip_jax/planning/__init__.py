"""Costs of a training, from the programs that JAX compiles for TPU slices and GPUs."""
