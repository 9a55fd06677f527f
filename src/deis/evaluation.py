"""How good the samples of a plan are: their distance to real images, and to the converged solutions from the same noise."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .arguments import function, kind, whole
from .arrays import AnyArray
from .backends import like, to_numpy
from .calibration.network import Model, Network, rmse
from .calibration.teacher import dense_plan
from .draws import streams
from .features import Extractor, Perceptual, distances, features, load_extractor, load_images, load_perceptual
from .files import replacing
from .generation.manifest import read_manifest
from .generation.verification import read_samples
from .likelihood import log_likelihood
from .methods.step import choose_form
from .plan import Plan
from .run import sample

__all__ = [
    "converged", "distances", "evaluate", "evaluate_samples", "features", "likelihood", "load_extractor", "load_images",
    "load_perceptual",
]  # fmt: skip


def evaluate(
    plan: Plan,
    model: Model,
    samples: Any,
    *,
    condition: Any = None,
    extractor: Extractor | None = None,
    real: AnyArray | None = None,
    reference: AnyArray | None = None,
    perceptual: Perceptual | None = None,
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
        As for `deis.calibrate`: the plan to run, and the noise.
    extractor : callable, optional
        images -> features, for the distances to real images; `load_extractor` makes one.
    real : array of shape (m, d), optional
        The features of real images, from the same extractor.
    reference : array of shape (k, ...), optional
        The converged solutions of the first k samples, as `converged` returns them.
    perceptual : callable, optional
        (images, images) -> distances of shape (n,), a second distance to the converged solutions; `load_perceptual` makes one.
    decode : callable, optional
        For a network of latents: samples -> images, for the extractor and the perceptual distance; see `deis.Pretrained`.
    rng : optional
        Random numbers for a stochastic plan, see `deis.sample`.
    folder : path, optional
        Keep each finished batch here, and resume from there; the folder may serve several plans, and with different tags
        several models.
    tag : str
        What the samples and features depend on besides the plan and the noise, such as the model's and the extractor's names.
    progress : optional
        A tqdm bar, or another object with `update(n)`.

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
    kind("tag", tag, str, "a string,")
    _check_measures(extractor=extractor, real=real, reference=reference, perceptual=perceptual, decode=decode)
    network = Network(model, samples, condition, batch)
    if reference is not None and (reference.shape[1:] != tuple(samples.shape[1:]) or len(reference) > len(samples)):
        raise ValueError(f"reference must be solutions of the first samples, and has shape {reference.shape}")
    run = _Run(plan, network, extractor, 0 if reference is None else len(reference), decode, rng, folder, tag)
    parts = []
    for first, last in _batches(network):
        parts.append(run.batch(first, last))
        if progress is not None:
            progress.update(last - first)
    seconds = float(sum(part["seconds"] for part in parts))
    found: dict[str, Any] = {"method": plan.method, "grid": plan.grid, "nfe": plan.nfe, "samples": len(samples)}
    found |= {"seconds": seconds, "images_per_second": len(samples) / seconds}
    if reference is not None:
        found |= run.errors(np.concatenate([part["x_0"] for part in parts]), reference, perceptual)
    if real is not None:
        found |= distances(np.concatenate([part["features"] for part in parts]), real)
    return found


def evaluate_samples(
    folder: str | Path, extractor: Extractor, real: AnyArray, *, batch: int = 64, progress: Any = None
) -> dict[str, Any]:
    """Measure the samples that `deis.generate` wrote, a shard at a time in memory.

    Parameters
    ----------
    folder : path
        Of `deis.generate`; every shard is checked against its checksum as it is read.
    extractor, real
        As for `evaluate`.
    batch : int
        Images per call of the extractor.
    progress : optional
        A tqdm bar, or another object with `update(n)`.

    Returns
    -------
    dict
        "method", "grid", "nfe", "samples", and the distances to the real images, see `distances`.

    Raises
    ------
    FileNotFoundError, ValueError
        As `deis.read_samples`.
    """
    function("extractor", extractor, "images")
    kind("real", real, np.ndarray, "a NumPy array,")
    batch, parts = whole("batch", batch), []
    for _, pixels in read_samples(folder):
        images = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        parts += [features(extractor, images[first : first + batch]) for first in range(0, len(images), batch)]
        if progress is not None:
            progress.update(len(images))
    plan = Plan.from_document(read_manifest(folder)["samples"]["plan"])
    found = np.concatenate(parts)
    about: dict[str, Any] = {"method": plan.method, "grid": plan.grid, "nfe": plan.nfe, "samples": len(found)}
    return about | distances(found, real)


def _check_measures(**measures: Any) -> None:
    for argument, parameters in (("extractor", ["images"]), ("perceptual", ["images", "targets"]), ("decode", ["x"])):
        if measures[argument] is not None:
            function(argument, measures[argument], *parameters)
    if (measures["extractor"] is None) != (measures["real"] is None):
        raise ValueError("extractor and real belong together: give both, or neither")
    if measures["perceptual"] is not None and measures["reference"] is None:
        raise ValueError("perceptual needs reference, the converged solutions to compare with")
    for argument in ("real", "reference"):
        if measures[argument] is not None:
            kind(argument, measures[argument], np.ndarray, "a NumPy array,")


@dataclass(frozen=True)
class _Run:
    """What the batches of an evaluation share; see `evaluate`. The states of the first samples are compared, and so are kept."""

    plan: Plan
    network: Network
    extractor: Extractor | None
    compared: int
    decode: Callable[[Any], Any] | None
    rng: Any
    folder: str | Path | None
    tag: str

    def batch(self, first: int, last: int) -> dict[str, Any]:
        """Return one batch's seconds, features and, of the first samples, states; from the folder if they are there."""
        if self.folder is None:
            return self._measured(first, last)
        path = Path(self.folder) / f"{self._key(first, last)}.npz"
        if path.exists():
            with np.load(path) as arrays:
                return dict(arrays)
        part = self._measured(first, last)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, **part)
        return part

    def _measured(self, first: int, last: int) -> dict[str, Any]:
        start = time.perf_counter()
        x_0 = _sampled(self.network, self.plan, first, last, self.rng)
        part = {"seconds": np.array(time.perf_counter() - start), "x_0": x_0[: max(self.compared - first, 0)]}
        if not np.isfinite(x_0).all():
            raise ValueError(
                f"the samples {first} ... {last - 1} of {self.plan.method!r} are not finite; find the cause with check_finite=True"
            )
        if self.extractor is not None:
            part["features"] = features(self.extractor, self._images(x_0))
        return part

    def _key(self, first: int, last: int) -> str:
        """Return a name from all that a batch depends on."""
        noise = hashlib.sha256(to_numpy(self.network.x_T[first:last]).tobytes()).hexdigest()
        text = json.dumps([self.plan.document()["sha256"], self.tag, noise, first, last, self.compared])
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def errors(self, x_0: AnyArray, reference: AnyArray, perceptual: Perceptual | None) -> dict[str, float]:
        """Return the medians of the differences of samples to the converged ones."""
        differences = rmse(x_0, reference)
        psnr = 20 * np.log10(2 / np.maximum(differences, 1e-12))
        found = {"rmse": float(np.median(differences)), "psnr": float(np.median(psnr))}
        if perceptual is not None:
            apart = _apart(perceptual, self._images(x_0), self._images(reference), self.network.batch)
            found["lpips"] = float(np.median(apart))
        return found

    def _images(self, x_0: AnyArray) -> AnyArray:
        """Return the images of samples: themselves, or what latents, in the dtype and on the device of the noise, decode to."""
        return x_0 if self.decode is None else to_numpy(self.decode(like(x_0, self.network.x_T)))


