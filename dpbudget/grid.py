"""The integer grid of ``exact`` noise, a function of what the plan states and of nothing else.

Every record's clipped gradient becomes an integer vector v of squared length at most ``bound``, in units of
``sigma C / 2^log2_width``; the sum of all v gets a rounded Gaussian of ``2^log2_width`` units a coordinate. Width over
length is at least the noise multiplier, in exact arithmetic (docs/exact.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

#: The smallest and the largest width. 2^10 keeps small models precise. Beyond 2^40, which only a noise multiplier above
#: 500 for a model of 2^40 parameters would ask for, the sampler would have to look at more bits of every value.
MIN_LOG2_WIDTH, MAX_LOG2_WIDTH = 10, 40
#: A record's vector of length C is at least so many units, times the root of the number of parameters: truncation
#: towards zero then takes at most a 64th of its length.
RESOLUTION = 64


@dataclass(frozen=True)
class Grid:
    """Unit, bound and width of one phase.

    Attributes:
        log2_width: the noise has the standard deviation 2^log2_width units.
        bound: largest squared length of a record's integer vector, floor((2^log2_width / sigma)^2).
        noise_multiplier: sigma.
    """

    log2_width: int
    bound: int
    noise_multiplier: float

    def unit(self, clip_norm: float) -> float:
        """The length of one unit for gradients that are clipped to ``clip_norm``, rounded to float64."""
        return self.noise_multiplier * clip_norm * 2.0**-self.log2_width


def grid_for(noise_multiplier: float, max_parameters: int) -> Grid:
    """The grid of a phase: the smallest power of two of at least 64 sigma sqrt(max_parameters) units of noise.

    It stays within 2^10 and 2^40; a grid that is coarser than asked for costs precision and no privacy.

    Guarantee: ``4**log2_width >= bound * sigma**2`` as real numbers, so that noise and longest vector have a ratio of
    at least the noise multiplier.

    Args:
        noise_multiplier: sigma > 0.
        max_parameters: the plan's, at least 1.
    """
    square = Fraction(noise_multiplier) ** 2
    least = RESOLUTION**2 * square * max_parameters  # of the squared width
    root = ((math.ceil(least) - 1).bit_length() + 1) // 2
    log2_width = min(max(MIN_LOG2_WIDTH, root), MAX_LOG2_WIDTH)
    return Grid(log2_width, math.floor(Fraction(4) ** log2_width / square), noise_multiplier)
