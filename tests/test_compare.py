"""`deis.compare`: the numbers of `evaluate`, what an interrupt leaves, what is not overwritten, and a page that needs nothing."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

import deis
from deis.cli import main
from deis.comparison.figures import INK, figures
from deis.comparison.identity import Identity
from deis.comparison.lineup import entries
from deis.comparison.noise import noise_for
from deis.comparison.report import number
from deis.comparison.result import NOT_FINITE, Comparison, Row
from deis.evaluation import evaluate
from deis.model.weights import networks, weights_digest

from .oracle import two_modes

SDE = deis.VPSDE.linear()
EPS, SOLUTION = two_modes(SDE)


def model(x: Tensor, t: Tensor) -> Tensor:
    return torch.from_numpy(EPS(x.numpy(), t.numpy()))


MODEL = deis.Denoiser(model, SDE, shape=(1, 4, 4))
FEW: dict[str, Any] = {"methods": ("auto", "ddim"), "nfes": (4, 6), "reference_steps": 64}


def noise(n: int = 6) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((n, 1, 4, 4)))


def counting(calls: list[int], function: Callable[..., Tensor] = model, most: float = np.inf) -> deis.Denoiser:
    """Return a model that counts the samples it evaluates, and is interrupted when there are too many."""

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        if sum(calls) > most:
            raise KeyboardInterrupt
        return function(x, t)

    return deis.Denoiser(counted, SDE, shape=(1, 4, 4))


# --- the numbers --------------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_evaluate() -> None:
    real = np.random.default_rng(1).standard_normal((40, 3))
    measures: dict[str, Any] = {"extractor": lambda images: images.flatten(1)[:, :3], "real": real}
    found = deis.compare(MODEL, noise(8), batch=3, grids=("own", "rho:7"), **FEW, **measures)
    assert [(row.method, row.grid, row.nfe) for row in found.rows[:4]] == [
        ("auto", "", 4), ("auto", "", 6), ("auto", "rho:7", 4), ("auto", "rho:7", 6),
    ]  # fmt: skip
    for row in (found.rows[1], found.rows[-1]):
        assert row.plan is not None
        expected = evaluate(row.plan, MODEL, noise(8), reference=found.reference, **measures)
        for name, own in (("rmse", row.error), ("psnr", row.psnr), ("frechet", row.frechet), ("recall", row.recall)):
            assert own == pytest.approx(expected[name], rel=1e-6), name
        assert row.plan.nfe == row.nfe
        assert row.seconds is not None
        assert row.bare is not None
        assert row.seconds > 0 < row.bare


def test_the_reference_is_the_solution_and_errors_arise_along_it() -> None:
    found = deis.compare(MODEL, noise(), batch=4, **FEW)
    for row in found.rows:
        assert row.plan is not None
        exact = SOLUTION(row.plan.ts, noise().numpy().ravel()).reshape(-1, 6, 16)
        np.testing.assert_allclose(found.reference.reshape(6, 16), exact[-1], atol=1e-4)
        states = deis.sample(row.plan, MODEL, noise(), trajectory=True).numpy().reshape(exact.shape)
        expected = np.median(np.sqrt(np.square(states - exact).mean(2)), axis=1)
        size = [np.hypot(SDE.alpha(t), SDE.sigma(t)) for t in row.plan.ts]
        np.testing.assert_allclose(np.array(row.errors, dtype=float), expected / size, atol=2e-4)
        np.testing.assert_allclose(row.vp_t, row.plan.ts, rtol=1e-6)


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("rhork_2heun", 2), ("tab2", 3)])
def test_slopes_are_the_orders_of_the_methods(method: str, order: int) -> None:
    found = deis.compare(MODEL, noise(2), methods=[method], nfes=(24, 36, 54), reference_steps=512)
    slope = found.slope(method)
    assert slope is not None
    assert slope == pytest.approx(-order, abs=0.3)


def test_what_the_reference_cannot_tell_is_left_out_of_the_slope() -> None:
    rows = tuple(Row("ddim", "", nfe, error=error) for nfe, error in ((10, 0.1), (20, 0.05), (40, 1e-9)))
    found = Comparison(rows, np.zeros((1, 2)), {}, None, 1e-6, {}, Identity("", ()))
    assert found.slope("ddim") == pytest.approx(-1)
    best = found.best()
    assert best is not None
    assert best.nfe == 40
    assert found.slope("auto") is None


def test_a_stochastic_method_and_a_plan_take_part() -> None:
    plan = deis.make_plan(SDE, "tab2", 5)
    both = [
        deis.compare(MODEL, noise(), batch=batch, methods=["ancestral", plan], nfes=(4,), reference_steps=32) for batch in (2, 6)
    ]
    assert [(row.series, row.nfe) for row in both[0].rows] == [("ancestral", 4), ("plan tab2", 5)]
    assert both[0].rows[0].error == pytest.approx(both[1].rows[0].error, rel=1e-9)


def test_samples_may_be_a_number_of_arrays_in_numpy_and_jax() -> None:
    drawn = deis.compare(MODEL, 3, seed=1, methods=["ddim"], nfes=(3,), reference_steps=16)
    x_T = np.stack([np.random.default_rng((1, i)).standard_normal((1, 4, 4), dtype=np.float32) for i in range(3)])
    x_T *= np.float32(SDE.sigma(1.0))
    same = deis.compare(deis.Denoiser(EPS, SDE), x_T.astype(float), methods=["ddim"], nfes=(3,), reference_steps=16)
    assert drawn.rows[0].error == pytest.approx(same.rows[0].error, rel=1e-4)
    with pytest.raises(ValueError, match="does not tell the shape of its samples; give the noise itself"):
        deis.compare(deis.Denoiser(EPS, SDE), 3)


def test_jax_is_compared() -> None:
    jnp = pytest.importorskip("jax.numpy")

    def eps(x: Any, t: Any) -> Any:
        rho = jnp.exp(0.5 * jnp.log(jnp.expm1(0.1 * t + 19.9 * t**2 / 2)))[:, None]
        return rho / jnp.sqrt(1 + rho**2) * x / (0.25 / (1 + rho**2) + rho**2 / (1 + rho**2))

    found = deis.compare(deis.Denoiser(eps, SDE), jnp.ones((2, 3)), methods=["ddim"], nfes=(3,), reference_steps=16)
    assert found.reference_pictures is None
    assert found.rows[0].error is not None
    assert found.rows[0].error > 0


# --- cells without numbers ----------------------------------------------------------------------------------------------


def test_a_setting_that_is_not_finite_is_a_marked_cell(tmp_path: Path) -> None:
    bad = deis.make_plan(SDE, "ddim", 4).t[1].item()

    def broken(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t) * (torch.nan if t[0].item() == pytest.approx(bad, abs=1e-12) else 1)

    few = FEW | {"reference_steps": 63}  # which has not the times of 4 steps
    found = deis.compare(deis.Denoiser(broken, SDE), noise(), out=tmp_path / "report", **few)
    assert [(row.series, row.nfe, row.note) for row in found.rows if row.note] == [(m, 4, NOT_FINITE) for m in ("auto", "ddim")]
    assert found.slope("ddim") is None
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count(f">{NOT_FINITE}</td>") == 4
    json.loads((tmp_path / "report" / "comparison.json").read_text(), parse_constant=pytest.fail)


def test_a_later_batch_that_is_not_finite_marks_its_cell() -> None:
    """With an extractor, for which such a batch has no features."""
    bad = deis.make_plan(SDE, "ddim", 4).t[1].item()

    def broken(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t) * (torch.nan if len(x) == 1 and t[0].item() == pytest.approx(bad, abs=1e-12) else 1)

    real: dict[str, Any] = {"real": np.random.default_rng(0).standard_normal((9, 2))}
    real |= {"extractor": lambda images: images.reshape(len(images), -1)[:, :2]}
    found = deis.compare(
        deis.Denoiser(broken, SDE), noise(), methods=["ddim"], nfes=[4], reference_steps=63, batch=5, **real
    )  # the last batch is of one sample
    assert [row.note for row in found.rows] == [NOT_FINITE]


def test_what_has_no_plan_is_a_marked_cell() -> None:
    found = deis.compare(MODEL, noise(), methods=["calibrated", "ddim"], nfes=(3,), reference_steps=16)
    assert "no calibrated plan of 3 evaluations" in found.rows[0].note
    best = found.best(3)
    assert best is not None
    assert best.method == "ddim"
    plan = deis.make_plan(SDE, "ddim", 3)
    (entry,) = entries(deis.FlowMatching(), ["ddim"], [("log", None)], [3], {})
    assert (entry.plan, entry.grid) == (None, "log")
    assert "ts_phase='log' has no grid where alpha is 0" in entry.reason
    with pytest.raises(ValueError, match="is of the schedule VPSDE"):
        entries(deis.FlowMatching(), [plan], [None], [3], {})
    two = entries(SDE, [plan, deis.make_plan(SDE, "ddim", 3, "log")], [None], [5], {})
    assert [(entry.method, entry.nfe) for entry in two] == [("plan ddim", 3), ("plan ddim (2)", 3)]


# --- what is kept -------------------------------------------------------------------------------------------------------


def test_an_interrupted_comparison_goes_on(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {**FEW, "work": tmp_path}
    whole: list[int] = []
    expected = deis.compare(counting(whole), noise(), **FEW)
    with pytest.raises(KeyboardInterrupt):
        deis.compare(counting([], most=sum(whole) - 3 * 6), noise(), **arguments)
    rest: list[int] = []
    found = deis.compare(counting(rest), noise(), **arguments)
    cheap = 2 * 2 + 2 * 6 + 6  # the probe, the check of the reference, and the first call that is not timed
    assert 6 * 6 <= sum(rest) <= cheap + 6 * 6  # the last cell alone
    assert [row.error for row in found.rows] == [row.error for row in expected.rows]
    again: list[int] = []
    deis.compare(counting(again), noise(), **arguments)
    assert sum(again) <= cheap


def test_the_reference_is_computed_once(tmp_path: Path) -> None:
    first: list[int] = []
    deis.compare(counting(first), noise(), methods=["ddim"], nfes=(2,), reference_steps=64, work=tmp_path)
    second: list[int] = []
    deis.compare(counting(second), noise(), methods=["ddim"], nfes=(3,), reference_steps=64, work=tmp_path)
    assert sum(first) > 64 * 6
    assert sum(second) <= 2 * 2 + 2 * 6 + 6 + 3 * 6
    deis.compare(
        counting(second, lambda x, t: model(x, t) / 2), noise(), methods=["ddim"], nfes=(3,), reference_steps=64, work=tmp_path
    )
    assert sum(second) > 64 * 6
    assert len(list(tmp_path.iterdir())) == 2


def test_weights_are_found_wherever_they_are() -> None:
    net = nn.Linear(3, 3)

    class Holder:
        def __init__(self) -> None:
            self.inner = {"net": [net]}

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            return self.inner["net"][0](x)

    def closure(x: Tensor, t: Tensor) -> Tensor:
        return net(x)

    for function in (net, closure, Holder(), Holder().__call__, deis.Denoiser(closure, SDE)):
        assert list(networks(function)) == [net]
    before = weights_digest(closure)
    assert before == weights_digest(Holder()) != weights_digest(model) == ""
    with torch.no_grad():
        net.weight[0, 0] += 1
    assert weights_digest(closure) != before


def test_a_folder_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds files that are no comparison \(thesis.tex\)"):
        deis.compare(MODEL, noise(), out=tmp_path, **FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    deis.compare(MODEL, noise(), out=tmp_path / "a", **FEW)
    page = (tmp_path / "a" / "index.html").read_bytes()
    half = deis.Denoiser(lambda x, t: model(x, t) / 2, SDE)
    for other, x_T in ((half, noise()), (MODEL, -noise()), (MODEL, noise(8))):  # whose first 6 samples are the same
        with pytest.raises(ValueError, match="holds a comparison of another model, schedule, noise"):
            deis.compare(other, x_T, out=tmp_path / "a", **FEW)
    assert (tmp_path / "a" / "index.html").read_bytes() == page


# --- the page -----------------------------------------------------------------------------------------------------------

VOID = {"meta", "br", "img", "link", "hr"}


class Page(HTMLParser):
    """Reads a page: its cells of tables, and what it takes from elsewhere; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.outside: list[str] = []
        self.inside: list[str] = []
        self._rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert tag not in ("script", "link", "iframe", "object")
        self.ids += [values["id"] or ""] if "id" in values else []
        for name in ("src", "href", "xlink:href"):
            value = values.get(name)
            if value is not None and value.startswith("#"):
                self.inside.append(value[1:])
            elif value is not None and not value.startswith("data:"):
                self.outside.append(value)
        if tag == "table":
            self._rows = self.tables.setdefault(values["id"] or "", [])
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self._rows[-1][-1] += data.strip()


