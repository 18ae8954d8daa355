"""What README.md and results/ say: links, records of this kernel, and figures that follow from them."""
import json
import re
from dataclasses import replace

import numpy as np
import pytest

import build
from bench import COUNTERS, read_counters
from emulator import emulator
from model import Config
from tests.helpers import HERE, report, report_refused


def test_explained_time(capsys):
    """--explain shows what the record has of a shape, and that it has nothing of another."""
    config = Config.from_name("pythia-1b")
    rows = json.loads((HERE / "results" / "bench-h200.json").read_text())["rows"]
    us = rows["step pythia-1b 128 greedy"]["us"]
    other = replace(config, vocab=1000)
    for shape, words in ((config, f"{np.median(us):.1f} us a token"), (other, "not in")):
        emulator.explain(shape)
        line = re.search("^measured .*", capsys.readouterr().out, re.MULTILINE)[0]
        report("--explain", f"measured time of 1b with {shape.vocab} tokens: not shown", words not in line)


def test_counters():
    names, numbers = list(COUNTERS.values()), ["64000000.5", "128,000,000", "87.5", "1.25"]
    rows = [["ID", *names], ["", "nsecond", "byte", "%", "inst/cycle"], ["0", *numbers]]
    table = "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)
    found = read_counters(f"==PROF== Connected to process 1 (python)\n{table}\n==PROF== Disconnected\n")
    expected = {"token_us": 1000.0000078125, "read": 2e6, "busy": 0.875, "issued": 1.25}
    report("bench.py", "counters read from ncu's table, largest difference",
           max(abs(found[key] - expected[key]) for key in expected), 1e-9)
    report_refused("ncu that counts nothing", ["LaunchFailed"], read_counters, "==ERROR== LaunchFailed\n")
    report_refused("ncu without a number", ["no table"], read_counters, table.replace("87.5", "n/a"))


def test_record_is_current():
    """The GPU machine's tables in results/ are of this kernel; bench.py's own say it where they are not."""
    records = list((HERE / "results").glob("*.txt"))
    stale = [path.name for path in records if build.kernel_hash() not in path.read_text()]
    faults = stale or ["no record"] * (not records)
    advice = ": run python test_block.py --record and --sanitize on a GPU" if faults else ""
    report("record", f"GPU records not of this kernel{advice}", len(faults))


def of_28b():
    """The kernel's constants and the blocks of an H200 for pythia-2.8b, the example of all texts."""
    k = emulator.kernel_constants(build.constants(Config.from_name("pythia-2.8b")))
    return k, emulator.fitting_clusters(k.RANKS, 132) * k.RANKS


def test_table_of_one_token():
    """docs/one-token.md: its table follows from the emulator, and its text says each number of the table."""
    k, blocks = of_28b()
    config = Config.from_name("pythia-2.8b")
    layer, ends = emulator.layer_bytes(config, 128)
    matrices, rings = 2 * (4 * k.C**2 + 2 * k.C * k.MLP), k.SLOTS * k.SLOT_BYTES * blocks
    expected = {
        "layers": k.L, "hidden size C": k.C, "heads": k.NH, "head size": k.HS,
        "hidden units of a layer": k.MLP, "vocabulary": k.V, "blocks": blocks,
        "clusters": blocks // k.RANKS, "workers of a block": k.WORKERS,
        "columns of a worker": k.COLS, "rows of a tile": k.TILE_ROWS, "slots of the ring": k.SLOTS,
        "bytes of a slot": k.SLOT_BYTES, "rows of q, k, v of a rank": k.QKV_ROWS,
        "output rows of a rank": k.OUT_ROWS, "columns that a rank adds up": k.OWN,
        "additions to a word of x": blocks // k.RANKS + 1, "tokens of a launch": build.Fused.TOKENS,
        "MB of the matrices of a layer": f"{matrices / 1e6:.1f}", "MB of a layer": f"{layer / 1e6:.1f}",
        "MB of a token": f"{(layer * k.L + ends) / 1e6:.0f}", "MB of all rings": f"{rings / 1e6:.1f}"}
    text, table = (HERE / "docs" / "one-token.md").read_text().split("## The numbers")
    said = dict(re.findall(r"^\| ([^|]+) \| ([\d.]+) \|$", table, re.MULTILINE))
    wrong = {name for name in expected.keys() | said.keys() if said.get(name) != str(expected.get(name))}
    report("docs/one-token.md", f"wrong numbers in its table {wrong or ''}", len(wrong))
    written = {str(k.SLOT_BYTES): f"{k.SLOT_BYTES // 1000} KB"}
    missing = [number for number in said.values()
               if not re.search(rf"(?<![\d.]){re.escape(written.get(number, number))}(?![\d.]*\d)", text)]
    report("docs/one-token.md", f"numbers that its text lacks {missing or ''}", len(missing))


