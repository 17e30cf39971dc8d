"""Numbers that say how many pictures they are of and how sure they are: 95 % intervals."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

SHARE = 0.95  # of the intervals that cover what is measured
Z = 1.959964  # (1 + SHARE) / 2 quantile of the normal distribution
DRAWS = 2000  # of a bootstrap


class Result(NamedTuple):
    """A measured number."""

    name: str
    value: float
    low: float  # ends of its 95 % interval
    high: float
    n: int  # rows that the interval is over: pictures drawn, unless the card says otherwise
    card: dict[str, Any]  # whatever else the number depends on

    def noting(self, **card: Any) -> "Result":
        """Puts more on the card: the sampler, its steps and scales, the features' card."""
        return self._replace(card=self.card | card)

    def __str__(self) -> str:
        return f"{self.name} {self.value:.4g} [{self.low:.4g}, {self.high:.4g}], n = {self.n:,}"


def wilson(hits: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a share, `hits` (or halves) of n independent rows: in [0, 1], not empty for 0 hits or n."""
    share, spread = hits / n, Z**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * np.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def share(name: str, hits: np.ndarray, over: str, **card: Any) -> Result:
    """Share of the rows that are hits, bool (n,), with Wilson's interval. over: the rows, in words."""
    low, high = wilson(int(np.sum(hits)), len(hits))
    return Result(name, float(np.mean(hits)), low, high, len(hits), card | {"interval": f"Wilson's, over the {over}"})


def mean(name: str, values: np.ndarray, over: str, **card: Any) -> Result:
    """Mean of values (n,), with a bootstrap's interval. over: the rows, in words."""
    low, high = bootstrap(values)
    about = card | {"interval": f"bootstrap over the {over}"}
    return Result(name, float(np.mean(values, dtype=np.float64)), low, high, len(values), about)


def at_most(hits: int, n: int) -> float:
    """Clopper–Pearson's upper bound of a share, `hits` of n independent rows: one-sided, and exact.

    A share above it would give so few hits in fewer than 5 % of all samples. For no hits it is 1 - 0.05^(1 / n), about
    3 / n.
    """
    from scipy.special import betaincinv

    return 1.0 if hits == n else float(betaincinv(hits + 1, n - hits, SHARE))


def bootstrap(values: np.ndarray, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Percentiles of the means of so many samples of n of the values (n,), drawn with replacement."""
    rng = np.random.default_rng(seed)
    values = np.asarray(values, np.float64)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    low, high = np.quantile(means, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)


def jackknife(value: float, without: Sequence[float]) -> tuple[float, float]:
    """An interval around what was computed of all rows, by what is computed without each of g groups of them.

    The delete-a-group jackknife: s² = (g - 1) / g Σ (without_i - their mean)², and ±t s with g - 1 degrees of freedom.
    For statistics such as FID, which are smooth and biased alike for all groups: a bootstrap, which repeats rows, would
    move them.
    """
    groups = len(without)
    variance = (groups - 1) / groups * np.square(without - np.mean(without)).sum()
    return around(value, float(np.sqrt(variance)), groups - 1)


def around(value: float, error: float, freedom: int) -> tuple[float, float]:
    """Student's interval of a number whose standard error was estimated with so many degrees of freedom."""
    from scipy.special import stdtrit

    half = float(stdtrit(freedom, (1 + SHARE) / 2)) * error
    return value - half, value + half
