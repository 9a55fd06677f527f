"""diffusers' own tests of schedulers, from a checkout that DEIS_DIFFUSERS names: ``pytest -m diffusers_suite``.

What fails is listed here with its reason; anything else that fails is ours.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = [
    pytest.mark.diffusers_suite,
    pytest.mark.skipif("DEIS_DIFFUSERS" not in os.environ, reason="DEIS_DIFFUSERS names no checkout of diffusers"),
]

FILES = (
    "ddim",
    "ddpm",
    "deis",
    "dpm_multi",
    "dpm_single",
    "euler",
    "euler_ancestral",
    "heun",
    "kdpm2_discrete",
    "lms",
    "pndm",
    "unipc",
)
REASONS = {
    "has no plan yet; call set_timesteps first": "a step without set_timesteps, which some classes take for one of all times",
    "unexpected keyword argument 'eta'": "DDIM's argument of step; here method_options={'eta': ...}",
    "has no attribute '(step_prk|prk_timesteps|step_plms|_get_variance|previous_timestep)'": "the inside of PNDM, DDIM and DDPM",
    "'float' object has no attribute 'cpu'": "init_noise_sigma is a number here",
    r"AssertionError: assert \{": "test_compatibles: after another class, the configuration means that class's method",
    "may be that of LMSDiscreteScheduler or KDPM2": "test_compatibles, after one of two classes of the same parameters",
    "is none of the scheduler's, which are": "a time that set_timesteps did not give",
    "distinct times, and the schedule has": "as many steps as training times down to the smallest noise, one of them of length 0",
    "ValueError not raised : Can only pass one": "timesteps beside their number, which may be given where they agree",
    "interpolation_type='log_linear' has no plan": "refused by name",
    "algorithm_type='sde-dpmsolver\\+\\+' of solver_order=2 has no plan": "refused by name: noise within a step",
    "does not apply to flow matching|has no meaning for flow matching": "refused by name",
}
"""What messages match."""
NUMBERS = (
    r"(Euler\w*|Heun\w*|KDPM2\w*|LMS\w*|DEIS\w*)Test\.test_(full_loop_\w+|switch)",  # another state, or another method
    r"\w*Test\.test_full_loop_with_(karras|karras_and_v_prediction|lu_and_v_prediction)",  # times that diffusers rounds
    r"DDIMSchedulerTest\.test_full_loop_with_no_set_alpha_to_one",  # a last step of length 0 there
    r"(Euler|Heun)\w*Test\.test_custom_(sigmas|timesteps)",  # levels through float32, and Heun's times each given once
)
"""Sums over a class's own samples."""


def known(name: str, message: str) -> bool:
    """Tell whether a failure has its reason above."""
    return any(re.search(part, message) for part in REASONS) or any(re.search(part, name) for part in NUMBERS)


def run(where: Path, *files: str) -> dict[str, str]:
    """Return the message of each test that fails, empty where it passes."""
    checkout = Path(os.environ["DEIS_DIFFUSERS"])
    here = Path(__file__).parent
    report = where / "report.xml"
    options = ("--noconftest", "-c", os.devnull, "--rootdir", str(checkout), "-p", "no:cacheprovider", "-W", "ignore", "-q")
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "diffusers_suite", *options, f"--junitxml={report}", *files],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (here.parent / "src", here, checkout))), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        check=False,
    )
    messages = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        failure = case.find("failure") if case.find("error") is None else case.find("error")
        if case.find("skipped") is None:
            messages[f"{case.get('classname')}.{case.get('name')}"] = "" if failure is None else str(failure.get("message"))
    return messages


def test_its_common_tests(tmp_path: Path) -> None:
    """Of test_schedulers.py, over methods, spacings and flow matching; all but one for each: see REASONS."""
    file = tmp_path / "test_common.py"
    file.write_text(
        "from diffusers_suite import common\nfrom tests.schedulers import test_schedulers as own\n"
        "globals().update(common(own.SchedulerCommonTest))\n"
    )
    messages = run(tmp_path, str(file))
    failed = {name: text for name, text in messages.items() if text}
    print(f"{len(messages) - len(failed)} of {len(messages)} pass")
    assert len(messages) >= 200
    assert {name: text for name, text in failed.items() if not known(name, text)} == {}
    assert {name.rsplit(".", 1)[1] for name in failed} <= {"test_compatibles", "test_trained_betas"}


def test_its_tests_of_each_class(tmp_path: Path) -> None:
    messages = run(tmp_path, *(f"tests/schedulers/test_scheduler_{name}.py" for name in FILES))
    failed = {name: text for name, text in messages.items() if text}
    print(f"{len(messages) - len(failed)} of {len(messages)} pass")
    assert {name: text for name, text in failed.items() if not known(name, text)} == {}
    assert len(messages) - len(failed) >= 250
