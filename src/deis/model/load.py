"""`deis.load_model`: a trained network from a file, a folder or the hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, overload

from ..arguments import kind, one_of
from .checkpoints.torch_files import DTYPES, StrPath
from .folder import BUNDLED, embedded, load_folder
from .pretrained import Pretrained

_HUB = re.compile(r"[\w.-]+/[\w.-]+(?<!\.pth)(?<!\.pt)(?<!\.ckpt)(?<!\.safetensors)(?<!\.onnx)(?<!\.pkl)")


@overload
def load_model(spec: None = None, backend: str = "torch", device: str | None = None, dtype: str = "float32") -> Pretrained: ...
@overload
def load_model(spec: StrPath, backend: str = "torch", device: str | None = None, dtype: str = "float32", **options: Any) -> Any: ...


def load_model(
    spec: StrPath | None = None, backend: str = "torch", device: str | None = None, dtype: str = "float32", **options: Any
) -> Any:
    """Load a trained network; the content of spec decides which loader reads it.

    Parameters
    ----------
    spec : path or str, optional
        Without it, the class-conditional MNIST network that ships with the library. Otherwise

        - "mnist", the same, or "mnist-blurring", one of `deis.Blurring`, which ships, too;
        - a folder with a `deis.json`, as `training/train_mnist.py` writes it: `deis.model.folder.load_folder`;
        - a folder with a `model_index.json`, or the name on the hub, such as "google/ddpm-cifar10-32", of a diffusers pipeline,
          Stable Diffusion's included: `deis.model.checkpoints.pipelines.load_pipeline`;
        - a checkpoint of the code base of DDIM or PNDM: `deis.model.checkpoints.ddim_unet.load_ddim`;
        - one of Song et al.'s score SDEs, of PyTorch or Flax: `deis.model.checkpoints.score_sde.load_score_sde`;
        - one of CLD-SGM or gDDIM, with sde="cld" or "blurring": `deis.model.checkpoints.linear_sdes.load_linear_sde`;
        - one of EDM, as safetensors, state dict or, with allow_pickle=True, pickle: `deis.model.checkpoints.edm.load_edm`;
        - a network in ONNX: `deis.model.checkpoints.onnx_file.load_onnx`.
    backend : {"torch", "jax"}
        JAX runs folders with a `deis.json` and the bundled MNIST model.
    device : str, optional
        Such as "cuda"; torch and ONNX only.
    dtype : {"float32", "float64"}
        The precision of the weights, and of the x that the model takes. JAX has float64 if x64 is on; ONNX keeps that of the file.
    **options
        What a file does not say, for the loader of its format, which documents them: `sde="ve"`, `size=`, `config=`,
        `preconditioning=`, `allow_pickle=`, `beta=`, `mixed=`, `blur=`.

    Returns
    -------
    Pretrained
        The unconditional model itself, and a `deis.Denoiser` of its `conditional`. For a folder whose `deis.json` names a linear
        SDE, such as "cld" or "blurring", a `PretrainedLinear`, and a `deis.LinearDenoiser`.

    Raises
    ------
    FileNotFoundError
        If spec is neither a file or folder nor looks like a name on the hub, or a folder lacks a file.
    ImportError
        If a package that the format needs is not installed; the message names its extra.
    TypeError
        For an option that the format does not have.
    ValueError
        For an unknown backend or dtype, a file of no known format, or one that is not what it looks like; the message names the
        first key that differs.
    """
    one_of("backend", backend, ("torch", "jax"))
    one_of("dtype", dtype, DTYPES)
    if spec is not None:
        kind("spec", spec, (str, os.PathLike), "the name of a file, a folder or a pipeline on the hub,")
    name: StrPath = BUNDLED[0] if spec is None else spec
    bundled = spec is None or (name in BUNDLED and not Path(name).exists())
    if bundled or (Path(name).is_dir() and not (Path(name) / "model_index.json").exists()):
        if options:
            raise TypeError(f"a model folder takes no option {next(iter(options))!r}: its deis.json says how it was trained")
        return embedded(os.fspath(name), backend, device, dtype) if bundled else load_folder(name, backend, device, dtype)
    if backend != "torch":
        raise ValueError(f"backend={backend!r} runs folders with a deis.json; spec={os.fspath(name)!r} needs backend='torch'")
    return _loader(name)(name, device=device, dtype=dtype, **options)


def read_options(texts: Iterable[str]) -> dict[str, Any]:
    """Return the options of `load_model` in texts of the form NAME=VALUE, with VALUE in JSON where it can be read as such.

    Raises
    ------
    ValueError
        For a text of another form.
    """
    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"option {text!r} must be NAME=VALUE, such as sde=ve")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def _loader(spec: StrPath) -> Callable[..., Any]:
    """Return the loader for a pipeline or file."""
    from .checkpoints import edm, onnx_file, pipelines

    path = Path(spec)
    if path.is_dir():
        return pipelines.load_pipeline
    if not path.exists():
        if _HUB.fullmatch(os.fspath(spec)):
            return pipelines.load_pipeline
        raise FileNotFoundError(f"spec={os.fspath(spec)!r} is no file or folder, nor a name on the hub such as 'owner/name'")
    if path.suffix == ".onnx":
        return lambda path, device, dtype, **options: onnx_file.load_onnx(path, device, **options)  # the file has its own precision
    return edm.load_edm if path.suffix == ".pkl" else _load_weights


def _load_weights(path: StrPath, device: str | None, dtype: str, **options: Any) -> Any:
    """Load a file of weights by its keys."""
    from .checkpoints import ddim_unet, edm, flax_files, linear_sdes, score_sde, torch_files

    saved = flax_files.read(path) if flax_files.is_flax(path) else torch_files.read(path)
    if options.get("sde") in linear_sdes.SDES:  # such a file looks like one of score SDEs
        return linear_sdes.of_saved(saved, path, device, dtype, **options)
    for code_base in (ddim_unet, score_sde, edm):
        if code_base.recognises(saved):
            return code_base.of_saved(saved, path, device, dtype, **options)
    keys = list(saved)[:3] if isinstance(saved, dict) else type(saved).__name__
    raise ValueError(
        f"path={os.fspath(path)!r} has no known format: it holds {keys}, and 'temb.dense.0.weight' (DDIM, PNDM), 'model' and "
        "'ema' or 'params_ema' (score SDEs) or 'model.map_layer0.weight' (EDM) were looked for; give a network to deis.Denoiser"
    )
