"""Engines: the same bytes from a Ray cluster of which a worker is killed, from torchrun, accelerate and JAX on several devices."""

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import deis
from deis.generation import ranks
from deis.generation.job import Job
from deis.generation.verification import verify_samples

SIZES: dict[str, Any] = {"num": 80, "shard": 4, "batch": 4, "format": "npz"}
ARGUMENTS = ["--nfe", "3", *(word for name, value in SIZES.items() for word in (f"--{name}", str(value)))]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # float32 rounds differently on several
IN_PATH = str(Path(sys.executable).parent)


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a process of ours, without what a launcher of this very process may have set."""
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return own | ONE_THREAD | more


def run(*command: str, **more: str) -> str:
    done = subprocess.run(
        [f"{IN_PATH}/{command[0]}", *command[1:]], env=environment(**more), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fails(*command: str, **more: str) -> str:
    """Return what a command says that ends with code 1."""
    done = subprocess.run(
        [f"{IN_PATH}/{command[0]}", *command[1:]], env=environment(**more), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    """Return the shards and the manifest."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the samples that one process made."""
    folder, threads = tmp_path_factory.mktemp("engines") / "alone", torch.get_num_threads()
    torch.set_num_threads(1)
    deis.generate(folder, plan=deis.load_model().plan(3), engine="in_process", **SIZES)
    torch.set_num_threads(threads)
    return folder


