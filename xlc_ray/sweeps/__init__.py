"""Many runs that share a base: which there are, which are cut short, and the frontier that they find. No cluster here."""

from xlc_ray.sweeps.result import Sweep

__all__ = ["Sweep"]
