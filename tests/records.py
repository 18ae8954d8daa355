"""Writes what results/ has of the tests: python test_block.py --record, and --sanitize."""
import importlib.metadata
import re
import shutil
import subprocess
import sys
import time

import torch

import build
from checkpoint import Refused
from tests.helpers import DEVICE, HERE, cut, multiprocessors


def facts():
    """What a record says of the machine: lines of text."""
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                            capture_output=True, text=True, check=False).stdout.split("\n")[0] or "unknown"
    packages = ("torch", "transformers", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return [f"GPU: {torch.cuda.get_device_name(DEVICE)}, driver {driver}, CUDA {torch.version.cuda}",
            f"versions: Python {sys.version.split()[0]}, {versions}",
            f"date: {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}",
            f"kernel: {build.kernel_hash()} (SHA-256 of fused_block.cu without comments and white space)"]


def write_record(name, lines):
    path = HERE / "results" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    print(f"written: {path.relative_to(HERE)}")


def record():
    """Runs what needs a GPU, writes results/tests-<gpu>.txt if all pass; returns the exit code."""
    printed = []
    only = ("-m", "usefixtures")  # which is the mark `gpu`
    command = [sys.executable, HERE / "test_block.py", *only]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            print(line, end="", flush=True)
            printed.append(line.rstrip())
    if run.returncode:
        print("nothing is recorded, because not all tests pass", file=sys.stderr)
        return run.returncode
    gpu_name = torch.cuda.get_device_name(DEVICE).lower().removeprefix("nvidia ")
    write_record(f"tests-{re.sub('[^a-z0-9]+', '-', gpu_name)}.txt",
                 ["python test_block.py --record", *facts(), "", *(line for line in printed if line)])
    return 0


SANITIZED = """
from dataclasses import replace
import torch
from build import Fused
from model import Config, Pythia
config = replace(Config.from_name("pythia-31m"), n_layer=2, vocab=512)
model = Pythia.random(config, 0, torch.float16, "cuda")
fused = Fused(model, model.new_cache().zero_(), graph=False)
fused.start(7, 40)
for _ in range(3):
    fused.step()
fused.wait(torch.cuda.current_stream())
"""


def sanitize():
    """Runs three steps under each tool of compute-sanitizer, writes the verdicts; returns the exit code."""
    tool_path, arch = shutil.which("compute-sanitizer"), build.device_arch(DEVICE)
    if not tool_path:
        raise Refused("compute-sanitizer is not on PATH: it comes with the CUDA toolkit")
    build.load(build.constants(cut("pythia-31m"), arch, sms=multiprocessors()), arch)  # not under the tool
    lines, clean = ["python test_block.py --sanitize", *facts(), ""], True
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        start = time.perf_counter()
        # initcheck has to see PyTorch's kernels too, which write what ours reads; only ours may not err
        watched = ["--print-limit", "9999"] if tool == "initcheck" else ["--kernel-regex", "kns=fused_block"]
        command_line = [tool_path, "--tool", tool, *watched, "--error-exitcode", "3",
                        sys.executable, "-c", SANITIZED]
        try:
            run = subprocess.run(command_line, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                 text=True, timeout=140, check=False)
            said = [line for line in run.stdout.splitlines() if line.startswith("=========")]
            summary = next((line for line in reversed(said) if "SUMMARY" in line), "no summary").strip("= ")
            good = run.returncode == 0 and "SUMMARY: 0 " in summary
            verdict = f"exit code {run.returncode}, {summary}"
            if tool == "initcheck":
                ours = sum("at fused_block" in line for line in said)
                good, verdict = "SUMMARY" in summary and ours == 0, f"{ours} errors in fused_block; {summary}"
            said = said[:40] or run.stdout.splitlines()[-20:]
        except subprocess.TimeoutExpired:
            good, verdict, said = False, "no verdict in 140 s", []
        clean &= good
        lines += [f"{tool:<10} {'PASS' if good else 'FAIL'}  {verdict} ({time.perf_counter() - start:.0f} s)"]
        lines += [] if good else said
        print(lines[-1] if good else "\n".join(lines), flush=True)
    lines += ["", "racecheck does not see what blocks of a cluster write into each other's memory; this",
              "is why test_fused_block and test_fused_repeats compare bits over thousands of launches."]
    write_record("sanitizer.txt", lines)
    return int(not clean)