def test_the_page_stands_alone_and_shows_the_numbers_of_the_json(tmp_path: Path) -> None:
    real = np.random.default_rng(1).standard_normal((40, 3))
    found = deis.compare(
        MODEL, noise(), extractor=lambda images: images.flatten(1)[:, :3], real=real, name="<b>&", out=tmp_path / "r", **FEW
    )
    text = (tmp_path / "r" / "index.html").read_text()
    page, numbers = Page(text), json.loads((tmp_path / "r" / "comparison.json").read_text())
    assert page.outside == []
    assert "<b>&" not in text
    assert "url(http" not in text
    assert "@import" not in text
    assert len(page.ids) == len(set(page.ids))
    referred = {*page.inside, *re.findall(r"url\(#([^)]+)\)", text)}
    assert referred
    assert referred <= set(page.ids)
    assert "currentColor" in text
    assert INK not in text
    wide = {(cells[0], nfe): cell for cells in page.tables["errors"][1:] for nfe, cell in zip(found.nfes, cells[1:], strict=False)}
    for row, cells in zip(numbers["rows"], page.tables["rows"][1:], strict=True):
        assert cells[:3] == [row["method"], str(row["nfe"]), number(row["error"])]
        assert wide[row["method"], row["nfe"]] == number(row["error"])
        assert cells[4] == number(row["frechet"])
    assert numbers["slopes"]["ddim"] == found.slope("ddim")
    names = {"errors", "frechet", "pictures", "trajectory", "seconds"}
    assert {path.stem for path in (tmp_path / "r").glob("*.png")} == {path.stem for path in (tmp_path / "r").glob("*.svg")} == names
    for name in names:
        ElementTree.parse(tmp_path / "r" / f"{name}.svg")
        with Image.open(tmp_path / "r" / f"{name}.png") as image:
            assert image.width > 900


