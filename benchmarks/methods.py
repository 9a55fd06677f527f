"""Every deterministic method x clock x form x grid x NFE: the error against the converged solution from the same noise.

python -m benchmarks.methods digits
python -m benchmarks.methods mnist
python -m benchmarks.methods anime64 --checkpoint ../shared/checkpoints/anime64
python -m benchmarks.methods report > docs/methods.md

The error is the median over samples of the root mean square difference to the reference; data lie in [-1, 1]. Three problems:

digits    a mixture of 30 Gaussians fitted to scikit-learn's 8x8 digits, with its exact eps, VP linear; 64 samples, float64
mnist     the bundled MNIST model, labels in turn; 20 samples, float32
anime64   a network of 63 million parameters that this project did not train, discrete cosine schedule, from t = 290; 8 samples,
          float32; a selection of methods at 5 NFE

The networks take their time, so that not every cell is measured, but `auto` always is. Of mnist, at 6 NFE the methods and grids
within a half of the best at 5, at 8 within twice the best at 5, at 10 within a half of the best at 8. Of anime64, at 6 NFE those
within a third of the best at 5, at 8 within a half of the best at 5, at 10 within three quarters of the best at 8. Of both, at 15
and 20 those within a third of the best at 10.

Each writes benchmarks/results/methods_<problem>.csv, a line a measurement, and goes on from there when it is started again.
`report` prints the tables, and what is best at each NFE.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import deis
from deis.methods.clocks import CLOCKS
from deis.methods.layout import Builder
from deis.methods.registry import find
from deis.quadrature import Form

from .pages import folded, measured

INTRODUCTION = """![The least error at eight calls by clock and form](figures/methods.png)

The clock and the form are worth a factor of two and more, and no choice is the best on every model. Over the three problems
together, the data form in vp_t with a corrector is first at 6, 8, 10, 15 and 20 calls. This choice is `auto`.

