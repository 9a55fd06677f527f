"""The two demos: scripts that run on checkpoints written here, and notebooks that are kept executed."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from . import test_checkpoints

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_the_demos_run_on_the_checkpoints_of_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(dict(test_checkpoints.ho_weights()[0]), tmp_path / "ema_celeba.ckpt")
    torch.save(test_checkpoints.song("DDPM++")[0], tmp_path / "checkpoint_8.pth")
    common = ["--option", "size=8", "--num", 2, "--nfe", 10, 12, "--methods", "DDIM", "rhoRK2", "auto", "--reference-steps", 16]
    for script, file in (("discrete.py", "ema_celeba.ckpt"), ("continuous.py", "checkpoint_8.pth")):
        run(monkeypatch, script, "--model", tmp_path / file, *common, "--out", tmp_path / script)
        output = capsys.readouterr().out
        assert "| | 10 NFE | 12 NFE |" in output
        table = json.loads((tmp_path / script / "table.json").read_text())
        assert {name: sorted(cells) for name, cells in table.items()} == {
            "DDIM": ["10", "12"], "rhoRK2": ["10", "12"], "auto": ["10", "12"],
        }  # fmt: skip
        assert all(np.isfinite(cell["rmse"]) for cells in table.values() for cell in cells.values())


@pytest.mark.parametrize("arguments", [[], ["--model", "a.ckpt", "--anime64", "folder"]])
def test_the_discrete_demo_needs_one_network(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "discrete.py", *arguments)
    assert "give one of --model and --anime64" in capsys.readouterr().err


def test_the_demo_of_linear_sdes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "linear.py", "--nfe", 30, "--num", 100, "--out", tmp_path / "demo.png")
    output = capsys.readouterr().out
    found = [float(text) for text in re.findall(r"NumPy, torch, JAX differ by at most (\S+)", output)]
    assert len(found) == 2
    assert max(found) < 1e-10
    (near,) = re.findall(r"points: (\S+) from the nearest mean", output)
    assert abs(float(near) - 0.118) < 0.03
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["continuous", "discrete"])
def test_the_notebooks_are_executed(name: str) -> None:
    cells = [c for c in json.loads((EXAMPLES / f"{name}.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join("".join(output.get("text", [])) for output in outputs)
    assert all(f"\n| {method} | 0." in text for method in ("DDIM", "tAB3", "iPNDM", "auto"))
    assert "Warning" not in text
