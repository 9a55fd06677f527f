"""One worker: the model in memory, and shards one after the other."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from ..arrays import AnyArray
from ..seeded import Run, jax_runner, precision, torch_runner
from .formats import FORMATS, Content, Label, checksum, is_intact, size
from .job import Job, is_made, load
from .publish import publish
from .record import Record, load_record


def make_worker(job: Job, run: Run | None = None) -> Callable[[int], Record]:
    """Return worker(k), which makes shard k, writes it whole, and returns its record; the model is loaded once.

    Several threads may call it: one samples at a time, while the others encode and write. A shard that another worker has made in
    the meantime is left as it is.

    Parameters
    ----------
    job : Job
    run : callable, optional
        What samples a batch, see `deis.seeded.Run`; by default on the device of the job. It is called with `job.batch` numbers
        each time, or with half as many after each time that it ran out of memory.
    """
    sampler = _Sampler(job, run or make_run(job), job.batch)

    def worker(k: int) -> Record:
        if is_made(job, k):
            return load_record(job.record_path(k))
        start, numbers = time.perf_counter(), job.samples(k)
        labels = labels_of(job, numbers)
        images, batch = sampler.shard(numbers)
        content = FORMATS[job.format].pack(images, numbers, labels)
        name, by, seconds = job.path(k).name, made_by(job), time.perf_counter() - start
        return _kept(job, k, content, Record(name, len(numbers), checksum(content), size(content), batch, by, seconds, labels))

    return worker


def make_run(job: Job) -> Run:
    """Return what samples a batch, in torch or on all of JAX's devices."""
    with precision(job.options):
        model = load(job.model, job.backend, job.device, job.dtype, job.load_options)
        if job.backend == "torch":
            return torch_runner(job.plan, model, job.options)
        from .mesh import on_all_devices

        return jax_runner(job.plan, model, job.options, on_all_devices)


def labels_of(job: Job, numbers: range) -> tuple[Label, ...] | None:
    """Return the labels of samples; numbers from num on, which only fill a batch, have those of the first ones."""
    return None if job.labels is None else tuple(job.labels[i % job.num] for i in numbers)


def _kept(job: Job, k: int, content: Content, record: Record) -> Record:
    """Write a shard and then its record; a worker that is killed between them leaves a shard that the next one makes again."""
    path, record_path = job.path(k), job.record_path(k)
    if not path.exists():
        record_path.unlink(missing_ok=True)  # that of a shard which somebody has removed
    if not publish(content, path) and not is_intact(path, record.sha256):
        if record_path.exists():  # another worker was first, with another batch
            return load_record(record_path)
        raise ValueError(
            f"{str(path)!r} has no record and is not the shard that belongs there; it was left as it is: move it away and run again"
        )
    record.save(record_path)
    return record


@dataclass
class _Sampler:
    """The network, one thread at a time, and the number of samples of a call that its memory holds."""

    job: Job
    run: Run
    batch: int
    alone: threading.Lock = field(default_factory=threading.Lock)

    def shard(self, numbers: range) -> tuple[AnyArray, int]:
        """Return samples in uint8, (n, height, width, channels), and the batch that they were made with."""
        with self.alone:
            while True:
                images = self._tried(numbers)
                if images is not None:
                    return images, self.batch
                self._halve()

    def _tried(self, numbers: range) -> AnyArray | None:
        """Return the samples; None where the memory does not suffice."""
        try:
            firsts = range(numbers.start, numbers.stop, self.batch)
            with precision(self.job.options), reproducible():
                return np.concatenate([self._pixels(range(first, first + self.batch)) for first in firsts])[: len(numbers)]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if self.batch == 1:
                raise MemoryError("out of memory with one sample a call; give a device with more of it") from error
        return None

    def _halve(self) -> None:
        """Go on with half as many samples a call. It is called when the error, which holds on to tensors, is gone."""
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()
        self.batch //= 2
        warnings.warn(
            f"out of memory: it goes on with a batch of {self.batch}. Shards made with another batch may differ from these in the "
            "last bit of a few pixels; each record says with which it was made",
            stacklevel=2,
        )

    def _pixels(self, numbers: range) -> AnyArray:
        """Return the samples of one call, always of a full batch: their bits depend on its size."""
        labels = labels_of(self.job, numbers)
        given = labels if labels is None or isinstance(labels[0], str) else np.array(labels)
        x_0 = self.run(numbers, given, None)
        if not np.isfinite(x_0).all():
            raise ValueError(f"the samples {numbers[0]} ... {numbers[-1]} of {self.job.plan.method!r} are not finite")
        return to_uint8(x_0)


def to_uint8(images: AnyArray) -> AnyArray:
    """Return images of shape (n, channels, height, width) in [-1, 1] as uint8 of shape (n, height, width, channels)."""
    return np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory is short, which NumPy says by its kind of error, and JAX, torch on CUDA and torch on a CPU in words."""
    words = ("RESOURCE_EXHAUSTED", "out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


@contextmanager
def reproducible() -> Iterator[None]:
    """Let cuDNN choose the same kernels each time, by rule and not by trial."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield


def made_by(job: Job) -> str:
    """Return the framework and the device that samples are made with."""
    if job.backend == "jax":
        import jax

        return f"jax {jax.__version__} on {jax.devices()[0].device_kind}"
    import torch

    device = torch.device(job.device or "cpu")
    return f"torch {torch.__version__} on {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}"
