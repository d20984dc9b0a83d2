"""PPO post-training of language models as pure JAX functions, composed into one program.

The names below come in the order in which data flows; the familiar trainer is at the end.
"""

from .advantages import gae as gae
from .config import GenerationConfig as GenerationConfig
from .config import Hyperparams as Hyperparams
from .config import IterationConfig as IterationConfig
from .evaluation import ModelReward as ModelReward
from .evaluation import evaluate as evaluate
from .iteration import Collected as Collected
from .iteration import collect as collect
from .iteration import iteration_keys as iteration_keys
from .iteration import learn as learn
from .iteration import ppo_iteration as ppo_iteration
from .learner.epochs import update as update
from .learner.state import Learner as Learner
from .learner.state import TrainState as TrainState
from .losses import clipped_policy_loss as clipped_policy_loss
from .losses import clipped_value_loss as clipped_value_loss
from .losses import fixed_mean as fixed_mean
from .losses import sequence_mean as sequence_mean
from .losses import token_mean as token_mean
from .models import LanguageModel as LanguageModel
from .models import Transformer as Transformer
from .models import TransformerConfig as TransformerConfig
from .models import ValueHead as ValueHead
from .models import ValueModel as ValueModel
from .ops.kl import k1 as k1
from .ops.kl import k2 as k2
from .ops.kl import k3 as k3
from .ops.kl import with_gradient_of as with_gradient_of
from .ops.masked import whiten as whiten
from .program import CompiledIteration as CompiledIteration
from .program import compile_iteration as compile_iteration
from .rewards import adaptive_kl_coef as adaptive_kl_coef
from .rewards import token_rewards as token_rewards
from .rollout.generate import generate as generate
from .sharding import make_mesh as make_mesh
from .sharding import place as place
from .trainer.config import PPOConfig as PPOConfig
from .trainer.ppo import PPOActorCritic as PPOActorCritic
from .trainer.ppo import PPOBatch as PPOBatch
from .trainer.ppo import PPOTrainer as PPOTrainer
from .trainer.pretrained import CausalLM as CausalLM
from .trainer.pretrained import RewardModel as RewardModel
from .trainer.text_reward import PythonReward as PythonReward
from .types import Evaluation as Evaluation
from .types import Experience as Experience
from .types import Prompts as Prompts
from .types import Rollout as Rollout
