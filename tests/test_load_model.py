"""`deis.load_model`: every format by its content; pipelines of diffusers and ONNX, as files written here."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor

import deis
from deis.cli import main
from deis.model.checkpoints.pipelines import of_pipeline

from . import test_checkpoints, test_edm, test_pipelines

X = test_checkpoints.X
T = torch.tensor([3.0, 700.0])
PROMPTS = ["a cat", "a dog"]


def test_every_format_is_told_by_its_content(tmp_path: Path) -> None:
    score, network = test_checkpoints.song("DDPM++")
    torch.save(dict(test_checkpoints.ho_weights()[0]), tmp_path / "a")
    torch.save(test_checkpoints.WRAPPERS["trained"](dict(test_checkpoints.ho_weights()[0])), tmp_path / "b")
    torch.save(score, tmp_path / "c")
    test_checkpoints.flax_file(tmp_path / "d", test_checkpoints.flax_params(score, network))
    torch.save(dict(test_edm.karras(test_edm.DDPMPP)[0]), tmp_path / "e")
    save_file(dict(test_edm.karras(test_edm.ADM)[0]), tmp_path / "f.safetensors")
    options: dict[str, dict[str, Any]] = {"b": {"size": 8}, "d": {"size": 32, "sde": "subvp"}, "e": {"preconditioning": "vp"}}
    found = {path.name: deis.load_model(path, **options.get(path.name, {})) for path in sorted(tmp_path.iterdir())}
    assert {name: (type(model.sde).__name__, model.predicts, model.shape) for name, model in found.items()} == {
        "a": ("VPSDE", "eps", (3, 32, 32)),
        "b": ("VPSDE", "eps", (3, 8, 8)),
        "c": ("VPSDE", "eps", (3, 32, 32)),
        "d": ("SubVPSDE", "eps", (3, 32, 32)),
        "e": ("VPSDE", "eps", (3, 8, 8)),
        "f.safetensors": ("EDM", "x0", (3, 8, 8)),
    }


def test_a_file_of_no_known_format(tmp_path: Path) -> None:
    torch.save({"weight": X, "bias": X}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"has no known format: it holds \['weight', 'bias'\], and 'temb.dense.0.weight'"):
        deis.load_model(tmp_path / "net.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="has no known format: it holds list"):
        deis.load_model(tmp_path / "list.pt")
    (tmp_path / "net.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"net.safetensors' cannot be read as safetensors"):
        deis.load_model(tmp_path / "net.safetensors")
    with pytest.raises(FileNotFoundError, match="is no file or folder, nor a name on the hub"):
        deis.load_model(tmp_path / "nothing.pt")
    for name in ("a/b.pth", "a/b.safetensors", "a/b.pkl", "a/b/c", "name"):
        with pytest.raises(FileNotFoundError, match="is no file or folder, nor a name on the hub"):
            deis.load_model(name)
    with pytest.raises(ValueError, match=r"runs folders with a deis.json; spec=.*list.pt' needs backend='torch'"):
        deis.load_model(tmp_path / "list.pt", backend="jax")
    with pytest.raises(TypeError, match="a model folder takes no option 'sde'"):
        deis.load_model(**{"sde": "ve"})
    torch.save(dict(test_checkpoints.ho_weights()[0]), tmp_path / "ema.ckpt")
    with pytest.raises(TypeError, match="preconditioning"):
        deis.load_model(tmp_path / "ema.ckpt", preconditioning="vp")


def saved(pipe: Any, folder: Path) -> Any:
    """Return the pipeline, whose networks are random but neither tiny nor zero, after writing it to the folder."""
    generator = torch.Generator().manual_seed(0)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            for weight in part.eval().requires_grad_(False).parameters():
                if weight.ndim > 1:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * weight[0].numel() ** -0.5)
    pipe.save_pretrained(folder)
    return pipe


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("classes", [None, 4])
def test_a_pipeline_of_images(tmp_path: Path, prediction_type: str, classes: int | None) -> None:
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, num_class_embeds=classes,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction_type, beta_schedule="squaredcos_cap_v2")
    pipe = saved(diffusers.DDPMPipeline(unet=unet, scheduler=scheduler), tmp_path)
    network = deis.load_model(tmp_path)
    predicts = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}[prediction_type]
    assert (network.shape, network.predicts, network.num_classes, network.decode) == ((3, 8, 8), predicts, classes, None)
    alphas = scheduler.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(network.sde.alpha([0, 500, 998]) ** 2, alphas[[0, 500, 998]], rtol=1e-6)
    labels = None if classes is None else [1, 3]
    expected = pipe.unet(X, T, None if labels is None else torch.tensor(labels)).sample
    torch.testing.assert_close(network.conditional(labels)(X, T), expected)
    assert expected.std() > 0.1


def test_a_pipeline_of_latents_by_class(tmp_path: Path) -> None:
    pipe, _ = test_pipelines.dit()
    saved(pipe, tmp_path)
    network = deis.load_model(tmp_path)
    assert (network.shape, network.num_classes, network.null_class) == ((4, 8, 8), 1000, 1000)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    some, none = (
        pipe.transformer(z, timestep=T, class_labels=torch.tensor(labels)).sample[:, :4] for labels in ([7, 7], [1000] * 2)
    )
    torch.testing.assert_close(network.conditional([7, 7], 3.0)(z, T), none + 3 * (some - none), rtol=1e-4, atol=1e-4)
    assert network.decode is not None
    torch.testing.assert_close(network.decode(z), pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample)
    assert (some - none).abs().max() > 1e-3


def text_parts(folder: Path) -> dict[str, Any]:
    """A tokenizer of single letters and a tiny text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=9)
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=9, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(config)}


