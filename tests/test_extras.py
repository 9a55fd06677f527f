"""A missing package names the extra that has it, and how that is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

import deis
from deis.extras import needs

ONES = "import numpy; x = numpy.ones((9, 2)); "
CASES = [
    ("torch", "import deis.adapters.k_diffusion", "torch"),
    ("torch", "import deis.adapters.diffusers", "diffusers"),
    ("diffusers", "import deis.adapters.diffusers", "diffusers"),
    ("diffusers", "import deis.adapters.diffusers_config", "diffusers"),
    ("diffusers", "import deis; deis.load_model()", "diffusers"),
    ("torch", "import deis; deis.load_model()", "diffusers"),
    ("flax", "import deis; deis.load_model(backend='jax')", "jax"),
    ("diffusers", "from deis.model.checkpoints.pipelines import load_pipeline; load_pipeline('x')", "diffusers"),
    ("diffusers", "from deis.model.checkpoints.ddim_unet import _network; _network({}, 'x')", "diffusers"),
    ("diffusers", "from deis.model.checkpoints.edm_names import adm; adm({}, 32, 'x')", "diffusers"),
    ("torch", "from deis.model.checkpoints.torch_files import read; read('x.pth')", "torch"),
    ("safetensors", "from deis.model.checkpoints.torch_files import read; read('x.safetensors')", "torch"),
    ("flax", "from deis.model.checkpoints.flax_files import read; read('x')", "jax"),
    ("torch", "from deis.model.checkpoints.flax_files import weights; weights({}, 'x', None)", "torch"),
    ("onnxruntime", "from deis.model.checkpoints.onnx_file import _session; _session('x', None)", "onnx"),
    ("optax", "from deis.calibration.gradient import _JaxAdam; _JaxAdam(*[None] * 5)", "jax"),
    ("torchmetrics", ONES + "from deis.evaluation import distances; distances(x, x)", "evaluate"),
    ("torch", "from deis.evaluation import load_extractor; load_extractor('x')", "evaluate"),
    ("torch", "from deis.evaluation import load_perceptual; load_perceptual('x')", "evaluate"),
    ("PIL", "from deis.evaluation import load_images; load_images('.')", "evaluate"),
    ("click", "import deis.cli", "cli"),
    ("tqdm", "import deis.cli", "cli"),
]


@pytest.mark.parametrize(("missing", "code", "extra"), CASES)
def test_a_missing_package_names_its_extra(missing: str, code: str, extra: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert missing in last
    assert last.endswith(f"pip install '.[{extra}]' in a checkout of deis")
    assert last.startswith(("ImportError: ", "the command line"))


def test_the_name_of_the_missing_module_is_kept() -> None:
    with pytest.raises(ImportError, match="a test needs the extra 'torch'") as raised, needs("torch", "a test"):
        import nonsense_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401
    assert raised.value.name == "nonsense_that_nobody_has"


def test_no_text_sends_the_user_to_an_index_that_lacks_deis() -> None:
    for file in Path(deis.__file__).parent.rglob("*.py"):
        assert "install 'deis-samplers" not in file.read_text(encoding="utf-8")
