"""Compile fused_block.cu for one model shape and one GPU architecture, load it, and launch it (Fused).

    python build.py --model pythia-2.8b                     compile for the GPU of this machine, and cache
    python build.py --compile-only --arch sm_90a            compile all ten shapes; needs nvcc, but no GPU

The kernel's shape is a set of compile-time constants. Libraries are kept where torch keeps its extensions
(TORCH_EXTENSIONS_DIR, or ~/.cache/torch_extensions), one for each source, set of flags, version of nvcc and
of torch, and kind of machine.
"""
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
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
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # PYTHONSAFEPATH leaves it out

from checkpoint import Refused
from model import SIZES, Config, Sampler

SOURCE = Path(__file__).resolve().with_name("fused_block.cu")
GREEDY = Sampler()
# the most that one thread block may have, by the CUDA programming guide
SHARED_BYTES = {"sm_90a": 227 * 1024, "sm_100a": 227 * 1024, "sm_120a": 99 * 1024}


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
              sms=132, memory_rate=4814, extra=None):
    """The kernel's -D constants {name: int} for a Config, on a GPU of `sms` multiprocessors, whose memory
    delivers `memory_rate` bytes a ns by its clock and the width of its bus (defaults: an H200's).

    `threads`, `rows`, `attention_kib` and `pace` are tuning, see MIN_WORKERS, ROWS, ATTENTION_BYTES and PACE
    in fused_block.cu; `extra` adds constants of test builds: {"TAPS": 1} or {"TIMELINE": 1}.
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
    if rows is None:  # a tile fills two slots of 16 to 24 KB; less where the ring would not hold two tiles
        rows = 2 if SHARED_BYTES[arch] < 128 * 1024 else 8 if c.hidden < 4096 else 4
    if threads is None:  # docs/results.md has the measurements of rows, threads and clusters
        threads = 384 if 512 < c.hidden < 1024 else 256
    if attention_kib is None:
        attention_kib = 6 * cluster if c.hidden <= 1024 else 0
    pace = memory_rate if pace is None else pace
    if pace < 1:
        raise Refused(f"pace {pace} would let no copy start: take 1 byte a ns or more")
    return {"HIDDEN": c.hidden, "HEADS": c.n_head, "HEAD_SIZE": c.head_size, "ROTARY": c.rotary_dims,
            "MLP": c.mlp, "VOCAB": c.vocab, "LAYERS": c.n_layer, "CONTEXT": c.context, "CLUSTER": cluster,
            "MIN_WORKERS": threads, "ROWS": rows, "ATTENTION_BYTES": attention_kib * 1024,
            "PACE": pace, "SHARED_BYTES": SHARED_BYTES[arch], "MIN_BLOCKS": max(sms // 2, 1), **(extra or {})}


def flags(defines, arch):
    """nvcc's arguments."""
    number = arch.removeprefix("sm_")
    return ["-O3", "-std=c++17", f"-gencode=arch=compute_{number},code={arch}",
            "-ftz=true", "-prec-div=false",  # fewer branches: subnormals are 0, a / b errs by 2 ulp
            *(f"-D{name}={value}" for name, value in defines.items())]


