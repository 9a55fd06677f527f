"""What is drawn of a plan is what is in it, for every method; and what a notebook shows is well formed."""

import io
import subprocess
import sys
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import as_file, files
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

import deis
from deis.methods.registry import REGISTRY
from deis.plots import GRIDS, NoiseScale, noise_levels, plot_small, schedule_of, staged, usual_grids, weight_columns

VP, EDM, FLOW = deis.VPSDE.linear(), deis.EDM(), deis.FlowMatching()
DISCRETE = deis.VPSDE.discrete(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
NAMES = [entry.name.replace("<q>", "2").replace("<tableau>", "3kutta") for entry in REGISTRY]
PLANS = {
    "tab3": deis.make_plan(VP, "tab3", 6),
    "stages": deis.make_plan(VP, "rhork_3kutta", 6),
    "corrector": deis.make_plan(VP, "unipc3", 8),
    "noise": deis.make_plan(EDM, "ancestral", 8),
    "noise in stages": deis.make_plan(VP, "seeds_3", 10),
    "no calls": deis.make_plan(VP, "belm", 5),
    "flow": deis.make_plan(FLOW, nfe=5),
    "one row": deis.make_plan(FLOW, "ddim", 1),
    "a hundred rows": deis.make_plan(VP, "tab3", 100),
    "up": deis.make_plan(VP, "tab1", 12, direction="encode"),
    "up from sigma = 0": deis.make_plan(deis.FlowMatching(sampling_T=0.99), "auto", 6, direction="encode"),
    "discrete": deis.make_plan(DISCRETE, nfe=5),
}


def calibrated() -> deis.Plan:
    """Return deis.load_model().plan(5), without its network."""
    with as_file(files("deis") / "assets" / "mnist" / "plans" / "nfe05.json") as path:
        return deis.load_plan(path)


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest) -> deis.Plan:
    return PLANS[request.param]


def lines(axes: Any) -> dict[str, Any]:
    return {line.get_label(): np.stack(line.get_data(), axis=1) for line in axes.lines}


def mesh_of(axes: Any) -> Any:
    (mesh,) = [found for found in axes.collections if isinstance(found, QuadMesh)]
    return mesh.get_array()


def test_the_times_drawn_are_the_log_rho_of_the_states(plan: deis.Plan) -> None:
    figure, scale = plan.plot(), NoiseScale.of(noise_levels(plan))
    drawn = lines(figure.axes[0])["this plan"][:, 0]
    on = np.concatenate([[True], plan.accepts])
    with np.errstate(divide="ignore"):
        log_rho = np.log(plan.sigma[on] / plan.alpha[on])
    finite = np.isfinite(log_rho)
    np.testing.assert_allclose(drawn[finite], log_rho[finite], rtol=1e-12, atol=1e-12)
    assert len(drawn) == len(plan.ts)
    assert (np.diff(drawn) < 0).all() or plan.direction == "encode"
    np.testing.assert_array_equal(np.isin(drawn, [scale.low - scale.margin, scale.high + scale.margin]), ~finite)
    assert figure.axes[0].xaxis_inverted() == (plan.direction == "decode")  # from left to right, as it runs


def test_the_stages_are_drawn_apart() -> None:
    plan = PLANS["stages"]
    stages = lines(plan.plot().axes[0])["a stage"][:, 0]
    np.testing.assert_allclose(stages, VP.log_rho(plan.t[1:][~plan.accepts]), rtol=1e-9)


def test_the_map_holds_the_columns_of_the_table(plan: deis.Plan) -> None:
    parts = [plan.keep_x[:, None], plan.keep_p, *([plan.keep_z[:, None]] if plan.stochastic else [])]
    if (plan.next_x != 1).any() or plan.next_p.any():
        parts += [plan.next_x[:, None], plan.next_p]
    table, drawn = np.hstack(parts), mesh_of(plan.plot().axes[1])
    assert drawn.shape == table.shape
    np.testing.assert_array_equal(drawn.filled(0), table)
    np.testing.assert_array_equal(np.ma.getmaskarray(drawn), table == 0)
    np.testing.assert_array_equal(mesh_of(plot_small(plan).axes[1]).filled(0), table)


def test_the_numbers_written_are_the_weights() -> None:
    plan = PLANS["corrector"]
    written = {text.get_position(): float(text.get_text()) for text in plan.plot().axes[1].texts}
    for j, column in enumerate(weight_columns(plan).values()):
        for i, weight in enumerate(column):
            assert written.get((j + 0.5, i + 0.5), 0) == pytest.approx(weight, rel=0.01)
    assert not PLANS["a hundred rows"].plot().axes[1].texts


def test_the_path_marks_states_stages_calls_and_noise(plan: deis.Plan) -> None:
    found, n = lines(plan.plot().axes[2]), len(plan.rows)
    rows = {name: set(found[name][:, 0].astype(int)) for name in found if name.startswith(("state", "stage"))}
    stage = {i for i in range(1, n) if not plan.accepts[i - 1]}
    for name, wanted in {"state": set(range(n)) - stage, "stage": stage}.items():
        assert rows.get(name, set()) == {i for i in wanted if plan.calls[i]}
        assert rows.get(f"{name}, no call", set()) == {i for i in wanted if not plan.calls[i]}
    assert found["result"][0, 0] == n
    noisy = {int(x) for x in found["noise is added"][::3, 0]} if "noise is added" in found else set()
    assert noisy == set(np.flatnonzero(plan.keep_z).tolist())