# Processes that a launcher has started


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_each_shard_belongs_to_one_rank_whenever_the_ranks_look(world: int) -> None:
    found = [list(range(rank, 20)) for rank in range(world)]  # the later they look, the more is there
    parts = [ranks.part(shards, rank, world) for rank, shards in enumerate(found)]
    assert sorted(k for part in parts for k in part if k >= world) == list(range(world, 20))
    assert sum(len(set(part)) for part in parts) == len({k for part in parts for k in part})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "RANK='' in the environment must be a number"),
        ({"RANK": "0"}, "WORLD_SIZE='' in the environment must be a number"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one' .*torchrun or accelerate launch"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
    ],
)
def test_a_rank_that_no_launcher_has_set_is_told(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranks.rank_and_world(environ)


def test_a_rank_has_the_gpu_of_its_local_number() -> None:
    assert ranks.rank_device("cuda", {"LOCAL_RANK": "3"}) == "cuda:3"
    assert ranks.rank_device(None, {}) is None
    assert ranks.rank_device("cpu", {}) == "cpu"
    with pytest.raises(ValueError, match="LOCAL_RANK=''"):
        ranks.rank_device("cuda", {})


def test_ranks_are_the_default_under_a_launcher_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks.default_engine() == "in_process"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ranks.default_engine() == "ranks"


@pytest.mark.parametrize("launcher", ["torchrun --nproc-per-node 2 -m --", "accelerate launch --multi_gpu --num_processes 2 -m"])
def test_two_launched_processes_share_the_shards(alone: Path, tmp_path: Path, launcher: str) -> None:
    out = tmp_path / "out"
    told = run(*launcher.split(), "deis", "generate", *ARGUMENTS, "--out", str(out), MASTER_PORT=str(free_port()))
    assert contents(out) == contents(alone)
    assert verify_samples(out).ok
    assert told.count("holds") == 2
    assert f"holds {SIZES['num']} of {SIZES['num']}" in told  # says whoever was last


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# Ray


ON_RAY = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # Ray forks; JAX, where other tests have loaded it, warns


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Start a cluster of four cores on this machine."""
    # By default its workers give way to all other processes, so that a busy machine lets them wait.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_AUTH_TOKEN": secrets.token_hex(32)} | ONE_THREAD
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    found = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=found.address, log_to_driver=False, logging_level=logging.ERROR)
    yield found
    ray.shutdown()
    found.shutdown()  # type: ignore[no-untyped-call]


def workers_of_ray() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.name().startswith("ray::_Worker")]


@pytest.mark.ray
@ON_RAY
def test_a_worker_of_four_is_killed_and_its_shards_are_made_again(cluster: Any, alone: Path, tmp_path: Path) -> None:
    out, killed = tmp_path / "out", list[int]()

    def kill_one() -> None:
        while not any(out.glob("records/*.json")):
            time.sleep(0.01)
        while not (making := [worker.pid for worker in workers_of_ray() if "make" in worker.cmdline()[0]]):
            time.sleep(0.001)
        killed.append(making[0])
        os.kill(making[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    records = deis.generate(out, plan=deis.load_model().plan(3), engine="ray", **SIZES)
    killer.join()
    assert len(killed) == 1
    assert len(records) == 20
    assert contents(out) == contents(alone)
    assert verify_samples(out).ok


def job_of(count: int) -> Job:
    return Job(Path("nowhere"), deis.make_plan(deis.VPSDE.linear(), nfe=1), "", count, shard=1)


def work(hired: type, count: int, workers: int, done: Callable[[Any], None] = lambda k: None) -> None:
    """Let actors of a class make shards."""
    import ray

    from deis.generation.ray_actors import _work

    _work(ray.remote(hired).options(num_cpus=1, max_concurrency=2), job_of(count), range(count), done, workers)


@pytest.mark.ray
@ON_RAY
def test_workers_that_join_later_get_work(cluster: Any, tmp_path: Path) -> None:
    joined, first, made = tmp_path / "joined", cluster.head_node.node_id, list[int]()

    class Waits:
        """After the first shard, the four of the first machine wait until the second one has worked."""

        def __init__(self, job: Job) -> None:
            import ray

            self.early = ray.get_runtime_context().get_node_id() == first

        def prepare(self) -> None: ...

        def make(self, k: int) -> int:
            end = time.monotonic() + 100
            while k > 0 and self.early and not joined.exists() and time.monotonic() < end:
                time.sleep(0.01)
            assert time.monotonic() < end
            if not self.early:
                joined.touch()
            return k

    def done(k: int) -> None:
        made.append(k)
        if k == 0:
            late.append(cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20))

    late: list[Any] = []
    work(Waits, 20, 5, done)
    cluster.remove_node(late[0])
    assert sorted(made) == list(range(20))
    assert joined.exists()


@pytest.mark.ray
@ON_RAY
def test_a_shard_that_ends_every_worker_is_told(cluster: Any) -> None:
    class Dies:
        def __init__(self, job: Job) -> None: ...

        def prepare(self) -> None: ...

        def make(self, k: int) -> int:
            if k == 2:
                os._exit(1)
            return k

    with pytest.raises(RuntimeError, match="3 workers died at shard 2; give each more memory or a smaller batch"):
        work(Dies, 3, workers=1)


@pytest.mark.ray
@ON_RAY
def test_the_error_of_a_worker_is_raised_as_it_was(cluster: Any) -> None:
    class Fails:
        def __init__(self, job: Job) -> None: ...

        def prepare(self) -> None:
            raise FileNotFoundError("no such model on this machine")

    with pytest.raises(FileNotFoundError, match=r"^no such model on this machine$"):
        work(Fails, 3, workers=2)


def test_ray_takes_a_model_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="engine='ray' loads the model in other processes, and model is a Pretrained; give a name"):
        deis.generate(tmp_path / "out", 4, model=deis.load_model(), engine="ray")


def test_a_cluster_that_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    message = "RAY_ADDRESS=.* does not answer .*; start Ray there with ray start --head, or unset RAY_ADDRESS"
    with pytest.raises(ConnectionError, match=message):
        deis.generate(tmp_path / "out", 4, engine="ray")
    assert not (tmp_path / "out").exists()


def test_a_missing_ray_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "deis.generation.ray_actors", raising=False)
    with pytest.raises(ImportError, match=r"--engine ray needs the extra 'ray'.*pip install '.\[ray\]'"):
        deis.generate(tmp_path / "out", 4, engine="ray")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "slurm"}, "engine='slurm' is unknown; the known ones are 'in_process', 'ray', 'ranks', 'jax'"),
        ({"engine": "in_process", "workers": 4}, "workers=4 .* for engine='ray', and engine='in_process'; leave them out"),
        ({"engine": "ray", "device": "cuda:1"}, "device='cuda:1' names one GPU.*give cuda"),
        ({"engine": "jax"}, "engine='jax' is for backend='jax', and backend='torch'"),
        ({"backend": "tensorflow"}, "backend='tensorflow' is unknown; the known ones are 'torch', 'jax'"),
    ],
)
def test_what_does_not_fit_together_is_told_before_anything_is_written(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        deis.generate(tmp_path / "out", 4, **options)
    assert not (tmp_path / "out").exists()


# JAX on several devices

NETWORK = """
import sys
import jax, jax.numpy as jnp, numpy as np
import deis
from deis.generation.mesh import on_all_devices
from deis.model.pretrained import Pretrained
from deis.seeded import jax_runner

def network(x, t, labels):
    return jnp.tanh(x + 0.1 * jnp.asarray(labels)[:, None, None, None]) * jnp.cos(t)[:, None, None, None]

model = Pretrained(network, deis.VPSDE.linear(), "eps", (1, 6, 6), 3, 3, 1.0)
plan = deis.make_plan(model.sde, "tab2", nfe=4)
options = {"backend": "jax", "device": None, "dtype": "float32", "seed": 0, "guidance": 2.0}
"""
EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}

SHARDED = (
    NETWORK
    + """
assert len(jax.devices()) == 8
placed, computed = [], []

def network_seen(x, t, labels):
    jax.debug.inspect_array_sharding(x, callback=computed.append)
    return network(x, t, labels)

def place(arrays):
    placed.append(on_all_devices(arrays))
    return placed[-1]

labels = np.arange(16) % 3
seen = Pretrained(network_seen, model.sde, "eps", model.shape, 3, 3, 1.0)
many = jax_runner(plan, seen, options, place)(range(16), labels, None)
one = jax_runner(plan, model, options)(range(16), labels, None)
for array in jax.tree.leaves(placed[0]):
    shards = array.addressable_shards
    assert {shard.device for shard in shards} == set(jax.devices())
    assert all(len(shard.data) == 2 for shard in shards), [len(shard.data) for shard in shards]
assert computed and all(len(s.device_set) == 8 and not s.is_fully_replicated for s in computed), computed
assert np.abs(many - one).max() <= 1e-5, np.abs(many - one).max()
assert np.abs(one).max() > 0.1
print("held", len(placed[0]))
"""
)


def test_jax_computes_a_batch_on_all_eight_devices() -> None:
    assert run("python", "-c", SHARDED, **EIGHT).startswith("held")


def test_a_batch_that_does_not_divide_over_the_devices_is_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = f"deis.generate({str(out)!r}, 40, model=model, plan=plan, backend='jax', guidance=2.0, shard=12, batch=12)"
    told = fails("python", "-c", NETWORK + call, **EIGHT)
    assert "batch=12 does not divide into 8 equal parts, one for each JAX device of this machine; give 16" in told
    assert not out.exists()


PROCESSES = (
    NETWORK
    + """
if __name__ == "__main__":
    out, engine = sys.argv[1:]
    options = {"model": model, "plan": plan, "backend": "jax", "guidance": 2.0, "shard": 8, "batch": 8, "format": "npz"}
    deis.generate(out, 48, engine=engine, **options)
    print(jax.process_index(), jax.process_count(), len(jax.devices()), len(jax.local_devices()))
"""
)


def test_two_jax_processes_of_four_devices_share_the_shards(tmp_path: Path) -> None:
    script, address = tmp_path / "processes.py", f"127.0.0.1:{free_port()}"
    script.write_text(PROCESSES)
    four = EIGHT | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_COORDINATOR_ADDRESS": address, "WORLD_SIZE": "2"}
    command = [sys.executable, str(script), str(tmp_path / "two"), "jax"]
    running = [
        subprocess.Popen(command, env=environment(**four, RANK=rank), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in "01"
    ]
    told = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    assert [text.splitlines()[-1] for text in told] == ["0 2 8 4", "1 2 8 4"]
    run("python", str(script), str(tmp_path / "one"), "in_process", **EIGHT | {"XLA_FLAGS": ""})
    assert verify_samples(tmp_path / "two").ok
    two, one = (contents(tmp_path / name) for name in ("two", "one"))
    assert len(two) == 7
    assert two == one


def test_jax_processes_that_cannot_meet_are_told(tmp_path: Path) -> None:
    arguments = ["--num", "8", "--nfe", "3", "--backend", "jax", "--engine", "jax", "--out", str(tmp_path / "out")]
    told = fails("deis", "generate", *arguments, JAX_PLATFORMS="cpu")
    assert "set JAX_COORDINATOR_ADDRESS=host:port of the first one, RANK and WORLD_SIZE" in told
