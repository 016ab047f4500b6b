"""How far a mean can be trusted."""

import statistics

from scipy import stats


def mean_interval(values: list[float]) -> float:
    """Half of the 95 % interval of their mean, if they are normally distributed; 0 for one value."""
    if len(values) < 2:
        return 0.0
    return stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
