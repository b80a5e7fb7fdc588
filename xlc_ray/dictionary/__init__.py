"""The mathematics of sparse dictionaries: torch only, no cluster, no activations read or written."""

from xlc_ray.dictionary.dictionary import Dictionary
from xlc_ray.dictionary.features import Features
from xlc_ray.dictionary.groups import FeatureGroup
from xlc_ray.dictionary.shards import Shards
from xlc_ray.dictionary.wiring import Wiring

__all__ = ["Dictionary", "FeatureGroup", "Features", "Shards", "Wiring"]
