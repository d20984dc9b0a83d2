"""FLOPs and bytes of a stage, counted from its size; docs/benchmarks.md has the definitions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .sizes import Size

if TYPE_CHECKING:  # it imports JAX, which a peer's environment need not have
    from .machine import Machine


class Phase(NamedTuple):
    """Work that one limit bounds: FLOPs, attention's share of them, and bytes from memory."""

    flops: float
    attention_flops: float
    bytes: float


@dataclass(frozen=True)
class Work:
    """The phases of a stage, one after the other, and the response tokens it handles."""

    phases: tuple[Phase, ...]
    tokens: int

    @property
    def flops(self) -> float:
        return sum(phase.flops for phase in self.phases)

    @property
    def attention_share(self) -> float:
        """Attention's part of the counted FLOPs."""
        return sum(phase.attention_flops for phase in self.phases) / self.flops

    def least_seconds(self, machine: "Machine") -> float:
        """The roofline: for each phase the slower of its products and its memory traffic."""
        return sum(
            max(phase.flops / machine.flops_per_s, phase.bytes / machine.bytes_per_s)
            for phase in self.phases
        )


def figures(work: Work, machine: "Machine", seconds: float) -> dict[str, float]:
    """What a time means: tokens/s, model FLOPs utilisation and fraction of the roofline."""
    return {
        "tokens_per_s": round(work.tokens / seconds, 1),
        "gflop": round(work.flops / 1e9, 3),
        "mfu": round(work.flops / seconds / machine.flops_per_s, 4),
        "roofline_fraction": round(work.least_seconds(machine) / seconds, 4),
    }


def rollout_work(size: Size, item: int = 4) -> Work:
    """Prefill, then T - 1 decode steps; each step reads all weights and the cache once."""
    rows, steps = size.batch, size.response - 1
    prompts = _forward(size, size.prompt, read=1, item=item)
    pairs = rows * sum(size.prompt + t for t in range(1, size.response))
    attention = size.layers * _attention(size, pairs)
    dense = 2.0 * rows * steps * (size.matmul_parameters + size.head_parameters)
    weights = steps * (size.matmul_parameters + size.head_parameters)
    cache = pairs * size.layers * 2 * size.kv_heads * size.head_dim
    decode = Phase(dense + attention, attention, float(item * (weights + cache)))
    return Work((prompts, decode), rows * size.response)


def score_work(size: Size, item: int = 4) -> Work:
    """One forward pass of the reference over all slots, one of the critic."""
    length = size.prompt + size.response
    models = [_forward(size, length, size.response, item, head=head) for head in (True, False)]
    return Work(tuple(models), size.batch * size.response)


def learn_work(size: Size, item: int = 4) -> Work:
    """Every epoch: forward and backward of policy and critic, and Adam on all their weights."""
    phases = []
    length = size.prompt + size.response
    for head, parameters in ((True, size.policy_parameters), (False, size.critic_parameters)):
        forward = _forward(size, length, size.response, item, head=head)
        phases.append(
            Phase(
                3 * forward.flops,
                3 * forward.attention_flops,
                # Two reads of the weights, gradient out and in; weights and moments in and out.
                float(parameters * (item * 4 + 4 * 6)),
            )
        )
    return Work(tuple(phases) * size.epochs, size.batch * size.response)


def collect_work(size: Size, item: int = 4) -> Work:
    """The rollout, then the scores."""
    return _joined(rollout_work(size, item), score_work(size, item))


def step_work(size: Size, item: int = 4) -> Work:
    """The whole iteration; its tokens are those of the responses, counted once."""
    return _joined(collect_work(size, item), learn_work(size, item))


WORK: dict[str, Callable[[Size, int], Work]] = {
    "rollout": rollout_work,
    "score": score_work,
    "collect": collect_work,
    "learn": learn_work,
    "step": step_work,
}
"""Name of a stage -> its work, from a size and the bytes of a number."""


def _joined(first: Work, second: Work) -> Work:
    return Work(first.phases + second.phases, first.tokens)


def _attention(size: Size, pairs: float) -> float:
    """Evaluation and mixing of a layer: 4 FLOPs a channel for each (query, visible key) pair."""
    return 4.0 * size.heads * size.head_dim * pairs


def _forward(size: Size, length: int, read: int, item: int, head: bool = True) -> Phase:
    """A causal forward pass over `length` slots for the results of the last `read` of them.

    The last layer owes the others their keys and values alone.
    """
    unread = length - read
    layer_pairs, unread_pairs = (n * (n + 1) / 2 for n in (length, unread))
    attention = _attention(size, size.batch * (size.layers * layer_pairs - unread_pairs))
    keys_and_values = 2 * size.width * size.kv_heads * size.head_dim
    left_out = unread * (size.matmul_parameters / size.layers - keys_and_values)
    head_parameters = size.head_parameters if head else 0
    dense = size.matmul_parameters * length - left_out + head_parameters * read
    dense *= 2.0 * size.batch
    return Phase(
        dense + attention, attention, float(item * (size.matmul_parameters + head_parameters))
    )
