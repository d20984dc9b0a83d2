"""The same PPO step here and in other frameworks, in turns on this machine, as ratios.

`python -m bench.peers.compare --shape SMALL --peers tunix trl hf --rounds 5`. Each peer runs in
its own interpreter: `--tunix-python`, `--trl-python`, or TUNIX_PYTHON and TRL_PYTHON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.peers.common import MARK
from bench.sizes import parse_size

DRIVERS = {
    "ours": ("bench.peers.ours", "own"),
    "rollouts": ("bench.peers.ours", "own"),
    "steps": ("bench.peers.ours", "own"),
    "tunix": ("bench.peers.tunix_step", "tunix"),
    "trl": ("bench.peers.trl_step", "trl"),
    "hf": ("bench.peers.hf_generate", "trl"),
}
"""Name -> module of its driver, and which interpreter runs it."""

TITLES = {
    "ours": "ppo_kernel", "rollouts": "ppo_kernel, rollouts", "tunix": "Tunix", "trl": "TRL",
    "steps": "ppo_kernel, one call a turn", "hf": "transformers generate",
}  # fmt: skip
THEIRS = ("tunix", "trl", "hf", "steps")
"""What may run beside ours."""

ROOT = Path(__file__).parents[2]


class Peer:
    """One driver's process and the rounds it has answered; `error` is set when it has ended."""

    def __init__(self, name: str, flags: argparse.Namespace):
        module, interpreter = DRIVERS[name]
        python = {"own": sys.executable, "tunix": flags.tunix_python, "trl": flags.trl_python}
        self.name, self.rounds, self.warmups, self.error = name, [], [], None
        self.log = open(flags.logs / f"{name}.log", "w")  # noqa: SIM115 (closed with the process)
        command = [python[interpreter], "-m", module, "--shape", flags.shape]
        self.calls, self.cold = flags.steps_a_turn, 1
        if name == "rollouts":
            # The first of a turn find cold caches for longer than one short call takes.
            self.calls, self.cold = 4 * flags.steps_a_turn, flags.steps_a_turn
            command += ["--rollouts"]
        if name == "steps":
            self.calls = 2
            command += ["--steps-a-call", str(flags.steps_a_turn)]
        rounds = flags.rounds * self.calls
        command += ["--warmup", str(flags.warmup), "--rounds", str(rounds)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip

    def warm_up(self, count: int) -> None:
        """Wait for the rounds that compile; they are kept apart."""
        self.warmups = [answer for _ in range(count) if (answer := self._answer())]

    def take_turn(self) -> None:
        """Calls one after the other; the first `cold` of several are not counted."""
        for call in range(self.calls):
            if self.error:
                return
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            answer = self._answer()
            if answer and call >= min(self.cold, self.calls - 1):
                self.rounds.append(answer)

    def close(self) -> None:
        """End the process; a driver that waits for its turn ends by itself."""
        if not self.process.stdin.closed:
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.log.close()

    def median(self, key: str) -> float | None:
        """Median seconds over the rounds; None where the peer has no such part or failed."""
        values = [answer[key] for answer in self.rounds if key in answer]
        return statistics.median(values) if values else None

    def _answer(self) -> dict | None:
        if self.error:
            return None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
            self.log.write(line)
        self.error = f"ended with code {self.process.wait()}, see {self.log.name}"
        return None


def measure(flags: argparse.Namespace) -> list[Peer]:
    """All peers warm up, then take turns; with `--one-at-a-time` each runs to its end alone."""
    names = ["ours", "rollouts", *flags.peers]
    if flags.one_at_a_time:
        return [_alone(name, flags) for name in names]
    peers = []
    try:
        for name in names:
            peers.append(Peer(name, flags))
            peers[-1].warm_up(flags.warmup)
        for _ in range(flags.rounds):
            for peer in peers:
                peer.take_turn()
    finally:
        for peer in peers:
            peer.close()
    return peers


def _alone(name: str, flags: argparse.Namespace) -> Peer:
    peer = Peer(name, flags)
    try:
        peer.warm_up(flags.warmup)
        for _ in range(flags.rounds):
            peer.take_turn()
    finally:
        peer.close()
    return peer


def print_table(peers: list[Peer], flags: argparse.Namespace) -> None:
    """Medians, and each peer's as a multiple of ours: above 1 means ours is faster."""
    size, (ours, rollouts) = parse_size(flags.shape), peers[:2]
    tokens = size.batch * size.response
    table = Table(title=f"{flags.shape}, float32, medians, {flags.rounds} turns of each")
    for column in ("", "PPO step", "x ours", "rollout tokens/s", "ours x", "update", "warm-up"):
        table.add_column(column, justify="right" if column else "left")
    table.add_column("peak memory", justify="right")
    for peer in peers:
        if not peer.rounds:
            table.add_row(TITLES[peer.name], peer.error or "no rounds", *[""] * 6)
            continue
        warmup = sum(_longest(answer) for answer in peer.warmups)
        step, rollout, update = map(peer.median, ("step_s", "rollout_s", "update_s"))
        table.add_row(
            TITLES[peer.name],
            _cell(step, "{:.3f} s"),
            _ratio(step, ours.median("step_s")),
            _cell(rollout and tokens / rollout, "{:,.1f}"),
            _ratio(rollout, rollouts.median("rollout_s")),
            _cell(update, "{:.3f} s"),
            f"{warmup:.1f} s",
            f"{max(answer['peak_mb'] for answer in peer.rounds):,} MB",
        )
    Console(width=120).print(table)


def _longest(answer: dict) -> float:
    """Seconds of a call: of several steps, of one, or of a rollout, whichever the peer has."""
    return next(answer[key] for key in ("call_s", "step_s", "rollout_s") if key in answer)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _ratio(theirs: float | None, ours: float | None) -> str:
    return "-" if theirs is None or ours is None else f"{theirs / ours:.2f}"


def main() -> None:
    """Parse the flags, measure, print, and write every round to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="TINY", help="TINY, SMALL, QWEN05, or with changes")
    parser.add_argument("--peers", nargs="*", default=["tunix", "trl", "hf"], choices=THEIRS)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--steps-a-turn", type=int, default=3, help="the first is not counted")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--one-at-a-time", action="store_true", help="for sizes that fill memory")
    parser.add_argument("--tunix-python", default=os.environ.get("TUNIX_PYTHON", sys.executable))
    parser.add_argument("--trl-python", default=os.environ.get("TRL_PYTHON", sys.executable))
    parser.add_argument("--logs", type=Path, default=Path(".benchmarks/peers"))
    flags = parser.parse_args()
    flags.logs.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(
            f"Other processes are running (load {load:.1f}). The thread pools of the peers suffer"
        )
        print("unequally from that, torch's most: such ratios say little.")
    peers = measure(flags)
    print_table(peers, flags)
    results = {p.name: {"rounds": p.rounds, "warmups": p.warmups, "error": p.error} for p in peers}
    path = flags.logs / f"{flags.shape}.json"
    path.write_text(json.dumps(results, indent=1))
    print(f"Every round: {path}")


if __name__ == "__main__":
    main()
