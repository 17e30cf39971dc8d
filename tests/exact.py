"""The exact denoiser of a few pictures, E[x_0 | x_t] by Bayes, as a network whose eps is off by a fixed field at each
step, as is that of a trained one."""

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.diffusion.schedule import make_schedule, table_at

CHAIN = make_schedule("cosine", 1000)
SHAPE = (8, 8, 3)
ERROR = 0.03  # of eps, whose own size is 1


def pictures():
    """Plain squares on plain ground, of colours that lie apart: (24, 8, 8, 3) in [-1, 1]."""
    rng = np.random.default_rng(0)
    data = np.repeat(rng.uniform(-1, 1, (24, 1, 1, 3)), 64, axis=1).reshape(24, *SHAPE)
    data[:, 2:6, 2:6] = rng.uniform(-1, 1, (24, 1, 1, 3))
    return data.astype(np.float32)


DATA = pictures()


def network(x_t, t, data=DATA, spread=0.0):
    """Gives eps for x_t at original timesteps t (B,), where pictures are those of `data` and Gaussian noise of size
    `spread`."""
    signal, noise = (table_at(table, t, x_t) for table in (CHAIN.sqrt_alpha_bars, CHAIN.sqrt_beta_bars))
    variance = jnp.square(signal) * spread**2 + jnp.square(noise)  # of x_t around signal * picture
    squares = jnp.sum(jnp.square(x_t[:, None] - signal[:, None] * data[None]), axis=(2, 3, 4))
    weights = jax.nn.softmax(-squares / (2 * variance[:, 0, 0]), axis=1)
    picture = jnp.einsum("bn,nhwc->bhwc", weights, data)
    x0 = picture + spread**2 * signal / variance * (x_t - signal * picture)
    wrong = ERROR * jax.random.normal(jax.random.fold_in(jax.random.key(1), t[0]), (1, *SHAPE))
    return (x_t - signal * x0) / noise + wrong


def decibels(ours, truth):
    """Computes the PSNR of each picture in [-1, 1]: (B,)."""
    error = np.mean(np.square(np.clip(ours, -1, 1) - truth), axis=(1, 2, 3))
    return 10 * np.log10(4 / error)
