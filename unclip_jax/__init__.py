"""unCLIP (DALL-E 2) and GLIDE in JAX: pure functional models, one training loop, TPU slices and GPUs alike."""

__version__ = "0.2.0"
