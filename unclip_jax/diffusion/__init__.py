"""The diffusion process as pure functions of arrays: no networks, no I/O, no Flax."""