def compile_only(defines, arch, source=SOURCE):
    """Compiles without loading; returns ptxas's report (text). Needs nvcc, no GPU. Raises Refused."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc(), *flags(defines, arch), "-Xptxas=-v", "-cubin", "-o", f"{folder}/kernel.cubin",
                   source]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode:
        raise does_not_compile(source, arch, result.stderr)
    return result.stderr


def does_not_compile(source, arch, output):
    return Refused(f"{source.name} does not compile for {arch} ({first_error(output)}): check that the CUDA "
                   "toolkit is whole, that g++ and ninja are on PATH, and that there is room in the compile "
                   "cache (TORCH_EXTENSIONS_DIR) and in TMPDIR")


def load(defines, arch, source=SOURCE):
    """The compiled kernel as a ctypes library; compiles it the first time. Raises Refused."""
    if not torch.version.cuda:
        raise Refused("this torch is built without CUDA, so nothing can be linked with it: install torch "
                      "with CUDA, or give --compile-only")
    key = repr((source.read_bytes(), flags(defines, arch), nvcc_version(nvcc()), torch.__version__,
                platform.machine())).encode()
    name = f"fused_block_{defines['HIDDEN']}_{arch}_{hashlib.sha256(key).hexdigest()[:16]}"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions", name).expanduser()
    library = folder / "kernel.so"

    def build():
        from torch.utils import cpp_extension  # slow to import, and needed only here
        print(f"Compiling the kernel for {arch} (once, about 4 s)", file=sys.stderr)
        cpp_extension.CUDA_HOME = str(Path(nvcc()).parents[1])
        # ninja may lie beside a Python that is called by its path
        os.environ["PATH"] = os.environ.get("PATH", os.defpath) + os.pathsep + os.path.dirname(sys.executable)
        with tempfile.TemporaryDirectory(prefix="build_", dir=folder) as place:  # has no older lock
            try:
                cpp_extension.load(Path(place).name, [str(source)], extra_cuda_cflags=flags(defines, arch),
                                   build_directory=place, is_python_module=False)
            except (RuntimeError, subprocess.CalledProcessError) as error:
                # if there are several lines, the first one is the command
                raise does_not_compile(source, arch, str(error).partition("\n")[2] or str(error)) from error
            # now it is whole: a killed linker leaves half a file
            Path(place, f"{Path(place).name}.so").replace(library)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise Refused(f"{folder} belongs to another user, whose code this would run: set "
                          "TORCH_EXTENSIONS_DIR to a folder of your own")
        folder.chmod(0o700)
        with open(folder / "building", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the operating system drops it when its holder dies
            if not library.exists():
                build()
            with suppress(OSError):
                return ctypes.CDLL(str(library))
            build()  # what was there is damaged, or of another system
            return ctypes.CDLL(str(library))
    except OSError as error:
        raise Refused(f"the compile cache cannot be used ({error}): set TORCH_EXTENSIONS_DIR to a writable "
                      "folder with some free space") from error


def kernel_hash():
    """SHA-256 of fused_block.cu without comments and white space, by which a measurement is recorded."""
    code = re.sub(r"//[^\n]*|\s+", "", SOURCE.read_text())
    return hashlib.sha256(code.encode()).hexdigest()


@functools.cache
def nvcc():
    """The path of nvcc. Raises Refused where there is none, or of another CUDA version than torch's."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = f"{home}/bin" if home else os.environ.get("PATH", os.defpath) + ":/usr/local/cuda/bin"
    path = shutil.which("nvcc", path=places)
    if not path:
        raise Refused("nvcc is not found: install the CUDA toolkit, or set CUDA_HOME to where it is")
    release = nvcc_version(path).partition("release ")[2].partition(",")[0]
    wanted = torch.version.cuda
    if wanted and release.partition(".")[0] != wanted.partition(".")[0]:
        raise Refused(f"nvcc is CUDA {release}, but torch was built with CUDA {wanted}: install the matching "
                      "toolkit")
    return path


def nvcc_version(path):
    """What nvcc says of itself (text). Raises Refused where it does not run."""
    try:
        return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise Refused(f"{path} does not run ({error}): install the CUDA toolkit again, or set CUDA_HOME to "
                      "another") from error


def first_error(text):
    """The line of a compiler's output that names the cause, which usually is not the last line."""
    words = "error|fatal|cannot|no such|not found|no space|denied|undefined|killed"
    named = re.search(rf"^(?!.*(warning|exit status)).*({words}).*", text, re.MULTILINE | re.IGNORECASE)
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


def memory_rate(gpu):
    """Bytes a ns that memory delivers, from the driver's properties; an H200's if the driver has none."""
    clock, bus = getattr(gpu, "memory_clock_rate", 0), getattr(gpu, "memory_bus_width", 0)  # kHz, bits
    return 2 * clock * bus // 8 // 10**6 or 4814  # two transfers in a cycle of the clock


