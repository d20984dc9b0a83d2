"""What stands on a trunk: an output matrix (policy) or one vector (critic, reward model)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int

from . import transformer
from .transformer import TransformerConfig


@dataclass(frozen=True)
class Model:
    """Parameters by name, and what their shapes do not tell.

    A trunk has `embedding`, `layers` and `norm`. A policy has `output` besides, None where it is
    the embedding; a critic has `head`. A critic on the policy's trunk has nothing but `head`,
    and None for `config`.
    """

    parameters: dict
    config: TransformerConfig | None


def hidden_states(
    model: Model, tokens: Int[np.ndarray, " S"], mask: Bool[np.ndarray, " S"]
) -> Float64[np.ndarray, "S D"]:
    """Final hidden state of every slot."""
    assert model.config is not None, "a head on the policy's trunk has no trunk of its own"
    return transformer.forward(model.parameters, model.config, tokens, mask)


def _output(policy: Model) -> str:
    return "embedding" if policy.parameters["output"] is None else "output"


def unembed(policy: Model, hidden: Float64[np.ndarray, "C D"]) -> Float64[np.ndarray, "C V"]:
    """A logit is the product of the hidden state with a row of the output matrix."""
    return hidden @ policy.parameters[_output(policy)].T


def policy_backward(
    hidden_gradient: Float64[np.ndarray, "S D"],
    logit_gradient: Float64[np.ndarray, "S V"],
    policy: Model,
    tokens: Int[np.ndarray, " S"],
    mask: Bool[np.ndarray, " S"],
) -> dict:
    """Gradients of a policy from those of its logits, and of its hidden states by another way.

    Where the output is the embedding, that matrix collects from both of its uses.
    """
    name = _output(policy)
    hidden = hidden_states(policy, tokens, mask)
    dhidden = hidden_gradient + logit_gradient @ policy.parameters[name]
    assert policy.config is not None, "a policy has a trunk"
    gradients = transformer.backward(dhidden, policy.parameters, policy.config, tokens, mask)
    gradients["output"] = None if name == "embedding" else np.zeros(policy.parameters[name].shape)
    gradients[name] += logit_gradient.T @ hidden
    return gradients


def values_from_hidden(
    critic: Model, hidden: Float64[np.ndarray, "S D"]
) -> Float64[np.ndarray, " S"]:
    """value = h . w."""
    return hidden @ critic.parameters["head"]


def critic_backward(
    value_gradient: Float64[np.ndarray, " S"],
    critic: Model,
    policy: Model,
    tokens: Int[np.ndarray, " S"],
    mask: Bool[np.ndarray, " S"],
) -> tuple[dict, Float64[np.ndarray, "S D"]]:
    """(gradients of the critic, gradient of the policy's hidden states).

    The second is zero unless the critic is a head on the policy's trunk.
    """
    owner = policy if critic.config is None else critic
    hidden = hidden_states(owner, tokens, mask)
    dhidden = np.outer(value_gradient, critic.parameters["head"])
    gradients = {"head": value_gradient @ hidden}
    if critic.config is None:
        return gradients, dhidden
    gradients |= transformer.backward(dhidden, critic.parameters, critic.config, tokens, mask)
    return gradients, np.zeros((len(tokens), len(policy.parameters["norm"])))