@pytest.mark.parametrize("sde", [VP, FLOW], ids=lambda sde: sde.name)
def test_every_method_draws(sde: deis.Schedule) -> None:
    for name in NAMES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                plan = deis.make_plan(sde, name, 3)
            except ValueError:  # a form or a noise that the schedule does not have
                continue
        figure = plan.plot()
        assert isinstance(figure, Figure)
        assert mesh_of(figure.axes[1]).shape[0] == len(plan.rows), name


def test_a_calibrated_plan_draws() -> None:
    plan = calibrated()
    figure = plan.plot()
    assert "state, no call" in lines(figure.axes[2])
    assert plan.method in figure.get_suptitle()
    file = io.BytesIO()
    figure.savefig(file, format="pdf")
    assert file.getvalue().startswith(b"%PDF")


@pytest.mark.parametrize(
    "sde", [VP, deis.VPSDE.cosine(), deis.SubVPSDE.linear(), deis.VESDE(), EDM, FLOW, deis.FlowMatching(shift=3)]
)
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_the_usual_grids_are_those_of_make_grid(sde: deis.Schedule, direction: str) -> None:
    method = "ddim" if direction == "decode" or np.isfinite(sde.log_alpha(sde.t_start)) else "auto"
    plan = deis.make_plan(sde, method, 7, direction=direction)
    for grids in (usual_grids(plan, schedule_of(plan)), usual_grids(plan, None)):
        for name, phase, power in GRIDS:
            try:
                wanted = sde.log_rho(deis.make_grid(sde, 7, phase, power))
            except ValueError:
                wanted = None
            found = grids[name]
            if found is None:
                assert wanted is None or phase == "t"
            else:
                assert wanted is not None
                np.testing.assert_allclose(found[::-1] if direction == "encode" else found, wanted, rtol=1e-6, atol=1e-6)


def test_a_schedule_that_its_name_does_not_tell_is_asked_for() -> None:
    plan = PLANS["discrete"]
    assert schedule_of(plan) is None
    assert schedule_of(replace(plan, schedule="VPSDE.linear(x, 2)")) is None
    assert schedule_of(replace(PLANS["tab3"], schedule="EDM()")) is None
    assert any("plan.plot(sde)" in text.get_text() for text in plan.plot().axes[0].texts)
    drawn = lines(plan.plot(DISCRETE).axes[0])["t, even"][:, 0]
    np.testing.assert_allclose(drawn, DISCRETE.log_rho(deis.make_grid(DISCRETE, plan.num_step, "t", 1.0)))
    with pytest.raises(ValueError, match="not the schedule of this plan"):
        plan.plot(VP)
    with pytest.raises(TypeError, match="sde must be a noise schedule"):
        plan.plot("vp")  # type: ignore[arg-type]


def test_nothing_is_drawn_outside_or_left_behind(plan: deis.Plan) -> None:
    before = dict(mpl.rcParams)
    figure = plan.plot()
    figure.draw_without_rendering()
    for part in (*figure.axes, *figure.texts):
        box = part.get_tightbbox()
        assert box is not None
        assert box.x0 >= -1
        assert box.x1 <= figure.bbox.x1 + 1
    assert dict(mpl.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


# --- HTML -----------------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects cells, and checks that what opens closes."""

    EMPTY = ("br", "meta")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_html_holds_a_picture_and_the_numbers(plan: deis.Plan) -> None:
    page = Reader(plan._repr_html_())
    assert {"svg", "details", "table"} <= page.tags
    numbers = [float(cell) for cell in page.cells if cell.strip("+-.e0123456789") == ""]
    for column in (plan.t, plan.keep_x, plan.keep_p, plan.keep_z, plan.next_x, plan.next_p):
        for weight in np.unique(column):
            assert float(f"{weight:.6g}") in numbers


def test_html_escapes_what_a_file_may_say() -> None:
    page = replace(PLANS["tab3"], method="<script>", grid="a & b")._repr_html_()
    assert "<script>" not in page
    assert "a &amp; b" in page


def test_the_table_of_many_rows_is_cut() -> None:
    page = Reader(deis.make_plan(VP, "ddim", 500)._repr_html_())
    assert "..." in page.cells


def test_without_matplotlib_there_is_the_table_and_a_clear_error() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import deis; plan = deis.make_plan(deis.VPSDE.linear(), nfe=3); page = plan._repr_html_()\n"
        "assert '<svg' not in page and '<details open' in page and '<td>0.001</td>' in page\n"
        "print('the table')\nplan.plot()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert done.stdout == "the table\n"
    assert last.startswith("ImportError: a picture of a plan needs the extra 'see'")
    assert last.endswith("pip install '.[see]' in a checkout of deis")


def test_a_calibration_report_is_a_text_and_a_table() -> None:
    plan = calibrated()
    report = deis.calibration_report(plan)
    page = Reader(report._repr_html_())
    assert isinstance(report, str)
    assert "table" in page.tags
    for row in plan.provenance["stages"]:
        for text in (row["stage"], f"{row['after']:.5f}", f"{row['evaluations']:.0f}"):
            assert text in page.cells
            assert text in report


def test_the_next_part_is_drawn_where_there_is_one() -> None:
    assert {name: staged(plan) for name, plan in PLANS.items() if name in ("tab3", "stages", "corrector", "no calls")} == {
        "tab3": False, "stages": True, "corrector": True, "no calls": False,
    }  # fmt: skip
