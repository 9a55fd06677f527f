"""Sets of images by their features: the distances between them, and what makes features of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from .arguments import kind
from .arrays import AnyArray
from .backends import to_numpy
from .extras import needs

Extractor = Callable[[Any], Any]
"""Images of shape (n, channels, height, width), a torch.Tensor in [-1, 1], to features of shape (n, d)."""
Perceptual = Callable[[Any, Any], Any]
"""Two batches of such images to their distances, of shape (n,)."""

_NEIGHBOURS = 3  # Kynkaanniemi et al., arXiv 1904.06991
_SUBSET = 1000  # Binkowski et al., arXiv 1801.01401


def features(extractor: Extractor, images: AnyArray) -> AnyArray:
    """Return the features of images in [-1, 1], clipped to it, of shape (n, d)."""
    import torch

    with torch.no_grad():
        found: AnyArray = to_numpy(extractor(torch.from_numpy(np.clip(images, -1, 1)).float()))
    if found.ndim != 2 or len(found) != len(images):
        raise ValueError(f"the extractor returned features of shape {found.shape} for {len(images)} images; it must return (n, d)")
    return found


def distances(fake: AnyArray, real: AnyArray) -> dict[str, float]:
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
    for argument, values in (("fake", fake), ("real", real)):
        kind(argument, values, np.ndarray, "a NumPy array,")
    if fake.ndim != 2 or real.ndim != 2 or min(len(fake), len(real)) < 5 or fake.shape[1:] != real.shape[1:]:
        raise ValueError(f"features of shapes {fake.shape} and {real.shape} cannot be compared: give (n, d), n at least 5")
    return {**_by_torchmetrics(fake, real), "precision": _covered(fake, real), "recall": _covered(real, fake)}


def _by_torchmetrics(fake: AnyArray, real: AnyArray) -> dict[str, float]:
    """Return the Fréchet distance, and KID with its deviation."""
    with needs("evaluate", "a distance between features"):
        import torch
        from torch import nn
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

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
    return {"frechet": float(frechet.compute()), "kid": float(mean), "kid_std": float(deviation)}


def _covered(points: AnyArray, centres: AnyArray) -> float:
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
    script = _script("features", name, "'inception', or a TorchScript file (n, c, h, w) -> (n, d)", device)
    return lambda images: script(images.to(device))


def load_perceptual(name: str, device: str = "cpu") -> Perceptual:
    """Return a perceptual distance.

    Parameters
    ----------
    name : str
        "alex", "vgg" or "squeeze": LPIPS (Zhang et al., arXiv 1801.03924) through torchmetrics and torchvision, where the weights
        of that network are there or can be downloaded. Otherwise the path of a TorchScript file: two batches of images in
        [-1, 1] -> (n,).

    Raises
    ------
    FileNotFoundError, ValueError
        As `load_extractor` does.
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
    script = _script("lpips", name, "'alex', 'vgg', 'squeeze', or a TorchScript file", device)
    return lambda a, b: script(a.to(device), b.to(device))


def _script(argument: str, name: str, cure: str, device: str) -> Any:
    """Return the network in a TorchScript file."""
    import torch

    if not Path(name).is_file():
        raise FileNotFoundError(f"{argument}={name!r} is no file; give {cure}")
    try:
        return torch.jit.load(name, map_location=device).eval()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name!r} cannot be read as a TorchScript file, which torch.jit.save writes: {reason}") from error


def _rgb(images: Any) -> Any:
    return images.repeat(1, 3, 1, 1) if images.shape[1] == 1 else images


def load_images(path: str | Path, most: int | None = None) -> AnyArray:
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
