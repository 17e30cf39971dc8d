"""`unclip_jax.train` on a mesh that is not in the order of processes, as on TPU slices such as v5p:4x4x4."""

import numpy as np

from unclip_jax import cli, train
from unclip_jax.training import sharding


def mixed(shape, devices, **options):
    return np.array(devices)[[2, 0, 3, 1]].reshape(shape)


sharding.create_device_mesh = mixed
cli.run(train.main)
