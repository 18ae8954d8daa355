"""Compile fused_block.cu for one model shape and one GPU architecture, load it, and launch it (Fused).

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
import struct
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import torch

from checkpoint import Refused
from model import SIZES, Config, Sampler

SOURCE = Path(__file__).with_name("fused_block.cu")
GREEDY = Sampler()
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
            "PACE": pace, "SHARED_BYTES": SHARED_BYTES[arch], "MIN_BLOCKS": max(sms // 2, 1), **(extra or {})}


def flags(defines, arch):
    """nvcc's arguments."""
    number = arch.removeprefix("sm_")
    return ["-O3", "-std=c++17", f"-gencode=arch=compute_{number},code={arch}", "-Xptxas=-v",
            "-ftz=true", "-prec-div=false",  # fewer branches: subnormals are 0, a / b errs by 2 ulp
            *(f"-D{name}={value}" for name, value in defines.items())]


def compile_only(defines, arch, source=SOURCE):
    """Compiles without loading; returns ptxas's report (text). Needs nvcc, no GPU. Raises Refused."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc(), *flags(defines, arch), "-cubin", "-o", f"{folder}/kernel.cubin", source]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise Refused(f"nvcc does not compile {source.name} for {arch}: {first_error(result.stderr)}")
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


class Fused:
    """Decodes with the kernel in fused_block.cu, up to TOKENS tokens a launch.

    It shares the model's weights and a key/value cache with the reference, and owns the few buffers that a
    launch works in. Token, position and the sampler's settings lie in the GPU's memory, so a launch needs
    nothing from the host. One text at a time: when another begins, the older one ends with Refused.
    """
    TOKENS = 8

    def __init__(self, model, cache=None, graph=True, source=SOURCE, **tuning):
        """Compiles the kernel for the model's shape the first time.

        `cache` (from `model.new_cache`) is shared with the reference, so that either can go on where the other
        stopped. `graph` replays a captured CUDA graph. `tuning`: arguments of `constants`. Raises Refused
        where the kernel cannot run.
        """
        device, dtype = model.embed_in.device, model.embed_in.dtype
        if device.type != "cuda" or dtype != torch.float16:
            raise Refused(f"the fused kernel runs float16 on a CUDA GPU, not {dtype} on {device.type}: "
                          "take dtype float16 and device cuda, or leave fused out")
        arch, gpu = device_arch(device), torch.cuda.get_device_properties(device)
        self.defines = constants(model.config, arch, sms=gpu.multi_processor_count, **tuning)
        self.library = load(self.defines, arch, source)
        self.library.fused_prepare.restype = self.library.fused_launch.restype = ctypes.c_char_p
        clusters = ctypes.c_int()
        with torch.cuda.device(device):
            check(self.library.fused_prepare(ctypes.byref(clusters)))
        self.clusters, size = clusters.value, self.defines["CLUSTER"]
        if self.clusters * size * 2 < gpu.multi_processor_count:
            raise Refused(f"this GPU has room for {self.clusters} clusters of {size} blocks at once, on "
                          f"{gpu.multi_processor_count} multiprocessors: look for limits of MPS or MIG, or "
                          "take a smaller cluster")
        self.use_graph, self.graph = graph, None
        self.allocate(model, cache, gpu.multi_processor_count)

    @torch.inference_mode(False)  # the buffers are written outside of inference mode, too
    def allocate(self, model, cache, blocks):
        """Makes the buffers, and the kernel's parameter: pointers to the weights, the cache and the buffers.

        The kernel trusts its pointers, so everything is compared with what its struct Model says. Raises
        Refused for the first tensor of another shape, dtype or device, or not contiguous.
        """
        c, device = model.config, model.embed_in.device
        cache = model.new_cache() if cache is None else cache
        self.config, self.device, self.cache = c, device, cache
        self.text, self.next_layer, self.lock = 0, 0, threading.Lock()
        C, F, V, half = c.hidden, c.mlp, c.vocab, torch.float16

        def zeros(*shape, dtype=torch.float32, **kw):
            return torch.zeros(shape, dtype=dtype, **({"device": device} | kw))
        pinned = {"device": "cpu", "pin_memory": device.type == "cuda"}  # the kernel writes these to the host
        self.residual = zeros(2, C, dtype=torch.int64)
        self.logits = zeros(V)
        self.history = zeros(c.context, dtype=torch.int32, **pinned)     # the token chosen at each position
        self.state = zeros(64, dtype=torch.int32)                        # the kernel's State
        self.settings = zeros(24, dtype=torch.uint8)                     # the kernel's Settings
        self.failure = zeros(4, dtype=torch.int32, **pinned)             # outlives the CUDA context
        self.taps = zeros(6 * C + F)
        self.timeline = zeros(blocks, c.n_layer + 1, 10, dtype=torch.int64)
        layer = {"ln1_w": (C,), "ln1_b": (C,), "ln2_w": (C,), "ln2_b": (C,), "w_qkv": (3 * C, C),
                 "b_qkv": (3 * C,), "w_out": (C, C), "b_out": (C,), "w_up": (F, C), "b_up": (F,),
                 "w_down": (F, C), "b_down": (C,)}                       # in the order of the kernel's Layer
        read = [(f"blocks[{i}].{name}", getattr(block, name), shape, half)
                for i, block in enumerate(model.blocks) for name, shape in layer.items()]
        read += [("embed_in", model.embed_in, (V, C), half), ("lnf_w", model.lnf_w, (C,), half),
                 ("lnf_b", model.lnf_b, (C,), half), ("embed_out", model.embed_out, (V, C), half),
                 ("rope", model.rope, (2, c.context, c.rotary_dims // 2), torch.float32),
                 ("cache", cache, (c.n_layer, 2, 1, c.n_head, c.context, c.head_size), half)]
        for name, tensor, shape, dtype in read:
            if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, device):
                raise Refused(f"{name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}, the kernel "
                              f"needs {list(shape)} {dtype} on {device}: load the model in float16, and take "
                              "the cache from new_cache()")
            if not tensor.is_contiguous() or tensor.data_ptr() % 16:
                raise Refused(f"{name} is not contiguous, or not at a multiple of 16 bytes: load the model anew")
        *weights, cache = [tensor.detach() for _, tensor, _, _ in read]
        # all that a launch reads or writes; keeps the memory, whatever becomes of the model
        self.tensors = [*weights[:-1], *weights[-1], cache, self.residual, self.logits, self.history,
                        self.state, self.settings, self.failure, self.taps, self.timeline]
        self.pointers = (ctypes.c_void_p * len(self.tensors))(*(t.data_ptr() for t in self.tensors))

    def __call__(self, tokens, cache, pos):
        """Logits [1, 1, V] fp32 of one token [1, 1] at `pos`, with the reference's signature."""
        if tokens.shape != (1, 1) or cache is not self.cache:
            raise Refused("a fused step takes one token and the cache it was made with: take the model for "
                          "others")
        self.begin()
        self.start(tokens, pos)
        self.launch(0, self.config.n_layer, tokens=1)
        with self.failures_explained():
            return self.logits.clone().view(1, 1, -1)

    def begin(self):
        """Begins another text; returns its number, for `decode`."""
        with self.lock:
            self.text += 1
            return self.text

    def start(self, token, pos, sampler=GREEDY):
        """Makes `token` (int or tensor of one) at position `pos` the input of the next launch."""
        if not 0 <= pos < self.config.context:
            raise Refused(f"position {pos} is not one of the {self.config.context}: shorten the prompt, or "
                          "ask for fewer tokens")
        settings = struct.pack("<QdfI", sampler.seed % 2**64, sampler.top_p or 1.0, sampler.temperature,
                               min(sampler.top_k or self.config.vocab, self.config.vocab))
        with self.failures_explained():
            self.state[0:1].copy_(torch.as_tensor(token).view(1))
            self.state[1] = pos
            self.settings.copy_(torch.frombuffer(bytearray(settings), dtype=torch.uint8))
        self.next_layer = 0

    def launch(self, first_layer, last_layer, tokens=0):
        """Layers first_layer..last_layer - 1 on the current stream.

        With first_layer 0, x is the token's embedding, otherwise what the launch before left. With `tokens`,
        all layers run that often, up to the end of the context; each time the LM head chooses the next token.
        """
        if first_layer not in (0, self.next_layer):
            raise Refused(f"layer {first_layer} has no input: launch layer {self.next_layer} first")
        with torch.cuda.device(self.device), self.failures_explained():
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            check(self.library.fused_launch(self.pointers, self.clusters, first_layer, last_layer,
                                            tokens, stream))
        self.next_layer = 0 if tokens else last_layer

    def step(self, tokens=1):
        """Makes `tokens` in one launch on the current stream, without waiting for it."""
        if not self.use_graph or tokens != self.TOKENS:  # to capture other graphs would take longer
            return self.launch(0, self.config.n_layer, tokens)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.Stream(self.device)):
                self.graph.capture_begin(capture_error_mode="thread_local")  # other threads may go on
                self.launch(0, self.config.n_layer, tokens)
                self.graph.capture_end()
        with self.failures_explained():
            self.graph.replay()

    def decode(self, token, pos, steps, sampler=GREEDY, text=None):
        """Yields `steps` ids (ints) after `token` at `pos`; the GPU is a launch ahead of what is yielded.

        `text` is what `begin` returned, if the cache was filled after it. All launches go to the stream that
        is current at the first. Raises Refused when another text begins.
        """
        text, end = self.begin() if text is None else text, pos + steps
        if end > self.config.context:
            raise Refused(f"position {end - 1} is past the last of {self.config.context} positions: shorten "
                          "the prompt or ask for fewer tokens")
        if steps == 0:
            return
        stream, ready = torch.cuda.current_stream(self.device), deque()
        for at in range(pos, end + self.TOKENS, self.TOKENS):
            with self.lock, torch.cuda.stream(stream):
                self.check_text(text)
                if at == pos:
                    self.start(token, pos, sampler)
                if at < end:
                    self.step(min(self.TOKENS, end - at))
                    ready.append(stream.record_event())
            if at > pos:
                self.wait(ready.popleft())
                made = self.history[at - self.TOKENS:min(at, end)].tolist()
                self.check_text(text)  # after reading: what was read is of this text
                yield from made

    def check_text(self, text):
        if text != self.text:
            raise Refused("another text has begun on this decoder: make a Fused for each text at a time")

    def wait(self, work):
        """Waits for `work`, an event or a stream; RuntimeError names the sync where a launch gave up."""
        with self.failures_explained():
            work.synchronize()

    @contextmanager
    def failures_explained(self):
        """Whichever call meets the error of a launch that gave up raises RuntimeError with its report."""
        try:
            yield
        except RuntimeError as error:
            sync, block, layer, seen = self.failure.tolist()
            if sync == 0:
                raise
            name = ["", "(1)", "(2)", "(3)", "(4)", "(5)", "(F)", "(E)", "(h)", "(6)"][sync]
            lacking = {4: f", where x lacked {seen} of its sums,",
                       5: f", where {seen} blocks had not arrived,"}.get(sync, "")
            raise RuntimeError(f"the fused kernel waited too long at sync {name}{lacking} in block {block}, "
                               f"layer {layer}, and gave up: start a new process") from error


def check(error):
    """Raises what a function of the kernel's library returned (bytes), if anything."""
    if error:
        raise RuntimeError(f"CUDA refused the fused kernel: {error.decode()}")


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


if __name__ == "__main__":
    main()
