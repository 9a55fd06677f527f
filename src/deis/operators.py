"""Linear operators A of measurements y = A x: masks, average pooling, blur, and any linear function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arguments import array, check_state, function, kind, shown, whole
from .arrays import Array
from .backends import backend_of, like
from .foreign import is_compiling, is_jax, is_torch, is_traced

Map = Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class LinearOperator:
    r"""A linear map A of each sample of a batch, with its transpose and its regularised inverse.

    Attributes
    ----------
    name : str
    apply : callable
        apply(x) -> A x, from (batch, ...) to (batch, ...).
    adjoint : callable
        adjoint(y) -> A^T y.
    pseudo_inverse : callable
        pseudo_inverse(r, s) -> A^T (A A^T + s I)^+ r, which minimises \|A x - r\|^2 + s \|x\|^2; at s = 0 it is the pseudo-inverse.
        s >= 0 is a number, or an array that broadcasts against x.
    measured : callable, optional
        measured(y) -> 1 where an entry of y is a measurement and 0 where it is not, of the shape of y. Without it, all entries are.

    Examples
    --------
    >>> import numpy as np
    >>> import deis
    >>> A = deis.operators.downsample(2)
    >>> A(np.arange(16.0).reshape(1, 1, 4, 4))
    array([[[[ 2.5,  4.5],
             [10.5, 12.5]]]])
    """

    name: str
    apply: Map
    adjoint: Map
    pseudo_inverse: Callable[[Any, Any], Any]
    measured: Map | None = None

    def __post_init__(self) -> None:
        kind("name", self.name, str, "a string")
        function("apply", self.apply, "x")
        function("adjoint", self.adjoint, "y")
        function("pseudo_inverse", self.pseudo_inverse, "r", "s")
        if self.measured is not None:
            function("measured", self.measured, "y")

    def __call__(self, x: Any) -> Any:
        """Return A x.

        Raises
        ------
        TypeError, ValueError
            If x is not a batch of what the operator takes.
        """
        check_state("x", x)
        return self.apply(x)

    def check_adjoint(self, x: Any) -> None:
        """Check that <A u, v> = <u, A^T v> for random u of the shape, dtype and framework of x, once with random v, once with A u.

        Raises
        ------
        ValueError
            If the two differ by more than the square root of the dtype's precision, relative to |A u| |v|.
        """
        check_state("x", x)
        rng = np.random.default_rng(0)
        u = like(rng.standard_normal(x.shape), x)
        image = self.apply(u)
        for v in (like(rng.standard_normal(image.shape), image), image):
            back = self.adjoint(v)
            if tuple(back.shape) != tuple(u.shape):
                raise ValueError(f"adjoint of {self.name} returned shape {tuple(back.shape)} for x of shape {tuple(u.shape)}")
            pair = float((image * v).sum()), float((u * back).sum())
            scale = float((image * image).sum() * (v * v).sum()) ** 0.5
            if not abs(pair[0] - pair[1]) <= _precision(x) ** 0.5 * scale:
                raise ValueError(
                    f"adjoint of {self.name} is not the transpose of apply: <A u, v> = {pair[0]:.6g}, <u, A^T v> = {pair[1]:.6g}; "
                    "correct it, make sure that apply is linear (no constant term), or leave the adjoint to torch or JAX"
                )


def mask(known: Any) -> LinearOperator:
    """Return the operator that keeps the known entries of x and makes the others 0, for inpainting.

    Parameters
    ----------
    known : array of bool, or of 0 and 1
        1 where x is known. It has the shape of a sample, or a batch axis for one mask per sample. An axis of length 1, such as
        that of channels, is repeated. Entries of y where `known` is 0 are ignored.

    Raises
    ------
    TypeError
        If it is not an array of numbers.
    ValueError
        If it has an entry other than 0 and 1; and, on use, if its size does not match that of x.
    """
    if not is_traced(known):
        values = array("known", known.astype(np.float64) if _is_bool(known) else known, "0 or 1")
        if not (values.ndim and np.isin(values, (0, 1)).all()):
            raise ValueError(f"known={shown(known)} must be an array of 0 and 1, of the shape of a sample")
        known = known if is_torch(known) or is_jax(known) else values

    def keep(x: Any) -> Any:
        return _mask_like(known, x) * x

    def pseudo_inverse(r: Any, s: Any) -> Any:
        return _mask_like(known, r) * r / (1 + s)

    def measured(y: Any) -> Any:
        return backend_of(y).xp.broadcast_to(_mask_like(known, y), y.shape)

    return LinearOperator("mask", keep, keep, pseudo_inverse, measured)


def downsample(factor: int | tuple[int, ...]) -> LinearOperator:
    """Return average pooling by a whole factor, for super-resolution.

    Parameters
    ----------
    factor : int or tuple of int
        One for each of the last axes. An int applies to the last two, the height and the width of images.

    Raises
    ------
    ValueError
        If a factor is not a whole number of at least 1; and, on use, if it does not divide the size of x.
    """
    given = factor if isinstance(factor, tuple | list) else (factor, factor)
    factors = tuple(whole(f"factor[{i}]" if given is factor else "factor", f) for i, f in enumerate(given))
    if not factors:
        raise ValueError("factor=() must have a whole number for each of the last axes of x, such as 4 or (4, 4)")
    count, axes = int(np.prod(factors)), len(factors)

    def apply(x: Any) -> Any:
        sizes = tuple(x.shape[-axes:])
        if x.ndim <= axes or any(size % f for size, f in zip(sizes, factors, strict=False)):
            raise ValueError(
                f"factor={factor!r} must divide the last {axes} axes of x, whose shape is {tuple(x.shape)}; crop or pad x"
            )
        split = [part for size, f in zip(sizes, factors, strict=True) for part in (size // f, f)]
        return x.reshape(*x.shape[:-axes], *split).mean(tuple(range(-1, -2 * axes, -2)))

    def spread(y: Any) -> Any:
        lead, sizes = y.shape[:-axes], y.shape[-axes:]
        split = [part for size, f in zip(sizes, factors, strict=True) for part in (size, f)]
        thin = y.reshape(*lead, *(part for size in sizes for part in (size, 1)))
        whole_sizes = (size * f for size, f in zip(sizes, factors, strict=True))
        return backend_of(y).xp.broadcast_to(thin, (*lead, *split)).reshape(*lead, *whole_sizes)

    # A A^T = I / count
    return LinearOperator(
        f"downsample({factor!r})", apply, lambda y: spread(y) / count, lambda r, s: spread(r) / count / (1 / count + s)
    )


def blur(kernel: Any) -> LinearOperator:
    r"""Return the circular convolution with a kernel, by FFT: (A x)[i] = sum_j kernel[j] x[i - j + centre].

    Parameters
    ----------
    kernel : array
        Real. It covers the last `kernel.ndim` axes of x and is no larger than these; its centre is at index size // 2.

    Notes
    -----
    A is diagonal in the Fourier basis. The pseudo-inverse leaves out frequencies whose \|k\|^2 + s is below the largest one times
    the precision of x: a kernel that hardly passes them says nothing about them.

    Raises
    ------
    TypeError
        If the kernel is not an array of real numbers.
    ValueError
        If it is empty, not finite or all 0; and, on use, if it is larger than x.
    """
    values = array("kernel", kernel)
    if not (values.ndim and values.size and np.isfinite(values).all() and values.any()):
        raise ValueError(f"kernel={shown(kernel)} must be a finite array of at least one axis that is not 0 everywhere")

    def filtered(x: Any, gain: Callable[[Any, Any], Any]) -> Any:
        backend = backend_of(x)
        wide, xp = backend.cast(x, backend.carry(x.dtype)), backend.xp
        axes, sizes = tuple(range(-values.ndim, 0)), tuple(x.shape[-values.ndim :])
        response = xp.fft.rfftn(like(_wrapped(values, x), wide), None, axes)
        found = xp.fft.irfftn(gain(response, xp.fft.rfftn(wide, None, axes)), sizes, axes)
        return backend.cast(found, x.dtype)

    def inverted(k: Any, f: Any, s: Any, x: Any) -> Any:
        xp = backend_of(x).xp
        power = (k * k.conj()).real
        total = power + s
        usable = total > _precision(x) * (power.max() + s)
        return xp.where(usable, k.conj() / xp.where(usable, total, 1.0), 0.0) * f

    return LinearOperator(
        "blur",
        lambda x: filtered(x, lambda k, f: k * f),
        lambda y: filtered(y, lambda k, f: k.conj() * f),
        lambda r, s: filtered(r, lambda k, f: inverted(k, f, s, r)),
    )


def linear(function_of_x: Map, shape: tuple[int, ...], adjoint: Map | None = None, *, iterations: int = 50) -> LinearOperator:
    r"""Return the operator of any linear function; torch and JAX derive the transpose, and NumPy needs the adjoint.

    The regularised inverse uses conjugate gradients on \|A x - r\|^2 + s \|x\|^2 (CGLS, Björck, Numerical Methods for Least
    Squares Problems, 1996, section 7.4), for each sample separately. It also converges if A A^T is singular.

    Parameters
    ----------
    function_of_x : callable
        x -> A x, from (batch, \*shape) to (batch, ...), the same for each sample, without a constant term.
    shape : tuple of int
        The shape of one sample.
    adjoint : callable, optional
        y -> A^T y. `LinearOperator.check_adjoint` checks it.
    iterations : int
        The maximal number of iterations, each with one A and one A^T. A sample stops at the precision of its dtype. Up to
        rounding, as many iterations as measurements suffice; fewer do if the singular values of A are similar.

    Raises
    ------
    TypeError
        If function_of_x or adjoint is not a function of one array; on use in NumPy, if the adjoint is missing.
    ValueError
        If shape is not a tuple of whole numbers; and, on use, if x has another shape, or the function has no gradients.
    """
    function("function_of_x", function_of_x, "x")
    if adjoint is not None:
        function("adjoint", adjoint, "y")
    if not isinstance(shape, tuple | list):
        raise ValueError(f"shape={shown(shape)} must be the shape of one sample, a tuple of whole numbers")
    sample = tuple(whole(f"shape[{i}]", size) for i, size in enumerate(shape))
    iterations = whole("iterations", iterations)

    def apply(x: Any) -> Any:
        if tuple(x.shape[1:]) != sample:
            raise ValueError(f"x has shape {tuple(x.shape)} and the operator takes (batch, {', '.join(map(str, sample))})")
        y = function_of_x(x)
        if getattr(y, "ndim", 0) < 1 or backend_of(y) is not backend_of(x) or len(y) != len(x):
            raise ValueError(f"function_of_x must return a {type(x).__name__} of shape ({len(x)}, ...), and returned {shown(y)}")
        return y

    transpose = adjoint or (lambda y: _transposed(apply, sample, y))
    return LinearOperator("linear", apply, transpose, lambda r, s: _least_squares(apply, transpose, iterations, r, s))


def beside(argument: str, values: Any, x: Any) -> Any:
    """Return an array in the framework and dtype, and on the device, of another.

    Raises
    ------
    TypeError
        If it is of a framework that is neither that of x nor NumPy.
    """
    backend = backend_of(x)
    if backend_of(values) is backend:
        return values.to(x) if is_torch(x) else backend.cast(values, x.dtype)
    if not isinstance(values, np.ndarray):
        raise TypeError(
            f"{argument} is a {type(values).__name__} and x a {type(x).__name__}; make {argument} one, or a numpy.ndarray"
        )
    return like(values, x)


def _is_bool(values: Any) -> bool:
    return getattr(getattr(values, "dtype", None), "kind", "") == "b"


def _mask_like(known: Any, x: Any) -> Any:
    """Return a mask that broadcasts against x."""
    shape, wanted = tuple(known.shape), tuple(x.shape)
    against = wanted if len(shape) == len(wanted) else wanted[1:]
    if len(shape) != len(against) or any(size not in (1, most) for size, most in zip(shape, against, strict=True)):
        raise ValueError(
            f"known has shape {shape} and x {wanted}; give a mask of the shape of a sample, {wanted[1:]}, or one for each, {wanted}"
        )
    return beside("known", known, x)


def _wrapped(kernel: Array, x: Any) -> Array:
    """Return the kernel in an array of the size of x, its centre at index 0."""
    sizes = tuple(x.shape[-kernel.ndim :])
    if x.ndim <= kernel.ndim or any(k > size for k, size in zip(kernel.shape, sizes, strict=True)):
        raise ValueError(
            f"kernel of shape {kernel.shape} is larger than the last axes of x, whose shape is {tuple(x.shape)}; cut it"
        )
    wide = np.zeros(sizes)
    wide[tuple(slice(0, k) for k in kernel.shape)] = kernel
    return np.roll(wide, [-(k // 2) for k in kernel.shape], tuple(range(kernel.ndim)))


def _precision(x: Any) -> float:
    return float(backend_of(x).xp.finfo(x.dtype).eps)


def _transposed(apply: Map, sample: tuple[int, ...], y: Any) -> Any:
    backend = backend_of(y)
    if backend.vjp is None:
        raise TypeError(
            f"adjoint is missing: torch and JAX derive it from the function, and y is a {type(y).__name__}; give adjoint="
        )
    first = y.reshape(len(y), -1)[:, 0].reshape(-1, *(1,) * len(sample))
    at = backend.xp.zeros_like(backend.xp.broadcast_to(first, (len(y), *sample)))
    return backend.vjp(apply, at)[1](y)


State = tuple[Any, Any, Any, Any]
"""x, the residual, the direction and the square of the gradient."""


def _least_squares(apply: Map, adjoint: Map, iterations: int, r: Any, s: Any) -> Any:
    """Minimise |A x - r|^2 + s |x|^2 by conjugate gradients."""
    gradient = adjoint(r)
    xp, start = backend_of(r).xp, _squared(gradient, gradient)
    least = (10 * _precision(r)) ** 2 * start

    def step(_: Any, state: State) -> State:
        x, residual, p, gamma = state
        q = apply(p)
        delta, going = _squared(q, gradient) + (s * p * p).reshape(len(p), -1).sum(1).reshape(gamma.shape), gamma > least
        a = xp.where(going, gamma, 0.0) / xp.where(going, delta, 1.0)
        x, residual = x + a * p, residual - a.reshape(-1, *(1,) * (r.ndim - 1)) * q
        slope = adjoint(residual) - s * x
        after = _squared(slope, gradient)
        return x, residual, slope + after / xp.where(going, gamma, 1.0) * p, xp.where(going, after, gamma)

    state = (xp.zeros_like(gradient), r, gradient, start)
    if is_jax(r):
        from jax import lax

        return lax.fori_loop(0, iterations, step, state)[0]
    for i in range(iterations):
        if not (is_compiling() or bool((state[3] > least).any())):
            break
        state = step(i, state)
    return state[0]


def _squared(z: Any, like_x: Any) -> Any:
    """Return |z|^2 of each sample, in a shape that broadcasts against x."""
    return (z * z).reshape(len(z), -1).sum(1).reshape(-1, *(1,) * (like_x.ndim - 1))
