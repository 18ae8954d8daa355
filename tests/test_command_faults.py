"""The command lines as users call them: odd arguments, closed streams, little memory, broken compilers."""
import _ctypes
import io
import json
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils import cpp_extension

import build
import generate
from build import first_error
from checkpoint import Refused
from model import Config
from tests.helpers import HERE, TINY, report, report_refusal, report_refused


def run(command, **env):
    """What a shell command says (text), and its exit code; "$0" is this Python, "$1" generate.py."""
    result = subprocess.run(["sh", "-c", command, sys.executable, str(Path(HERE, "generate.py"))],
                            capture_output=True, text=True, timeout=120, check=False, env=os.environ | env)
    return result.stdout, result.stderr, result.returncode


# ----------------------------------------------------------------------------------------------- generate.py

def test_bytes_that_are_not_utf8(capsys):
    """Python passes such a byte of an argument as a surrogate; the text shows U+FFFD for it, once."""
    rc = generate.main(["--prompt", "caf\udce9", "--tokens", "3", "--device", "cpu"])
    out = capsys.readouterr().out
    report("generate.py", "prompt caf\\xe9: exit code, or another text", rc + (out.count("caf\ufffd") != 1))
    for option in ("--model", "--device", "--revision"):
        rc = generate.main([option, "caf\udce9", *(["--model", TINY] if option == "--revision" else [])])
        report_refusal(f"caf\\xe9 as {option}", ["caf"], capsys.readouterr().err, rc)


def test_newlines_of_a_prompt(capsys, monkeypatch):
    """One newline at the end of standard input is the editor's; all others are the prompt's."""
    def text(prompt, piped=None):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(piped)))
        generate.main(["--prompt", prompt, "--tokens", "8", "--device", "cpu"])
        return capsys.readouterr().out
    piped = {"Q: Who is Ahab?\nA:": "\n", "Q: Who is Ahab?\nA:\n": "\n", "\n\n": "\n", "Call me": ""}
    unlike = [prompt for prompt, more in piped.items() if text(prompt) != text("-", (prompt + more).encode())]
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    report("generate.py", f"prompts that a pipe changes {unlike or ''}", len(unlike))
    report("generate.py", "--help does not say which newline goes", "one newline" not in said)


def test_streams_and_places(tmp_path):
    """Closed streams; and called by a link, without its folder in sys.path, standard error closed."""
    link = tmp_path / "link"
    link.symlink_to(Path(HERE, "generate.py"))
    commands = ['"$0" "$1" >&-', '"$0" "$1" --prompt - <&-',
                f'PYTHONSAFEPATH=1 "$0" {link} --tokens 3 --device cpu 2>&-']
    with ThreadPoolExecutor() as pool:
        (_, said, rc), (_, unread, unread_rc), (out, _, linked) = pool.map(run, commands)
    report_refusal("standard output closed", ["standard output", "closed"], said, rc)
    report_refusal("standard input closed", ["standard input", "prompt"], unread, unread_rc)
    report("generate.py", "by a link, PYTHONSAFEPATH, 2>&-: exit code", linked)
    report("generate.py", "by a link, PYTHONSAFEPATH, 2>&-: no text", len(out) < 60)


def test_interrupted_imports():
    """Ctrl-C before there is text: the exit code of a shell is 130, and nothing is said of the checkpoint."""
    faults = []
    for seconds in (0.1, 0.3, 0.6, 1.0, 1.5):
        process = subprocess.Popen([sys.executable, Path(HERE, "generate.py")], stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        # Python's own start ends by the signal itself, which a shell calls 130, too
        if process.returncode not in (130, -signal.SIGINT) or "cannot" in err:
            faults.append((seconds, process.returncode, err))
    report("generate.py", f"Ctrl-C while it starts: others than 130 {faults or ''}", len(faults))


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v limits nothing elsewhere")
def test_little_memory(tmp_path):
    """What is larger than the memory is neither called a bad file nor answered by an allocator's line."""
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**29], "data_offsets": [0, 2**31]}}).encode()
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(weights, 8 + len(header) + 2**31)  # 2 GB, of which the disk holds nothing
    limit = 'ulimit -v 1500000; "$0" "$1" --device cpu --dtype float32 '
    with ThreadPoolExecutor() as pool:
        (_, file, rc), (_, drawn, drawn_rc) = pool.map(run, (
            limit + f"--model {tmp_path}", limit + "--random --model pythia-1b"))
    report_refusal("2 GB of checkpoint in 1.5 GB", ["memory", "model.safetensors", "smaller"], file, rc)
    report("refusal", "2 GB of checkpoint: called a bad file", "fetch" in file)
    report_refusal("4 GB of random weights in 1.5 GB", ["pythia-1b", "memory", "smaller"], drawn, drawn_rc)


