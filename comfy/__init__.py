"""deis in ComfyUI: samplers and a scheduler in every list of them, and a node that loads a plan.

README.md says how to install it.
"""

import hashlib
import importlib
from functools import partial
from pathlib import Path

import torch

import deis
from deis.adapters.k_diffusion import sample_deis, sigmas_of, sigmas_of_auto
from deis.methods.any_levels import adams_on_any_levels

SAMPLERS = {
    # The best on a trained network of all that beat euler, deis, dpmpp_2m and uni_pc on a Gaussian: benchmarks/comfyui.py.
    # The method "auto" of the library is chosen for noise levels of its own.
    "deis_auto": adams_on_any_levels("data", "vp_t", 2, 2, most=2.0, name="deis_auto"),
    "deis_arctan2": adams_on_any_levels("eps", "arctan_rho", 2, name="deis_arctan2"),
    "deis_tab2": adams_on_any_levels("eps", "t", 2, name="deis_tab2"),
    "deis_tab3": adams_on_any_levels("eps", "t", 3, name="deis_tab3"),
    "deis_rhoab2": adams_on_any_levels("eps", "rho", 2, name="deis_rhoab2"),
    "deis_abm2": adams_on_any_levels("data", "t", 2, 3, name="deis_abm2"),
    "deis_ipndm3": "ipndm3",
    "deis_unipc2": adams_on_any_levels("data", "log_rho", 1, 2, most=2.0, name="deis_unipc2"),
    "deis_unipc3": adams_on_any_levels("data", "log_rho", 2, 3, most=2.0, name="deis_unipc3"),
    "deis_dpmpp_2m_exact": "dpmpp_2m",
    "deis_dpmpp_3m_exact": "dpmpp_3m",
    "deis_ancestral": "ancestral",
    "deis_sde_dpmpp_2m": adams_on_any_levels("data", "log_rho", 1, tau=1.0, most=1.25, name="deis_sde_dpmpp_2m"),
}


SCHEDULER = "deis"
FOLDER = "deis_plans"


def named(name, **options):
    """Return `sample_deis` with some options as a sampler with its own name, which ComfyUI logs from 0.29 on."""
    sampler = partial(sample_deis, **options)
    sampler.__name__ = name
    return sampler


def register():
    """Add the samplers and the scheduler to ComfyUI's lists, after the existing ones, and the folder of plans to its models."""
    samplers = importlib.import_module("comfy.samplers")
    sampling = importlib.import_module("comfy.k_diffusion.sampling")
    folders = importlib.import_module("folder_paths")
    for name, method in SAMPLERS.items():
        setattr(sampling, f"sample_{name}", named(f"sample_{name}", method=method))
        for names in (samplers.KSAMPLER_NAMES, samplers.SAMPLER_NAMES, samplers.KSampler.SAMPLERS):
            if name not in names:
                names.append(name)
    samplers.SCHEDULER_HANDLERS[SCHEDULER] = samplers.SchedulerHandler(sigmas_of_auto)
    for names in (samplers.SCHEDULER_NAMES, samplers.KSampler.SCHEDULERS):
        if SCHEDULER not in names:
            names.append(SCHEDULER)
    folders.add_model_folder_path(FOLDER, str(Path(folders.models_dir) / FOLDER))


def find_plan(path):
    """Return the file at this path, in models/deis_plans, or in ComfyUI's input folder."""
    folders = importlib.import_module("folder_paths")
    places = [Path(folder) for folder in (*folders.get_folder_paths(FOLDER), folders.get_input_directory())]
    for file in (Path(path), *(place / path for place in places)):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"there is no plan file {path!r}; give its whole path, or put it into {' or '.join(map(str, places))} "
        "(plan.save('plan.json') writes one)"
    )


class LoadDeisPlan:
    """A sampler and its noise levels from a plan file, for SamplerCustom."""

    CATEGORY = "sampling/custom_sampling/samplers"
    DESCRIPTION = "Load a plan of deis, such as a calibrated one: its sampler, and the noise levels that it runs on."
    RETURN_TYPES = ("SAMPLER", "SIGMAS")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 (ComfyUI's name)
        return {
            "required": {
                "path": ("STRING", {"default": "plan.json", "tooltip": f"A path, or a file in models/{FOLDER} or in input."}),
                "denoise": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "tooltip": "For image-to-image: the share of the steps to run, counted from the end.",
                    },
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, path, denoise=1.0):  # noqa: N802 (ComfyUI's name)
        """Return a value that changes with the file, so that ComfyUI loads it again."""
        return hashlib.sha256(find_plan(path).read_bytes()).hexdigest()

    @classmethod
    def VALIDATE_INPUTS(cls, path):  # noqa: N802 (ComfyUI's name)
        """Return True, or what is wrong with the file, which ComfyUI shows before it runs anything."""
        try:
            deis.load_plan(find_plan(path))
        except (OSError, ValueError) as error:
            return str(error)
        return True

    def load(self, path, denoise=1.0):
        """Return the sampler of the plan, and the noise levels of its last steps."""
        plan = deis.load_plan(find_plan(path))
        samplers = importlib.import_module("comfy.samplers")
        steps = round(plan.num_step * denoise)
        sigmas = sigmas_of(plan)[-(steps + 1) :] if steps else torch.empty(0)
        return samplers.KSAMPLER(named("sample_deis_plan", plan=plan)), sigmas


register()
NODE_CLASS_MAPPINGS = {"LoadDeisPlan": LoadDeisPlan}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadDeisPlan": "Load DEIS plan"}
