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
    for shape, words in ((config, f"{np.median(us):.1f} us a token"), (replace(config, vocab=1000), "not in")):
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
