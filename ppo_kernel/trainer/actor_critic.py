"""`PPOActorCritic`: the models of a run, checked against each other."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..evaluation import ModelReward
from ..functions import RewardFn
from ..models.config import TransformerConfig
from ..models.heads import LanguageModel, ValueModel
from .config import PPOConfig
from .pretrained import CausalLM, RewardModel
from .text_reward import PythonReward


@dataclass(frozen=True)
class PPOActorCritic:
    """The models of a run: policy, frozen reference, critic, reward.

    The critic starts on the reward model's trunk where that has the policy's tokenizer, else on
    the policy's; its head starts at zero.

    Attributes:
        policy_model: the SFT model.
        reward_model: a `RewardModel`, a JAX `RewardFn`, or a `PythonReward`.
        config: settings of the run, those of its `PPOTrainer`.
        critic_model: a critic of your own (`models.protocol.Critic`).
        reference_model: the KL is measured against it; None for the policy at the start.

    Raises:
        ValueError: a policy or reward of another kind; the policy has ids that the reward model,
            the critic or the reference would read as others.
    """

    policy_model: CausalLM
    reward_model: RewardModel | RewardFn | PythonReward
    config: PPOConfig
    critic_model: Callable | None = None
    reference_model: CausalLM | None = None

    def __post_init__(self):
        if not isinstance(self.policy_model, CausalLM):
            raise ValueError(
                f"policy_model must be a CausalLM, such as CausalLM.from_pretrained(path); got "
                f"{self.policy_model!r}."
            )
        if not isinstance(self.reward_model, RewardModel) and not callable(self.reward_model):
            raise ValueError(
                "reward_model must be a RewardModel, such as RewardModel.from_pretrained(path), a "
                f"function of the rollout, or a PythonReward; got {self.reward_model!r}."
            )
        size = self.policy_model.num_token_ids
        for name, config in self._sizes().items():
            if config.vocab_size < size:
                raise ValueError(
                    f"{name} has {config.vocab_size} token ids, but reads those of a "
                    f"policy that has {size}; give its embedding as many rows, or let a reward "
                    "model read text: PythonReward(reward_model.score_texts)."
                )

    @property
    def critic(self) -> Callable:
        """The critic before the first update."""
        if self.critic_model is not None:
            return self.critic_model
        reward = self.reward_model
        if isinstance(reward, RewardModel) and self._reads_ids(reward):
            return ValueModel.on(reward.model.trunk)
        return ValueModel.on(self.policy_model.model.trunk)

    def reward(self) -> RewardFn | PythonReward:
        """The reward as the iteration takes it: in the program, or `PythonReward`."""
        reward = self.reward_model
        if isinstance(reward, PythonReward) and reward.tokenizer is None:
            return replace(reward, tokenizer=self.policy_model.tokenizer)
        if not isinstance(reward, RewardModel):
            return reward
        if self._reads_ids(reward):
            return ModelReward(reward.model)
        return PythonReward(reward.score_texts, self.policy_model.tokenizer)

    def check_length(self, prompt: int, response: int) -> None:
        """Refuse sequences with more tokens than a model has positions.

        Args:
            prompt, response: tokens of the longest.

        Raises:
            ValueError: names the model and its max_position_embeddings.
        """
        for name, config in self._sizes().items():
            if prompt + response > config.max_positions:
                raise ValueError(
                    f"a prompt of {prompt} tokens and {response} new tokens exceed the "
                    f"max_position_embeddings={config.max_positions} of {name}; shorten the "
                    "prompts, or lower max_new_tokens or max_seq_len."
                )

    def _sizes(self) -> dict[str, TransformerConfig]:
        """Sizes of the models that read the policy's ids; those of another class do not tell."""
        reward, reference = self.reward(), self.reference_model
        readers = {
            "policy_model": self.policy_model.model,
            "reward_model": reward.model if isinstance(reward, ModelReward) else None,
            "critic_model": self.critic_model,
            "reference_model": None if reference is None else reference.model,
        }
        return {
            name: model.trunk.config
            for name, model in readers.items()
            if isinstance(model, ValueModel | LanguageModel)
        }

    def _reads_ids(self, reward: RewardModel) -> bool:
        """Whether the policy's token ids are the reward model's."""
        ours, theirs = self.policy_model.tokenizer, reward.tokenizer
        return ours is None or theirs is None or ours == theirs
