"""The API of the DEIS paper's reference implementation for JAX; see `deis.reference`."""

from deis.reference import VPSDE, get_cos_alpha_fns, get_linear_alpha_fns, get_sampler
from deis.reference import IntegerVPSDE as DiscreteVPSDE

__all__ = ["VPSDE", "DiscreteVPSDE", "get_cos_alpha_fns", "get_linear_alpha_fns", "get_sampler"]