def test_layer_in_time():
    """fused_block.cu, chapter 11: what block 11 does in a layer, and where hidden unit 602 goes."""
    k, blocks = of_28b()
    block, unit = 11, 602
    plan = emulator.make_plan(k, block, blocks, 128)
    slots = list(emulator.producer(k, block, blocks, 128, 0, 1, False))
    chapter = build.SOURCE.read_text().partition("// 11. A layer in time")[2].partition("// 12. ")[0]
    chapter = " ".join(chapter.replace("//", " ").split())

    def tile(i):
        first = plan.units.at(i)
        return f"{first}..{first + min(k.TILE_ROWS, plan.units.size - i) - 1}"

    def row(matrix):
        return [i for i, slot in enumerate(slots)
                if slot.matrix == matrix and slot.first <= unit < slot.first + slot.n]
    tiles = [tile(i) for i in range(0, plan.units.size, k.TILE_ROWS)]
    (up,), (down,) = row("w_up"), row("w_down")
    copied, of_qkv = slots[up], sum(slot.matrix == "w_qkv" for slot in slots)
    lane = unit - (copied.first - copied.first % k.TILE_ROWS)
    qkv = plan.cluster * 3 * k.HS + plan.rank * k.QKV_ROWS
    out = plan.cluster * k.HS + plan.rank * k.OUT_ROWS
    kb = sum(slot.bytes for slot in slots) / 1e3
    rank0, bias_bytes = block - plan.rank, copied.bytes - copied.n * k.C * 2
    expected = [
        f"thread 0 of block {block}", f"rank {plan.rank} of cluster {plan.cluster}",
        f"rows {qkv}..{qkv + k.QKV_ROWS - 1}: head {plan.cluster}", f"S8: units {tiles[0]}, {tiles[1]}; (1)",
        f"S8: units {tiles[2]}, {tiles[3]}; (2)",
        f"output rows {out}..{out + k.OUT_ROWS - 1}; S8: units {tiles[4]}",
        f"positions {', '.join(str(plan.first_cached + i * k.STRIDE) for i in range(k.BATCH))}",
        f"columns {(plan.rank + 1) * k.OWN - 2} and {(plan.rank + 1) * k.OWN - 1} of x", f"a layer {kb:.0f}",
        f"hidden unit {unit} of block {block}", f"w_up + {unit} * C, {2 * k.C} bytes", f"units, {tiles[1]}",
        f"copied {up} half tiles: {of_qkv} for S2, and {up - of_qkv} for the first tile",
        f"rows {copied.first}..{copied.first + copied.n - 1} go to slot {up % k.SLOTS}",
        f"{copied.n * k.C * 2} bytes of rows and {bias_bytes} of biases at full[{up % k.SLOTS}]",
        f"dots[{lane}]", f"lanes {lane}, {lane + 8}, {lane + 16} and {lane + 24}. Lane {lane} writes",
        f"bias[{up % k.SLOTS}][{copied.first % 8 + unit - copied.first}]",
        f"{k.WARPS * k.TEAM_LANES // k.ROWS} threads have h_{unit}", f"arrives in slot {down % k.SLOTS}",
        f"other {plan.units.size - 1} units and its {k.OUT_ROWS} output rows",
        f"which is block {rank0}: sums[{plan.rank}]",
        f"block {blocks - 1} is the carrier of column 0", f"After {plan.clusters} clusters"]
    missing = [words for words in expected if words not in chapter]
    report("fused_block.cu", f"numbers of chapter 11 that do not follow {missing or ''}", len(missing))


def test_table_of_sizes():
    """fused_block.cu, chapter 15: the constants of the ten sizes."""
    chapter = build.SOURCE.read_text().partition("// 15. Other shapes")[2].partition("Small models")[0]
    rows = [line.strip("/ ").split() for line in chapter.splitlines()[1:] if line.strip("/ ")]
    (_, *sizes), *table = rows
    wrong = not table
    for i, size in enumerate(sizes):
        k = emulator.kernel_constants(build.constants(Config.from_name(f"pythia-{size}")))
        wrong += sum(int(values[i]) != getattr(k, name) for name, *values in table)
    report("fused_block.cu", f"numbers that differ, of {len(table)} in each of {len(sizes)} sizes", wrong)


PAGES = ["README.md", *(str(path.relative_to(HERE)) for path in sorted(HERE.glob("docs/*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    """What a page links to is there; a link to a line has words of it: its title, or its text."""
    text, faults, lines = (HERE / page).read_text(), [], 0
    link = r'\[([^\]]*)\]\(([^)#:\s]+)(?:#L(\d+))?(?:#[a-z-]*)?(?: "([^"]*)")?\)'
    for words, target, line, title in re.findall(link, text):
        path = (HERE / page).parent / target
        if not path.exists():
            faults.append(f"no file {target}")
        elif line:
            words, lines = title or words, lines + 1
            code = path.read_text().splitlines()
            where = [i for i, row in enumerate(code, 1) if words in row]
            if where != [int(line)]:
                faults.append(f"{words!r} is in lines {where} of {target}, not {line}")
    report(page, f"links that lead elsewhere {faults or ''}", len(faults))
    report(page, "links to a line that were not looked at", text.count("#L") - lines)
    report(page, "no link to a line at all", page == "README.md" and lines == 0)
