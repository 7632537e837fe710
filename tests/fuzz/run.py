"""Coverage-guided fuzzing of everything that others write and we read: ``make fuzz``.

``python tests/fuzz/run.py [--runs N] [TARGET...]`` fuzzes each target of ``tests/fuzz/targets`` for N inputs and prints
a table; ``--one TARGET [libFuzzer options]`` runs one in this process. A target is a module with ``fuzz(data)``, which
raises nothing but for what is wrong. Corpora begin with the module's ``SEEDS`` and
``corpus/TARGET``, and grow in ``build/fuzz/TARGET``.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = HERE.parents[1] / "build" / "fuzz"
TIMEOUT_S = 10
"""For one input; the slowest are a thousand times quicker."""
MEMORY_MB = 1024
MAX_BYTES = 4096
SLOW = frozenset({"dns", "http1_client", "http1_head", "http1_server", "http2_server", "ledger", "websocket"})
"""Get a fifth of the inputs."""


def list_targets() -> list[str]:
    return sorted(path.stem for path in (HERE / "targets").glob("*.py"))


def fuzz_one(target: str, options: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["vallum", "h11", "h2", "hpack", "hyperframe", "dns"]):
        module = importlib.import_module(f"targets.{target}")
    for number, seed in enumerate(getattr(module, "SEEDS", ())):
        (WORK / target / f"seed-{number}").write_bytes(seed)
    atheris.Setup([target, *options], module.fuzz)
    atheris.Fuzz()


def start(target: str, runs: int) -> tuple[int, str, float]:
    """Fuzz it in a process of its own: its exit code, what it said, and how long it took (s)."""
    grown, seeds = WORK / target, HERE / "corpus" / target
    grown.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--one", target, f"-runs={runs}", f"-timeout={TIMEOUT_S}"]
    command += [f"-rss_limit_mb={MEMORY_MB}", f"-max_len={MAX_BYTES}", "-print_final_stats=1", "-verbosity=1"]
    command += [f"-artifact_prefix={WORK}/{target}-", str(grown)] + ([str(seeds)] if seeds.is_dir() else [])
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    return done.returncode, done.stdout, time.monotonic() - started


def main() -> int:
    if sys.argv[1:2] == ["--one"]:
        fuzz_one(sys.argv[2], sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100_000, help="inputs for each target")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(list_targets())}")
    asked = parser.parse_args()
    total, failed = 0, []
    print("| target | inputs | inputs/s | edges | peak memory (MB) |\n|---|---:|---:|---:|---:|")
    for target in asked.targets or list_targets():
        code, said, wall_s = start(target, asked.runs // 5 if target in SLOW else asked.runs)
        counts = {name: int(value) for name, value in re.findall(r"stat::(\w+):\s+(\d+)", said)}
        edges = re.findall(r"cov: (\d+)", said)
        inputs = counts.get("number_of_executed_units", 0)
        total += inputs
        peak = counts.get("peak_rss_mb", 0)
        print(f"| {target} | {inputs} | {inputs / wall_s:.0f} | {edges[-1] if edges else 0} | {peak} |", flush=True)
        if code:
            failed.append(target)
            print(said[-6000:], file=sys.stderr, flush=True)
    print(f"\n{total} inputs; " + (f"failed: {', '.join(failed)} (inputs in {WORK})" if failed else "none failed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