def test_a_pipeline_of_latents_by_text(tmp_path: Path) -> None:
    pipe = diffusers.StableDiffusionPipeline(
        **text_parts(tmp_path), vae=test_pipelines.vae(), unet=test_pipelines.unet(), safety_checker=None, feature_extractor=None,
        scheduler=diffusers.DPMSolverMultistepScheduler(**test_pipelines.SD, steps_offset=1, prediction_type="v_prediction"),
        requires_safety_checker=False,
    )  # fmt: skip
    saved(pipe, tmp_path / "pipe")
    network = deis.load_model(tmp_path / "pipe")
    assert (network.shape, network.predicts, network.num_classes) == ((4, 8, 8), "v", None)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    some, none = pipe.encode_prompt(PROMPTS, "cpu", 1, True)[:2]
    assert (some - none).abs().max() > 1e-3
    with_text, without = (pipe.unet(z, T, encoder_hidden_states=embedding).sample for embedding in (some, none))
    guided = without + 7.5 * (with_text - without)
    torch.testing.assert_close(network.conditional(PROMPTS, 7.5)(z, T), guided, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(network(z, T), without, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="must be a sequence of prompts"):
        network.conditional("a cat")
    z_0 = deis.sample(deis.make_plan(network.sde, nfe=3), network.conditional(PROMPTS, 2.0), z)
    assert network.decode is not None
    assert network.decode(z_0).shape == (2, 3, 16, 16)


def test_a_pipeline_that_load_model_does_not_run(tmp_path: Path) -> None:
    for make, network in ((test_pipelines.xl, "UNet2DConditionModel"), (test_pipelines.sd3, "SD3Transformer2DModel")):
        with pytest.raises(ValueError, match=f"has a {network} that load_model cannot run by itself; .*PlanScheduler.from_config"):
            of_pipeline(make()[0])
    unet, scheduler = test_pipelines.ddim()[0].unet, diffusers.ScoreSdeVeScheduler()
    diffusers.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / "ve")
    with pytest.raises(ValueError, match="ScoreSdeVeScheduler with prediction_type=None has no schedule known here"):
        deis.load_model(tmp_path / "ve")
    with pytest.raises(ValueError, match="lacks its text encoder or tokenizer"):
        of_pipeline(test_pipelines.stable_diffusion(diffusers.StableDiffusionPipeline))
    (tmp_path / "ve" / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="is no pipeline that diffusers can load"):
        deis.load_model(tmp_path / "ve")