`python -m benchmarks.figures methods` draws the figure. `python -m benchmarks.methods report` makes the page from the measurements
in `benchmarks/results`, which `python -m benchmarks.methods digits`, `... mnist` and `... anime64` write. [Its
docstring](../benchmarks/methods.py) describes each problem. The error is the median over samples of the root mean square difference
to the converged solution from the same noise, on the best of the grids. The name of that grid follows the error: t or vp_t and its
power, rho of power 7 (Karras), log rho. The order is that of convergence: `data, t, order 3` is `deis.adams("data", "t", 2)`, of
degree 2, and `data, t, order 3, corrector 2` is `deis.adams("data", "t", 1, 2)`. `auto` is `data, vp_t, order 3, corrector 2` on
vp_t2."""
AUTO = "data, vp_t, order 3, corrector 2"
RESULTS = Path(__file__).parent / "results"
FIELDS = ("method", "form", "clock", "order", "corrector", "grid", "nfe", "error")
EVALUATIONS = (5, 8, 10, 6, 15, 20)
GRIDS = (("t", 1.0), ("t", 2.0), ("t", 3.0), ("rho", 7.0), ("log", 1.0), ("vp_t", 1.0), ("vp_t", 2.0), ("vp_t", 3.0))
FORMS: tuple[Form, Form] = ("eps", "data")
NAMED = (
    "ddim", "ipndm2", "ipndm3", "ipndm4", "dpmpp_2m_published", "dpmpp_3m_published", "unipc2_bh1", "unipc2_bh2", "unipc3_bh2",
    "dpm_solver_2", "dpm_solver_3", "dpmpp_2s", "dpmpp_3s", "edm_heun", "dpm_solver_2m_published", "dpm_solver_3m_published",
    "dpm_solver_2s_published", "dpm_solver_3s_published", "dpmpp_2s_published", "dpmpp_3s_published",
    "bdia", "belm",
)  # fmt: skip


MNIST_RUNNING = {8: (5, 2.0), 10: (8, 1.5), 6: (5, 1.5), 15: (10, 4 / 3), 20: (10, 4 / 3)}
ANIME64_RUNNING = {8: (5, 1.5), 10: (8, 1.75), 6: (5, 4 / 3), 15: (10, 4 / 3), 20: (10, 4 / 3)}


@dataclass(frozen=True)
class Problem:
    """A model to sample: model(x, t) -> eps."""

    sde: deis.Schedule
    model: Callable[[Tensor, Tensor], Tensor]
    noise: Tensor
    reference_steps: int
    reference_phase: str
    running: dict[int, tuple[int, float]] = field(default_factory=dict)
    """nfe -> (nfe of before, how far from its best): the methods and grids that are measured; elsewhere all."""
    every_method: bool = True

    def run(self, plan: deis.Plan) -> Tensor:
        x_0: Tensor = deis.sample(plan, self.model, self.noise)
        return x_0


def digits(num: int = 64, components: int = 30, sde: deis.Schedule | None = None) -> Problem:
    from sklearn.datasets import load_digits
    from sklearn.mixture import GaussianMixture

    data = load_digits().data / 8 - 1
    mixture = GaussianMixture(components, reg_covar=1e-3, random_state=0).fit(data)
    variance, basis = (torch.from_numpy(a) for a in np.linalg.eigh(mixture.covariances_))
    mean, log_weight = torch.from_numpy(mixture.means_), torch.from_numpy(np.log(mixture.weights_))
    sde = deis.VPSDE.linear() if sde is None else sde

    def eps(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = float(sde.alpha(t[0].item())), float(sde.sigma(t[0].item()))
        y = torch.einsum("kji,bkj->bki", basis, x[:, None] - alpha * mean)
        spread = alpha**2 * variance + sigma**2
        log_p = log_weight - 0.5 * (y**2 / spread + spread.log()).sum(-1)
        return sigma * torch.einsum("bk,kij,bkj->bi", log_p.softmax(-1), basis, y / spread)

    x_T = torch.from_numpy(np.random.default_rng(0).standard_normal((num, 64)))
    return Problem(sde, eps, x_T, 1000, "log")


def mnist(num: int = 20) -> Problem:
    network = deis.load_model()
    x_T = torch.from_numpy(np.random.default_rng(3).standard_normal((num, *network.shape), dtype=np.float32))
    return Problem(network.sde, network.conditional(np.arange(num) % 10), x_T, 200, "t", MNIST_RUNNING)


def flow(num: int = 20) -> Problem:
    """Return the problem of the bundled MNIST model as flow matching: its own noise levels, told by t = sigma / (alpha + sigma)."""
    problem, sde = mnist(num), deis.FlowMatching()
    network, vp = problem.model, problem.sde
    assert isinstance(network, deis.Denoiser)

    def eps(x: Tensor, t: Tensor) -> Tensor:
        time = t[0].item()
        log_rho = np.clip(sde.log_rho(np.float64(max(time, 1e-9))), *vp.log_rho(np.array([vp.t_end, vp.t_start])))
        return network.predict(x / np.hypot(1 - time, time), float(vp.t_of_log_rho(log_rho)), "x0")

    return Problem(sde, deis.Denoiser(eps, sde, "x0"), problem.noise, 200, "vp_t", problem.running)


def anime64_network(checkpoint: Path) -> tuple[deis.Schedule, Callable[[Tensor, Tensor], Tensor]]:
    """Return the schedule from t = 290, and the network."""
    if not (checkpoint / "unet.py").exists():
        sys.exit(f"--checkpoint {checkpoint} does not exist: this benchmark needs the weights")
    spec = importlib.util.spec_from_file_location("anime64_unet", checkpoint / "unet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return replace(deis.VPSDE.discrete(module.alphas_cumprod()), sampling_T=290.0), module.load()


def anime64(checkpoint: Path, num: int = 8) -> Problem:
    sde, net = anime64_network(checkpoint)
    x_T = torch.from_numpy(np.random.default_rng(3).standard_normal((num, 3, 64, 64), dtype=np.float32))
    first: dict[int, Tensor] = {}

    def eps(x: Tensor, t: Tensor) -> Tensor:
        """Evaluate the network; its value at the noise itself, which every plan asks for, is kept."""
        if t[0].item() < 290:
            return net(x, t)
        if 290 not in first:
            first[290] = net(x_T, t)
        return first[290]

    return Problem(sde, eps, x_T, 145, "t", ANIME64_RUNNING, every_method=False)


def error(x: Tensor, reference: Tensor) -> float:
    """Return the median over samples of the root mean square difference."""
    return float((x - reference).square().flatten(1).mean(1).sqrt().median())


def methods(problem: Problem) -> Iterator[tuple[dict[str, str], Builder]]:
    """Yield what to call each method, and its builder."""
    for name in NAMED:
        if problem.every_method or name in ("ddim", "ipndm2", "dpmpp_2m_published", "unipc2_bh2"):
            options = {"lower_order_final": True} if "published" in name or "_bh" in name else {}
            entry = find(name)[0]
            about = {"method": name, "form": entry.form, "clock": entry.clock, "order": entry.order_text, "corrector": ""}
            yield about, deis.get_method(name, **options)
    for form in FORMS:
        for clock in CLOCKS:
            for degree, corrector in ((1, None), (2, None), (3, None), (1, 2), (2, 3)):
                few = clock in ("t", "log_rho", "arctan_rho", "vp_t") and degree < 3 and (corrector is None or degree == 1)
                if problem.every_method or few:
                    about = {"method": "adams", "form": form, "clock": clock, "order": str(degree + 1 + (corrector is not None))}
                    about["corrector"] = "" if corrector is None else str(corrector)
                    yield about, deis.adams(form, clock, degree, corrector)


def measure(problem: Problem, path: Path) -> None:
    rows = measured(path)
    done = {tuple(row[field] for field in FIELDS[:-1]) for row in rows}
    reference = problem.run(deis.make_plan(problem.sde, "tab3", problem.reference_steps, problem.reference_phase, 1.0))

    coarser = problem.run(deis.make_plan(problem.sde, "tab3", problem.reference_steps // 2, problem.reference_phase, 1.0))
    print(f"{path.stem}: {problem.reference_steps} steps of tab3, {error(coarser, reference):.1e} from half as many", flush=True)
    grids = GRIDS if problem.every_method else tuple(grid for grid in GRIDS if grid not in {("t", 3.0), ("vp_t", 1.0)})
    path.parent.mkdir(exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if not rows:
            writer.writeheader()
        for nfe in EVALUATIONS:
            running = in_the_running(rows, *problem.running[nfe]) if nfe in problem.running else None
            for about, build in methods(problem):
                for phase, power in grids:
                    if problem.every_method and (phase == "vp_t") != (about["clock"] == "vp_t"):
                        continue  # on a linear VP schedule they are t, or nearly
                    row = about | {"grid": phase if phase == "log" else f"{phase}{power:g}", "nfe": str(nfe)}
                    if tuple(row[field] for field in FIELDS[:-1]) in done or (running and key(row) not in running):
                        continue
                    x = problem.run(deis.make_plan(problem.sde, build, None, phase, power, nfe=nfe))
                    rows.append(row | {"error": f"{error(x, reference):.5g}"})
                    writer.writerow(rows[-1])
                    file.flush()


def key(row: dict[str, str]) -> tuple[str, str]:
    return title(row), row["grid"]


def under_both_names(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows of a problem on a linear VP schedule with t called vp_t, too, as grid and as clock; those measured last."""
    grids = [row | {"grid": f"vp_{row['grid']}"} for row in rows if row["grid"].startswith("t")]
    return [row | {"clock": "vp_t"} for row in (*grids, *rows) if row["clock"] == "t"] + grids + rows


