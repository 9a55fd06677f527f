"""How good the samples of a plan are: their distance to real images, and to the converged solutions from the same noise."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from .arguments import function, kind, whole
from .calibration.network import Model, Network, rmse
from .calibration.teacher import dense_plan
from .extras import needs
from .files import replacing
from .foreign import like, to_numpy
from .methods.step import choose_form
from .plan import Plan
from .run import sample

Array = NDArray[Any]
Extractor = Callable[[Any], Any]
"""Images of shape (n, channels, height, width), a torch.Tensor in [-1, 1], to features of shape (n, d)."""

_NEIGHBOURS = 3  # Kynkaanniemi et al., arXiv 1904.06991
_SUBSET = 1000  # Binkowski et al., arXiv 1801.01401


def evaluate(
    plan: Plan,
    model: Model,
    samples: Any,
    *,
    condition: Any = None,
    extractor: Extractor | None = None,
    real: Array | None = None,
    reference: Array | None = None,
    perceptual: Callable[[Any, Any], Any] | None = None,
    decode: Callable[[Any], Any] | None = None,
    batch: int = 64,
    rng: Any = None,
    folder: str | Path | None = None,
    tag: str = "",
    progress: Any = None,
) -> dict[str, Any]:
    """Sample a plan, and measure the samples.

    Parameters
    ----------
    plan, model, samples, condition, batch
        As for `deis.calibrate`: what runs, on which noise.
    extractor : callable, optional
        images -> features, for the distances to real images; `load_extractor` makes one.
    real : array of shape (m, d), optional
        The features of real images, from the same extractor.
    reference : array of shape (k, ...), optional
        The converged solutions of the first k samples, as `converged` returns them.
    perceptual : callable, optional
        (images, images) -> distances of shape (n,), to be taken to the converged solutions, too; `load_perceptual` makes one.
    decode : callable, optional
        Of a network of latents: samples -> images, for the extractor and the perceptual distance; see `deis.Pretrained`.
    rng : optional
        Random numbers of a stochastic plan, see `deis.sample`.
    folder : path, optional
        Keep each finished batch here, and go on from there; the folder may serve several plans, and with different tags
        several models.
    tag : str
        What the samples and features depend on beside the plan and the noise, such as the model's and the extractor's names.
    progress : optional
        A tqdm bar, or what has its `update(n)`.

    Returns
    -------
    dict
        "method", "grid", "nfe", "samples", "seconds" and "images_per_second" (of the sampling alone); with `reference` the medians
        of "rmse" and "psnr" over its samples, data in [-1, 1], and with `perceptual` of "lpips"; with `real` "frechet", "kid",
        "kid_std", "precision" and "recall", see `distances`.

    Raises
    ------
    ValueError
        Where one of extractor and real comes without the other, perceptual without reference, or the samples are not finite.
    """
    kind("plan", plan, Plan, "a deis.Plan, as deis.make_plan returns,")
    for argument, fn, parameters in (
        ("extractor", extractor, ("images",)),
        ("perceptual", perceptual, ("images", "targets")),
        ("decode", decode, ("x",)),
    ):
        if fn is not None:
            function(argument, fn, *parameters)
    kind("tag", tag, str, "a string,")
    if (extractor is None) != (real is None):
        raise ValueError("extractor and real belong together: give both, or neither")
    if perceptual is not None and reference is None:
        raise ValueError("perceptual needs reference, the converged solutions to compare with")
    network = Network(model, samples, condition, batch)
    for argument, values in (("real", real), ("reference", reference)):
        if values is not None:
            kind(argument, values, np.ndarray, "a NumPy array,")
    if reference is not None and (reference.shape[1:] != tuple(samples.shape[1:]) or len(reference) > len(samples)):
        raise ValueError(f"reference must be solutions of the first samples, and has shape {reference.shape}")
    kept = 0 if reference is None else len(reference)
    parts = [
        _batch(network, plan, extractor, decode, first, min(first + batch, len(samples)), kept, rng, folder, tag, progress)
        for first in range(0, len(samples), batch)
    ]
    seconds = float(sum(part["seconds"] for part in parts))
    found: dict[str, Any] = {"method": plan.method, "grid": plan.grid, "nfe": plan.nfe, "samples": len(samples)}
    found |= {"seconds": seconds, "images_per_second": len(samples) / seconds}
    if reference is not None:
        x_0 = np.concatenate([part["x_0"] for part in parts])[:kept]
        errors = rmse(x_0, reference)
        found |= {"rmse": float(np.median(errors)), "psnr": float(np.median(20 * np.log10(2 / np.maximum(errors, 1e-12))))}
        if perceptual is not None:
            images, targets = (_images(x, decode, samples) for x in (x_0, reference))
            found["lpips"] = float(np.median(_apart(perceptual, images, targets, batch)))
    if real is not None:
        found |= distances(np.concatenate([part["features"] for part in parts]), real)
    return found


def _images(x_0: Array, decode: Callable[[Any], Any] | None, x_T: Any) -> Array:
    """Return the images of samples: themselves, or what latents, in the dtype and on the device of the noise, decode to."""
    return x_0 if decode is None else to_numpy(decode(like(x_0, x_T)))


def _apart(perceptual: Callable[[Any, Any], Any], a: Array, b: Array, batch: int) -> Array:
    """Return the perceptual distances of images in [-1, 1], clipped to it, of shape (n,)."""
    import torch

    a, b = (np.clip(x, -1, 1).astype(np.float32) for x in (a, b))
    with torch.no_grad():
        parts = [to_numpy(perceptual(*(torch.from_numpy(x[i : i + batch]) for x in (a, b)))) for i in range(0, len(a), batch)]
    found: Array = np.concatenate(parts)
    if found.shape != (len(a),):
        raise ValueError(f"perceptual returned distances of shape {found.shape} for {len(a)} pairs; it must return (n,)")
    return found


def _batch(
    network: Network,
    plan: Plan,
    extractor: Extractor | None,
    decode: Callable[[Any], Any] | None,
    first: int,
    last: int,
    kept: int,
    rng: Any,
    folder: str | Path | None,
    tag: str,
    progress: Any,
) -> dict[str, Any]:
    """Return one batch's seconds, features and, of the first samples, states; from the folder where they are there."""
    path = None if folder is None else Path(folder) / f"{_key(network, plan, tag, first, last, kept)}.npz"
    if path is not None and path.exists():
        with np.load(path) as arrays:
            part = dict(arrays)
    else:
        start = time.perf_counter()
        x_0 = to_numpy(sample(plan, network.denoiser(first, last), network.x_T[first:last], rng=rng))
        part = {"seconds": np.array(time.perf_counter() - start), "x_0": x_0[: max(kept - first, 0)]}
        if not np.isfinite(x_0).all():
            raise ValueError(f"the samples {first} ... {last - 1} of {plan.method!r} are not finite; look with check_finite=True")
        if extractor is not None:
            part["features"] = features(extractor, _images(x_0, decode, network.x_T))
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial, partial.open("wb") as file:
                np.savez(file, **part)
    if progress is not None:
        progress.update(last - first)
    return part


