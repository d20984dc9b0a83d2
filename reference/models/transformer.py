"""The trunk: embedding, blocks and a final norm, forward and backward."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int

from .attention import Sequence, attention, attention_backward
from .layers import gated_mlp, gated_mlp_backward, rms_norm, rms_norm_backward


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the slow rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class TransformerConfig:
    """What the shapes of the parameters do not tell."""

    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-6


def rope_frequencies(config: TransformerConfig) -> Float64[np.ndarray, " half"]:
    """theta^(-2i/E); where stretched: short wavelengths stay, long ones grow by the factor."""
    frequencies, scaling = [], config.rope_scaling
    for i in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * i / config.head_dim)
        if scaling is not None:
            wavelength, span = 2 * np.pi / frequency, scaling.original_max_position
            if wavelength > span / scaling.low_freq_factor:
                frequency = frequency / scaling.factor
            elif wavelength >= span / scaling.high_freq_factor:
                kept = (span / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency = (1 - kept) * frequency / scaling.factor + kept * frequency
        frequencies.append(frequency)
    return np.array(frequencies)


def forward(
    parameters: dict,
    config: TransformerConfig,
    tokens: Int[np.ndarray, " S"],
    mask: Bool[np.ndarray, " S"],
) -> Float64[np.ndarray, "S D"]:
    """Final hidden state of every slot; of filled ones alone it means something."""
    inputs = _layer_inputs(parameters, config, tokens, mask)
    return rms_norm(inputs[-1], parameters["norm"], config.norm_epsilon)


def backward(
    gradient: Float64[np.ndarray, "S D"],
    parameters: dict,
    config: TransformerConfig,
    tokens: Int[np.ndarray, " S"],
    mask: Bool[np.ndarray, " S"],
) -> dict:
    """Gradients of embedding, layers and norm, given that of the final hidden states."""
    inputs, sequence = _layer_inputs(parameters, config, tokens, mask), _sequence(config, mask)
    dx, norm = rms_norm_backward(gradient, inputs[-1], parameters["norm"], config.norm_epsilon)
    layers = []
    for x, layer in reversed(list(zip(inputs[:-1], parameters["layers"], strict=True))):
        dx, layer_gradient = _block_backward(dx, x, layer, config, sequence)
        layers.insert(0, layer_gradient)
    embedding = np.zeros_like(parameters["embedding"])
    for slot, token in enumerate(tokens):
        embedding[token] += dx[slot]
    return {"embedding": embedding, "layers": layers, "norm": norm}


def _sequence(config: TransformerConfig, mask: Bool[np.ndarray, " S"]) -> Sequence:
    """A token's position is the number of tokens before it; empty slots do not count."""
    positions = np.array([max(int(mask[: slot + 1].sum()) - 1, 0) for slot in range(len(mask))])
    return Sequence(mask, positions, rope_frequencies(config))


def _layer_inputs(
    parameters: dict,
    config: TransformerConfig,
    tokens: Int[np.ndarray, " S"],
    mask: Bool[np.ndarray, " S"],
) -> list[Float64[np.ndarray, "S D"]]:
    """The residual stream before each layer, and after the last."""
    sequence = _sequence(config, mask)
    inputs = [parameters["embedding"][tokens]]
    for layer in parameters["layers"]:
        inputs.append(_block(inputs[-1], layer, config, sequence))
    return inputs


def _block(
    x: Float64[np.ndarray, "S D"], layer: dict, config: TransformerConfig, sequence: Sequence
) -> Float64[np.ndarray, "S D"]:
    """m = x + attention(norm(x)),  y = m + mlp(norm(m))."""
    normed = rms_norm(x, layer["attention_norm"], config.norm_epsilon)
    middle = x + attention(normed, layer["attention"], config, sequence)
    normed = rms_norm(middle, layer["mlp_norm"], config.norm_epsilon)
    return middle + gated_mlp(normed, layer["mlp"])


def _block_backward(
    gradient: Float64[np.ndarray, "S D"],
    x: Float64[np.ndarray, "S D"],
    layer: dict,
    config: TransformerConfig,
    sequence: Sequence,
) -> tuple[Float64[np.ndarray, "S D"], dict]:
    """Each residual branch adds its gradient to the one that passes by it."""
    epsilon = config.norm_epsilon
    first = rms_norm(x, layer["attention_norm"], epsilon)
    middle = x + attention(first, layer["attention"], config, sequence)
    second = rms_norm(middle, layer["mlp_norm"], epsilon)
    dsecond, mlp = gated_mlp_backward(gradient, second, layer["mlp"])
    branch, mlp_norm = rms_norm_backward(dsecond, middle, layer["mlp_norm"], epsilon)
    dmiddle = gradient + branch
    dfirst, attended = attention_backward(dmiddle, first, layer["attention"], config, sequence)
    branch, attention_norm = rms_norm_backward(dfirst, x, layer["attention_norm"], epsilon)
    gradients = {"attention_norm": attention_norm, "attention": attended}
    return dmiddle + branch, gradients | {"mlp_norm": mlp_norm, "mlp": mlp}
