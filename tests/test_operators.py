"""Linear operators: transposes by dot products, inverses by dense linear algebra, blur and pooling by other libraries."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

import deis
from deis import operators
from deis.operators import LinearOperator

Array = NDArray[np.float64]
RNG = np.random.default_rng(0)
KNOWN = RNG.random((2, 6, 8)) > 0.4
KERNEL = RNG.random((3, 4))
BOX = np.ones((2, 2)) / 4  # its transfer function is 0 at the highest frequencies
WIDE = RNG.standard_normal((5, 12)) @ np.diag([1.0] * 9 + [0.0] * 3)
WIDE[4] = WIDE[3]  # A A^T is singular
BACKENDS: dict[str, Callable[[Any], Any]] = {"numpy": np.asarray, "torch": torch.as_tensor, "jax": jnp.asarray}


def times(matrix: Array) -> Callable[[Any], Any]:
    """Return x -> matrix x of each sample, in the framework of x."""

    def product(x: Any) -> Any:
        a = torch.tensor(matrix, dtype=x.dtype) if isinstance(x, torch.Tensor) else matrix.astype(np.dtype(x.dtype))
        return (x.reshape(len(x), 1, -1) * a).sum(-1)

    return product


def wide(iterations: int = 50) -> LinearOperator:
    return operators.linear(times(WIDE), (3, 4), lambda y: times(WIDE.T)(y).reshape(-1, 3, 4), iterations=iterations)


OPERATORS: dict[str, tuple[LinearOperator, tuple[int, ...]]] = {
    "mask": (operators.mask(KNOWN), (2, 6, 8)),
    "mask of pixels": (operators.mask(KNOWN[:1]), (2, 6, 8)),
    "downsample": (operators.downsample(2), (2, 6, 8)),
    "downsample, uneven": (operators.downsample((3, 4)), (2, 6, 8)),
    "downsample, one axis": (operators.downsample((4,)), (8,)),
    "blur": (operators.blur(KERNEL), (2, 6, 8)),
    "blur, odd size": (operators.blur(KERNEL), (5, 7)),
    "blur, singular": (operators.blur(BOX), (1, 6, 8)),
    "blur, one axis": (operators.blur([1.0, 2.0, 1.0]), (9,)),
    "linear": (wide(), (3, 4)),
    "linear, derived": (operators.linear(times(WIDE), (3, 4)), (3, 4)),
}
IN_JAX = ("mask", "downsample, uneven", "blur", "linear, derived")  # the others compile the same code again
CASES = [
    (name, backend)
    for name in OPERATORS
    for backend in BACKENDS
    if (name, backend) != ("linear, derived", "numpy") and (backend != "jax" or name in IN_JAX)
]


def dense(operator: LinearOperator, shape: tuple[int, ...]) -> Array:
    """Return the matrix of an operator, from its action on a basis in torch."""
    size = int(np.prod(shape))
    return operator.apply(torch.eye(size, dtype=torch.float64).reshape(size, *shape)).reshape(size, -1).numpy().T


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_the_adjoint_is_the_transpose(name: str, backend: str) -> None:
    operator, shape = OPERATORS[name]
    operator.check_adjoint(BACKENDS[backend](np.zeros((3, *shape), np.float32)))
    with jax.enable_x64(True):
        operator.check_adjoint(BACKENDS[backend](np.zeros((3, *shape))))


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_matrix_transpose_and_inverse_are_those_of_dense_linear_algebra(name: str, backend: str) -> None:
    operator, shape = OPERATORS[name]
    a = dense(operator, shape)
    x = np.random.default_rng(1).standard_normal((3, *shape))
    with jax.enable_x64(True):
        y = np.asarray(operator(BACKENDS[backend](x)))
        np.testing.assert_allclose(y.reshape(3, -1), x.reshape(3, -1) @ a.T, rtol=0, atol=1e-12)
        r = np.random.default_rng(2).standard_normal(y.shape)  # outside the range of A where A A^T is singular
        back = np.asarray(operator.adjoint(BACKENDS[backend](r)))
        np.testing.assert_allclose(back.reshape(3, -1), r.reshape(3, -1) @ a, rtol=0, atol=1e-12)
        for s in (0.0, 0.3, 1e4) if backend == "torch" else (0.0, 0.3):
            inverse = a.T @ np.linalg.pinv(a @ a.T + s * np.eye(len(a)), rcond=1e-12)
            found = np.asarray(operator.pseudo_inverse(BACKENDS[backend](r), s))
            assert found.shape == x.shape
            np.testing.assert_allclose(found.reshape(3, -1), r.reshape(3, -1) @ inverse.T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", OPERATORS)
def test_each_sample_may_have_its_own_regularisation(name: str) -> None:
    operator, shape = OPERATORS[name]
    y = operator(torch.tensor(RNG.standard_normal((2, *shape))))
    s = torch.tensor([0.1, 2.0], dtype=torch.float64).reshape(2, *(1,) * len(shape))
    expected = torch.cat([operator.pseudo_inverse(y[i : i + 1], float(s[i])) for i in range(2)])
    torch.testing.assert_close(operator.pseudo_inverse(y, s), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
@pytest.mark.parametrize("kernel", [(3, 3), (3, 4), (2, 2), (5, 7)])
def test_blur_is_the_circular_convolution_of_scipy(size: tuple[int, int], kernel: tuple[int, int]) -> None:
    x, k = RNG.standard_normal((2, 3, *size)), RNG.random(kernel)
    if any(a > b for a, b in zip(kernel, size, strict=True)):
        pytest.skip("no such blur")
    expected = np.stack([[ndimage.convolve(image, k, mode="wrap") for image in sample] for sample in x])
    np.testing.assert_allclose(operators.blur(k)(x), expected, rtol=0, atol=1e-12)


def test_pooling_is_that_of_torch_and_masks_are_products() -> None:
    x = torch.tensor(RNG.standard_normal((2, 3, 12, 8)))
    torch.testing.assert_close(operators.downsample(4)(x), torch.nn.functional.avg_pool2d(x, 4))
    torch.testing.assert_close(operators.downsample((2, 4))(x), torch.nn.functional.avg_pool2d(x, (2, 4)))
    for shape in ((3, 12, 8), (1, 12, 8), (2, 3, 12, 8), (2, 1, 12, 8)):
        known = RNG.random(shape) > 0.5
        for given in (known, torch.tensor(known), known.astype(int).tolist()):
            torch.testing.assert_close(operators.mask(given)(x), x * torch.tensor(known))


def test_a_derived_adjoint_is_that_of_a_strided_convolution() -> None:
    kernel = torch.tensor(RNG.standard_normal((4, 2, 3, 3)))
    operator = operators.linear(lambda x: torch.nn.functional.conv2d(x, kernel.to(x), stride=2), (2, 9, 9))
    y = torch.tensor(RNG.standard_normal((3, 4, 4, 4)))
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(operator.adjoint(y), torch.nn.functional.conv_transpose2d(y, kernel, stride=2))
    operator.check_adjoint(torch.zeros(1, 2, 9, 9))


def test_conjugate_gradients_end_after_as_many_steps_as_there_are_singular_values() -> None:
    calls: list[int] = []
    rank_one = operators.linear(lambda x: calls.append(1) or times(np.ones((3, 4)))(x), (4,), times(np.ones((4, 3))))  # type: ignore[func-returns-value]
    r = np.ones((2, 3))
    np.testing.assert_allclose(rank_one.pseudo_inverse(r, 0.0), np.linalg.pinv(np.ones((3, 4))) @ np.ones(3) * np.ones((2, 4)))
    assert len(calls) <= 2
    np.testing.assert_array_equal(rank_one.pseudo_inverse(np.zeros((2, 3)), 0.0), np.zeros((2, 4)))
    exact, few = (wide(n).pseudo_inverse(np.ones((1, 5)), 0.1) for n in (5, 1))
    assert abs(exact - few).max() > 1e-3


@pytest.mark.parametrize("name", IN_JAX)
def test_under_jit_and_in_half_precision(name: str) -> None:
    operator, shape = OPERATORS[name]
    x = jnp.asarray(RNG.standard_normal((2, *shape)), jnp.float32)
    y = operator(x)
    for run, given in ((operator.apply, x), (operator.adjoint, y), (lambda r: operator.pseudo_inverse(r, 0.5), y)):
        np.testing.assert_allclose(jax.jit(run)(given), run(given), rtol=1e-4, atol=1e-5)
    if "linear" not in name:
        half = operator(torch.tensor(np.asarray(x)).half())
        assert half.dtype == torch.float16
        np.testing.assert_allclose(half, np.asarray(y), rtol=0, atol=0.02)


def test_a_wrong_adjoint_is_found() -> None:
    for adjoint in (
        lambda y: 2 * times(WIDE.T)(y).reshape(-1, 3, 4),
        lambda y: times(WIDE.T)(y).reshape(-1, 3, 4)[:, ::-1],
    ):
        with pytest.raises(ValueError, match=r"adjoint of linear is not the transpose of apply: <A u, v> = "):
            operators.linear(times(WIDE), (3, 4), adjoint).check_adjoint(np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match=r"adjoint of linear returned shape \(2, 12\) for x of shape \(2, 3, 4\)"):
        operators.linear(times(WIDE), (3, 4), times(WIDE.T)).check_adjoint(np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match="no constant term"):
        operators.linear(lambda x: times(WIDE)(x) + 1, (3, 4)).check_adjoint(torch.zeros(2, 3, 4))


X = np.ones((2, 3, 8, 8))
REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: operators.mask([0.5, 1.0]), ValueError, r"known=\[0.5, 1.0\] must be an array of 0 and 1"),
    (lambda: operators.mask(1), ValueError, "known=1 must be an array of 0 and 1"),
    (lambda: operators.mask("ab"), TypeError, "known must be an array of real numbers"),
    (lambda: operators.mask(np.ones((3, 8, 7)))(X), ValueError, r"known has shape \(3, 8, 7\) and x \(2, 3, 8, 8\); give a mask"),
    (lambda: operators.mask(np.ones((4, 3, 8, 8)))(X), ValueError, r"known has shape \(4, 3, 8, 8\)"),
    (lambda: operators.mask(np.ones((8, 8)))(X), ValueError, r"known has shape \(8, 8\)"),
    (lambda: operators.mask(torch.ones(3, 8, 8))(X), TypeError, "known is a Tensor and x a ndarray; make known one"),
    (lambda: operators.downsample(0), ValueError, "factor=0 must be a whole number"),
    (lambda: operators.downsample((2, 1.5)), ValueError, r"factor\[1\]=1.5"),  # type: ignore[arg-type]
    (lambda: operators.downsample(()), ValueError, r"factor=\(\) must have"),
    (lambda: operators.downsample(3)(X), ValueError, "factor=3 must divide the last 2 axes of x, whose shape is"),
    (lambda: operators.downsample(1)(np.ones((2, 3))), ValueError, "factor=1 must divide the last 2 axes"),
    (lambda: operators.blur(np.zeros((3, 3))), ValueError, "not 0 everywhere"),
    (lambda: operators.blur([1.0, float("nan")]), ValueError, "must be a finite array"),
    (lambda: operators.blur(1.0), ValueError, "kernel=1.0 must be"),
    (lambda: operators.blur(np.ones((9, 3)))(X), ValueError, r"kernel of shape \(9, 3\) is larger than the last axes of x"),
    (lambda: operators.blur(np.ones((3, 3)))(np.ones((2, 3))), ValueError, r"kernel of shape \(3, 3\) is larger"),
    (lambda: operators.linear(3, (4,)), TypeError, "function_of_x must be a function of"),  # type: ignore[arg-type]
    (lambda: operators.linear(lambda x: x, 4), ValueError, "shape=4 must be the shape of one sample"),  # type: ignore[arg-type]
    (lambda: operators.linear(lambda x: x, (0,)), ValueError, r"shape\[0\]=0"),
    (lambda: operators.linear(lambda x: x, (4,), iterations=0), ValueError, "iterations=0"),
    (lambda: operators.linear(lambda x: x, (4,))(X), ValueError, r"x has shape \(2, 3, 8, 8\) and the operator takes \(batch, 4\)"),
    (lambda: operators.linear(lambda x: x.sum(), (4,))(np.ones((2, 4))), ValueError, r"must return a ndarray of shape \(2, ...\)"),
    (
        lambda: operators.linear(lambda x: x, (4,)).adjoint(np.ones((2, 4))),
        TypeError,
        "adjoint is missing: torch and JAX derive it",
    ),
    (lambda: operators.linear(lambda x: x.detach(), (4,)).adjoint(torch.ones(2, 4)), ValueError, "no derivative in x"),
    (lambda: operators.mask(np.ones((3, 8, 8)))("x"), TypeError, "x must be a torch.Tensor"),
]


@pytest.mark.parametrize(("call", "error", "match"), REFUSED)
def test_bad_input_is_refused_by_name(call: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_the_module_is_an_attribute() -> None:
    assert deis.operators is operators
