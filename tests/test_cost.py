"""The single program costs what its two halves cost: composing them computes nothing twice."""

import pytest

from bench import stages
from bench.cases import build
from bench.sizes import parse_size

SIZE = "tiny,layers=1,batch=4,prompt=8,response=16,epochs=1"


@pytest.fixture(scope="module")
def costs():
    """(FLOPs, temporary bytes) of each program, by the compiler's own count."""
    found = {}
    for name in ("collect", "learn", "step"):
        program = stages.prepare(name, build(parse_size(SIZE))).program
        flops = program.cost_analysis()["flops"]
        found[name] = flops, program.memory_analysis().temp_size_in_bytes
    return found


def test_the_step_computes_what_collect_and_learn_compute(costs):
    (collect, _), (learn, _), (step, _) = (costs[name] for name in ("collect", "learn", "step"))
    assert step == pytest.approx(collect + learn, rel=0.005)


def test_the_step_needs_the_memory_of_the_larger_half(costs):
    (_, collect), (_, learn), (_, step) = (costs[name] for name in ("collect", "learn", "step"))
    assert step <= 1.02 * max(collect, learn)
