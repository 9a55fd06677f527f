"""The API of the DEIS paper's reference implementation for PyTorch; see `deis.reference`."""

from deis.reference import VPSDE, DiscreteVPSDE, get_cos_alpha_fns, get_linear_alpha_fns, get_sampler

__all__ = ["VPSDE", "DiscreteVPSDE", "get_cos_alpha_fns", "get_linear_alpha_fns", "get_sampler"]
