"""Helpers are imported by name (with importlib import mode no test folder is on the path by itself), and one thread:
bit-for-bit comparisons need the same number on both sides."""

import gc
import os
import shutil
import signal
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parent))

import helpers  # noqa: E402

from lowlevel import cli  # noqa: E402

os.environ.pop("COLUMNS", None)  # pytest-xdist sets it
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background
    signal.signal(signal.SIGINT, signal.default_int_handler)

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SAVEFIG = Figure.savefig
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A worker takes a file at a time, and all of tests/faults, whose fork server takes seconds to start, together."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "tests/faults" if file.startswith("tests/faults/") else file

    return ByFile(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_finish():
    """Full garbage collections, of which there are hundreds, pass over what imports left: 0.3 s each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def quick():
    """Files are not flushed to the disk, figures are made and not drawn, and the command line has one parser."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(cli, "build_parser", cache(cli.build_parser))
        patch.setattr(Figure, "savefig", lambda _, path, **__: Path(path).write_bytes(b""))
        yield


@pytest.fixture
def drawn(monkeypatch) -> None:
    """Figures are drawn."""
    monkeypatch.setattr(Figure, "savefig", SAVEFIG)


@pytest.fixture(scope="session")
def thorough(pytestconfig) -> bool:
    """Whether loops over many faults try all of them. `-m "not slow"`, as in runs/test.sh, makes them try a few."""
    return "not slow" not in pytestconfig.getoption("markexpr")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    helpers.write_tiny_base(folder)
    return folder


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Headless chromium, whose console can be read."""
    if not (BROWSER and DRIVER):
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium here: pip install lowlevel[dev]")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()
