"""emulator.py: the division of work, and the dataflow in float64, against C++ and the model."""
import ctypes
import math
import re
import shutil
import subprocess
from itertools import pairwise

import numpy as np
import pytest
import torch

import build
from checkpoint import Refused
from emulator import emulator
from emulator.emulator import SOURCE, kernel_constants
from model import SIZES, Config, Pythia
from tests.helpers import CLUSTERS, TINY, cut, filled_cache, report

EMULATED_POSITIONS = (0, 1, 17, 1000, 2047)


def uncovered(k, blocks, position, lm_head):
    """How many rows of a layer and of the LM head, and cached tokens, the blocks do not copy exactly once."""
    rows = {"w_qkv": 3 * k.C, "w_out": k.C, "w_up": k.MLP, "w_down": k.MLP, "embed_out": k.V}
    copied = {name: np.zeros((1, n), int) for name, n in rows.items()} | {"kv": np.zeros((k.NH, k.CTX), int)}
    for block in range(blocks):
        for stage in emulator.producer(k, block, blocks, position, 0, 1, lm_head):
            copied[stage.matrix][stage.head or 0, stage.first:stage.first + stage.n] += 1
    once = {"kv": np.arange(k.CTX) < position, "embed_out": lm_head}
    return sum((counts != once.get(name, 1)).sum() for name, counts in copied.items())


@pytest.mark.parametrize("name", SIZES)
def test_coverage(name):
    """Who copies and uses what, at every cluster size and as many clusters as an H200 holds."""
    miscopied = misowned = 0
    for cluster in CLUSTERS:
        k = kernel_constants(build.constants(Config.from_name(name), cluster=cluster))
        blocks = emulator.fitting_clusters(cluster, 132) * cluster
        # rows of the LM head do not depend on the position
        miscopied += sum(uncovered(k, blocks, position, position == 0) for position in EMULATED_POSITIONS)
        tokens = [t for base in range(k.WARPS * k.WARP_POSITIONS)
                  for t in range(base, k.KV_POSITIONS, k.STRIDE)]
        # columns are a thread's, rows a team's, tokens of some lanes
        misowned += sum(sorted(owned) != list(range(n)) for owned, n in (
            (k.column.ravel(), k.C), (k.row[:, :k.ROWS].ravel(), k.TILE_ROWS), (tokens, k.KV_POSITIONS)))
    report(name, "rows and cached tokens not copied exactly once", miscopied)
    report(name, "parts of a tile without exactly one owner", misowned)


def untouched(grid, layers, lm_head):
    """How many weights and tokens of these layers and the LM head the last launch did not use once."""
    matrices = [grid.touched[name][i] for name in ("w_qkv", "w_out", "w_up", "w_down") for i in layers]
    tokens = np.arange(grid.k.CTX) <= grid.position
    return (sum((counts != 1).sum() for counts in matrices) + (grid.touched["embed_out"][-1] != lm_head).sum()
            + sum((grid.touched["kv"][i] != tokens).sum() for i in layers))


@pytest.mark.parametrize("name, positions", [("tiny-pythia", (0, 100)), ("pythia-14m", (1, 17, 700)),
                                             ("pythia-70m", (0, 130))])
def test_emulator(name, positions):
    """One block, and a whole step, against model.py in float64, with few clusters and with more than heads.

    The limits are those of fixed point; all other arithmetic is float64. A cluster's sum is off by up to half
    a unit, so a block by clusters / 2 units (and a tenth for float64). Logits, in standard deviations, and k
    and v are allowed 2 units a cluster and layer. The kernel's unit is 2^-22, 2.4e-7; here it is 2^-36, so
    that a mistake has less to hide behind.
    """
    if name == "tiny-pythia":
        model = Pythia.from_pretrained(TINY)
    else:
        model = Pythia.random(cut(name, vocab=1003), seed=7, dtype=torch.float16)
    model, unit = model.double(), 2.0**-36
    L, C, V = model.config.n_layer, model.config.hidden, model.config.vocab
    block, step, cached, unused, wrong = [], [], [], 0, 0
    for cluster, clusters in ((1, 5), (2, 3), (4, model.config.n_head + 2), (8, 1)):
        for position in positions:
            cache = filled_cache(model, position)
            grid = emulator.Emulator(model, clusters, cache, 1 / unit, cluster=cluster)
            rng = torch.Generator().manual_seed(position)
            x = (torch.randn(C, generator=rng, dtype=torch.float64) / unit).round() * unit
            token = int(torch.randint(V, (), generator=rng))

            # one addition of x, and all that a word then lacks
            grid.residual[grid.swaps % 2] = grid.addend(x.numpy())
            grid.residual[grid.swaps % 2] += grid.lacking(grid.residual[grid.swaps % 2])
            grid.launch(token, position, 1, 2, lm_head=False)
            rope = model.rope[:, position:position + 1]
            truth = model.blocks[1](x.view(1, 1, C), rope, cache[1], position)[0, 0].numpy()
            block.append(np.abs(grid.x() - truth).max() / unit / (clusters / 2 + 0.1))
            unused += untouched(grid, [1], False)

            grid.launch(token, position)
            truth = model(torch.tensor([[token]]), cache, position)[0, 0].numpy()
            step.append(np.abs(grid.logits - truth).max() / truth.std() / unit / (2 * clusters * L))
            new = (grid.cache - cache)[..., position, :]
            cached.append(new.abs().max().item() / unit / (2 * clusters * L))
            unused += untouched(grid, range(L), True)
            wrong += grid.token != truth.argmax()
    report(name, "emulated block: error / fixed point's", np.max(block), 1)
    report(name, "emulated step, logits: error / fixed point's", np.max(step), 1)
    report(name, "emulated step, new k and v: error / fixed point's", np.max(cached), 1)
    report(name, "emulated steps with another token than float64", wrong)
    report(name, "weights and tokens not used exactly once", unused)


