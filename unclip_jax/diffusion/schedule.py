"""Noise schedules: every table the formulas need, and respacing a long chain into a short one.

Notation (0-based; t = 0 means one noising step applied):

    alpha_t      = 1 - beta_t
    alpha_bar_t  = prod_{i <= t} alpha_i,  alpha_bar_{-1} = 1        share of signal variance left at t
    beta_bar_t   = 1 - alpha_bar_t                                   noise variance at t

All tables are computed once in float64 on the host, so that a `NoiseSchedule` may be passed through `jax.jit` as an
argument: each table is rounded to float32 by itself, and no difference of nearly equal float32 numbers is ever taken.
"""

import re
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int, Shaped

from unclip_jax.arrays import Array

SCHEDULES = ("cosine", "linear")
LEAST_LOG_SNR = -5.1  # at which "logsnrN" starts; the cosine schedule's last steps are noisier, to no use

Table = Float[Array, " n"]
Rows = Float[Array, "B *dims"]  # float32 examples: pictures (B, H, W, C) or vectors (B, d)
StepIndex = int | Int[Array, ""]  # shared by the batch
StepIndices = StepIndex | Int[Array, " B"]  # shared, or one per row


class NoiseSchedule(NamedTuple):
    """Tables of one chain of n steps; entry 0 is the least noisy step."""

    betas: Table  # beta_t: noise variance added by the step
    timesteps: Int[Array, " n"]  # index of the step in the original chain, which the networks receive
    alpha_bars: Table
    alpha_bars_prev: Table  # one step less noisy; entry 0 is 1
    alpha_bars_next: Table  # one step noisier; the last entry is 0
    beta_bars: Table  # 1 - alpha_bars
    beta_bars_prev: Table  # 1 - alpha_bars_prev
    beta_bars_next: Table  # 1 - alpha_bars_next
    sqrt_alpha_bars: Table
    sqrt_beta_bars: Table
    log_betas: Table
    posterior_x0_weight: Table  # mean of q(x_{t-1} | x_t, x_0) = posterior_x0_weight x_0 + posterior_x_t_weight x_t
    posterior_x_t_weight: Table
    posterior_variance: Table  # beta-tilde_t; entry 0 is 0
    posterior_log_variance: Table  # log beta-tilde_t; entry 0 is entry 1, since log 0 has no use
    flow_x0_weight: Table  # on the probability flow of one x_0: x_{t-1} = flow_x0_weight x_0 + flow_x_t_weight x_t
    flow_x_t_weight: Table
    log_snr_ratio: Table  # 1/2 the step in log-SNR from t to t-1, over that from t+1 to t; the two ends are 0

    @property
    def num_steps(self) -> int:
        """The length n of the chain."""
        return self.betas.shape[0]


def make_schedule(name: str, num_timesteps: int) -> NoiseSchedule:
    """Makes the full chain of `num_timesteps` steps.

    "cosine": improved DDPM (arXiv 2102.09672, eq. 17), beta capped at 0.999.
    "linear": DDPM's 1e-4 to 0.02, scaled by 1000 / num_timesteps so that a chain of any length ends in noise.
    Raises ValueError for an unknown name or a length that the schedule cannot have.
    """
    if num_timesteps < 1:
        raise ValueError(f"a noise schedule of {num_timesteps} steps: expected at least 1")
    if name == "cosine":
        u = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
        f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    elif name == "linear":
        scale = 1000 / num_timesteps
        if 0.02 * scale >= 1:
            raise ValueError(f"a linear noise schedule of {num_timesteps} steps: expected at least 21, or use 'cosine'")
        betas = np.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=np.float64)
    else:
        raise ValueError(f"unknown noise schedule {name!r}: expected one of {', '.join(SCHEDULES)}")
    return _tables(betas, np.arange(num_timesteps))


