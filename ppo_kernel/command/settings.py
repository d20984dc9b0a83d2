"""Settings of `ppo-kernel train`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..ops.checks import Range, check_whole
from ..trainer.config import PPOConfig
from ..trainer.supervised import FitConfig


@dataclass(frozen=True)
class TrainSettings:
    """SFT, reward model and PPO, from a model folder and files of text.

    Attributes:
        model: folder of a Llama, Qwen2 or Qwen3 model in Hugging Face's layout; nothing is
            downloaded.
        prompts: of PPO: JSON lines {"prompt": ...}, or a .txt file with one prompt per line.
        output: the run folder. The same command again goes on with a run that was stopped.
        sft: examples for supervised fine-tuning: JSON lines {"prompt": ..., "response": ...} or
            {"text": ...}. Without it PPO starts from the model as it is.
        preferences: pairs that a reward model is trained on: JSON lines {"prompt": ...,
            "chosen": ..., "rejected": ...}.
        reward_model: folder of a reward model (a sequence classifier with one label), instead of
            preferences.
        num_iterations: of PPO.
        save_every: iterations from one checkpoint to the next.
        evaluate_every: iterations from one look at held-out prompts to the next.
        held_out: share of the rows of each file that is kept for evaluation.
        seed: of all randomness.
        compute_dtype: type of the activations; parameters are float32.
        sft_fit: settings of supervised fine-tuning.
        reward_fit: settings of the reward model's training.
        ppo: settings of PPO.

    Raises:
        ValueError: a value is out of its range; both or none of preferences and reward_model.
    """

    model: Path
    prompts: Path
    output: Path
    sft: Path | None = None
    preferences: Path | None = None
    reward_model: Path | None = None
    num_iterations: int = 100
    save_every: int = 10
    evaluate_every: int = 10
    held_out: float = 0.1
    seed: int = 0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    sft_fit: FitConfig = FitConfig(
        num_steps=200, batch_size=16, widths=(512,), learning_rate=1e-5, weight_decay=0.0
    )
    reward_fit: FitConfig = FitConfig(
        num_steps=200, batch_size=16, widths=(512,), learning_rate=1e-5, weight_decay=0.0
    )
    ppo: PPOConfig = field(
        default_factory=lambda: PPOConfig(
            learning_rate_actor=1e-6, learning_rate_critic=1e-5, max_new_tokens=64,
            per_device_batch_size=8,
        )
    )  # fmt: skip

    def __post_init__(self):
        check_whole("num_iterations", self.num_iterations)
        check_whole("save_every", self.save_every)
        check_whole("evaluate_every", self.evaluate_every)
        check_whole("seed", self.seed, least=0)
        Range(0, 0.5, above=True).check("held_out", self.held_out)
        if (self.preferences is None) == (self.reward_model is None):
            raise ValueError(
                "give the reward one way: --preferences FILE to train a reward model, or "
                f"--reward-model FOLDER; got {'neither' if self.preferences is None else 'both'}."
            )

    def as_json(self, digests: Mapping[str, str]) -> dict[str, Any]:
        """The content of `config.json`; a run that goes on must agree in it.

        Data files are compared by digest, so they may have moved, and so may the output.

        Args:
            digests: SHA-256 of each file, by the setting that names it.
        """
        said = {name: value for name, value in vars(self).items() if name != "output"}
        for name in ("model", "reward_model"):
            said[name] = None if said[name] is None else str(said[name].expanduser().resolve())
        for name, digest in digests.items():
            said[name] = {"file": said[name].name, "sha256": digest}
        return {"command": "train", **said}
