"""What a training costs, worked out from the programs that JAX compiles for a TPU slice."""