class Fused:
    """Decodes with the kernel in fused_block.cu, up to TOKENS tokens a launch.

    It shares the model's weights and a key/value cache with the reference, which reads the prompt. It owns
    the few buffers that a launch works in. Token, position and the sampler's settings lie in the GPU's
    memory, so a launch needs nothing from the host. A decoder writes one text at a time: when another text
    begins, the older one ends with Refused.
    """
    TOKENS = 8

    def __init__(self, model, cache=None, graph=True, source=SOURCE, **tuning):
        """Compiles the kernel for the model's shape the first time.

        `cache` (from `model.new_cache`) is shared with the reference, so that the kernel can go on where the
        reference has stopped, and the other way round. With `graph`, a captured CUDA graph is replayed.
        `tuning` are arguments of `constants`. Raises Refused if the kernel cannot run.
        """
        device, dtype = model.embed_in.device, model.embed_in.dtype
        if device.type != "cuda" or dtype != torch.float16:
            raise Refused(f"the fused kernel runs float16 on a CUDA GPU, not {dtype} on {device.type}: "
                          "take dtype float16 and device cuda, or leave fused out")
        arch, gpu = device_arch(device), torch.cuda.get_device_properties(device)
        self.defines = constants(model.config, arch, **{"sms": gpu.multi_processor_count,
                                                        "memory_rate": memory_rate(gpu)} | tuning)
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

        The kernel trusts its pointers, so every tensor is compared with what the kernel's struct Model
        expects. Raises Refused for the first tensor that has another shape, dtype or device, or is not
        contiguous.
        """
        c, device = model.config, model.embed_in.device
        cache = model.new_cache() if cache is None else cache
        self.model, self.config, self.device, self.cache = model, c, device, cache
        self.text_number, self.next_layer, self.lock, self.last = 0, 0, threading.Lock(), None
        C, F, V, half = c.hidden, c.mlp, c.vocab, torch.float16

        def zeros(*shape, dtype=torch.float32, **kw):
            return torch.zeros(shape, dtype=dtype, **({"device": device} | kw))
        pinned = {"device": "cpu", "pin_memory": device.type == "cuda"}  # the kernel writes these to the host
        self.residual = zeros(2, C, dtype=torch.int64)
        self.logits = zeros(V)
        self.history = zeros(c.context, dtype=torch.int32, **pinned)     # tokens chosen after each position
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
                raise Refused(f"{name} is not contiguous, or not at a multiple of 16 bytes: load the model "
                              "anew")
        *weights, cache = [tensor.detach() for _, tensor, _, _ in read]
        # all that a launch reads or writes; this list keeps the memory when the model's attributes change
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
        """Begins another text, after the launches of the older one; returns its number, for `decode`."""
        with self.lock:
            if self.last is not None:  # they may be on another stream
                torch.cuda.current_stream(self.device).wait_event(self.last)
            self.text_number += 1
            return self.text_number

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

    def launch(self, first_layer, end_layer, tokens=0):
        """Layers first_layer..end_layer - 1 on the current stream.

        With first_layer 0, x begins as the token's embedding, otherwise as the x of the last launch. With
        `tokens`, the launch makes that many tokens, fewer at the end of the context: for each of them, all
        layers run, and the LM head chooses the next token.
        """
        if first_layer not in (0, self.next_layer):
            raise Refused(f"layer {first_layer} has no input: launch layer {self.next_layer} first")
        with self.failures_explained():
            self.submit(first_layer, end_layer, tokens)
        self.next_layer = 0 if tokens else end_layer

    def submit(self, first_layer, end_layer, tokens):
        """Hands a launch to CUDA."""
        with torch.cuda.device(self.device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            check(self.library.fused_launch(self.pointers, self.clusters, first_layer, end_layer,
                                            tokens, stream))

    def step(self, tokens=1):
        """Starts a launch on the current stream that makes `tokens` tokens, and does not wait for it."""
        if not self.use_graph or tokens != self.TOKENS:  # other numbers are too rare for a capture
            return self.launch(0, self.config.n_layer, tokens)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.Stream(self.device)):
                self.graph.capture_begin(capture_error_mode="thread_local")  # other threads may go on
                self.launch(0, self.config.n_layer, tokens)
                self.graph.capture_end()
        with self.failures_explained():
            self.graph.replay()

    def decode(self, token, pos, steps, sampler=GREEDY, text_number=None):
        """Yields `steps` ids (ints) after `token` at `pos`; the GPU is a launch ahead of what is yielded.

        `text_number` is what `begin` returned, if that was called before the cache was filled. All launches
        go to the stream that is current at the first launch. Raises Refused when another text begins.
        """
        end = pos + steps
        text_number = self.begin() if text_number is None else text_number
        if end > self.config.context:
            raise Refused(f"position {end - 1} is past the last of {self.config.context} positions: shorten "
                          "the prompt or ask for fewer tokens")
        if steps == 0:
            return
        stream, ready = torch.cuda.current_stream(self.device), deque()
        for at in range(pos, end + self.TOKENS, self.TOKENS):
            with self.lock, torch.cuda.stream(stream):
                self.check_text(text_number)
                if at == pos:
                    self.start(token, pos, sampler)
                if at < end:
                    self.step(min(self.TOKENS, end - at))
                    self.last = stream.record_event()
                    ready.append(self.last)
            if at > pos:
                self.wait(ready.popleft())
                made = self.history[at - self.TOKENS:min(at, end)].tolist()
                self.check_text(text_number)  # after reading, so that what was read belongs to this text
                yield from made

    def check_text(self, text_number):
        if text_number != self.text_number:
            raise Refused("another text has begun on this decoder: finish one text first, or make a Fused "
                          "for each")

    def wait(self, work):
        """Waits for `work`, an event or a stream; RuntimeError names the sync where a launch gave up."""
        with self.failures_explained():
            work.synchronize()

    @contextmanager
    def failures_explained(self):
        """Raises RuntimeError with the report of a launch that gave up, at the call that sees its error."""
        try:
            yield
        except RuntimeError as error:
            sync, block, layer, number = self.failure.tolist()
            if sync == 0:
                raise
            name = ["", "(1)", "(2)", "(3)", "(4)", "(5)", "(6)", "(F)", "(E)", "(N)"][sync]
            lacking = {4: f", where x lacked {number} of its sums,",
                       5: f", where {number} blocks had not arrived,"}.get(sync, "")
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
