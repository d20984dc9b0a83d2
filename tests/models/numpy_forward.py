"""A Transformer of any settings in NumPy, float64 and plain loops: it judges the shipped one.

It shares no code with it and imports no JAX. One sequence at a time; the tokens outside the mask
are left out, so that nothing of padding is needed.
"""

from math import erf

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return np.array([0.5 * z * (1 + erf(z / 2**0.5)) for z in x.ravel()]).reshape(x.shape)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def relu(x):
    return np.maximum(x, 0.0)


def linear(x, layer):
    y = x @ layer["weight"]
    return y if layer["bias"] is None else y + layer["bias"]


def norm(x, parameters, settings):
    """RMS norm or layer norm of one vector; the identity without parameters."""
    if parameters is None:
        return x
    if settings["centred"]:
        x = x - x.sum() / len(x)
    y = (settings["offset"] + parameters["weight"]) * x
    y = y / np.sqrt((x * x).sum() / len(x) + settings["epsilon"])
    return y if parameters["bias"] is None else y + parameters["bias"]


def rotated(x, position, rope):
    """The first channels turned by pairs (i, i + R/2); all of them without a rope."""
    if rope is None:
        return x
    width = int(len(x) * rope["fraction"])
    y = x.copy()
    for i in range(width // 2):
        angle = position * rope["theta"] ** (-2 * i / width)
        first, second = x[i], x[i + width // 2]
        y[i] = first * np.cos(angle) - second * np.sin(angle)
        y[i + width // 2] = first * np.sin(angle) + second * np.cos(angle)
    return y


def attention(x, layer, spec, settings):
    """One head of one token at a time; each token sees the last `window` tokens."""
    size, group = settings["head_dim"], settings["num_heads"] // settings["num_kv_heads"]
    scale = size**-0.5 if spec["scale"] is None else spec["scale"]
    projected = {}
    for name in ("query", "key", "value"):
        heads = linear(x, layer[name]).reshape(len(x), -1, size)
        if name != "value":
            for t in range(len(x)):
                for h in range(heads.shape[1]):
                    normed = norm(heads[t, h], layer[f"{name}_norm"], settings["norm"])
                    heads[t, h] = rotated(normed, t, spec["rope"])
        projected[name] = heads
    mixed = np.zeros((len(x), settings["num_heads"], size))
    for t in range(len(x)):
        first = 0 if spec["window"] is None else max(0, t + 1 - spec["window"])
        for h in range(settings["num_heads"]):
            logits = []
            for s in range(first, t + 1):
                z = scale * projected["query"][t, h] @ projected["key"][s, h // group]
                cap = spec["softcap"]
                logits.append(z if cap is None else cap * np.tanh(z / cap))
            weights = np.exp(np.array(logits) - max(logits))
            weights = weights / weights.sum()
            for weight, s in zip(weights, range(first, t + 1), strict=True):
                mixed[t, h] += weight * projected["value"][s, h // group]
    return linear(mixed.reshape(len(x), -1), layer["output"])


def mlp(x, layer, settings):
    hidden = settings["activation"](linear(x, layer["up" if layer["gate"] is None else "gate"]))
    if layer["gate"] is not None:
        hidden = hidden * linear(x, layer["up"])
    return linear(hidden, layer["down"])


def forward(parameters, settings, tokens):
    """(final hidden states, logits) of the tokens of one sequence, none of them padding.

    Args:
        parameters: "embedding", "position_embedding" or None, "norm", "output" or None, and
            "layers", each with "attention_norm", "attention", "attention_post_norm", "mlp_norm",
            "mlp", "mlp_post_norm".
        settings: "layers", one record per layer, and what the functions above read.
        tokens: ids.
    """

    def each(x, which):
        return np.stack([norm(row, which, settings["norm"]) for row in x])

    x = parameters["embedding"][tokens]
    if settings["embedding_scale"] is not None:
        x = x * settings["embedding_scale"]
    if parameters["position_embedding"] is not None:
        x = x + parameters["position_embedding"][: len(tokens)]
    for layer, spec in zip(parameters["layers"], settings["layers"], strict=True):
        normed = each(x, layer["attention_norm"])
        mixed = attention(normed, layer["attention"], spec, settings)
        middle = x + each(mixed, layer["attention_post_norm"])
        read = normed if settings["parallel"] else each(middle, layer["mlp_norm"])
        x = middle + each(mlp(read, layer["mlp"], settings), layer["mlp_post_norm"])
    hidden = each(x, parameters["norm"])
    output = parameters["embedding"] if parameters["output"] is None else parameters["output"]
    logits, cap = hidden @ output.T, settings["final_softcap"]
    return hidden, logits if cap is None else cap * np.tanh(logits / cap)