def _key(network: Network, plan: Plan, tag: str, first: int, last: int, kept: int) -> str:
    """Return a name for what a batch depends on."""
    noise = hashlib.sha256(to_numpy(network.x_T[first:last]).tobytes()).hexdigest()
    text = json.dumps([plan.document()["sha256"], tag, noise, first, last, kept])
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def converged(model: Model, samples: Any, steps: int = 128, *, condition: Any = None, batch: int = 64) -> tuple[Array, float]:
    """Return the solutions of the probability flow in many steps, and the median by which they differ from those of half as many.

    Raises
    ------
    ValueError
        For fewer than two steps.
    """
    steps = whole("steps", steps, 2)
    network = Network(model, samples, condition, batch)
    form = choose_form(network.sde, np.array([network.sde.t_start]))
    ends = []
    for number in (steps // 2, steps):
        plan = dense_plan(network.sde, number, form)
        parts = [
            to_numpy(sample(plan, network.denoiser(first, min(first + batch, len(samples))), samples[first : first + batch]))
            for first in range(0, len(samples), batch)
        ]
        ends.append(np.concatenate(parts))
    return ends[1], float(np.median(rmse(*ends)))


def features(extractor: Extractor, images: Array) -> Array:
    """Return the features of images in [-1, 1], clipped to it, of shape (n, d)."""
    import torch

    with torch.no_grad():
        found: Array = to_numpy(extractor(torch.from_numpy(np.clip(images, -1, 1)).float()))
    if found.ndim != 2 or len(found) != len(images):
        raise ValueError(f"the extractor returned features of shape {found.shape} for {len(images)} images; it must return (n, d)")
    return found


def distances(fake: Array, real: Array) -> dict[str, float]:
    """Return the distances of two sets of features, each (n, d).

    "frechet" between the Gaussians of their moments, and "kid", the unbiased squared maximum mean discrepancy with a cubic kernel
    over subsets of 1000, with its standard deviation over subsets: both by torchmetrics. "precision" is the share of the fake
    features within the ball of a real one that reaches to its third neighbour, "recall" the reverse (Kynkaanniemi et al.,
    arXiv 1904.06991); torchmetrics has neither.

    Raises
    ------
    ValueError
        Where either has fewer than five features, or their numbers of dimensions differ.
    """
    with needs("evaluate", "a distance between features"):
        import torch
        from torch import nn
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

    for argument, values in (("fake", fake), ("real", real)):
        kind(argument, values, np.ndarray, "a NumPy array,")
    if fake.ndim != 2 or real.ndim != 2 or min(len(fake), len(real)) < 5 or fake.shape[1:] != real.shape[1:]:
        raise ValueError(f"features of shapes {fake.shape} and {real.shape} cannot be compared: give (n, d), n at least 5")

    class Same(nn.Module):
        num_features = fake.shape[1]

        def forward(self, x: Any) -> Any:
            return x

    subset = min(_SUBSET, len(fake), len(real))
    frechet, kid = FrechetInceptionDistance(feature=Same()), KernelInceptionDistance(feature=Same(), subset_size=subset)
    for metric in (frechet, kid):
        for part, is_real in ((real, True), (fake, False)):
            metric.update(torch.from_numpy(part), real=is_real)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the subsets
        mean, deviation = kid.compute()
    return {
        "frechet": float(frechet.compute()),
        "kid": float(mean),
        "kid_std": float(deviation),
        "precision": _covered(fake, real),
        "recall": _covered(real, fake),
    }


def _covered(points: Array, centres: Array) -> float:
    """Return the share of the points within the ball of a centre that reaches to the centre's third neighbour."""
    import torch

    x, c = torch.from_numpy(points), torch.from_numpy(centres)
    radius = torch.cat([torch.cdist(part, c).kthvalue(_NEIGHBOURS + 1).values for part in c.split(1000)])
    inside = [(torch.cdist(part, c) <= radius).any(dim=1) for part in x.split(1000)]
    return float(torch.cat(inside).double().mean())


def load_extractor(name: str, device: str = "cpu") -> Extractor:
    """Return a feature extractor.

    Parameters
    ----------
    name : str
        "inception": the 2048 features of Inception-v3, through torchmetrics and torch-fidelity, whose weights must be there or can
        be downloaded. Otherwise the path of a TorchScript file: images in [-1, 1] -> features.

    Raises
    ------
    FileNotFoundError
        Where there is no such file.
    ValueError
        Where the file is no TorchScript.
    ImportError
        Where torch is missing, or Inception is asked for and torch-fidelity is.
    """
    with needs("evaluate", "a feature extractor"):
        import torch  # noqa: F401

    if name == "inception":
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            net = NoTrainInceptionV3("inception-v3-compat", ["2048"]).to(device)
        except (ImportError, ModuleNotFoundError) as error:
            raise ImportError(
                f"--features inception needs torch-fidelity ({error}): pip install torch-fidelity, or give a TorchScript file"
            ) from None
        return lambda images: net(((_rgb(images) + 1) * 127.5).round().byte().to(device))
    if not Path(name).is_file():
        raise FileNotFoundError(f"features={name!r} is no file; give 'inception', or a TorchScript file (n, c, h, w) -> (n, d)")
    script = _script(name, device)
    return lambda images: script(images.to(device))


def load_perceptual(name: str, device: str = "cpu") -> Callable[[Any, Any], Any]:
    """Return a perceptual distance.

    Parameters
    ----------
    name : str
        "alex", "vgg" or "squeeze": LPIPS (Zhang et al., arXiv 1801.03924) through torchmetrics and torchvision, where the weights
        of that network are there or can be downloaded. Otherwise the path of a TorchScript file: two batches of images in
        [-1, 1] -> (n,).

    Raises
    ------
    FileNotFoundError
        Where there is no such file.
    ValueError
        Where the file is no TorchScript.
    ImportError
        Where torch is missing, or LPIPS is asked for, and torchvision or the weights are.
    """
    with needs("evaluate", "a perceptual distance"):
        import torch  # noqa: F401

    if name in ("alex", "vgg", "squeeze"):
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            metric = LearnedPerceptualImagePatchSimilarity(net_type=name, reduction="none").to(device)
        except (ImportError, OSError, RuntimeError) as error:
            raise ImportError(f"lpips={name!r} needs torchvision and its weights ({error}), or give a TorchScript file") from None
        return lambda a, b: metric(_rgb(a).to(device), _rgb(b).to(device))
    if not Path(name).is_file():
        raise FileNotFoundError(f"lpips={name!r} is no file; give 'alex', 'vgg', 'squeeze', or a TorchScript file")
    script = _script(name, device)
    return lambda a, b: script(a.to(device), b.to(device))


def _script(path: str, device: str) -> Any:
    import torch

    try:
        return torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path!r} cannot be read as a TorchScript file, which torch.jit.save writes: {reason}") from error


