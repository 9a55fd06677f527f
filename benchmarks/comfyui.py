"""Samplers in ComfyUI itself, on the digits of the bundled MNIST model: a table of errors, and the picture of the folder comfy.

DEIS_COMFYUI=.../ComfyUI python -m benchmarks.comfyui
DEIS_COMFYUI=.../ComfyUI python -m benchmarks.comfyui --picture comfy/picture.png

ComfyUI runs its own and our samplers from the same noise, with an EPS model of a linear table of betas around the network, whose
time is that of the noise level. The error is the median over 20 samples of the root mean square distance to 100 steps of
`deis_tab3` with the scheduler "karras", data in [-1, 1]; the picture has ten digits at six steps with "simple".
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import deis

NODES = Path(__file__).parents[1] / "comfy"
THEIRS = ("euler", "dpmpp_2m", "deis", "uni_pc")
OURS = ("deis_auto", "deis_arctan2", "deis_tab3", "deis_unipc2", "deis_unipc3")
CONDITIONING = [[torch.zeros(1, 1, 8), {}]]


class AnyName(ModuleType):
    """Stands in for a package that ComfyUI imports, and that sampling does not use; it has whatever name is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class MissingPackages(MetaPathFinder, Loader):
    """Finds the modules of packages that are not installed, and loads each as an `AnyName`."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] in self.packages else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return AnyName(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def find_program(root: str) -> None:
    """Let ComfyUI's modules be imported, on the CPU."""
    importlib.import_module("transformers").CLIPTokenizer  # noqa: B018 (it looks for torchvision, once)
    sys.meta_path.append(MissingPackages(("torchvision", "torchaudio")))  # after the finder of those that are installed
    # The checkout's comfy has no __init__.py: from anywhere on the path the folder of nodes would be found before it.
    sys.path[:] = [root, *(path for path in sys.path if Path(path).resolve() != NODES.parent)]
    for name in [name for name in sys.modules if name.partition(".")[0] in ("comfy", "utils", "nodes")]:
        del sys.modules[name]
    importlib.import_module("comfy.cli_args").args.cpu = True


def load_program(root: str) -> Any:
    """Return ComfyUI's modules, with the folder of nodes loaded by its own loader."""
    find_program(root)
    names = ("samplers", "sample", "model_base", "model_patcher", "model_sampling", "supported_models_base", "latent_formats")
    modules = {name: importlib.import_module(f"comfy.{name}") for name in names}
    extras = {name: importlib.import_module(f"comfy_extras.nodes_{name}") for name in ("model_advanced", "custom_sampler")}
    nodes, execution = importlib.import_module("nodes"), importlib.import_module("execution")
    for path in (*(str(extra.__file__) for extra in extras.values()), str(NODES)):
        if not asyncio.run(nodes.load_custom_node(path)):
            raise RuntimeError(f"ComfyUI cannot load {path}; its log says why")
    ours = sys.modules[str(NODES).replace(".", "_x_")]
    return SimpleNamespace(
        **modules, **extras, nodes=nodes, execution=execution, folders=importlib.import_module("folder_paths"), ours=ours
    )


def patcher_of(program: Any, kind: str, settings: dict[str, Any]) -> Any:
    """Return a ModelPatcher of a ModelType around no network yet."""
    config = program.supported_models_base.BASE({"disable_unet_model_creation": True})
    config.sampling_settings = dict(settings)
    config.latent_format = program.latent_formats.SD15()
    config.latent_format.scale_factor = 1.0
    model = program.model_base.BaseModel(config, program.model_base.ModelType[kind])
    cpu = torch.device("cpu")
    return program.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


class Digits(torch.nn.Module):
    """The bundled MNIST model, behind the scaling of an EPS model."""

    dtype = torch.float32

    def __init__(self, num: int) -> None:
        super().__init__()
        self.network = deis.load_model()
        self.denoiser = self.network.conditional(np.arange(num) % 10)

    def forward(self, x_in: Tensor, t: Tensor, transformer_options: Any = None, **others: Any) -> Tensor:
        rho, sde = float(transformer_options["sigmas"][0]), self.network.sde
        time = float(np.clip(sde.t_of_rho(rho), sde.t_end, sde.t_start))
        x = x_in * (1 + rho**2) ** 0.5
        with torch.no_grad():
            x_0 = self.denoiser.predict(float(sde.alpha(time)) * x, time, "x0")
        return (x - x_0) / rho


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, help="write the picture here, in place of the table")
    args = parser.parse_args()
    if "DEIS_COMFYUI" not in os.environ:
        sys.exit("DEIS_COMFYUI names no checkout of ComfyUI; set it to one")
    num = 20 if args.picture is None else 10
    network = Digits(num)
    program = load_program(os.environ["DEIS_COMFYUI"])
    patcher = patcher_of(program, "EPS", {"beta_schedule": "linear", "linear_start": 1e-4, "linear_end": 0.02})
    patcher.model.diffusion_model = network

    def run(sampler: str, scheduler: str, steps: int) -> Tensor:
        latent = torch.zeros(num, *network.network.shape)
        noise = program.sample.prepare_noise(latent, 7)
        end: Tensor = program.sample.sample(
            patcher, noise, steps, 1.0, sampler, scheduler, CONDITIONING, CONDITIONING, latent, seed=7, disable_pbar=True
        )
        return end

    converged = run("deis_tab3", "karras", 100)
    if args.picture is not None:
        samplers = (*THEIRS, "deis_auto")
        draw({name: run(name, "simple", 6) for name in samplers} | {"converged": converged}, args.picture)
        return
    print("| steps | scheduler | " + " | ".join(f"`{name}`" for name in (*THEIRS, *OURS)) + " |")
    print("|---|---|" + "---|" * len((*THEIRS, *OURS)))
    for steps in (6, 10):
        for scheduler in ("normal", "simple", "karras", "beta", "deis"):
            ends = (run(name, scheduler, steps) for name in (*THEIRS, *OURS))
            errors = [float((end - converged).square().mean((1, 2, 3)).sqrt().median()) for end in ends]
            print(f"| {steps} | {scheduler} | " + " | ".join(f"{error:.3f}" for error in errors) + " |", flush=True)


def draw(rows: dict[str, Tensor], path: Path, size: int = 56) -> None:
    """Write a picture of digits, a row for each sampler."""
    width = size + 2
    sheet = Image.new("L", (110 + width * len(next(iter(rows.values()))), width * len(rows)), 255)
    text = ImageDraw.Draw(sheet)
    for j, (name, digits) in enumerate(rows.items()):
        text.text((6, j * width + 22), name, fill=0)
        for i, digit in enumerate(((digits[:, 0].clamp(-1, 1) + 1) * 127.5).byte().numpy()):
            sheet.paste(Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC), (110 + i * width, j * width + 1))
    sheet.save(path, optimize=True)


if __name__ == "__main__":
    main()
