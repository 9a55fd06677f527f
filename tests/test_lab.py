"""The lab without its page: entries are checked, code makes the same pictures, models stay in their folders, paths converge."""

import io
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.integrate import solve_ivp
from scipy.stats import multivariate_normal

import deis
from deis.cli.lab import free_port
from deis.lab.choices import CALIBRATED, METHODS, OWN, Choice, Request
from deis.lab.draw import animation, error_html, row, strip_html
from deis.lab.library import BUNDLED, Library
from deis.lab.plane import DATA, SPREAD, Mixture, paths
from deis.lab.session import Session, code_of, run
from deis.model.pretrained import Pretrained

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in sys.path)}
ASSETS = Path(deis.__file__).parent / "assets" / "mnist"


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(Library())


def request_of(choice: Choice | None = None, **values: Any) -> Request:
    return Request(choice or Choice(nfe=2), BUNDLED, **{"num": 2, **values})


# --- entries -----------------------------------------------------------------------------------------------------------


def test_a_choice_is_the_plan_of_make_plan(session: Session) -> None:
    sde = session.library.load(BUNDLED).sde
    choice = Choice.read(method="tab<q>", degree=2, nfe=7, grid="rho", power=" 5 ", options="lower_order_final=true, corrector=2")
    wanted = deis.make_plan(sde, "tab2", nfe=7, ts_phase="rho", ts_order=5.0, lower_order_final=True, corrector=2)
    assert session.plan(request_of(choice))[0] == wanted
    tableau = Choice(method="rhork_<tableau>", tableau="3kutta", nfe=9)
    assert session.plan(request_of(tableau))[0] == deis.make_plan(sde, "rhork_3kutta", nfe=9)
    own = Choice(method=CALIBRATED, nfe=5)
    assert session.plan(request_of(own))[0] is session.library.load(BUNDLED).plans[5]


WRONG_CHOICES: list[tuple[dict[str, Any], str]] = [
    ({"power": "seven"}, "power='seven' must be a number greater than 0"),
    ({"power": "-1"}, "power=-1.0 must be a finite number, greater than 0"),
    ({"power": "nan"}, "power=nan must be a finite number"),
    ({"nfe": 101}, "nfe=101 must be a finite number, at most 100"),
    ({"nfe": 0}, "nfe=0 must be a whole number of at least 1"),
    ({"nfe": None}, "nfe=None must be a whole number"),
    ({"method": "nonsense"}, "method='nonsense' is unknown"),
    ({"method": "tab<q>", "degree": 10}, "degree=10 must be a finite number, at most 9"),
    ({"method": "rhork_<tableau>", "tableau": "nonsense"}, "tableau='nonsense' is unknown"),
    ({"grid": "nonsense"}, "grid='nonsense' is unknown"),
    ({"options": "eta"}, "option 'eta' must be NAME=VALUE"),
    ({"options": "nfe=3"}, "option 'nfe' is no option of a method"),
    ({"options": "eta=NaN"}, "option eta=nan must be finite"),
    ({"options": 'eta={"a":1}'}, "must be a number, true, false, null or a word"),
    ({"options": 3}, "options must be text"),
]


@pytest.mark.parametrize(("values", "message"), WRONG_CHOICES)
def test_a_wrong_entry_is_refused_with_its_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message.replace("(", r"\(")):
        Choice.read(**values)


WRONG_PLANS: list[tuple[dict[str, Any], str]] = [
    ({"options": "nonsense=3"}, "does not take the options \\['nonsense'\\]"),
    ({"options": "__import__('os')=3"}, "does not take the options"),
    ({"method": "ipndm<q>", "degree": 5}, "ipndm"),
    ({"method": CALIBRATED, "nfe": 50}, "nfe=50: its own plans are of 3, 4, 5, 6, 7, 8, 9, 10 evaluations"),
    ({"method": CALIBRATED, "power": "2"}, "leave grid, power and options empty"),
    ({"grid": "t", "power": "1e20"}, "gives times that do not decrease"),
]