def test_figures_draw_the_numbers() -> None:
    found = deis.compare(MODEL, noise(), **FEW)
    drawn = figures(found)
    assert set(drawn) == {"errors", "pictures", "trajectory", "seconds"}
    lines = drawn["errors"].axes[0].lines
    for line, series in zip(lines, found.series, strict=True):
        np.testing.assert_array_equal(line.get_xydata(), [(row.nfe, row.error) for row in found.of(series)])
    assert len({(line.get_marker(), line.get_color()) for line in lines}) == len(lines)
    texts = [text.get_text() for text in drawn["errors"].legends[0].get_texts()]
    assert all(re.fullmatch(r"\w+, slope \N{MINUS SIGN}?\d\.\d", text) for text in texts)
    columns = drawn["pictures"].axes
    assert len(columns) == 2 * 3
    np.testing.assert_array_equal(columns[2].images[0].get_array(), columns[5].images[0].get_array())  # the reference is last


# --- the command --------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def test_the_command_writes_a_report_of_the_bundled_model(tmp_path: Path) -> None:
    out = tmp_path / "report"
    arguments = (
        "--num",
        2,
        "--nfe",
        "3,4",
        "--method",
        "calibrated",
        "--method",
        "auto",
        "--reference-steps",
        8,
        "--allow-rough",
        "--out",
        out,
    )
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert f"wrote {out / 'index.html'}" in result.output
    numbers = json.loads((out / "comparison.json").read_text())
    for row in numbers["rows"]:
        assert number(row["error"]) in result.output
    assert [(row["method"], row["nfe"]) for row in numbers["rows"]] == [
        ("calibrated", 3), ("calibrated", 4), ("auto", 3), ("auto", 4),
    ]  # fmt: skip
    assert "holds a comparison of another model" in run(*arguments, "--seed", 1).output


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    assert "holds files that are no comparison (x)" in run("--out", tmp_path).output
    assert "--real and --features belong together" in run("--features", "net.pt", "--out", tmp_path / "r").output
    assert "jax is not compared by this command" in run("--backend", "jax", "--out", tmp_path / "r").output
    assert "grid='nonsense' is unknown" in run("--grid", "nonsense", "--num", 1, "--out", tmp_path / "r").output
    assert "method='nonsense' is unknown" in run("--method", "nonsense", "--num", 1, "--out", tmp_path / "r").output


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("deis.comparison.measure.compared", interrupted)
    arguments = ("--num", 1, "--nfe", 3, "--method", "ddim", "--reference-steps", 4, "--allow-rough", "--out", tmp_path / "report")
    result = run(*arguments)
    assert result.exit_code == 130
    assert f"is in {tmp_path / 'report' / 'work'}: give the same command to go on" in result.output