def test_pack():
    """The argmax's integers are ordered as torch orders logits: NaN above all, then the first of equals."""
    logits = [-math.nan, math.inf, 3.0, 1e-40, 0.0, -1e-40, -2.0, -math.inf]
    packed = [emulator.pack(logit, token) for logit in logits for token in (0, 1, 50303)]
    wrong = sum(a <= b for a, b in pairwise(packed))
    report("emulator", "pairs of packed (logit, token) in the wrong order", wrong)


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler (c++) on this machine")
def test_constants_and_plan(tmp_path):
    """Every constant (as fp32) and every block's plan: as a C++ compiler and the emulator understand them."""
    sizes = "\n".join(re.findall(r"^(?:__host__ __device__ |static )?constexpr .*", SOURCE, re.MULTILINE))
    plan = "".join(re.search(code, SOURCE, re.MULTILINE | re.DOTALL)[0] for code in (
        r"^struct Portion \{.*?^\};", r"^struct Plan \{.*?^\};", r"^[^\n]*Portion deal\(.*?^\}",
        r"^[^\n]*Plan make_plan\(.*?^\}"))
    names = re.findall(r"\b(\w+) = ", "".join(re.findall(r"constexpr (?:int|float|long long) [^;]*;", sizes)))
    variants = [build.constants(Config.from_name(name), cluster=n) for name in SIZES for n in CLUSTERS]
    text = "#include <algorithm>\nusing std::max, std::min;\n"
    text += "".join(f"#define {word}\n" for word in ("__host__", "__device__", "__noinline__"))
    for n, defines in enumerate(variants):
        for macro, value in defines.items():
            text += f"#undef {macro}\n#define {macro} {value}\n"
        text += (f"namespace v{n} {{\n{sizes}\n{plan}\n}}\n"
                 f'extern "C" {{ void plan_{n}(int a, int b, int c, v{n}::Plan* p) '
                 f'{{ *p = v{n}::make_plan(a, b, c); }}\n'
                 f'double sizes_{n}[] = {{{", ".join(f"double(v{n}::{name})" for name in names)}}}; }}\n')
    (tmp_path / "plan.cpp").write_text(text)
    command_line = ["c++", "-std=c++17", "-shared", "-fPIC", "-o", "plan.so", "plan.cpp"]
    subprocess.run(command_line, cwd=tmp_path, check=True)
    library = ctypes.CDLL(str(tmp_path / "plan.so"))
    wrong_sizes, wrong_plans, count = 0, 0, 0
    for n, defines in enumerate(variants):
        k, function = kernel_constants(defines), getattr(library, f"plan_{n}")
        values = (ctypes.c_double * len(names)).in_dll(library, f"sizes_{n}")
        wrong_sizes += (np.float32([getattr(k, name) for name in names]) != np.float32(values)).sum()
        for clusters in (1, 3, emulator.fitting_clusters(k.RANKS, 132)):
            for position in EMULATED_POSITIONS:
                for block in range(clusters * k.RANKS):
                    args = block, clusters * k.RANKS, position
                    ours = [n for part in emulator.make_plan(k, *args) for n in np.atleast_1d(part)]
                    theirs = (ctypes.c_int * len(ours))()
                    function(*args, theirs)
                    wrong_plans += list(theirs) != ours
                    count += 1
    report("emulator", f"sizes unlike C++'s, of {len(names) * len(variants)}", wrong_sizes)
    report("emulator", f"plans unlike C++'s, of {count}", wrong_plans)


def test_constants_refused():
    """The kernel's static_asserts hold here too: sizes that it cannot be compiled for are refused."""
    good = build.constants(Config.from_name("pythia-2.8b"))
    for field, value, words in (("ROWS", 3, "power of two"), ("ROWS", 32, "two tiles"),
                                ("HEADS", 16, "as wide"), ("CLUSTER", 16, "evenly"),
                                ("MIN_WORKERS", 1024, "1024 threads")):
        with pytest.raises(Refused, match=words):
            kernel_constants(good | {field: value})
