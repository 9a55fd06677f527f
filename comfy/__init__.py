"""deis in ComfyUI: copy this folder into ComfyUI/custom_nodes, and `pip install deis-samplers[torch]` into its Python.

It adds the samplers below to every list of samplers, each computed on the noise levels that the scheduler gives and in the model's
own schedule, and a node that loads a plan, such as a calibrated one.
"""

import importlib
from functools import partial

import deis
from deis.adapters.k_diffusion import sample_deis, sigmas_of

SAMPLERS = {
    "deis_auto": "auto",
    "deis_tab2": "tab2",
    "deis_tab3": "tab3",
    "deis_rhoab2": "rhoab2",
    "deis_abm2": "deis_abm2",
    "deis_ipndm3": "ipndm3",
    "deis_unipc2": "unipc2",
    "deis_unipc3": "unipc3",
    "deis_dpmpp_2m_exact": "dpmpp_2m",
    "deis_dpmpp_3m_exact": "dpmpp_3m",
    "deis_ancestral": "ancestral",
    "deis_sde_dpmpp_2m": "sde_dpmpp_2m",
}


def register():
    """Add the samplers to ComfyUI's lists, behind those that are there."""
    samplers = importlib.import_module("comfy.samplers")
    sampling = importlib.import_module("comfy.k_diffusion.sampling")
    for name, method in SAMPLERS.items():
        setattr(sampling, f"sample_{name}", partial(sample_deis, method=method))
        for names in (samplers.KSAMPLER_NAMES, samplers.SAMPLER_NAMES, samplers.KSampler.SAMPLERS):
            if name not in names:
                names.append(name)


class LoadDeisPlan:
    """A sampler and its noise levels from a plan file, for SamplerCustom."""

    CATEGORY = "sampling/custom_sampling/samplers"
    RETURN_TYPES = ("SAMPLER", "SIGMAS")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 (ComfyUI's name)
        return {"required": {"path": ("STRING", {"default": "plan.json"})}}

    def load(self, path):
        """Return the sampler of the plan, and its noise levels."""
        plan = deis.load_plan(path)
        samplers = importlib.import_module("comfy.samplers")
        return samplers.KSAMPLER(partial(sample_deis, plan=plan)), sigmas_of(plan)


register()
NODE_CLASS_MAPPINGS = {"LoadDeisPlan": LoadDeisPlan}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadDeisPlan": "Load DEIS plan"}
