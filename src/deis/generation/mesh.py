"""JAX on all devices of a machine: each has a part of every batch, and a copy of the network."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..extras import needs

with needs("jax", "backend='jax'"):
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec


def check_batch(batch: int) -> None:
    """Check that a batch can be shared among the devices of this machine.

    Raises
    ------
    ValueError
        If it does not divide by their number.
    """
    devices = jax.local_device_count()
    if batch % devices:
        raise ValueError(
            f"batch={batch} does not divide into {devices} equal parts, one for each JAX device of this machine; give "
            f"{-(-batch // devices) * devices}, or show JAX fewer devices, for GPUs by CUDA_VISIBLE_DEVICES"
        )


def on_all_devices(arrays: Any) -> Any:
    """Return a tree of arrays of shape (batch, ...), each split along its first axis over the devices of this machine."""
    sharding = NamedSharding(Mesh(np.array(jax.local_devices()), ("batch",)), PartitionSpec("batch"))
    for array in jax.tree.leaves(arrays):
        check_batch(len(array))
    return jax.device_put(arrays, sharding)
