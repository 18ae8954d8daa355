"""Compile fused_block.cu for one model shape and one GPU architecture, and load it.

    python build.py --model pythia-2.8b                     compile for the GPU of this machine, and cache
    python build.py --compile-only --arch sm_90a            compile all ten shapes; needs nvcc, but no GPU

The kernel's shape is a set of compile-time constants. Libraries are kept where torch keeps its extensions
(TORCH_EXTENSIONS_DIR, or ~/.cache/torch_extensions), one for each source, set of flags, and version of torch
and CUDA.
"""
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch

from model import SIZES, Config, Refused

SOURCE = Path(__file__).with_name("fused_block.cu")
# the most that one thread block may have, by the CUDA programming guide
SHARED_BYTES = {"sm_90a": 227 * 1024, "sm_100a": 227 * 1024, "sm_120a": 99 * 1024}
# bytes a ns that memory delivers, by the datasheets of H200, B200 and RTX 5090
MEMORY_RATE = {"sm_90a": 4800, "sm_100a": 8000, "sm_120a": 1792}


def default_cluster(config, sms=132):
    """Thread blocks in a cluster: the fewest that make a head no more work than a block's fair share.

    A head is 4*HS rows of C, split over the blocks of its cluster; the fair share is all rows over all
    blocks. Clusters of 4 and 8 leave about one multiprocessor in eleven unused, because none spans two GPCs.
    """
    head_rows, all_rows = 4 * config.head_size, 4 * config.hidden + 2 * config.mlp
    for cluster in (1, 2, 4):
        blocks = sms if cluster <= 2 else sms * 10 // 11
        heads = -(-config.n_head * cluster // blocks)  # of the busiest cluster
        if heads * head_rows / cluster <= all_rows / blocks:
            return cluster
    return 8


def constants(config, arch="sm_90a", cluster=None, threads=None, rows=None, attention_kib=None, pace=None,
              sms=132, extra=None):
    """The kernel's -D constants {name: int} for a Config, on a GPU of `sms` multiprocessors.

    `threads`, `rows`, `attention_kib` and `pace` are tuning, see THREADS, ROWS, ATTENTION_BYTES and PACE in
    fused_block.cu; `extra` adds constants of test builds: {"TAPS": 1} or {"TIMELINE": 1}.
    Raises Refused for a shape that the kernel has no code for.
    """
    c = config
    cluster = default_cluster(c, sms) if cluster is None else cluster
    if cluster not in (1, 2, 4, 8):
        raise Refused(f"cluster size {cluster} is not offered: take 1, 2, 4 or 8")
    team = c.hidden // (8 if c.hidden < 4096 else 16)  # threads that hold a row: half a warp, or whole ones
    for what, value, fits in (("hidden size", c.hidden, c.hidden <= 5120 and (team == 16 or team % 32 == 0)),
                              ("head size", c.head_size, c.head_size % 16 == 0 and c.head_size <= 256),
                              ("rotary dimensions", c.rotary_dims, c.rotary_dims % 2 == 0),
                              ("MLP width", c.mlp, c.mlp % 8 == 0 and c.mlp <= 2**16),
                              ("vocabulary", c.vocab, c.vocab <= 2**23),
                              ("context", c.context, c.context <= 2**13),
                              ("layers", c.n_layer, c.n_layer <= 40),
                              ("LayerNorm eps", c.eps, c.eps == 1e-5)):
        if not fits:
            raise Refused(f"the fused kernel has no code for {what} {value}: run without fused")
    if rows is None:  # two stages of 16 to 24 KB; less where the ring would not hold two tiles
        rows = 2 if SHARED_BYTES[arch] < 128 * 1024 else 8 if c.hidden < 4096 else 4
    if threads is None:  # README.md has the measurements of these three
        threads = 384 if 512 < c.hidden < 1024 else 256
    if attention_kib is None:
        attention_kib = 6 * cluster if c.hidden <= 1024 else 0
    if pace is None:  # small models wait for latency, not memory; the largest are a little faster this way
        pace = MEMORY_RATE[arch] * (32 if c.hidden < 1024 else 16 if c.hidden < 4096 else 17) // 16
    if pace < 1:
        raise Refused(f"pace {pace} would let no copy start: take 1 byte a ns or more")
    return {"HIDDEN": c.hidden, "HEADS": c.n_head, "HEAD_SIZE": c.head_size, "ROTARY": c.rotary_dims,
            "MLP": c.mlp, "VOCAB": c.vocab, "LAYERS": c.n_layer, "CONTEXT": c.context, "CLUSTER": cluster,
            "THREADS": threads, "ROWS": rows, "ATTENTION_BYTES": attention_kib * 1024,
            "PACE": pace, "SHARED_BYTES": SHARED_BYTES[arch], **(extra or {})}


def flags(defines, arch):
    """nvcc's arguments."""
    number = arch.removeprefix("sm_")
    return ["-O3", "-std=c++17", f"-gencode=arch=compute_{number},code={arch}", "-Xptxas=-v",
            "-ftz=true", "-prec-div=false",  # fewer branches: subnormals are 0, a / b errs by 2 ulp
            *(f"-D{name}={value}" for name, value in defines.items())]


def compile_only(defines, arch):
    """Compiles without loading; returns ptxas's report (text). Needs nvcc, no GPU. Raises Refused."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc(), *flags(defines, arch), "-cubin", "-o", f"{folder}/kernel.cubin", SOURCE]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise Refused(f"nvcc does not compile {SOURCE.name} for {arch}: {first_error(result.stderr)}")
    return result.stderr


def load(defines, arch, source=SOURCE):
    """The compiled kernel as a ctypes library; compiles it the first time. Raises Refused."""
    from torch.utils import cpp_extension  # slow to import, and needed only here
    nvcc()  # refuses early
    arguments = flags(defines, arch)
    key = source.read_bytes() + repr((arguments, torch.__version__, torch.version.cuda)).encode()
    name = f"fused_block_{defines['HIDDEN']}_{arch}_{hashlib.sha256(key).hexdigest()[:16]}"
    try:
        folder = Path(cpp_extension._get_build_directory(name, verbose=False))
        if folder.stat().st_uid != os.getuid():
            raise Refused(f"{folder} belongs to another user, whose code this would run: set "
                          "TORCH_EXTENSIONS_DIR to a folder of your own")
        folder.chmod(0o700)
        library = folder / "kernel.so"  # renamed when whole: a killed linker leaves half a file
        with open(folder / "building", "w") as file:
            # The operating system drops this lock when its holder dies, so it is never stale. torch's own is
            # a file that others wait for: here it can only be what a killed build has left behind.
            fcntl.flock(file, fcntl.LOCK_EX)
            (folder / "lock").unlink(missing_ok=True)
            if not library.exists():
                cpp_extension.JIT_EXTENSION_VERSIONER.entries.pop(name, None)  # or a retry would not build
                print(f"Compiling the kernel for {arch} (once, about 4 s)", file=sys.stderr)
                cpp_extension.load(name, [str(source)], extra_cuda_cflags=arguments,
                                   build_directory=str(folder), is_python_module=False, verbose=False)
                (folder / f"{name}.so").replace(library)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError) as error:
        cause = first_error(str(error))
        if isinstance(error, OSError) or "No space left" in cause:
            raise Refused(f"the compile cache cannot be used ({cause}): set TORCH_EXTENSIONS_DIR, and TMPDIR "
                          "for nvcc's own files, to a writable folder with some free space") from error
        raise Refused(f"the kernel does not compile: {cause}") from error


def kernel_hash():
    """SHA-256 of fused_block.cu without comments and white space, by which a measurement is recorded."""
    code = re.sub(r"//[^\n]*|\s+", "", SOURCE.read_text())
    return hashlib.sha256(code.encode()).hexdigest()


@functools.cache
def nvcc():
    """The path of nvcc. Raises Refused where there is none, or of another CUDA version than torch's."""
    from torch.utils.cpp_extension import CUDA_HOME
    path = shutil.which("nvcc", path=f"{CUDA_HOME}/bin") if CUDA_HOME else shutil.which("nvcc")
    if not path:
        raise Refused("nvcc is not found: install the CUDA toolkit, or set CUDA_HOME to where it is")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    release = version.partition("release ")[2].partition(",")[0]
    wanted = torch.version.cuda
    if wanted and release.partition(".")[0] != wanted.partition(".")[0]:
        raise Refused(f"nvcc is CUDA {release}, but torch was built with CUDA {wanted}: install the matching "
                      "toolkit")
    return path


def first_error(text):
    """The first line of a compiler's output that names an error; "Error building extension" is no name."""
    named = re.search(r".*((error|fatal)\s*:|No space left).*", text)
    return (named[0] if named else text).strip().partition("\n")[0][:300] or "no message"


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=SIZES, help="one shape (default: all ten)")
    add("--arch", choices=SHARED_BYTES, help="GPU architecture (default: this machine's GPU)")
    add("--cluster", type=int, help="thread blocks in a cluster: 1, 2, 4 or 8 (default: by shape)")
    add("--compile-only", action="store_true", help="report registers and spills, keep nothing")
    args = parser.parse_args()
    try:
        arch = args.arch or device_arch("cuda")
        for name in [args.model] if args.model else SIZES:
            started = time.time()
            defines = constants(Config.from_name(name), arch, args.cluster)
            if args.compile_only:
                report = "; ".join(re.findall(r"\d+ bytes stack.*|Used .*", compile_only(defines, arch)))
            else:
                load(defines, arch)
                report = "ready"
            seconds = time.time() - started
            print(f"{name}, {arch}, clusters of {defines['CLUSTER']}: {report} ({seconds:.1f} s)", flush=True)
    except Refused as refusal:
        parser.exit(2, f"build.py: {refusal}\n")


def device_arch(device):
    """The architecture of a CUDA device, one of SHARED_BYTES. Raises Refused where the kernel cannot run."""
    if not torch.cuda.is_available():
        raise Refused("no CUDA GPU is found: run without fused, or give --arch to compile only")
    major, minor = torch.cuda.get_device_capability(device)
    arch = f"sm_{major}{minor}a"
    if arch not in SHARED_BYTES:
        raise Refused(f"this GPU has compute capability {major}.{minor}; the fused kernel needs clusters and "
                      f"bulk copies, and is written for {', '.join(SHARED_BYTES)}: run without fused")
    return arch


if __name__ == "__main__":
    main()