def respace(schedule: NoiseSchedule, spec: str) -> NoiseSchedule:
    """Makes the chain that visits only some steps of `schedule`, whose noise levels stay as they were.

    `spec` is one of
      "n1,n2,...": the chain cut into equal sections, n1 steps spread evenly over the first (least noisy), and so on;
      "n": n steps spread evenly over the whole chain, both ends included (n = 1 keeps the noisiest step alone);
      "k/n": the k least noisy of those n, such as "249/250", by which DDIM runs to and fro (arXiv 2105.05233, app. F);
      "ddimN": N steps with a constant integer stride from step 0 (which stops short of the noisiest step);
      "fast27": GLIDE's "10,10,3,2,2" with the noisiest step replaced by the one two before it;
      "logsnrN": N steps spread evenly over the log-SNR, log sqrt(alpha_bar / beta_bar), from LEAST_LOG_SNR or the
          noisiest step to step 0: for solvers such as DPM-Solver++ (arXiv 2206.00927, section 3.3).
    New betas are 1 - alpha_bar_k / alpha_bar_{k-1} over the kept steps, and every other table follows from them
    (guided-diffusion's respacing). Raises ValueError when the chain has no such steps.
    """
    even = re.fullmatch(r"logsnr(\d+)", spec)
    kept = _even_steps(schedule, int(even[1])) if even else np.array(_kept_steps(schedule.num_steps, spec))
    alpha_bars = np.asarray(schedule.alpha_bars, np.float64)[kept]
    betas = 1 - alpha_bars / np.concatenate([[1.0], alpha_bars[:-1]])
    return _tables(betas, np.asarray(schedule.timesteps)[kept])


def respacing(sampler: str, steps: str) -> str:
    """Names the respacing by which a sampler takes `steps`: of "dpm++", a number is spread evenly over the log-SNR."""
    return f"logsnr{steps}" if sampler == "dpm++" and steps.isdecimal() else steps


def first_steps(schedule: NoiseSchedule, count: int) -> NoiseSchedule:
    """Keeps the `count` least noisy steps: the chain that denoises a picture noised up to the last of them."""
    return NoiseSchedule(*(table[:count] for table in schedule))


def table_at(table: Table, t: StepIndices, like: Shaped[Array, " B *dims"]) -> Float32[Array, "..."]:
    """table[t], shaped to broadcast against `like`: () for a shared t, (B, 1, ..., 1) for one per row."""
    values = jnp.asarray(table, jnp.float32)[t]
    return values.reshape(values.shape + (1,) * (like.ndim - 1)) if values.ndim else values


def _tables(betas: np.ndarray, timesteps: np.ndarray) -> NoiseSchedule:
    alpha_bars = np.cumprod(1 - betas)
    alpha_bars_prev = np.concatenate([[1.0], alpha_bars[:-1]])
    alpha_bars_next = np.concatenate([alpha_bars[1:], [0.0]])
    beta_bars, beta_bars_prev = 1 - alpha_bars, 1 - alpha_bars_prev
    posterior_variance = betas * beta_bars_prev / beta_bars
    # A chain of one step has no entry 1 to borrow; its only step adds no noise, so any finite number will do.
    clipped = np.concatenate([posterior_variance[1:2], posterior_variance[1:]]) if len(betas) > 1 else betas
    return NoiseSchedule(
        betas=betas,
        timesteps=timesteps.astype(np.int32),
        alpha_bars=alpha_bars,
        alpha_bars_prev=alpha_bars_prev,
        alpha_bars_next=alpha_bars_next,
        beta_bars=beta_bars,
        beta_bars_prev=beta_bars_prev,
        beta_bars_next=1 - alpha_bars_next,
        sqrt_alpha_bars=np.sqrt(alpha_bars),
        sqrt_beta_bars=np.sqrt(beta_bars),
        log_betas=np.log(betas),
        posterior_x0_weight=np.sqrt(alpha_bars_prev) * betas / beta_bars,
        posterior_x_t_weight=np.sqrt(1 - betas) * beta_bars_prev / beta_bars,
        posterior_variance=posterior_variance,
        posterior_log_variance=np.log(clipped),
        flow_x0_weight=np.sqrt(alpha_bars_prev) - np.sqrt(alpha_bars * beta_bars_prev / beta_bars),
        flow_x_t_weight=np.sqrt(beta_bars_prev / beta_bars),
        log_snr_ratio=_log_snr_ratio(alpha_bars, beta_bars),
    )


