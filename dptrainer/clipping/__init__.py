"""Per-example clipping: from a batch to a :class:`~dptrainer.values.ClippedSum`."""

from dptrainer.clipping.bookkeeping import BookKeeping
from dptrainer.clipping.engine import ClippingEngine, Reduction, add_clipped, clip_factors
from dptrainer.clipping.factory import make_engine, self_test
from dptrainer.clipping.grouping import Grouping
from dptrainer.clipping.guard import buffer_guard
from dptrainer.clipping.one_by_one import OneByOne
from dptrainer.clipping.per_example import PerExample
from dptrainer.clipping.policy import Clipping, FlatClipping, NormalisedClipping, PerLayerClipping
from dptrainer.clipping.quantile import QuantileClipping
from dptrainer.clipping.rules import LayerCall, rule
from dptrainer.clipping.scheduled import ScheduledClipping
from dptrainer.clipping.vmap import VmapEngine

__all__ = [
    "BookKeeping",
    "Clipping",
    "ClippingEngine",
    "FlatClipping",
    "Grouping",
    "LayerCall",
    "NormalisedClipping",
    "OneByOne",
    "PerExample",
    "PerLayerClipping",
    "QuantileClipping",
    "Reduction",
    "ScheduledClipping",
    "VmapEngine",
    "add_clipped",
    "buffer_guard",
    "clip_factors",
    "make_engine",
    "rule",
    "self_test",
]