def onnx_file(path: Path, t_type: int, t_shape: list[Any], *, batch: Any = "batch", labels: bool = False) -> Path:
    """Write y = W x + 1e-3 t, of 3 x 8 x 8, where labels, if there are any, are added too."""
    weight = numpy_helper.from_array(KERNEL.numpy(), "w")
    inputs = [("sample", TensorProto.FLOAT, [batch, 3, 8, 8]), ("timestep", t_type, t_shape)]
    nodes = [
        helper.make_node("Conv", ["sample", "w"], ["h"]),
        helper.make_node("Cast", ["timestep"], ["time"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["time", "scale"], ["shift"]),
    ]
    constants = [weight, numpy_helper.from_array(np.float32(1e-3), "scale")]
    if t_shape:
        constants.append(numpy_helper.from_array(np.array([-1, 1, 1, 1]), "each"))
        nodes.append(helper.make_node("Reshape", ["shift", "each"], ["shifts"]))
    nodes.append(helper.make_node("Add", ["h", "shifts" if t_shape else "shift"], ["sum"]))
    if labels:
        inputs.append(("labels", TensorProto.INT64, ["batch"]))
        nodes += [
            helper.make_node("Cast", ["labels"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["floats", "each"], ["columns"]),
            helper.make_node("Add", ["sum", "columns"], ["out"]),
        ]
    puts = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs]
    out = helper.make_tensor_value_info("out" if labels else "sum", TensorProto.FLOAT, [batch, 3, 8, 8])
    graph = helper.make_graph(nodes, "net", puts, [out], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


KERNEL = torch.randn(3, 3, 1, 1, generator=torch.Generator().manual_seed(2))
SDE = deis.VPSDE.discrete(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))


def net(x: Tensor, t: Any) -> Tensor:
    return torch.nn.functional.conv2d(x, KERNEL) + 1e-3 * torch.as_tensor(t).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("t_type", "t_shape"), [(TensorProto.INT64, ["batch"]), (TensorProto.FLOAT, []), (TensorProto.DOUBLE, [1])]
)
def test_onnx_on_torch_and_numpy(tmp_path: Path, t_type: int, t_shape: list[Any]) -> None:
    path = onnx_file(tmp_path / "net.onnx", t_type, t_shape)
    network = deis.load_model(path, sde=SDE, predicts="v")
    assert (network.shape, network.predicts) == ((3, 8, 8), "v")
    times = torch.tensor([7, 7])
    got = network(X.double(), times)
    torch.testing.assert_close(got, net(X, times).double(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(network(X.numpy(), np.array([7, 7])), net(X, times).numpy(), rtol=1e-5, atol=1e-6)
    plan = deis.make_plan(SDE, "tab2", 4, "t", 1.0)
    samples = [deis.sample(plan, network.conditional(), x) for x in (X, X.numpy())]
    torch.testing.assert_close(samples[0], deis.sample(plan, deis.Denoiser(net, SDE, "v"), X), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(samples[1], samples[0].numpy(), rtol=1e-4, atol=1e-4)


def test_onnx_with_labels(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "net.onnx", TensorProto.FLOAT, ["batch"], labels=True)
    network = deis.load_model(path, sde=SDE, num_classes=3, null_class=0)
    got = network.conditional([1, 2], 2.0)(X, T)
    torch.testing.assert_close(got, net(X, T) + 2 * torch.tensor([1.0, 2.0]).reshape(-1, 1, 1, 1), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"'labels: tensor\(int64\)'\], and x and t were expected; give num_classes="):
        deis.load_model(path, sde=SDE)


def test_onnx_that_cannot_be_run(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "net.onnx", TensorProto.FLOAT, ["batch"])
    with pytest.raises(ValueError, match="does not tell how a network was trained; give sde="):
        deis.load_model(path)
    with pytest.raises(ValueError, match="onnxruntime has no CUDAExecutionProvider here"):
        deis.load_model(path, sde=SDE, device="cuda:0")
    with pytest.raises(ValueError, match=r"leaves the shape of samples open, \[8\]"):
        deis.load_model(path, sde=SDE, shape=(8,))
    path.write_bytes(b"not onnx")
    with pytest.raises(ValueError, match="cannot be read as ONNX"):
        deis.load_model(path, sde=SDE)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        deis.load_model(tmp_path / "other.onnx", sde=SDE)


def test_the_command_line_samples_any_of_them(tmp_path: Path) -> None:
    save_file(dict(test_edm.karras(test_edm.DDPMPP)[0]), tmp_path / "net.safetensors")
    files = ["--model", str(tmp_path / "net.safetensors"), "--out", str(tmp_path / "a.png")]
    result = CliRunner().invoke(main, ["sample", *files, "--nfe", "2", "--num", "5", "--method", "tab1"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "a.png").exists()
    for option, message in (("sde", "must be NAME=VALUE"), ("sde=ve", "unexpected keyword argument 'sde'")):
        result = CliRunner().invoke(main, ["sample", *files, "--option", option])
        assert result.exit_code == 1
        assert message in result.output
    score, network = test_checkpoints.song("NCSN++")
    params = test_checkpoints.flax_params(score, network)
    files[1] = str(test_checkpoints.flax_file(tmp_path / "checkpoint_1", params))
    facts = ["--option", "sde=ve", "--option", "size=32"]
    result = CliRunner().invoke(main, ["sample", *files, *facts, "--nfe", "2", "--num", "1", "--dtype", "float32"])
    assert result.exit_code == 0, result.output