def test_a_notebook_shows_the_errors_and_their_figure() -> None:
    found = deis.compare(counting([]), noise(), **FEW)
    page = found._repr_html_()
    ElementTree.fromstring(page.replace("xlink:", ""))
    assert "<svg" in page
    for row in found.rows:
        assert f"<td>{row.error:.3g}</td>" in page
    nothing = replace(found, rows=(replace(found.rows[0], error=None, note=NOT_FINITE),))._repr_html_()
    assert "<svg" not in nothing
    assert f"<td>{NOT_FINITE}</td>" in nothing


def test_a_notebook_without_matplotlib_shows_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    found = deis.compare(counting([]), noise(), **FEW)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert found._repr_html_().startswith("<div><details open>")


def test_what_is_kept_is_of_one_size_of_batch(tmp_path: Path) -> None:
    """Its times are."""
    calls: list[int] = []
    taken = []
    for batch in (2, 2, 6):
        before = sum(calls)
        deis.compare(counting(calls), noise(), work=tmp_path, batch=batch, **FEW)
        taken.append(sum(calls) - before)
    cells = 6 * 2 * (4 + 6)  # samples, methods, evaluations
    assert taken[1] < cells <= taken[2]


def test_a_number_of_samples_is_drawn_in_the_framework_of_the_network() -> None:
    found = noise_for(deis.load_model(backend="jax"), 2, 3.0, 0)
    assert isinstance(found, jax.Array)
    np.testing.assert_array_equal(np.asarray(found), noise_for(deis.load_model(), 2, 3.0, 0).numpy())
