"""One file per trained model, each in the sizes paper, small and tiny; installed as `unclip_jax.configs`."""
