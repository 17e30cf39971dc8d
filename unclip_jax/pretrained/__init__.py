"""Public PyTorch weights as bundles: GLIDE, OpenAI's CLIP and Karlo."""