# -------------------------------------------------------------------------------------------------- build.py

FAKE = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release {release}, V0"; exit {rc}; fi
while [ $# -gt 1 ]; do if [ "$1" = -o ]; then out=$2; fi; shift; done
echo built >> {log}
{body}
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A function that makes a shell script build.py's nvcc, where "$out" is what it has to write.

    torch without CUDA cannot link a kernel, so a stand-in for torch's builder runs nvcc alone.
    """
    def builder(name, sources, extra_cuda_cflags, build_directory, is_python_module):
        assert not is_python_module
        command = [build.nvcc(), *extra_cuda_cflags, "-o", f"{build_directory}/{name}.so", *sources]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"Error building extension '{name}': {command}\n{result.stderr}")
    monkeypatch.setattr(cpp_extension, "load", builder)
    path, log = tmp_path / "toolkit" / "bin" / "nvcc", tmp_path / "log"
    path.parent.mkdir(parents=True)
    log.touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(build, "nvcc", build.nvcc.__wrapped__)  # which remembers what it found

    def make(body="", release="13.0", rc=0):
        path.write_text(FAKE.format(body=body, release=release, rc=rc, log=log))
        path.chmod(0o755)
        log.write_text("")
        return lambda: log.read_text().count("built")
    return make


MODULES = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
LIBRARY = min((file for file in MODULES if file.endswith(".so")), key=os.path.getsize)  # any that loads
LIBRARY = f'cp {LIBRARY} "$out"'
DEFINES = build.constants(Config.from_name("pythia-14m"))


def load():
    """The path of the library, which is closed again, so that the next call opens what is there then."""
    with redirect_stderr(io.StringIO()):
        library = build.load(DEFINES, "sm_90a")
    _ctypes.dlclose(library._handle)
    return Path(library._name)


def test_cache_of_libraries(compiler, monkeypatch):
    compiler('echo half > "$out"; kill -9 $$')
    report_refused("compiler that is killed", ["does not compile", "sm_90a"], load)
    compiler("echo 'x.cu(1): error: nonsense' >&2; exit 1")
    report_refused("kernel that does not compile", ["x.cu(1): error: nonsense", "g++"], load)
    builds = compiler("sleep 0.3; " + LIBRARY)
    with ThreadPoolExecutor(2) as pool:
        paths = set(pool.map(lambda _: load(), range(2)))
    report("build.py", "compilations unlike 1 when two want the same", abs(builds() - 1))
    report("build.py", "libraries unlike 1", abs(len(paths) - 1))
    folder = paths.pop().parent
    report("build.py", "bits that others have of the cache folder's mode", folder.stat().st_mode & 0o077)
    builds = compiler(LIBRARY)
    load()
    report("build.py", "compilations of what is cached", builds())
    folders = os.environ["PATH"].split(os.pathsep)
    report("build.py", "ninja beside this Python: not looked for", os.path.dirname(sys.executable) not in folders)
    (folder / "kernel.so").write_text("not a library")
    load()
    report("build.py", "library that is damaged: compilations unlike 1", abs(builds() - 1))
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "riscv64")
        load()
    report("build.py", "library of another machine: taken", builds() != 2)
    builds = compiler(LIBRARY, release="13.9")
    load()
    report("build.py", "library of another nvcc: taken", builds() != 1)
    monkeypatch.setattr(build.os, "getuid", lambda: folder.stat().st_uid + 1)
    report_refused("compile cache of another user", ["another user", "TORCH_EXTENSIONS_DIR"], load)


def test_libraries_that_never_load(compiler):
    builds = compiler('echo nonsense > "$out"')
    report_refused("library that never loads", ["compile cache", "TORCH_EXTENSIONS_DIR"], load)
    report("build.py", "library that never loads: compilations unlike 2", abs(builds() - 2))


def test_compilers_that_do_not_run(compiler, tmp_path, monkeypatch):
    compiler(rc=1)
    report_refused("nvcc that exits 1", ["nvcc does not run", "CUDA_HOME"], build.nvcc)
    (tmp_path / "toolkit" / "bin" / "nvcc").write_text("no program")
    report_refused("nvcc that is no program", ["nvcc does not run", "CUDA_HOME"], build.nvcc)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    report_refused("no nvcc", ["nvcc is not found", "CUDA_HOME"], build.nvcc)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "log" / "cache"))
    compiler(LIBRARY)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    report_refused("cache that cannot be written", ["writable", "TORCH_EXTENSIONS_DIR"], load)


CAUSES = {  # what compilers say: the part of it that is the cause
    "/usr/bin/ld: cannot find -lcudart: No such file\ncollect2: error: ld returned 1 exit status": "-lcudart",
    "a.cu(3): warning #177-D: error is never used\na.cu(7): error: no\n1 error detected": "a.cu(7)",
    "gcc: No such file or directory\nnvcc fatal   : Failed to preprocess host compiler properties.": "gcc",
    "a.o: in function `f':\na.cu:(.text+0x1): undefined reference to `g'\n": "reference to `g'",
    "a.cu:1:10: fatal error: cuda.h: No such file or directory\ncompilation terminated.": "cuda.h",
    "/usr/bin/ld: final link failed: No space left on device\ncollect2: error: ld returned 1 exit status":
    "No space left",
    "collect2: fatal error: ld terminated with signal 9 [Killed]": "Killed",
    "Segmentation fault": "Segmentation", "": "no message"}


def test_causes():
    wrong = [cause for text, cause in CAUSES.items() if cause not in first_error(text)]
    report("build.py", f"causes not shown, of {len(CAUSES)} {wrong or ''}", len(wrong))


def test_build_command(tmp_path, monkeypatch):
    """By a link, without its folder in sys.path; and with nothing on PATH, so that nvcc lacks g++."""
    try:
        toolkit = Path(build.nvcc()).parents[1]
    except Refused as refusal:
        pytest.skip(str(refusal))
    link = tmp_path / "link"
    link.symlink_to(Path(HERE, "build.py"))
    command = f'PYTHONSAFEPATH=1 "$0" {link} --model pythia-14m --arch sm_90a --compile-only'
    env = {"CUDA_HOME": str(toolkit)}
    out, err, rc = run(command, **env)
    why = err if rc else ""
    report("build.py", f"by a link and PYTHONSAFEPATH: exit code {why}", rc + ("registers" not in out))
    if not torch.version.cuda:
        _, err, rc = run(command.removesuffix(" --compile-only"), **env)
        report_refusal("torch without CUDA", ["built without CUDA", "--compile-only"], err, rc)
    _, err, rc = run(f"PATH={tmp_path}; {command}", **env)
    report_refusal("no host compiler", ["g++", "gcc"], err.splitlines(keepends=True)[-1], rc)


def test_pace_of_a_memory():
    """An H200's memory delivers 4814 bytes a ns by clock and bus; half as much is paced half as fast."""
    h200 = SimpleNamespace(memory_clock_rate=3201000, memory_bus_width=6016)
    for gpu in (h200, SimpleNamespace(), SimpleNamespace(memory_clock_rate=0, memory_bus_width=6016)):
        report("build.py", f"rate of {gpu} - 4814", abs(build.memory_rate(gpu) - 4814))
    for name, rate, pace in (("2.8b", 4814, 4814), ("2.8b", 2407, 2407), ("70m", 3352, 3352)):
        of_rate = build.constants(Config.from_name(f"pythia-{name}"), memory_rate=rate)["PACE"]
        report("build.py", f"{name}, memory of {rate} bytes a ns: pace - {pace}", abs(of_rate - pace))
