"""How often latents fire, as a histogram that is kept while they are trained."""

from typing import Any

import numpy as np
from jaxtyping import Float

MOMENTS = 20  # of a training at which it is taken
LOWEST, BINS_PER_DECADE = -6, 4  # log10 of the firing frequency, in latents per row
EDGES = np.linspace(LOWEST, 0, -LOWEST * BINS_PER_DECADE + 1)


def density(frequency_F: Float[np.ndarray, " F"]) -> dict[str, Any]:
    """Histogram of log10 of the frequencies (shares of rows, 0 to 1); ``rarer`` counts those below the first bin."""
    frequency_F = np.asarray(frequency_F, np.float64)
    exponents = np.log10(frequency_F[frequency_F >= 10.0**LOWEST])
    counts = np.histogram(np.clip(exponents, LOWEST, 0.0), EDGES)[0]
    return {
        "edges": EDGES.tolist(),
        "counts": counts.tolist(),
        "rarer": int(len(frequency_F) - len(exponents)),
    }


def is_moment(step: int, looked: int, total_steps: int) -> bool:
    """Whether one of the moments lies after step ``looked`` and not after ``step``."""
    return step * MOMENTS // total_steps > looked * MOMENTS // total_steps