def _rgb(images: Any) -> Any:
    return images.repeat(1, 3, 1, 1) if images.shape[1] == 1 else images


def load_images(path: str | Path, most: int | None = None) -> Array:
    """Return images in [-1, 1] of shape (n, channels, height, width): of a folder of pictures, or the first array of an .npz file.

    Arrays are uint8, or floating in [-1, 1]; without a dimension for channels, or with it last or first.

    Raises
    ------
    ValueError
        Where there are none, they are of different shapes, or an array is of another kind.
    """
    path = Path(path)
    if path.is_dir():
        with needs("evaluate", "a folder of pictures"):
            from PIL import Image

        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))[:most]
        pictures = [np.asarray(Image.open(file)) for file in files]
        if len({picture.shape for picture in pictures}) != 1:
            raise ValueError(f"{str(path)!r} must hold pictures of one size and mode, and has {len(pictures)} of several or none")
        images = np.stack(pictures)
    else:
        try:
            with np.load(path) as arrays:
                images = arrays[arrays.files[0]][:most]
        except (ValueError, TypeError, AttributeError, IndexError, EOFError, BadZipFile) as error:
            raise ValueError(f"{str(path)!r} cannot be read as an .npz file that holds an array: {error}") from error
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / 127.5 - 1
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim == 4 and images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or not np.issubdtype(images.dtype, np.floating) or not np.abs(images).max() <= 1 + 1e-3:
        raise ValueError(f"{str(path)!r} holds {images.dtype} of shape {images.shape}; give uint8 images, or floats in [-1, 1]")
    return images
