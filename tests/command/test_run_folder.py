"""A run folder that a stopped run goes on in."""

import json
import struct
import subprocess
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event

from ppo_kernel.command.run_folder import RunFolder, check_same_run

SETTINGS = {"seed": 0, "fit": {"widths": (3, 4)}}


def events(folder):
    """(tag, step) of every scalar that TensorBoard finds, in order of tag and step."""
    found = []
    for path in folder.glob("events.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(value.tag, event.step) for value in event.summary.value]
            at += 16 + length
    return sorted(found)


def written(folder, steps=()):
    with RunFolder(folder, resume=SETTINGS) as run:
        for stage, step in steps:
            run.metrics(stage, step, {"loss": float(step)})
        return [(line["stage"], line["step"]) for line in lines(folder)]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_after_what_it_keeps(tmp_path):
    written(tmp_path, [("sft", 5), ("ppo", 1), ("ppo", 2), ("ppo", 3)])
    first = lines(tmp_path)
    with RunFolder(tmp_path, resume=SETTINGS) as run:
        run.rewind("ppo", 1)
        assert lines(tmp_path) == first[:2]
        run.metrics("ppo", 2, {"loss": 9.0})
    assert [(x["stage"], x["step"]) for x in lines(tmp_path)] == [
        ("sft", 5),
        ("ppo", 1),
        ("ppo", 2),
    ]
    assert lines(tmp_path)[-1]["loss"] == 9.0
    assert lines(tmp_path)[-1]["time_s"] >= first[-1]["time_s"]
    assert events(tmp_path) == [("ppo/loss", 1), ("ppo/loss", 2), ("sft/loss", 5)]


def test_a_line_that_was_cut_short_is_dropped(tmp_path):
    written(tmp_path, [("ppo", 1)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "ppo", "st')
    assert written(tmp_path, [("ppo", 2)]) == [("ppo", 1), ("ppo", 2)]


def test_samples_of_a_stage_are_written_once(tmp_path):
    with RunFolder(tmp_path, resume=SETTINGS) as run:
        run.samples("before", [{"prompt": "a"}])
        run.samples("after", [{"prompt": "b"}])
        run.samples("before", [{"prompt": "c\u2028"}])
    rows = (tmp_path / "samples.jsonl").read_text().strip("\n").split("\n")
    assert [json.loads(row)["prompt"] for row in rows] == ["b", "c\u2028"]


def test_only_a_run_with_metrics_can_be_another_one(tmp_path):
    other = SETTINGS | {"seed": 1}
    written(tmp_path)
    check_same_run(tmp_path, other)
    written(tmp_path, [("sft", 1)])
    check_same_run(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match=r"seed was 0, now 1\. Give the same settings"):
        RunFolder(tmp_path, resume=other)
    with pytest.raises(ValueError, match=r"a was None, now 1; .* and 2 more"):
        check_same_run(tmp_path, SETTINGS | dict.fromkeys("abcdef", 1))
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"run without config\.json"):
        check_same_run(tmp_path, SETTINGS)


def contents(folder):
    return {x.name: x.read_bytes() for x in folder.iterdir()}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "notes.txt"])
@pytest.mark.parametrize("resume", [None, SETTINGS], ids=["new", "resumed"])
def test_a_folder_that_no_run_has_written_is_refused_as_it_is(name, resume, tmp_path):
    (tmp_path / name).write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"has {name}.* choose a"):
        RunFolder(tmp_path, resume=resume)
    assert contents(tmp_path) == before


def test_a_run_with_a_file_of_somebody_else_is_refused_as_it_is(tmp_path):
    written(tmp_path, [("ppo", 1)])
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"has notes\.txt, which no run of ppo-kernel has written"):
        RunFolder(tmp_path, resume=SETTINGS)
    assert contents(tmp_path) == before
    with pytest.raises(ValueError, match="is a file; choose a folder"):
        RunFolder(tmp_path / "notes.txt", resume=SETTINGS)


HOLD = """
import sys, time
from ppo_kernel.command.run_folder import RunFolder
run = RunFolder(sys.argv[1], resume={"seed": 0, "fit": {"widths": (3, 4)}})
run.metrics("ppo", 1, {"loss": 1.0})
print("holding", flush=True)
time.sleep(300)
"""


def test_two_processes_cannot_write_one_run_and_a_killed_one_leaves_no_lock(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "holding\n"
            before = contents(tmp_path)
            with pytest.raises(ValueError, match=f"process {process.pid} is writing to {tmp_path}"):
                RunFolder(tmp_path, resume=SETTINGS)
            assert contents(tmp_path) == before
        finally:
            process.kill()
        process.wait()
        assert written(tmp_path, [("ppo", 2)]) == [("ppo", 1), ("ppo", 2)]


def test_one_process_writes_a_run_once_at_a_time(tmp_path):
    with RunFolder(tmp_path, resume=SETTINGS) as run:
        run.metrics("ppo", 1, {"loss": 1.0})
        with pytest.raises(ValueError, match="is writing to"):
            RunFolder(tmp_path, resume=SETTINGS)
        run.metrics("ppo", 2, {"loss": 1.0})
    assert written(tmp_path) == [("ppo", 1), ("ppo", 2)]