def likelihood(
    plan: Plan, model: Any, images: AnyArray, *, seed: int = 0, batch: int = 64, device: str = "cpu", progress: Any = None
) -> dict[str, Any]:
    """Measure the likelihood of real images under a torch network, with one probe an image; see `deis.log_likelihood`.

    Parameters
    ----------
    plan : Plan
        From ``deis.make_plan(..., direction="encode")``.
    model : callable, Denoiser or Pretrained
    images : array of shape (n, ...), n of at least 2
        Of 256 levels of grey from -1 to 1, as `load_images` returns them; noise within a level is added to each.
    seed : int
        The noise and the probe of image i depend on the seed and on i alone.
    batch : int
        Images per call of the model.
    device : str
        Where the network is.
    progress : optional
        A tqdm bar, or another object with `update(n)`.

    Returns
    -------
    dict
        "method", "grid", "nfe", "images", and the means of "nats" and "bits_per_dim", with the "standard_error" of the latter over
        the images; it includes the error of the probes.

    Raises
    ------
    ValueError
        Where there are fewer than two images, or they are not of 256 levels; else as `deis.log_likelihood`.
    """
    import torch

    levels, batch = (np.asarray(images, dtype=np.float64) + 1) * 127.5, whole("batch", batch)
    whole_levels = (np.abs(levels - np.clip(np.rint(levels), 0, 255)) < 1e-3).all()
    if len(levels) < 2 or not whole_levels:
        raise ValueError(
            "images must be two or more, of 256 levels -1, -1 + 1/127.5, ..., 1, to which noise within a level is added"
        )
    found = []
    for first in range(0, len(levels), batch):
        numbers = range(first, min(first + batch, len(levels)))
        u = [np.random.default_rng((seed, i)).random(levels.shape[1:]) for i in numbers]
        x_0 = torch.tensor((levels[numbers] + u - 0.5) / 127.5 - 1, dtype=torch.float32, device=device)
        part = log_likelihood(model, x_0, plan, rng=streams(x_0, numbers, seed))
        found.append([to_numpy(values) for values in (part.nats, part.bits_per_dim)])
        if progress is not None:
            progress.update(len(numbers))
    nats, bits = np.concatenate(found, axis=1)
    about: dict[str, Any] = {"method": plan.method, "grid": plan.grid, "nfe": plan.nfe, "images": len(bits)}
    error = float(bits.std(ddof=1)) / len(bits) ** 0.5
    return about | {"nats": float(nats.mean()), "bits_per_dim": float(bits.mean()), "standard_error": error}


