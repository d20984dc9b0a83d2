"""PPO post-training of language models as pure JAX functions, composed into one program.

`__all__` has the stages and records in the order in which data flows; the familiar trainer is at
the end. The namespaces `kl`, `losses`, `advantages`, `models` and `sampling` have the choices that
a stage takes: `ppo_kernel.kl.k3`, `ppo_kernel.losses.token_mean`.
"""

from . import advantages as advantages
from . import losses as losses
from . import models as models
from .advantages import gae, whitened
from .config import GenerationConfig, Hyperparams, IterationConfig, OptimizerHyperparams
from .evaluation import ModelReward, evaluate
from .iteration import Collected, adapt_kl_coef, collect, learn, ppo_iteration
from .learner.epochs import update
from .learner.state import Learner, Models, TrainState, iteration_keys
from .losses import (
    clipped_policy_loss,
    clipped_value_loss,
    fixed_mean,
    ppo_policy_loss,
    ppo_value_loss,
    sequence_mean,
    token_mean,
)
from .models import LanguageModel, Transformer, TransformerConfig, ValueHead, ValueModel
from .ops import kl as kl
from .ops import sampling as sampling
from .ops.kl import k1, k2, k3, with_gradient_of
from .ops.masked import whiten
from .program import CompiledIteration, compile_iteration
from .rewards import adaptive_kl_coef, token_rewards
from .rollout.generate import generate
from .sharding import make_mesh, place
from .trainer.actor_critic import PPOActorCritic
from .trainer.batch import PPOBatch
from .trainer.config import PPOConfig
from .trainer.ppo import PPOTrainer
from .trainer.pretrained import CausalLM, RewardModel
from .trainer.text_reward import PythonReward
from .types import Evaluation, Experience, LossInputs, Prompts, Rollout, ValueLossInputs

__version__ = "0.1.0"

# In the order of the data, so not sorted; without the namespaces, whose names are those of arrays
# in many a notebook.
__all__ = [  # noqa: RUF022
    # settings and records
    "GenerationConfig", "IterationConfig", "Hyperparams", "OptimizerHyperparams",
    "Prompts", "Rollout", "Evaluation", "Experience",
    # models
    "TransformerConfig", "Transformer", "LanguageModel", "ValueHead", "ValueModel",
    # 1: prompts -> rollout
    "generate",
    # 2: rollout -> evaluation
    "evaluate", "ModelReward",
    # 3: token rewards
    "token_rewards", "adaptive_kl_coef", "k1", "k2", "k3", "with_gradient_of",
    # 4: advantages
    "gae", "whitened", "whiten",
    # 5: losses, and the epochs that reduce them
    "LossInputs", "ValueLossInputs", "ppo_policy_loss", "ppo_value_loss",
    "clipped_policy_loss", "clipped_value_loss", "token_mean", "sequence_mean", "fixed_mean",
    "Learner", "Models", "TrainState", "update",
    # the stages composed
    "iteration_keys", "Collected", "collect", "learn", "adapt_kl_coef", "ppo_iteration",
    "CompiledIteration", "compile_iteration",
    # placement
    "make_mesh", "place",
    # the trainer
    "PPOConfig", "PPOActorCritic", "PPOBatch", "PPOTrainer",
    "CausalLM", "RewardModel", "PythonReward",
]  # fmt: skip
