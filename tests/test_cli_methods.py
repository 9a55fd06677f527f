"""deis methods tells what the registry has; the shell completes names; deis plan --show draws."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner, Result
from PIL import Image

import deis
from deis.cli import main
from deis.grids import PHASES
from deis.methods.registry import REGISTRY, find, names


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def complete(*words: str) -> list[str]:
    *given, incomplete = words
    shell = BashComplete(main, {}, "deis", "_DEIS_COMPLETE")
    return [item.value for item in shell.get_completions(list(given), incomplete)]


def test_the_json_is_the_registry() -> None:
    told = json.loads(run("methods", "--json").stdout)
    assert [record["name"] for record in told] == [entry.name for entry in REGISTRY]
    for record, entry in zip(told, REGISTRY, strict=True):
        for name in ("form", "clock", "evaluations", "reference", "weak"):
            assert record[name] == getattr(entry, name)
        assert record["order"] == (entry.order_text if callable(entry.order) else entry.order)
        assert record["grid"] == (None if entry.grid is None else list(entry.grid))


def test_the_plain_table_has_a_line_for_each_method() -> None:
    result = run("methods")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["name", "form", "clock", "order", "evaluations", "reference"]
    assert [line[0] for line in lines[1 : 1 + len(REGISTRY)]] == [entry.name for entry in REGISTRY]
    assert [line[1] for line in lines[1 : 1 + len(REGISTRY)]] == [entry.form for entry in REGISTRY]


@pytest.mark.parametrize("missing", [False, True])
def test_the_table_in_a_terminal(missing: bool) -> None:
    code = "import sys\n" + "sys.modules['rich'] = None\n" * missing
    code += "sys.stdout.isatty = lambda: True\nfrom deis.cli import main; main(['methods'])"
    environment = {"COLUMNS": "100", "PATH": "", "PYTHONPATH": str(Path(deis.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert all(entry.name in done.stdout for entry in REGISTRY)
    assert ("─" in done.stdout) != missing


@pytest.mark.parametrize("name", ["tab3", "edm-heun", "rhork_3kutta", "seeds_3", "er_sde", "heunpp2", "parallel2"])
def test_the_details_of_one(name: str) -> None:
    told = json.loads(run("methods", name, "--json").stdout)
    entry, _ = find(name)
    assert told["order"] == entry.order_of(name)
    assert told["options"].keys() == entry.options_of(name).keys()
    words = run("methods", name).stdout
    assert told["name"] in words
    assert all(f"{option}=" in words for option in told["options"])
    assert "Plan " in words
    assert "0.001 |" in words


@pytest.mark.parametrize("name", names())
def test_the_options_told_are_taken_and_others_are_not(name: str) -> None:
    entry, _ = find(name)
    deis.get_method(name, **entry.options_of(name))
    with pytest.raises(ValueError, match="does not take the options"):
        deis.get_method(name, nonsense=1)


def test_the_names_are_those_of_every_entry() -> None:
    assert [entry for entry in REGISTRY if not any(find(name)[0] is entry for name in names())] == []


@pytest.mark.parametrize(
    ("wrong", "near"), [("tab", "tab3"), ("dpm++_2m", "dpmpp_2m"), ("unipc", "unipc3"), ("DDMI", "ddim"), ("edm_huen", "edm_heun")]
)
def test_an_unknown_name_suggests_near_ones(wrong: str, near: str) -> None:
    for command in (["plan", "--method", wrong], ["methods", wrong]):
        result = run(*command)
        assert result.exit_code == 1
        question = result.output.partition("did you mean ")[2].partition("?")[0]
        assert repr(near) in question.split(" or ")
    assert "did you mean" not in run("plan", "--method", "magic").output


def test_a_name_as_the_list_has_it_is_explained() -> None:
    assert "name one, such as 'tab3'" in run("methods", "tab<q>").output
    assert "name one, such as 'rhork_2heun'" in run("methods", "rhork_<tableau>").output


@pytest.mark.parametrize("command", ["plan", "sample", "edit", "calibrate", "evaluate"])
def test_the_help_names_the_list_in_place_of_all_methods(command: str) -> None:
    output = run(command, "--help").output
    assert "dpmpp_2m" not in output
    assert "--method NAME" in output


def test_the_shell_completes_methods_and_grids() -> None:
    assert complete("plan", "--method", "tab") == ["tab1", "tab2", "tab3", "tab4"]
    assert set(complete("sample", "--method", "")) == set(names())
    assert complete("methods", "edm-") == ["edm_heun"]
    assert complete("evaluate", "--method", "cal") == ["calibrated"]
    assert complete("plan", "--grid", "") == list(PHASES)
    assert "methods" in complete("me")
    assert "_DEIS_COMPLETE=bash_source deis" in " ".join(run("--help").output.split())


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF"), ("PNG", b"\x89PNG")])
def test_a_plan_is_drawn_into_a_file(tmp_path: Path, kind: str, start: bytes) -> None:
    path = tmp_path / f"plan.{kind}"
    result = run("plan", "--method", "tab3", "--nfe", 5, "--show", path)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(start)
    assert result.output.splitlines()[-1] == f"wrote {path}"
    if start == b"\x89PNG":
        with Image.open(path) as image:
            assert image.width == 700


def test_a_plan_file_is_shown(tmp_path: Path) -> None:
    plan = deis.make_plan(deis.EDM(), "unipc2", 4)
    plan.save(tmp_path / "plan.json")
    assert run("plan", "--plan", tmp_path / "plan.json").output == repr(plan) + "\n"
    for options in (["--method", "tab3"], ["--nfe", 3], ["--schedule", "edm"]):
        result = run("plan", "--plan", tmp_path / "plan.json", *options)
        assert result.exit_code == 1
        assert f"{options[0]}" in result.output
        assert "conflict" in result.output


def test_a_picture_of_another_kind_is_refused_before_the_work(tmp_path: Path) -> None:
    result = run("plan", "--show", tmp_path / "plan.gif")
    assert result.exit_code == 2
    assert "must end in .png, .svg or .pdf" in result.output
    assert "Plan " not in result.output