def _apart(perceptual: Perceptual, a: AnyArray, b: AnyArray, batch: int) -> AnyArray:
    """Return the perceptual distances of images in [-1, 1], clipped to it, of shape (n,)."""
    import torch

    a, b = (np.clip(x, -1, 1).astype(np.float32) for x in (a, b))
    with torch.no_grad():
        parts = [to_numpy(perceptual(*(torch.from_numpy(x[i : i + batch]) for x in (a, b)))) for i in range(0, len(a), batch)]
    found: AnyArray = np.concatenate(parts)
    if found.shape != (len(a),):
        raise ValueError(f"perceptual returned distances of shape {found.shape} for {len(a)} pairs; it must return (n,)")
    return found


def _batches(network: Network) -> Iterator[tuple[int, int]]:
    """Yield the first sample of each batch, and the one after its last."""
    for first in range(0, len(network.x_T), network.batch):
        yield first, min(first + network.batch, len(network.x_T))


def _sampled(network: Network, plan: Plan, first: int, last: int, rng: Any = None) -> AnyArray:
    return to_numpy(sample(plan, network.denoiser(first, last), network.x_T[first:last], rng=rng))


def converged(model: Model, samples: Any, steps: int = 128, *, condition: Any = None, batch: int = 64) -> tuple[AnyArray, float]:
    """Return the solutions of the probability flow in many steps, and their median difference from those of half as many.

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
        ends.append(np.concatenate([_sampled(network, plan, first, last) for first, last in _batches(network)]))
    return ends[1], float(np.median(rmse(*ends)))
