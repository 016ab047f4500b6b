"""Contestants of a benchmark, each in a process of its own: they are asked for rounds in turns, one at a time."""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


# What other libraries print is no answer.
ANSWER = "turn: "


def machine() -> str:
    """What this machine computes with, such as `"AVX-512, 2 cores"`."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{capability.replace('AVX512', 'AVX-512')}, {os.cpu_count()} cores"


def resident_mebibytes(line: str) -> float:
    """A line of /proc/self/status: `"VmRSS"` for what is in memory now, `"VmHWM"` for the most that was."""
    fields = dict(entry.split(":", 1) for entry in Path("/proc/self/status").read_text().splitlines())
    return int(fields[line].split()[0]) / 1024


def take_turns(make_call: Callable[[], Callable[[], object]], warm_up: int, turn_seconds: float = 0.0) -> None:
    """
    What a contestant's process does: make the call, run it a few times unmeasured, then once for each line on stdin, or so
    often that the last of the unmeasured would have taken `turn_seconds` of the processor.
    Answers hold `cpu_ms`, `wall_ms` and `faults`, each of one call, and `peak_mib`, how far the process has grown beyond what
    was there before.
    """
    # Importing has left a peak of its own: start a new one.
    before = resident_mebibytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call, calls = make_call(), 1
    for _ in range(warm_up):
        cpu = time.process_time()
        call()
        calls = max(1, round(turn_seconds / max(time.process_time() - cpu, 1e-6)))
    print(ANSWER + "ready", flush=True)
    for _ in sys.stdin:
        usage, cpu, wall = resource.getrusage(resource.RUSAGE_SELF), time.process_time(), time.perf_counter()
        for _ in range(calls):
            call()
        measured = {"cpu_ms": 1000 * (time.process_time() - cpu), "wall_ms": 1000 * (time.perf_counter() - wall)}
        measured["faults"] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - usage.ru_minflt
        measured = {name: value / calls for name, value in measured.items()}
        measured["peak_mib"] = resident_mebibytes("VmHWM") - before
        print(ANSWER + json.dumps(measured), flush=True)


def medians_in_turns(commands: dict[str, list[str]], rounds: int) -> dict[str, dict[str, float]]:
    """
    Start these commands, which call `take_turns`, one after the other; then let each run one round, one at a time, and
    again, as often as `rounds` says.

    Returns:
        Name → medians over the rounds of what `take_turns` answers; of the peak, the most.
    """
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.DEVNULL,
        "text": True,
    }
    processes = {}
    try:
        for name, command in commands.items():
            processes[name] = subprocess.Popen(command, **pipes)
            _answer(processes[name])
        answers = {name: [] for name in processes}
        for _ in range(rounds):
            for name, process in processes.items():
                process.stdin.write("\n")
                process.stdin.flush()
                answers[name].append(json.loads(_answer(process)))
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    return {name: _medians(rows) for name, rows in answers.items()}


def _answer(process: Any) -> str:
    for line in process.stdout:
        if line.startswith(ANSWER):
            return line.removeprefix(ANSWER).strip()
    raise SystemExit(f"a contestant ended before its turn; to see why, run: {subprocess.list2cmdline(process.args)}")


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return {**medians, "peak_mib": max(row["peak_mib"] for row in rows)}
