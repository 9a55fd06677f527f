"""`deis edit`: pictures in and out, kept pixels, and errors in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image

import deis
from deis.cli import main

PIXELS = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
WHITE = np.zeros((28, 28), np.uint8)
WHITE[14:] = 255


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["edit", *(str(argument) for argument in arguments)])


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PIXELS).save("in.png")
    Image.fromarray(WHITE).save("mask.png")
    Image.fromarray(PIXELS.repeat(2, 0).repeat(2, 1)).save("twice.png")
    Image.fromarray(WHITE.repeat(3, 0).repeat(3, 1)).save("mask3.png")
    Image.fromarray(np.stack([PIXELS] * 3, axis=2)).save("colour.jpg", quality=100, subsampling=0)
    Image.fromarray(PIXELS.astype(np.uint16) * 256).save("deep.png")
    data = Path("in.png").read_bytes()
    Path("short.png").write_bytes(data[: len(data) // 2])
    Path("text.png").write_text("text")


def pixels(path: str) -> NDArray[Any]:
    with Image.open(path) as image:
        return np.asarray(image)


def test_image_to_image_writes_edits_side_by_side() -> None:
    result = run("--image", "in.png", "--nfe", 3, "--num", 4, "--class", 8, "--guidance", 2, "--strength", 0.4, "--out", "a.png")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "wrote a.png: 4 edits of 3 evaluations each"
    edits = pixels("a.png").reshape(2, 28, 2, 28).transpose(0, 2, 1, 3).reshape(4, -1)
    assert len(np.unique(edits, axis=0)) == 4
    assert not list(Path().glob(".*"))


def test_it_is_what_the_library_makes() -> None:
    import torch

    result = run("--image", "in.png", "--nfe", 3, "--method", "tab2", "--strength", 0.4, "--dtype", "float32", "--out", "a.png")
    assert result.exit_code == 0, result.output
    network = deis.load_model()
    plan = deis.make_plan(network.sde.between(strength=0.4), "tab2", nfe=3)
    x_0 = torch.from_numpy(PIXELS[None, None] / np.float32(127.5) - 1)
    rng = [torch.Generator().manual_seed(int(np.random.SeedSequence((0, 0, 1)).generate_state(1)[0]))]
    expected = deis.image_to_image(plan, network, x_0, 0.4, rng=rng).clamp(-1, 1).numpy()[0, 0]
    np.testing.assert_allclose(pixels("a.png"), (expected + 1) * 127.5, atol=0.51)


@pytest.mark.parametrize("backend", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_known_pixels_are_kept_bit_for_bit(backend: str) -> None:
    options = ["--image", "in.png", "--mask", "mask.png", "--nfe", 2, "--resample", 2, "--out", "a.png", "--backend", backend]
    result = run(*options)
    assert result.exit_code == 0, result.output
    assert "1 edits of 3 evaluations each" in result.output
    np.testing.assert_array_equal(pixels("a.png")[:14], PIXELS[:14])
    assert (pixels("a.png")[14:] != PIXELS[14:]).mean() > 0.5


@pytest.mark.parametrize("more", [[], ["--mask", "mask.png", "--method", "ancestral"]])
def test_an_edit_depends_on_the_seed_and_its_number_alone(more: list[object]) -> None:
    common = ["--image", "in.png", "--nfe", 2, "--num", 4, *more]
    for name, options in {"a": [], "b": ["--batch", 3], "c": ["--seed", 1]}.items():
        result = run(*common, *options, "--out", f"{name}.png")
        assert result.exit_code == 0, result.output
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert Path("a.png").read_bytes() != Path("c.png").read_bytes()


def test_other_sizes_are_refused_or_scaled() -> None:
    """The mean over areas undoes the enlarging of `deis sample`, and a mask goes with its picture."""
    few = ["--nfe", 1, "--strength", 0.2]
    refused = run("--image", "twice.png", *few)
    assert refused.exit_code == 1
    assert "twice.png is 56 x 56 pixels, and the model takes 28 x 28; give --resize" in refused.output
    for image, mask in (("in.png", "mask.png"), ("twice.png", "mask3.png"), ("colour.jpg", "mask.png")):
        result = run("--image", image, "--mask", mask, "--resize", *few, "--out", "a.png")
        assert result.exit_code == 0, result.output
        np.testing.assert_allclose(pixels("a.png")[:14].astype(int), PIXELS[:14], atol=5 if "colour" in image else 0)  # of JPEG


def test_a_plan_of_a_file_is_cut_and_a_calibrated_one_gives_way() -> None:
    network = deis.load_model()
    deis.make_plan(network.sde, "tab2", nfe=5).save("plan.json")
    network.plan(4).save("calibrated.json")
    cut = run("--image", "in.png", "--plan", "plan.json", "--strength", 0.5)
    assert "wrote edit.png: 1 edits of 3 evaluations" in cut.output, cut.output
    told = run("--image", "in.png", "--plan", "calibrated.json", "--strength", 0.5)
    assert "wrote edit.png" in told.output
    assert "--plan calibrated.json: the plan" in told.stderr
    assert "was calibrated as a whole" in told.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (["--image", "nowhere.png"], 1, "--image nowhere.png is no file"),
        (["--image", "text.png"], 1, "--image text.png is no picture that can be read"),
        (["--image", "short.png"], 1, "--image short.png is no picture that can be read"),
        (["--image", "deep.png"], 1, "deep.png has pixels of the kind I;16; save it with 8 bits per channel"),
        (["--image", "in.png", "--mask", "nowhere.png"], 1, "--mask nowhere.png is no file"),
        (["--image", "in.png", "--mask", "mask3.png"], 1, "--mask mask3.png is 84 x 84 pixels"),
        (["--image", "in.png", "--resample", 2], 1, "--resample 2 repeats steps of inpainting; give --mask, too"),
        (["--image", "in.png", "--strength", 0], 2, "'--strength'"),
        (["--image", "in.png", "--strength", 1.5], 2, "'--strength'"),
        (["--image", "in.png", "--class", 10], 1, "--class 10 is not a class of the model"),
        (["--image", "in.png", "--guidance", 2], 1, "guidance=2.0 needs labels"),
        (["--image", "in.png", "--out", "nowhere/a.png"], 2, "'nowhere' is not a folder"),
        ([], 2, "Missing option '--image'"),
    ],
)
def test_errors_are_one_line(arguments: list[object], code: int, match: str) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code
    assert result.output.splitlines()[-1].startswith("Error: ")
    assert match in result.output.splitlines()[-1]
    assert not Path("edit.png").exists()
