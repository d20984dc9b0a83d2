"""What the benchmarks' figures rest on: FLOPs, exponents, verdicts, and facts of a program."""

import io
import json
import math

import equinox as eqx
import jax
import numpy as np
import pytest
from rich.console import Console

from bench import regression, report, topology
from bench.cases import build, even_fraction
from bench.scaling import exponents
from bench.sizes import parse_size
from bench.work import WORK
from ppo_kernel.evaluation import evaluate
from ppo_kernel.iteration import collect, learn
from ppo_kernel.rollout.generate import generate
from ppo_kernel.sharding import make_mesh


def _inner(equation):
    """The programs inside an equation, such as the body of a loop."""
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(part, "eqns"):
                yield part
            elif hasattr(part, "jaxpr"):
                yield part.jaxpr


def _dense_flops(jaxpr) -> float:
    """Of all products without batch axes: those with weights, and not attention's."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), (batch, _) = equation.params["dimension_numbers"]
            terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 0 if batch else 2.0 * terms * math.prod(equation.outvars[0].aval.shape)
            continue
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        parts = [_dense_flops(part) for part in _inner(equation)]
        branches = equation.primitive.name == "cond"
        total += times * (max(parts) if branches else sum(parts))
    return total


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tinny", "unknown size 'tinny'"),
        ("tiny,depth=2", "unknown field 'depth'"),
        ("tiny,batch=abc", "'batch=abc' in .* needs a number"),
        ("tiny,batch=0", "'batch=0' in"),
        ("tiny,tied=yes", "'tied=yes' in"),
    ],
)
def test_sizes_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        parse_size(text)


def test_results_without_benchmarks(tmp_path):
    for content in (None, {}, {"benchmarks": []}):
        if content is not None:
            (tmp_path / "results.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="`make bench` writes them"):
            regression.read(tmp_path / "results.json")


def test_counted_flops_are_those_of_the_program():
    # With two tokens the decode loop, whose turns a program does not say, has one turn.
    size = parse_size("tiny,layers=2,batch=2,prompt=8,epochs=3,response=2")
    case = build(size)
    config, inputs = case.config, (case.reference, case.prompts, case.hyperparams)
    collected = collect(case.state, *inputs, config=config)
    sampled = collected.rollout
    # Computed by the last layer, but needed by nobody and not counted: the prompts' queries, and,
    # where responses are read, the rest of their last slot.
    query = size.width * size.heads * size.head_dim
    rest = size.matmul_parameters / size.layers - query * (1 + 2 * size.kv_heads / size.heads)
    prompts = 2 * size.batch * (size.prompt - 1) * query
    unneeded = prompts + 2 * size.batch * (query + rest)
    stages = {
        "rollout": (
            prompts,
            lambda state: generate(
                state.policy, case.prompts, jax.random.key(0), config=config.generation
            ),
        ),
        "score": (
            2 * unneeded,
            lambda state: evaluate(
                state.policy, case.reference, state.critic, sampled, temperature=1.0
            ),
        ),
        "learn": (
            2 * 3 * size.epochs * unneeded,
            lambda state: learn(
                state, collected, even_fraction(sampled), case.hyperparams, config=config
            ),
        ),
    }
    arrays, static = eqx.partition(case.state, eqx.is_array)
    for name, (more, run) in stages.items():
        jaxpr = jax.make_jaxpr(
            lambda x, run=run: eqx.filter(run(eqx.combine(x, static)), eqx.is_array)
        )(arrays)
        work = WORK[name](size, 4)
        counted = work.flops * (1 - work.attention_share)
        assert _dense_flops(jaxpr.jaxpr) == pytest.approx(counted + more, rel=1e-3), name


def test_exponents_are_those_of_the_power_law():
    value = np.array([64.0, 128.0, 256.0, 512.0])
    share = np.array([0.1, 0.2, 0.3, 0.4])
    columns = {
        "value": value,
        "median_s": 3e-3 * value**1.25 / (1 - share),
        "attention_share": share,
        "gflop": 2.0 * value,
    }
    measured = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    fitted = exponents(measured)
    assert fitted["without_attention"] == pytest.approx(1.25)
    assert fitted["time"] > 1.25
    assert fitted["time_per_flop"] == pytest.approx(fitted["time"] - 1.0)


def _results(path, seconds: dict[str, float], calibration: float):
    benchmarks = [
        {
            "group": "g", "stats": {"min": value},
            "extra_info": {"name": name, "device": "cpu", "calibration_s": calibration},
        }
        for name, value in seconds.items()
    ]  # fmt: skip
    path.write_text(json.dumps({
        "benchmarks": benchmarks,
        "machine_info": {"machine": "x86_64", "cpu": {"vendor_id_raw": "AuthenticAMD"}},
    }))  # fmt: skip
    return path


def test_a_slow_machine_is_no_regression_and_a_slow_function_is(tmp_path, capsys):
    usual, baseline = {"gae": 1.0, "update": 2.0}, tmp_path / "baseline.json"
    assert regression.check(tmp_path / "none", baseline, 1.3) == 2, "no baseline yet"
    assert regression.save(_results(tmp_path / "then", usual, 0.1), baseline) == 0
    slow_machine = _results(tmp_path / "now", {k: 3 * v for k, v in usual.items()}, 0.3)
    assert regression.check(slow_machine, baseline, 1.3) == 0
    slow_update = _results(tmp_path / "then", usual | {"update": 2.8}, 0.1)
    assert regression.check(slow_update, baseline, 1.3) == 1
    _, now = regression.read(slow_update)
    saved = json.loads(baseline.read_text())["AuthenticAMD"]
    verdicts = {name: verdict for name, *_, verdict in regression.compare(now, saved, 1.3)}
    assert verdicts == {"g: gae": "same", "g: update": "slower"}
    capsys.readouterr()


def test_facts_of_a_program_for_a_mesh():
    size = parse_size("tiny,layers=2,batch=16,prompt=8,epochs=1,response=16")
    mesh = make_mesh(8)
    compiled = topology.compile_for(mesh, size, "float32")
    (loop,) = topology.decode_loops(compiled.as_text(), size, rows=2)
    facts = topology.loop_facts(loop)
    assert facts["exchanges"] == 0
    assert facts["updates_in_place"] >= 2 * size.layers, "keys and values of each layer"
    sizes = compiled.memory_analysis()
    # In eighths: a policy, its reference and its two moments, a critic and its two, float32.
    whole = 4 * (4 * size.policy_parameters + 3 * size.critic_parameters)
    assert whole / 8 <= sizes.argument_size_in_bytes <= 1.05 * whole / 8
    with pytest.raises(ValueError, match="does not divide over 8 devices"):
        topology.compile_for(mesh, parse_size("tiny,batch=12"), "float32")


@pytest.mark.parametrize("path", sorted(report.HISTORY.glob("*.json")), ids=lambda path: path.stem)
def test_every_measurement_of_the_history_can_be_printed(path):
    rows = json.loads(path.read_text())
    for row in rows:
        assert tuple(row) == report.FIELDS
        assert row["values"], row
    console = Console(record=True, width=300, file=io.StringIO())
    report.print_history(path.stem, console)
    printed = console.export_text()
    assert all(f"{value:,}" in printed for row in rows for value in row["values"])