def _log_snr(alpha_bars: np.ndarray, beta_bars: np.ndarray) -> np.ndarray:
    """Computes the log-SNR, which falls from step to step."""
    return 0.5 * np.log(alpha_bars / beta_bars)


def _log_snr_ratio(alpha_bars: np.ndarray, beta_bars: np.ndarray) -> np.ndarray:
    log_snr = _log_snr(alpha_bars, beta_bars)
    lengths = log_snr[:-1] - log_snr[1:]  # of the step down to t, from t + 1
    ratio = np.zeros(len(alpha_bars))
    ratio[1:-1] = 0.5 * lengths[:-1] / lengths[1:]
    return ratio


def _kept_steps(length: int, spec: str) -> list[int]:
    if spec == "fast27":
        return [*_kept_steps(length, "10,10,3,2,2")[:-1], length - 3]
    if re.fullmatch(r"ddim\d+", spec):
        return _strided_steps(length, int(spec.removeprefix("ddim")))
    if re.fullmatch(r"\d+/\d+", spec):
        first, count = map(int, spec.split("/"))
        if not 1 <= first <= count:
            raise ValueError(f"respacing {spec!r}: expected at least 1 step and at most the {count} there are")
        return _kept_steps(length, str(count))[:first]
    if not re.fullmatch(r"\d+(,\d+)*", spec):
        raise ValueError(f"respacing {spec!r}: expected a number of steps like '64', numbers per section like "
                         "'10,10,3,2,2', the least noisy of a number like '249/250', 'ddim25', 'logsnr20', or 'fast27'")
    counts = [int(count) for count in spec.split(",")]
    return [length - 1] if counts == [1] else _section_steps(length, counts)


def _even_steps(schedule: NoiseSchedule, count: int) -> np.ndarray:
    """Finds different steps whose log-SNR is nearest to evenly spaced values."""
    if not 2 <= count <= schedule.num_steps:
        raise ValueError(f"respacing 'logsnr{count}': expected 2 to {schedule.num_steps} steps")
    log_snr = _log_snr(np.asarray(schedule.alpha_bars, np.float64), np.asarray(schedule.beta_bars, np.float64))
    wanted = np.linspace(log_snr[0], max(log_snr[-1], LEAST_LOG_SNR), count)
    nearest = np.abs(log_snr[None] - wanted[:, None]).argmin(axis=1)
    for k in range(1, count):  # where values lie closer together than steps
        nearest[k] = max(nearest[k], nearest[k - 1] + 1)
    for k in range(count - 1, -1, -1):
        nearest[k] = min(nearest[k], schedule.num_steps - count + k)
    return nearest


def _strided_steps(length: int, count: int) -> list[int]:
    for stride in range(1, length + 1):
        if len(range(0, length, stride)) == count:
            return list(range(0, length, stride))
    raise ValueError(f"respacing 'ddim{count}': no integer stride takes {count} of {length} steps; use '{count}'")


def _section_steps(length: int, counts: list[int]) -> list[int]:
    short, longer = divmod(length, len(counts))
    kept, start = [], 0
    for section, count in enumerate(counts):
        size = short + (section < longer)
        if not 1 <= count <= size:
            spec = ",".join(map(str, counts))
            raise ValueError(f"respacing {spec!r} of {length} steps: expected between 1 and {size} in section "
                             f"{section + 1}, not {count}")
        stride = (size - 1) / (count - 1) if count > 1 else 1
        # The sum runs on as in the reference: k * stride rounds to another step now and then.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return kept