@pytest.mark.parametrize(("values", "message"), WRONG_PLANS)
def test_a_plan_that_cannot_be_built_is_refused(session: Session, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        session.plan(request_of(Choice.read(**values)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num": 17}, "pictures=17"),
        ({"num": 0}, "pictures=0"),
        ({"seed": -1}, "seed=-1"),
        ({"guidance": 11}, "guidance=11"),
        ({"guidance": None}, "guidance=None"),
        ({"label": 10}, "class=10 must be a finite number, at most 9"),
    ],
)
def test_a_wrong_request_is_refused(session: Session, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        session.run(request_of(**values))


def test_a_warning_of_the_library_is_told(session: Session) -> None:
    with pytest.warns(UserWarning, match="is off by") as caught:
        plan = deis.make_plan(session.library.load(BUNDLED).sde, "rhork_2heun", nfe=3)
    found, notes = session.plan(request_of(Choice(method="rhork_<tableau>", nfe=3)))
    assert found == plan
    assert notes == [str(warning.message) for warning in caught]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_offer_makes_a_plan(method: str) -> None:
    plan, _ = Choice(method=method, degree=2, nfe=12).plan_on(deis.VPSDE.linear())
    assert plan.nfe == 12


# --- pictures ----------------------------------------------------------------------------------------------------------


def test_a_result_is_what_deis_sample_makes(session: Session) -> None:
    request = request_of(Choice(method="rhork_<tableau>", nfe=4), guidance=2.0, label=7, seed=3)
    result, model = session.run(request), session.library.load(BUNDLED)
    noise = np.stack([np.random.default_rng((3, i)).standard_normal(model.shape, dtype=np.float32) for i in range(2)])
    x_T = torch.from_numpy(noise * np.float32(result.plan.sigma[0]))
    seen: list[torch.Tensor] = []
    denoiser = model.conditional([7, 7], 2.0)
    x_0 = deis.sample(result.plan, denoiser, x_T, callback=lambda i, t, x: seen.append(x))
    np.testing.assert_array_equal(result.images, x_0.numpy())
    assert [evaluation.i for evaluation in result.evaluations] == [0, 1, 2, 3]
    np.testing.assert_array_equal(result.evaluations[0].x, x_T.numpy())
    np.testing.assert_array_equal(result.evaluations[2].x, seen[0].numpy())
    wanted = denoiser.predict(x_T, float(result.plan.t[0])).numpy()
    np.testing.assert_allclose(result.evaluations[0].x_0, wanted, atol=1e-5)


def test_of_many_evaluations_twelve_are_kept(session: Session) -> None:
    result = session.run(request_of(Choice(method="ddim", nfe=25), num=1))
    numbers = [evaluation.i for evaluation in result.evaluations]
    assert (len(numbers), numbers[0], numbers[-1]) == (12, 0, 24)
    assert "12 of 25 evaluations are shown" in strip_html(result, 0)


CODES: list[tuple[Choice, dict[str, Any]]] = [
    (Choice(), {}),
    (Choice(method="tab<q>", degree=2, nfe=3, grid="rho", power=5.0, options={"lower_order_final": True}), {"label": 4, "num": 1}),
    (Choice(method="ddim", nfe=3, options={"eta": 0.7}), {"guidance": 1.5, "seed": 11, "num": 3}),
    (Choice(method=CALIBRATED, nfe=4), {"seed": 2}),
]


@pytest.mark.filterwarnings("ignore:.* is off by:UserWarning")
@pytest.mark.parametrize(("choice", "values"), CODES)
def test_the_code_makes_the_same_pictures(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: Choice, values: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    request, made = request_of(choice, **values), dict[str, Any]()
    images = session.run(request).images
    exec(session.code(request), made)
    np.testing.assert_array_equal(made["x_0"], images)
    with Image.open("lab.png") as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(row(images)))


def test_the_code_runs_in_a_process_of_its_own_and_names_its_model(tmp_path: Path) -> None:
    folder = tmp_path / "it's a model"
    shutil.copytree(ASSETS, folder)
    session = Session(Library([tmp_path]))
    request = replace(request_of(), model=str(folder))
    (tmp_path / "code.py").write_text(session.code(request))
    subprocess.run([sys.executable, "code.py"], cwd=tmp_path, check=True, env=ENVIRONMENT)
    with Image.open(tmp_path / "lab.png") as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(row(session.run(request).images)))


def test_a_model_of_text_and_latents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a discrete schedule: the state follows the length of the prompt, and decodes to a picture of another size."""

    def net(x: Any, t: Any, condition: Any) -> Any:
        return x - (0 if condition is None else condition[:, None, None])

    model = Pretrained(
        net, deis.VPSDE.discrete(np.linspace(0.999, 0.005, 100)), "eps", (4, 3, 3), None, None, 1.0,
        embed=lambda prompts: (torch.tensor([[len(prompt) / 20] for prompt in prompts]), torch.zeros(len(prompts), 1)),
        decode=lambda x: x[:, :3].repeat_interleave(2, dim=-1).tanh(),
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(deis, "load_model", lambda: model)
    request, made = request_of(Choice(method="tab<q>", nfe=5), prompt="it's a cat", guidance=2.0), dict[str, Any]()
    result = run(request, model)
    assert result.images.shape == (2, 3, 3, 6)
    exec(code_of(request, model, None), made)
    np.testing.assert_array_equal(made["x_0"], result.images)
    assert strip_html(result, 1).count("<img") == 2 * 5 + 1


def test_colours_and_latents_have_pictures() -> None:
    rgb = np.linspace(-1, 1, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert np.asarray(row(rgb)).shape == (4, 10, 3)
    np.testing.assert_array_equal(np.asarray(row(rgb))[..., 5:, 0], np.rint((rgb[1, 0] + 1) * 127.5))
    assert np.asarray(row(np.zeros((1, 4, 2, 2)))).shape == (2, 2, 3)


# --- side by side ------------------------------------------------------------------------------------------------------


def test_distances_are_those_to_the_converged_pictures(session: Session) -> None:
    request, other = request_of(Choice(method="ddim", nfe=2)), Choice(method="auto", nfe=12)
    found = session.compare(request, other)
    assert [result.plan.nfe for result in found.results] == [2, 12]
    np.testing.assert_array_equal(found.results[0].evaluations[0].x, found.results[1].evaluations[0].x)  # the same noise
    model = session.library.load(BUNDLED)
    x_T = torch.from_numpy(found.results[0].evaluations[0].x)
    converged = deis.sample(deis.make_plan(model.sde, "dpmpp_3m", 100), model.conditional([0, 1]), x_T).numpy()
    np.testing.assert_allclose(found.converged, converged, atol=0.05)
    for result, distances in zip(found.results, found.distances, strict=True):
        wanted = np.sqrt(((result.images.astype(np.float64) - found.converged) ** 2).mean(axis=(1, 2, 3)))
        np.testing.assert_allclose(distances, wanted, rtol=1e-6)
    assert (found.distances[1] < found.distances[0]).all()
    assert found.error < np.median(found.distances[1])


def test_the_converged_pictures_are_made_once(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Request] = []

    def solve(request: Request, model: object) -> tuple[np.ndarray, float]:
        calls.append(request)
        return np.zeros(request.num), 0.0

    monkeypatch.setattr("deis.lab.session._solve", solve)
    own = Session(session.library)
    for request in (request_of(seed=5), request_of(Choice(nfe=9), seed=5), request_of(seed=6)):
        own.converged(request)
    assert [request.seed for request in calls] == [5, 6]


# --- the models --------------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A folder `models`, and beside it what is not to be read."""
    for folder in ("models/inside", "outside"):
        shutil.copytree(ASSETS, tmp_path / folder)
    (tmp_path / "models" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "models" / "own").symlink_to(tmp_path / "models" / "inside")
    (tmp_path / "models" / "circle").symlink_to(tmp_path / "models" / "circle")
    (tmp_path / "modelsmore").mkdir()
    return tmp_path


def test_models_below_the_folders_are_found_and_load(places: Path) -> None:
    library = Library([places / "models"])
    assert library.names() == [BUNDLED, str(places / "models" / "inside")]
    assert library.path(BUNDLED) is None
    for name in ("inside", "own", "../models/inside"):
        assert library.path(str(places / "models" / name)) == places / "models" / "inside"
    model = library.load(str(places / "models" / "inside"))
    assert library.load(str(places / "models" / "own")) is model


@pytest.mark.parametrize(
    "name",
    [
        "HERE/outside", "HERE/models/../outside", "HERE/models/link", "HERE/models/circle", "HERE/models/nothing",
        "HERE/modelsmore", "HERE", "google/ddpm-cifar10-32", "/etc/passwd", "a\0b", "",
    ],
)  # fmt: skip
def test_a_model_elsewhere_is_refused_in_the_same_words(places: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is not there, or not below"):
        Library([places / "models"]).load(name.replace("HERE", str(places)))


def test_a_model_with_a_file_elsewhere_is_refused(places: Path) -> None:
    weights = places / "models" / "inside" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.symlink_to(places / "outside" / weights.name)
    with pytest.raises(
        ValueError, match=r"holds a link that leads out of the lab's folders: 'diffusion_pytorch_model\.safetensors'"
    ):
        Library([places / "models"]).load(str(weights.parent))
    assert Library([places]).path(str(weights.parent)) == weights.parent


def test_without_folders_only_the_bundled_model_is_there(tmp_path: Path) -> None:
    assert Library().names() == [BUNDLED]
    with pytest.raises(ValueError, match="start the lab with --models DIR"):
        Library().load(str(ASSETS))
    with pytest.raises(ValueError, match="is no folder"):
        Library([tmp_path / "nothing"])


# --- in two dimensions -------------------------------------------------------------------------------------------------


def test_the_network_of_the_plane_is_exact() -> None:
    """Tweedie: E[x_0 | x] = (x + sigma^2 grad log p(x)) / alpha, here with the density of SciPy and differences."""
    sde, means = deis.VPSDE.linear(), DATA["a spiral"]()
    x, t, h = np.random.default_rng(0).normal(size=(5, 2)), 0.3, 1e-5
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    densities = [multivariate_normal(alpha * mean, alpha**2 * SPREAD**2 + sigma**2) for mean in means]

    def log_p(x: Any) -> Any:
        return np.log(sum(density.pdf(x) for density in densities))

    slope = np.stack([(log_p(x + h * e) - log_p(x - h * e)) / (2 * h) for e in np.eye(2)], axis=1)
    np.testing.assert_allclose(Mixture(means, sde)(x, np.full(5, t)), (x + sigma**2 * slope) / alpha, atol=1e-7)


def test_the_true_paths_are_those_of_an_independent_solver() -> None:
    found, sde = paths(Choice(nfe=4), "three by three", seed=1, particles=6), deis.VPSDE.linear()
    model = Mixture(found.means, sde)

    def slope(log_rho: float, y: Any) -> Any:  # d(x/alpha) = eps d(rho)
        t = float(sde.t_of_log_rho(log_rho))
        x = float(sde.alpha(t)) * y.reshape(6, 2)
        eps = (x - float(sde.alpha(t)) * model(x, np.full(6, t))) / float(sde.sigma(t))
        return (np.exp(log_rho) * eps).ravel()

    start, end = sde.log_rho(np.array([sde.t_start, sde.t_end]))
    solved = solve_ivp(slope, (start, end), (found.x[0] / sde.alpha(sde.t_start)).ravel(), rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(found.true_x[-1], solved.y[:, -1].reshape(6, 2) * sde.alpha(sde.t_end), atol=2e-3)
    np.testing.assert_array_equal(found.true_x[0], found.x[0])


@pytest.mark.parametrize("method", ["ddim", "tab<q>", "edm_heun"])
def test_paths_converge_to_the_true_ones(method: str) -> None:
    errors = [paths(Choice(method=method, nfe=nfe), "eight on a ring", particles=40).rmse for nfe in (6, 24, 96)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0
    assert errors[2] < 0.05


def test_the_animation_moves_from_the_first_state_to_the_last() -> None:
    found = paths(Choice(method="ancestral", nfe=3), "a spiral", particles=5)
    assert found.plan.stochastic
    with Image.open(io.BytesIO(animation(found))) as image:
        assert getattr(image, "n_frames", 1) == 61
        frames = []
        for number in (0, 60):
            image.seek(number)
            frames.append(np.asarray(image.convert("RGB"), dtype=int))
    assert (np.abs(frames[0] - frames[1]).max(axis=-1) > 50).sum() > 100


def test_wrong_entries_of_the_plane() -> None:
    for wrong, message in (({"data": "x"}, "data='x'"), ({"particles": 201}, "particles=201"), ({"seed": -1}, "seed=-1")):
        with pytest.raises(ValueError, match=message):
            paths(Choice(), **{"data": "a spiral", **wrong})  # type: ignore[arg-type]


# --- the rest ----------------------------------------------------------------------------------------------------------


def test_text_of_a_user_is_text_on_the_page() -> None:
    assert error_html("method='<script>'") == '<p class="lab-error" role="alert">method=&#x27;&lt;script&gt;&#x27;</p>'


def test_a_port_in_use_is_told() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port} cannot be listened on .*give another --port"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", 0) > 0
    with pytest.raises(ValueError, match=r"--host 203\.0\.113\.1"):
        free_port("203.0.113.1", 0)


def test_a_network_that_is_not_finite_is_told(session: Session) -> None:
    model = session.library.load(BUNDLED)
    with pytest.raises(ValueError, match="finite"):
        run(request_of(), replace(model, net=lambda x, t, labels: x * float("nan")))


def test_the_command_says_what_gradio_is_missing_for() -> None:
    code = "import sys; sys.modules['gradio'] = None\nfrom deis.cli import main\nmain(['lab', '--port', '0', '--no-browser'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 1
    assert "deis lab needs the extra 'lab'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_own_grid_is_that_of_the_method() -> None:
    assert Choice(grid=OWN).arguments == {"nfe": 10}
