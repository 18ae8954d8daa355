"""Fixtures of the kernel: what compiles it, on a GPU and for a CPU. Test files name this one as a plugin."""
import functools
import io
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, suppress

import pytest

import build
from checkpoint import Refused
from model import SIZES, Config
from tests import helpers
from tests.helpers import DEVICE, cut


@pytest.fixture(scope="session")
def nvcc():
    """The path of nvcc; without one the test is skipped."""
    try:
        return build.nvcc()
    except Refused as refusal:
        return pytest.skip(str(refusal))


@pytest.fixture(scope="session")
def patched(tmp_path_factory):
    """A function patched(old, new): the path of the kernel's source with `old` replaced by `new`.

    `old`, a text or a compiled pattern, has to stand in one place alone, so that no patch can rot. Of a
    pattern with a group only the group is replaced: the rest says where it stands.
    """
    folder, kernel = tmp_path_factory.mktemp("patched"), build.SOURCE.read_text()

    def patch(old, new):
        pattern = re.compile(re.escape(old)) if isinstance(old, str) else old
        places = [match.span(pattern.groups) for match in pattern.finditer(kernel)]
        assert len(places) == 1, f"{pattern.pattern!r} stands in {len(places)} places of the kernel"
        (start, end), = places
        text = kernel[:start] + new + kernel[end:]
        path = folder / f"{abs(hash(text))}.cu"
        path.write_text(text)
        return path
    return patch


@pytest.fixture(scope="session")
def kernels(patched):
    """Compiles what tests on a GPU run, side by side; without a GPU it skips them."""
    try:
        arch, sms = build.device_arch(DEVICE), helpers.multiprocessors()
    except Refused as refusal:
        pytest.skip(str(refusal))
    from test_block import HANGS, MIDDLE, MUTANTS, ON_GPU, SYNCS
    tiny, whole = Config.from_pretrained(helpers.TINY), list(map(Config.from_name, SIZES))
    plain = [(cut(name), cluster, {}) for name in SIZES for cluster in helpers.CLUSTERS]
    plain += [(config, None, {}) for config in (*whole, helpers.CHI_SQUARE, helpers.SHORT, helpers.DEEP)]
    plain += [(tiny, cluster, {}) for cluster in (None, *helpers.CLUSTERS)]
    plain += [(cut(name), None, {"TAPS": 1}) for name in SIZES]
    jobs = [(*job, build.SOURCE) for job in plain]
    jobs += [(MIDDLE, None, {"TAPS": 1}, patched(old, new)) for _, _, old, new in MUTANTS.values()]
    jobs += [(helpers.DEEP, None, {}, patched(*SYNCS[sync])) for sync in ON_GPU]
    jobs += [(helpers.DEEP, None, {}, patched(*HANGS["(4)"]))]

    def compiled(job):
        config, cluster, extra, source = job
        with suppress(Refused):  # the test that needs it says so
            build.load(build.constants(config, arch, cluster, sms=sms, extra=extra), arch, source)
    with redirect_stderr(io.StringIO()), ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, {repr(job): job for job in jobs}.values()))


@pytest.fixture(scope="session")
def simulated(tmp_path_factory):
    """Simulated, with a folder for what it compiles; without a compiler the test is skipped."""
    if sys.platform != "linux" or not shutil.which("c++") or subprocess.run(
            ["c++", "-fsyntax-only", "-xc++", "-"], input=b"_Float16 x;", capture_output=True,
            check=False).returncode:
        pytest.skip("no C++ compiler (c++) with _Float16, such as GCC 12, on a Linux")
    return functools.partial(helpers.Simulated, tmp_path_factory.mktemp("simulated"))
