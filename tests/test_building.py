"""Building the kernel without a GPU: what compiles, what is refused, the compile cache, a full disk."""
import ctypes
import io
import math
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import build
from build import Fused
from model import SIZES, Config, Pythia
from tests.helpers import HERE, TINY, exit_of, report, report_refusal, report_refused

pytest_plugins = ["tests.fixtures"]


@pytest.mark.parametrize("arch, names", [("sm_90a", ["tiny-pythia", *SIZES]),
                                         ("sm_100a", ["pythia-14m", "pythia-12b"]),
                                         ("sm_120a", ["pythia-14m", "pythia-12b"])])
def test_compile(nvcc, arch, names):
    """What ptxas says of the kernel: everything that a thread holds is in registers."""
    def compiled(name):
        start = time.perf_counter()
        config = Config.from_pretrained(TINY) if name == "tiny-pythia" else Config.from_name(name)
        text = build.compile_only(build.constants(config, arch), arch)
        return text, time.perf_counter() - start
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(compiled, names))
    for name, (text, _) in zip(names, results, strict=True):
        frames = re.findall(r"(\d+) bytes (stack frame|spill stores|spill loads)", text)
        local = sum(int(n) for n, _ in frames) if frames else math.inf
        registers = max(int(n) for n in re.findall(r"Used (\d+) registers", text))
        report(name, f"{arch}, {registers} registers: bytes in local memory", local)
    report("build.py", f"{arch}: seconds to compile, the slowest", max(seconds for _, seconds in results), 30)


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch):
    """A function that makes a script the nvcc of build.py; it knows its version, and does `more`."""
    def fake(release="13.0", more=""):
        (tmp_path / "bin").mkdir(exist_ok=True)
        path = tmp_path / "bin" / "nvcc"
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V0'\n{more}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(build, "nvcc", build.nvcc.__wrapped__)  # remembers what it found
    return fake


def test_build_refusals(tmp_path, monkeypatch, fake_nvcc):
    config = Config.from_name("pythia-14m")
    defines = build.constants(config)
    for case, fields, words in (("hidden size 64", {"hidden": 64}, ["hidden size 64"]),
                                ("head size 8", {"n_head": 16}, ["head size 8"]),
                                ("41 layers", {"n_layer": 41}, ["layers 41"]),
                                ("LayerNorm eps", {"eps": 1e-6}, ["eps", "1e-06"])):
        report_refused(case, ["run without fused", *words], build.constants, replace(config, **fields))
    for cluster in (0, 3):
        report_refused(f"clusters of {cluster}", [f"{cluster}", "1, 2, 4 or 8"], build.constants, config,
                       cluster=cluster)
    report_refused("a pace of 0", ["0", "1 byte a ns"], build.constants, config, pace=0)
    for dtype in (torch.float32, torch.float16):
        model = Pythia.random(replace(config, n_layer=1), dtype=dtype)
        words = [str(dtype), "cpu", "CUDA GPU", "leave fused out"]
        report_refused(f"fuse {dtype} on a CPU", words, Fused, model)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report_refused("no GPU", ["no CUDA GPU", "run without fused"], build.device_arch, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    report_refused("GPU of 8.6", ["8.6", "sm_90a", "run without fused"], build.device_arch, "cuda")
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_HOME", str(tmp_path))
        report_refused("no nvcc", ["nvcc is not found", "CUDA_HOME"], build.nvcc)
    fake_nvcc("12.4")
    report_refused("nvcc older than torch's CUDA", ["12.4", "13.0", "install the matching"], build.nvcc)
    fake_nvcc(more="echo 'x.cu(7): error: no' >&2; test \"$1\" = --version")
    report_refused("kernel that does not compile", ["sm_90a", "x.cu(7): error"], build.compile_only, defines,
                   "sm_90a")
    (tmp_path / "file").touch()  # what a folder without permission is to others, this is also to root
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    report_refused("cache that cannot be written", ["writable", "TORCH_EXTENSIONS_DIR"], build.load, defines,
                   "sm_90a")
    monkeypatch.setattr(sys, "argv", ["build.py", "--arch", "sm_80"])
    err, rc = exit_of(build.main)
    report("refusal", "build.py --arch sm_80", sum([rc != 2, "sm_80" not in err, "sm_90a" not in err]))


def test_killed_build(tmp_path, monkeypatch, fake_nvcc):
    """A build that Ctrl-C ends in torch's builder leaves nothing that a later one waits for, or loads."""
    fake_nvcc()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: path)
    defines, locks = build.constants(Config.from_name("pythia-14m")), []

    def killed(name, sources, build_directory, **_):
        Path(build_directory, "lock").touch()  # torch's own lock, on which its next call would wait for ever
        Path(build_directory, name + ".so").write_text("half a library")
        raise KeyboardInterrupt

    def whole(name, sources, build_directory, **_):
        locks.append(Path(build_directory, "lock").exists())
        Path(build_directory, name + ".so").write_text("a library")

    def load(compiler):
        monkeypatch.setattr(cpp_extension, "load", compiler)
        return build.load(defines, "sm_90a")
    with redirect_stderr(io.StringIO()):
        with pytest.raises(KeyboardInterrupt):
            load(killed)
        library = load(whole)
    report("build.py", "locks of a killed build still there", sum(locks))
    report("build.py", "half a library, of a killed build, loaded", Path(library).read_text() != "a library")


