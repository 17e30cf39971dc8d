"""Precision, recall, density and coverage: do the pictures drawn lie among the reference, and it among them?

Around each picture of a set there is a ball that reaches to its k-th nearest neighbour in the set, in feature space.

    precision   share of the pictures drawn that lie in some ball of the reference            arXiv 1904.06991
    recall      share of the reference that lies in some ball of the pictures drawn
    density     balls of the reference that a picture drawn lies in, on average, over k       arXiv 2002.09797
    coverage    share of the reference in whose own ball a picture drawn lies

All depend on both sets' sizes: compare them at the same alone. Distances are of float32, squared; guided-diffusion's of
float16, and a picture on a ball's border counts, as there. (The original metric's features are VGG-16's.)
"""

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.evaluation.devices import OnDevices
from unclip_jax.evaluation.intervals import Result, bootstrap, wilson

ROWS = 1024  # that each device compares at once
COLUMNS = 4096  # to so many


def precision_recall(
    pictures: np.ndarray, reference: np.ndarray, k: int = 3, devices: list[jax.Device] | None = None
) -> dict[str, Result]:
    """The four measures by name, of pooled features (n, d) and (m, d); at no time is there a matrix of all distances.

    Intervals are Wilson's, of density a bootstrap's, over the rows that are counted: of recall and coverage the
    reference's. Balls are taken as they are. Raises UserError where a set has no more than k rows.
    """
    if min(len(pictures), len(reference)) <= k:
        raise UserError(f"{len(pictures)} pictures, {len(reference)} of the reference: expected more than k = {k} each")
    # Distances stay the same; about the mean, less is lost to rounding.
    centre = reference.mean(axis=0, dtype=np.float64)
    drawn, known = ((rows - centre).astype(np.float32) for rows in (pictures, reference))
    drawn_radii, known_radii = (_neighbours(rows, rows, k + 1, devices)[:, k] for rows in (drawn, known))
    balls = _balls_around(drawn, known, known_radii, devices)
    found = _balls_around(known, drawn, drawn_radii, devices) > 0
    covered = _neighbours(known, drawn, 1, devices)[:, 0] <= known_radii

    def result(name, values, interval, kind):
        card = {"k": k, "pictures": {"n": len(drawn)}, "reference": {"n": len(known)}, "interval": kind}
        return Result(name, float(values.mean()), *interval, len(values), card)

    def share(name, hits, over):
        return result(name, hits, wilson(int(hits.sum()), len(hits)), f"Wilson's over the {over}, balls as they are")

    density = result("density", balls / k, bootstrap(balls / k), "bootstrap over the pictures, balls as they are")
    shares = ("precision", balls > 0, "pictures"), ("recall", found, "reference"), ("coverage", covered, "reference")
    return {"density": density} | {name: share(name, hits, over) for name, hits, over in shares}


def _neighbours(rows: np.ndarray, columns: np.ndarray, count: int, devices) -> np.ndarray:
    """Squared distances to the nearest columns, (n, count), the nearest first; a row that is a column is its own."""

    def nearest(blocks, rows):
        def step(kept, block):
            both = jnp.concatenate([kept, _squared_distances(rows, *block)], axis=1)
            return -jax.lax.top_k(-both, count)[0], None

        return jax.lax.scan(step, jnp.full((len(rows), count), jnp.inf), blocks)[0]

    return _over(rows, nearest, _blocks(columns), devices)


def _balls_around(rows: np.ndarray, columns: np.ndarray, radii: np.ndarray, devices) -> np.ndarray:
    """Counts the columns' balls, of squared radii, that each row lies in: int32 (n,)."""

    def count(blocks, rows):
        def step(total, block):
            *block, radii = block
            inside = _squared_distances(rows, *block) <= radii[None]
            return total + jnp.sum(inside, axis=1, dtype=jnp.int32), None

        return jax.lax.scan(step, jnp.zeros(len(rows), jnp.int32), blocks)[0]

    return _over(rows, count, _blocks(columns, radii), devices)


def _over(rows: np.ndarray, function, blocks: tuple, devices) -> np.ndarray:
    size = min(ROWS, -(-len(rows) // len(devices or jax.local_devices())))
    return np.concatenate(list(OnDevices(function, blocks, size, devices)([rows])))


def _blocks(columns: np.ndarray, *more: np.ndarray) -> tuple[np.ndarray, ...]:
    """Columns, their squared lengths, and what else there is of each, in blocks of equal size: (blocks, size, ...).
    Those that fill up the last block are infinitely far away."""
    size = min(COLUMNS, len(columns))
    fill = -len(columns) % size
    parts = [(columns, 0), (np.square(columns).sum(axis=1), np.inf), *((array, 0) for array in more)]
    filled = (np.concatenate([part, np.full((fill, *part.shape[1:]), value, np.float32)]) for part, value in parts)
    return tuple(part.reshape(-1, size, *part.shape[1:]) for part in filled)


def _squared_distances(rows, columns, lengths):
    """(n, d), (m, d) and the columns' squared lengths → (n, m)."""
    own = jnp.sum(jnp.square(rows), axis=1)
    return jnp.maximum(own[:, None] - 2 * rows @ columns.T + lengths[None], 0)
