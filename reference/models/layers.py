"""Layers that look at one token at a time, and their derivatives."""

import numpy as np
from jaxtyping import Float64, Int


def linear(x: Float64[np.ndarray, "rows in"], parameters: dict) -> Float64[np.ndarray, "rows out"]:
    """y = x W + b."""
    y = x @ parameters["weight"]
    return y if parameters["bias"] is None else y + parameters["bias"]


def linear_backward(
    gradient: Float64[np.ndarray, "rows out"], x: Float64[np.ndarray, "rows in"], parameters: dict
) -> tuple[Float64[np.ndarray, "rows in"], dict]:
    """dx = dy W^T, dW = x^T dy, db = sum of dy over rows."""
    bias = None if parameters["bias"] is None else gradient.sum(axis=0)
    return gradient @ parameters["weight"].T, {"weight": x.T @ gradient, "bias": bias}


def rms_norm(
    x: Float64[np.ndarray, "*batch D"], weight: Float64[np.ndarray, " D"], epsilon: float
) -> Float64[np.ndarray, "*batch D"]:
    """y_i = w_i x_i s with s = (mean_j x_j^2 + epsilon)^(-1/2)."""
    return weight * x * _scale(x, epsilon)


def rms_norm_backward(
    gradient: Float64[np.ndarray, "*batch D"],
    x: Float64[np.ndarray, "*batch D"],
    weight: Float64[np.ndarray, " D"],
    epsilon: float,
) -> tuple[Float64[np.ndarray, "*batch D"], Float64[np.ndarray, " D"]]:
    """With ds/dx_j = -s^3 x_j / D:  dx_j = s w_j dy_j - s^3 x_j / D sum_i dy_i w_i x_i."""
    size, scale = x.shape[-1], _scale(x, epsilon)
    inner = (gradient * weight * x).sum(axis=-1, keepdims=True)
    dx = scale * weight * gradient - scale**3 * x / size * inner
    return dx, (gradient * x * scale).reshape(-1, size).sum(axis=0)


def _scale(x: Float64[np.ndarray, "*batch D"], epsilon: float) -> Float64[np.ndarray, "*batch 1"]:
    return (np.mean(x**2, axis=-1, keepdims=True) + epsilon) ** -0.5


def silu(z: Float64[np.ndarray, "*shape"]) -> Float64[np.ndarray, "*shape"]:
    """z sigma(z) with sigma the logistic function."""
    return z / (1 + np.exp(-z))


def silu_backward(
    gradient: Float64[np.ndarray, "*shape"], z: Float64[np.ndarray, "*shape"]
) -> Float64[np.ndarray, "*shape"]:
    """dz = dy (sigma + z sigma (1 - sigma))."""
    sigma = 1 / (1 + np.exp(-z))
    return gradient * (sigma + z * sigma * (1 - sigma))


def gated_mlp(x: Float64[np.ndarray, "S D"], parameters: dict) -> Float64[np.ndarray, "S D"]:
    """y = (silu(x W_gate) * x W_up) W_down."""
    gate, up = linear(x, parameters["gate"]), linear(x, parameters["up"])
    return linear(silu(gate) * up, parameters["down"])


def gated_mlp_backward(
    gradient: Float64[np.ndarray, "S D"], x: Float64[np.ndarray, "S D"], parameters: dict
) -> tuple[Float64[np.ndarray, "S D"], dict]:
    """The product rule on the gate and what it lets through; x is read by both."""
    gate, up = linear(x, parameters["gate"]), linear(x, parameters["up"])
    inner, down = linear_backward(gradient, silu(gate) * up, parameters["down"])
    dx_gate, gate_gradient = linear_backward(silu_backward(inner * up, gate), x, parameters["gate"])
    dx_up, up_gradient = linear_backward(inner * silu(gate), x, parameters["up"])
    return dx_gate + dx_up, {"gate": gate_gradient, "up": up_gradient, "down": down}


def rotate(
    x: Float64[np.ndarray, "S X E"],
    positions: Int[np.ndarray, " S"],
    frequencies: Float64[np.ndarray, " half"],
) -> Float64[np.ndarray, "S X E"]:
    """Turn each pair (x_i, x_{i + E/2}) by position * frequency_i.

    A rotation is orthogonal: its backward pass is the rotation by the negative positions.
    """
    y, half = np.zeros_like(x), len(frequencies)
    for slot, position in enumerate(positions):
        for i, frequency in enumerate(frequencies):
            cos, sin = np.cos(position * frequency), np.sin(position * frequency)
            first, second = x[slot, :, i], x[slot, :, i + half]
            y[slot, :, i] = first * cos - second * sin
            y[slot, :, i + half] = first * sin + second * cos
    return y
