"""ik_llama.cpp as a contender, by its own program `llama-batched-bench`: it is on no package registry, so its folder is given.

    git clone https://github.com/ikawrakow/ik_llama.cpp && cmake -B build -S ik_llama.cpp -DGGML_NATIVE=ON
    cmake --build build --target llama-batched-bench
    python tests/bench/lengths.py --work DIR --ik build/bin

It lacks OLMoE: what it runs is a Qwen3-MoE of the same sizes (llama.py convert --architecture qwen3moe). A run loads the model,
repacks its rows, evaluates the prompts and takes the steps behind them; llama.cpp's program of the same name does the same.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

PROGRAM = "llama-batched-bench"
# PP, TG, B, N_KV, T_PP s, S_PP t/s, T_TG s, S_TG t/s, T s, S t/s
ROW = re.compile(r"^\|" + r" *([\d.]+) *\|" * 10, re.MULTILINE)


def program_in(folder: Path) -> Path:
    """Return the program in a folder; SystemExit where it is not."""
    path = folder / PROGRAM
    if not path.is_file():
        raise SystemExit(f"{folder} has no {PROGRAM}: give the folder with the programs of ik_llama.cpp (build/bin)")
    return path


def timed_rows(
    program: Path, model: Path, past: int, batches: Sequence[int], steps: int, threads: int
) -> Mapping[int, tuple[float, float]]:
    """Run the program; return by batch the seconds of its prompts of `past` tokens, and of its steps behind them."""
    context = max(batches) * (past + steps)
    command = [
        program, "-m", model, "-c", context, "-b", 2048, "-ub", 512, "-npp", past, "-ntg", steps,
        "-npl", ",".join(map(str, batches)), "-t", threads, "-fa", "on", "-rtr",
    ]  # fmt: skip
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return read_rows(done.stdout + done.stderr)


def read_rows(text: str) -> dict[int, tuple[float, float]]:
    """Return the seconds of prompts and of steps by batch, from the table that the program prints."""
    return {int(row[3]): (float(row[5]), float(row[7])) for row in ROW.finditer(text)}