QUICK = "-Xcicc=-O0", "-Xptxas=-O0"  # where the GPU's code is not what is looked at

FULL_DISK = """
mount -t tmpfs -o size=4k none "$TORCH_EXTENSIONS_DIR"
head -c 4096 /dev/zero > "$TORCH_EXTENSIONS_DIR/full"
for kib in 4 64 256 65536; do
    mount -o remount,size=${kib}k "$TORCH_EXTENSIONS_DIR"
    "$@" > log 2>&1
    echo "$? $(grep -c Traceback log) $(tail -n 1 log)"
done
"""


BUILD = """
import os, sys, tempfile, torch
from torch.utils import cpp_extension
import build
from model import Config
toolkit, optimised = sys.argv.pop(), build.flags
build.flags = lambda *args: [*optimised(*args), "-Xcicc=-O0", "-Xptxas=-O0"]  # the disk is what is looked at
if torch.version.cuda is None:  # a torch without CUDA lacks what only torch's own kernels need
    torch.version.cuda = "13.0"
    cpp_extension._prepare_ldflags = lambda *_: [f"-L{toolkit}/lib64", "-lcudart_static"]
try:
    build.main()
except SystemExit:  # does in the same process what the sentence advises
    os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp(dir=".")
    stderr, sys.stderr = sys.stderr, open(os.devnull, "w")
    build.load(build.constants(Config.from_name("pythia-14m")), "sm_90a")
    sys.stderr = stderr
    raise
"""


def test_full_disk(nvcc, tmp_path):
    """The compile cache on a file system without room for anything, for the object, for the library, each
    time with another folder after it; then with room. It is mounted in a namespace of its own."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "mount", "-t", "tmpfs", "none", tmp_path],
                                                     capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here (unshare --user --mount): none can be full")
    toolkit = re.search(r"TOP=(\S+)", subprocess.run([nvcc, "--dryrun", build.SOURCE], capture_output=True,
                                                     text=True, check=True).stderr)[1]
    arguments = [sys.executable, "-c", BUILD, "--model", "pythia-14m", "--arch", "sm_90a", toolkit]
    (tmp_path / "cache").mkdir()
    out = subprocess.run(
        [*unshare, "sh", "-c", FULL_DISK, "sh", *arguments], capture_output=True, text=True, timeout=120,
        check=True, cwd=tmp_path, env=os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"),
                                                    "PYTHONPATH": str(HERE)}).stdout
    *full, room = [line.split(" ", 2) for line in out.splitlines()]
    for kib, (rc, tracebacks, said) in zip((4, 64, 256), full, strict=True):
        report_refusal(f"{kib} KiB for the compile cache", ["cache", "No space left", "TORCH_EXTENSIONS_DIR"],
                       said + "\n", int(rc) + int(tracebacks))
    report("build.py", "exit code of the next build, with room", abs(int(room[0])) + ("ready" not in room[2]))


def test_library_without_gpu(nvcc, tmp_path):
    """The library as users have it loads without a GPU, and refuses ranges of layers that are none."""
    defines = build.constants(Config.from_name("pythia-2.8b"))
    subprocess.run([nvcc, *build.flags(defines, "sm_90a"), *QUICK, "-shared", "-Xcompiler", "-fPIC",
                    "-o", tmp_path / "kernel.so", build.SOURCE], check=True, capture_output=True)
    launch = ctypes.CDLL(str(tmp_path / "kernel.so")).fused_launch
    launch.restype = ctypes.c_char_p
    for first, last, tokens in ((-1, 1, 0), (1, 1, 0), (2, 1, 0), (0, 33, 0), (0, 31, 1), (1, 32, 2),
                                (0, 32, -1)):
        said = launch(None, 66, first, last, tokens, None) or b""
        report("library", f"layers {first} to {last}, {tokens} tokens: not refused",
               b"no such range of layers" not in said)
    said = launch(None, 1, 0, 32, 1, None) or b""  # two blocks of 320 threads, but 1280 pairs of columns
    report("library", "a grid that cannot carry x: not refused", b"too few blocks" not in said)
    said = launch(None, 255, 0, 32, 1, None) or b""  # one cluster more than a word can count
    report("library", "a grid that words cannot count: not refused", b"too many blocks" not in said)
