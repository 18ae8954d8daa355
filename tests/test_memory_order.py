"""What nvcc makes of the kernel's syncs: instructions, scopes and fences, as the kernel promises them.

A missing fence or a weaker scope may never show on a GPU, and cannot on a CPU. So this reads the PTX: each
instruction of memory order, and at which sync it stands, by the line of the source that it comes from.
"""
import re
import subprocess

import pytest

import build
from tests.helpers import SMALL, report

pytest_plugins = ["tests.fixtures"]

OPEN = "mbarrier.try_wait.parity.acquire.{}.shared::cta.b64"
PUSH = "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes"
ARRIVE, EXPECT = "mbarrier.arrive.shared::cta.b64", "mbarrier.arrive.expect_tx.shared::cta.b64"
# At a sync, or "" on lines that name none: instructions. None of their kind has another order or scope there.
PROMISED = {
    "(0)": ["barrier.cluster.arrive.release", "barrier.cluster.wait.acquire"],
    "(1)": [EXPECT, f"{PUSH}.b32", OPEN.format("cluster")],     # from peers
    "(2)": [EXPECT, f"{PUSH}.b32", OPEN.format("cluster")],
    "(3)": [EXPECT, f"{PUSH}.v4.b32", OPEN.format("cluster")],
    "(4)": ["ld.relaxed.gpu.global.v2.s64"],                    # words of x: each is whole by itself
    "(5)": ["red.release.gpu.global.add.u32", "ld.acquire.gpu.global.u32"],
    "(6)": ["ld.relaxed.gpu.global.v2.s64"],
    "(F)": [EXPECT, OPEN.format("cta")],
    "(E)": [ARRIVE],
    "(N)": [ARRIVE, OPEN.format("cta")],
    **{f"({sync})": ["barrier.sync"] for sync in "abcdefg"},
    "": ["red.relaxed.gpu.global.add.u64", OPEN.format("cta"),  # additions to x; (E), in the producer
         "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"]}
FENCES = {  # of fences: what comes before, and what after, as nothing else of memory order does
    "fence.mbarrier_init.release.cluster": (r"mbarrier\.init\S*", r"(\S* ld\S*\n)*\(0\) barrier\.cluster"),
    "fence.proxy.async": (r"\(N\) mbarrier\.try_wait\S*", r"(\S* mbarrier\S*\n)*\S* ?cp\.async\.bulk")}
EDITS = {  # of the asm in the kernel's toolbox, each of which must turn this red: (text, what stands instead)
    "no fence.proxy.async": ("fence.proxy.async;", ""),
    "no fence after the barriers' init": ("fence.mbarrier_init.release.cluster;", ""),
    "(5) counts relaxed": ("red.release.gpu.global.add.u32", "red.relaxed.gpu.global.add.u32"),
    "(5) polls relaxed": ("ld.acquire.gpu.global.u32", "ld.relaxed.gpu.global.u32"),
    "(1) to (3) in the block's scope": ("acquire.cluster.shared", "acquire.cta.shared"),
    "(0) without release": ("barrier.cluster.arrive.release", "barrier.cluster.arrive.relaxed"),
    "x added to in the block's scope": ("red.relaxed.gpu.global.add.u64", "red.relaxed.cta.global.add.u64"),
    "x read by plain loads": ("ld.relaxed.gpu.global.v2.s64", "ld.global.v2.s64")}


@pytest.fixture(scope="module")
def ptx(nvcc, tmp_path_factory):
    """The kernel's PTX, with the lines of the source."""
    path = tmp_path_factory.mktemp("ptx") / "kernel.ptx"
    flags = build.flags(build.constants(SMALL, cluster=2), "sm_90a")
    command = [nvcc, *flags, "-ptx", "-lineinfo", "-o", path, build.SOURCE]
    subprocess.run(command, check=True, capture_output=True)
    return path.read_text()


def memory_order(ptx):
    """[(sync, instruction)] of PTX, in its order. The sync is named in the comment of the innermost line, of
    those that were inlined one into another, whose comment names one."""
    lines = build.SOURCE.read_text().split("\n")
    names = [re.findall(r"\([0-9a-gEFN]\)", line.partition("//")[2]) for line in lines]
    order = r"((?:fence|m?barrier|(?:st|cp)\.async|red|ld\.(?:relaxed|acquire|global\.v2\.s64))[\w.:]*)"
    found, line, called_from = [], None, {}
    for text in ptx.split("\n"):
        if at := re.match(r"\s*\.loc\s+1 (\d+ \d+)(?:, function_name \S+ inlined_at 1 (\d+ \d+))?", text):
            line, called_from[at[1]] = at[1], at[2]
        elif instruction := re.match(rf"\s*(?:@!?%p\d+ )?{order}", text):
            caller = line
            while caller and not names[int(caller.split()[0]) - 1]:
                caller = called_from.get(caller)
            sync = names[int(caller.split()[0]) - 1][0] if caller else ""
            found.append((sync, instruction[1]))
    return found


def broken_promises(ptx):
    """What is not as PROMISED and FENCES say: lines of text."""
    def kind(instruction):
        return re.sub(r"\.(relaxed|acquire|release|weak|gpu|cta|cluster)\b", "", instruction)
    found = memory_order(ptx)
    text, faults = "\n".join(f"{sync} {instruction}" for sync, instruction in found), []
    for sync, promised in PROMISED.items():
        there = {instruction for at, instruction in found if at == sync}
        faults += [f"{sync} lacks {one}" for one in promised if one not in there]
        faults += [f"{sync} has {one}" for one in there - set(promised) if kind(one) in map(kind, promised)]
    for fence, (before, after) in FENCES.items():
        if not re.search(rf"{before}\n\S* ?{re.escape(fence)}\n{after}", text):
            faults.append(f"{fence} does not stand where it has to")
    return faults


def test_memory_order(ptx):
    faults = broken_promises(ptx)
    report("PTX", f"instructions of {len(PROMISED) - 1} syncs not as promised {faults or ''}", len(faults))


@pytest.mark.parametrize("edit", EDITS)
def test_memory_order_edits(ptx, edit):
    """Text in `asm` is in the PTX as it is in the source."""
    old, new = EDITS[edit]
    assert old in ptx
    faults = broken_promises(ptx.replace(old, new))
    report("PTX", f"{edit}: noticed by {faults[:1]}", not faults)