def in_the_running(rows: list[dict[str, str]], nfe: int, factor: float) -> set[tuple[str, str]]:
    """Return the methods and grids whose error at nfe evaluations is within a factor of the best."""
    errors = {key(row): float(row["error"]) for row in rows if int(row["nfe"]) == nfe}
    return {name for name, error in errors.items() if error <= factor * min(errors.values())} | {(AUTO, "vp_t2")}


def title(row: dict[str, str]) -> str:
    if row["method"] != "adams":
        return f"`{row['method']}`"
    return f"{row['form']}, {row['clock']}, order {row['order']}" + (f", corrector {row['corrector']}" if row["corrector"] else "")


def report(rows: list[dict[str, str]]) -> None:
    """Print for each method its error on its best grid, and the best of all at each NFE."""
    columns = sorted({int(row["nfe"]) for row in rows})
    best: dict[tuple[str, int], dict[str, str]] = {}
    for row in rows:
        place = (title(row), int(row["nfe"]))
        if place not in best or float(row["error"]) < float(best[place]["error"]):
            best[place] = row
    names = list(dict.fromkeys(title(row) for row in rows))
    leader = {
        nfe: min((best[name, nfe] for name in names if (name, nfe) in best), key=lambda r: float(r["error"])) for nfe in columns
    }
    print("| method | " + " | ".join(f"{nfe} NFE" for nfe in columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name in names:
        cells = []
        for nfe in columns:
            cell = best.get((name, nfe))
            text = "" if cell is None else f"{float(cell['error']):.4f} ({cell['grid']})"
            cells.append(f"**{text}**" if cell is leader[nfe] else text)
        print(f"| {name} | " + " | ".join(cells) + " |")


WELL_KNOWN = {
    "`auto`": AUTO,
    "`ddim`": "`ddim`",
    "`tab3`": "eps, t, order 4",
    "DPM-Solver++ 2M as in diffusers": "`dpmpp_2m_published`",
    "UniPC-2 as in diffusers": "`unipc2_bh2`",
}


def summary(tables: dict[str, list[dict[str, str]]]) -> None:
    """Print `auto` on its own grid beside well-known methods, each on its best grid, and the best of all."""
    columns = sorted(EVALUATIONS)
    print("\n## Summary\n\n`auto` is measured on its own grid, every other method on the best of its grids.\n")
    print("| problem | method | " + " | ".join(f"{nfe} NFE" for nfe in columns) + " |\n" + "|---" * (len(columns) + 2) + "|")
    for problem, rows in tables.items():
        for name, method in (*WELL_KNOWN.items(), ("the best of all, for this problem", None)):
            cells = []
            for nfe in columns:
                errors = [
                    float(row["error"])
                    for row in rows
                    if int(row["nfe"]) == nfe and method in (None, title(row)) and (method != AUTO or row["grid"] == "vp_t2")
                ]
                cells.append(f"{min(errors):.4f}" if errors else "")
            print(f"| {problem} | {name} | " + " | ".join(cells) + " |")


def overall(tables: dict[str, list[dict[str, str]]], most: int = 12) -> None:
    """Print the methods and grids of the least error over the problems, relative to each problem's best: the geometric mean."""
    print("\n## Over the three problems\n")
    with folded("The best methods and grids at each number of calls"):
        ranking(tables, most)


def ranking(tables: dict[str, list[dict[str, str]]], most: int) -> None:
    """Print the table of each NFE."""
    print("The geometric mean over the problems of the error relative to the best measured there, of one method on one grid.\n")
    for nfe in sorted(EVALUATIONS):
        ratios: list[dict[tuple[str, str], float]] = []
        for problem, found in tables.items():
            rows = found if problem == "anime64" else under_both_names(found)
            errors = {key(row): float(row["error"]) for row in rows if int(row["nfe"]) == nfe}
            ratios.append({name: error / min(errors.values()) for name, error in errors.items()})
        common = set.intersection(*(set(table) for table in ratios))
        score = {name: float(np.exp(np.mean([np.log(table[name]) for table in ratios]))) for name in common}
        print(f"**{nfe} NFE**\n\n| method | grid | over all | " + " | ".join(tables) + " |\n" + "|---" * (3 + len(tables)) + "|")
        for name in sorted(score, key=score.__getitem__)[:most]:
            cells = " | ".join(f"{table[name]:.2f}" for table in ratios)
            print(f"| {name[0]} | {name[1]} | {score[name]:.2f} | {cells} |")
        print()


def page() -> None:
    """Print the page of the three problems."""
    print(f"# Every method on three problems\n\n{INTRODUCTION}")
    tables = {name: measured(results(name)) for name in ("digits", "mnist", "anime64")}
    summary(tables)
    overall(tables)
    print("## Appendix: everything that was tried\n")
    for name, rows in tables.items():
        with folded(f"Every method on {name}"):
            report(rows)


def results(problem: str) -> Path:
    """Return the file of a problem's measurements."""
    return RESULTS / f"methods_{problem}.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem", choices=["digits", "mnist", "anime64", "report"])
    parser.add_argument("--checkpoint", type=Path, default=Path("../shared/checkpoints/anime64"))
    args = parser.parse_args()
    if args.problem == "report":
        page()
        return
    problems: dict[str, Callable[[], Problem]] = {"digits": digits, "mnist": mnist, "anime64": partial(anime64, args.checkpoint)}
    torch.set_grad_enabled(False)
    measure(problems[args.problem](), results(args.problem))


if __name__ == "__main__":
    main()
