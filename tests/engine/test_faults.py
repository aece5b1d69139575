"""What ends a run: signals, faults of the model, of memory, and of the engine. Nothing may be left behind."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.models import write_llama
from helpers.processes import left_behind, lesson_processes, shared_memory

from run_all_examples import LESSONS, Lesson

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "stable_prefix_vs_timestamp.py"
LONG = ["--prefix-tokens", "300", "--requests", "200"]  # half a minute of requests, and the first ones come soon


def start() -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), *LONG]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_until_starting(process: subprocess.Popen[str], temporary: Path) -> None:
    while len(lesson_processes(temporary)) < 2:  # the lesson and its engine
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def wait_until_measuring(process: subprocess.Popen[str], temporary: Path) -> None:
    for line in process.stdout:
        if line.startswith("2 "):  # the row of request 2
            return
    pytest.fail(f"the lesson ended early: {process.communicate()}")


@pytest.mark.alone
@pytest.mark.parametrize("wait", [wait_until_starting, wait_until_measuring])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda s: s.name)
def test_a_signal_ends_everything_within_ten_seconds(sent: signal.Signals, wait, temporary: Path) -> None:
    before = shared_memory()
    process = start()
    wait(process, temporary)
    if wait is wait_until_starting:
        time.sleep(1)  # into the start of the engine
    process.send_signal(sent)
    out, err = process.communicate(timeout=10)
    assert process.returncode == (-sent if sent == signal.SIGKILL else 128 + sent)
    assert "Traceback" not in out + err
    assert left_behind(temporary, killed=sent == signal.SIGKILL) == []
    assert shared_memory() <= before


@pytest.mark.alone
def test_a_hangup_that_nohup_ignores_is_ignored_and_an_interrupt_sent_twice_counts_once(temporary: Path) -> None:
    command = ["nohup", sys.executable, str(SCRIPT), *LONG]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until_measuring(process, temporary)
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline(), "it goes on"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert left_behind(temporary) == []


@pytest.mark.alone
def test_a_run_leaves_no_file_no_socket_and_no_shared_memory(temporary: Path) -> None:
    def written_elsewhere() -> set[str]:
        return {path.name for pattern in ("*kv-*", "*vllm*", "torch*") for path in Path("/tmp").glob(pattern)}

    before, beside = shared_memory(), written_elsewhere()
    options = ["--prefix-tokens", "300", "--requests", "2"]
    assert subprocess.run([sys.executable, SCRIPT, *options], capture_output=True).returncode == 0
    assert lesson_processes(temporary) == [], "the engine ended before the lesson did"
    assert list(temporary.iterdir()) == []
    assert written_elsewhere() <= beside
    assert shared_memory() <= before


def test_on_a_terminal_too_the_engines_log_stays_in_its_file(temporary: Path) -> None:
    ours, terminal = pty.openpty()
    command = [sys.executable, SCRIPT, "--prefix-tokens", "300", "--requests", "2"]
    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the last one who had the terminal has closed it
            while part := os.read(ours, 65536):
                shown += part
    os.close(ours)
    assert process.returncode == 0
    assert b"Starting vLLM..." in shown, "a terminal is told what takes long"
    assert b"EngineCore" not in shown
    assert b"INFO" not in shown
    assert b"Warning" not in shown
    assert left_behind(temporary) == []


@pytest.mark.alone
def test_the_end_takes_no_time_beside_the_imports() -> None:
    command = [sys.executable, SCRIPT, "--prefix-tokens", "300", "--requests", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if found := re.match(r"imports ([\d.]+) s", line):
                imports = float(found[1])
            if "claims about token counts hold" in line:
                told = time.monotonic()
    assert process.returncode == 0
    assert time.monotonic() - told < imports / 3


def test_an_engine_that_cannot_start_is_one_line_with_the_root_cause_and_the_log(
    tmp_path: Path, temporary: Path
) -> None:
    model = write_llama(tmp_path / "broken")
    (model / "model.safetensors").write_bytes(b"no weights")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--model", model, "--prefix-tokens", "600"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    found = re.fullmatch(
        r".*error: vLLM did not start: .*SafetensorError: .* \(the engine's log: (.+\.log)\)\n", done.stderr
    )
    assert found, done.stderr
    assert "SafetensorError" in Path(found[1]).read_text()
    Path(found[1]).unlink()
    assert left_behind(temporary) == []


def test_an_assertion_that_says_no_more_is_told_as_it_stands(tmp_path: Path, temporary: Path) -> None:
    import torch
    from safetensors.torch import save_file

    model = write_llama(tmp_path / "other")
    save_file({"model.embed_tokens.weight": torch.zeros(300, 128)}, model / "model.safetensors")
    command = [sys.executable, SCRIPT, "--model", model, "--prefix-tokens", "600"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    found = re.search(r"error: vLLM did not start: assert .*shape.* \(the engine's log: (.+\.log)\)", done.stderr)
    assert found, done.stderr
    Path(found[1]).unlink()
    assert left_behind(temporary) == []


def test_local_attention_in_every_layer_that_a_prompt_exceeds_is_refused(tmp_path: Path) -> None:
    experts = dict(num_local_experts=2, num_experts_per_tok=1, interleave_moe_layer_step=1, intermediate_size_mlp=256)
    kind = dict(architectures=["Llama4ForCausalLM"], model_type="llama4_text", attention_chunk_size=512)
    layers = dict(no_rope_layers=[1, 1], layer_types=["chunked_attention"] * 2)
    model = write_llama(tmp_path / "chunked", **kind, **experts, **layers)
    command = [sys.executable, SCRIPT, "--model", model, "--prefix-tokens", "600"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "of 512 tokens: choose a shorter prompt (--prefix-tokens), or another --model" in done.stderr


def test_a_window_in_every_layer_that_a_prompt_exceeds_is_refused_before_an_engine_starts(tmp_path: Path) -> None:
    mistral = dict(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=512)
    model = write_llama(tmp_path / "mistral", **mistral)
    done = subprocess.run(
        [sys.executable, SCRIPT, "--model", model, "--prefix-tokens", "600"], capture_output=True, text=True
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "every layer of this model has a sliding window, of 512 tokens" in done.stderr


@pytest.mark.alone
def test_a_kv_cache_larger_than_the_memory_is_one_line(tmp_path: Path, temporary: Path) -> None:
    huge = {"num_hidden_layers": 20, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 256}
    model = write_llama(tmp_path / "huge", max_position_embeddings=40000, **huge)
    command = [sys.executable, SCRIPT, "--model", model, "--prefix-tokens", "30000", "--requests", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    log = re.search(r"error: vLLM did not start: .*[Mm]emory.* \(the engine's log: (.+\.log)\)", done.stderr)
    assert log, done.stderr
    Path(log[1]).unlink()
    assert left_behind(temporary) == []


@pytest.mark.alone
def test_an_engine_that_dies_while_measuring_is_one_line(temporary: Path) -> None:
    process = start()
    wait_until_measuring(process, temporary)
    os.kill(max(lesson_processes(temporary)), signal.SIGKILL)  # the youngest: the engine
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in out + err
    log = re.search(r"error: the engine died: .* \(the engine's log: (.+\.log)\)", err)
    assert log, err
    Path(log[1]).unlink()
    assert left_behind(temporary) == []


RECURSION = "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}"
PARTS_ONLY = (
    "{% for m in messages %}{{ m.role }}{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{% endfor %}"
)
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}[{{ m.role }}] {{ m.content }}{% endfor %}"


def change_file(folder: Path, name: str, text: str | None) -> None:
    """Write a file of a model's folder anew, or remove it."""
    (folder / name).unlink() if text is None else (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("shape", "file", "text", "says"),
    [
        ({"template": ""}, None, None, "writes nothing of this prompt"),
        ({"template": "{% for n in range(10**12) %}x{% endfor %}"}, None, None, "template does not take this prompt"),
        ({"template": "{{ raise_exception('\x1b[31mno') }}"}, None, None, r"this prompt: \x1b[31mno"),
        ({"vocab_size": 300}, None, None, "knows no tokens of this prompt"),
        ({"architectures": ["\x1b[31mNone"]}, None, None, r"\x1b[31mNone"),
        ({"torch_dtype": "float99"}, None, None, "float99"),
        ({"template": RECURSION}, None, None, "template does not take this prompt: maximum recursion"),
        ({"template": "{{ 1 // 0 }}"}, None, None, "template does not take this prompt"),
        ({"template": PARTS_ONLY}, None, None, "the chat template leaves system messages out: choose another --model"),
        ({"template": NO_SYSTEM}, None, None, "the chat template leaves system messages out: choose another --model"),
        ({"vocab_size": "704"}, None, None, "Field 'vocab_size' expected int, got str"),
        ({"num_attention_heads": 0}, None, None, "vLLM cannot use the model in"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, None, None, "not a full-attention model that writes"),
        ({}, "config.json", "[]", "vLLM cannot use the model in"),
        ({}, "tokenizer.json", "[]", "vLLM cannot use the model in"),
        ({}, "tokenizer.json", None, "vLLM cannot use the model in"),
        ({}, "config.json", '{"model_type": ', "vLLM cannot use the model in"),
    ],
)
def test_a_model_that_is_broken_is_one_line_that_the_terminal_only_shows(
    shape: dict, file: str | None, text: str | None, says: str, tmp_path: Path, temporary: Path
) -> None:
    model = write_llama(tmp_path / "broken", **shape)
    if file:
        change_file(model, file, text)
    command = [sys.executable, SCRIPT, "--model", model, "--prefix-tokens", "600"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert says in done.stderr
    assert done.stderr.rstrip("\n").isprintable()
    assert left_behind(temporary) == []


def test_a_model_for_which_vllm_has_no_prefix_caching_is_refused(tmp_path: Path) -> None:
    attention = dict(kv_lora_rank=32, q_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
    experts = dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=64)
    kind = dict(architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", first_k_dense_replace=1)
    model = write_llama(tmp_path / "mla", **attention, **experts, **kind)
    command = [sys.executable, SCRIPT, "--model", model, "--prefix-tokens", "600", "--requests", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "CPU" in done.stdout or done.returncode == 1:  # where vLLM has it, the lesson runs
        assert "vLLM has no prefix caching for" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_without_a_standard_output_it_is_one_line() -> None:
    command = f"{sys.executable} {SCRIPT} >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "standard output is closed" in done.stderr


@pytest.mark.parametrize("option", ["-OO", "-P"])
def test_python_without_docstrings_or_without_the_current_folder_runs_it(option: str) -> None:
    command = [sys.executable, option, SCRIPT, "--prefix-tokens", "300", "--requests", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_path_that_looks_like_markup_is_shown_as_it_is(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "m[" / "x] [bold")
    command = [sys.executable, SCRIPT, "--model", model, "--prefix-tokens", "600", "--requests", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "m[/x] [bold with random weights" in done.stdout


def test_a_temporary_folder_with_a_long_name_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("long" * 30)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    command = [sys.executable, SCRIPT, "--prefix-tokens", "300", "--requests", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def listening(process: subprocess.Popen) -> set[str]:
    """Return the addresses at which anybody in a process's own network namespace listens, as hexadecimal numbers."""
    found = set()
    if os.readlink(f"/proc/{process.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        return found  # it has no own one yet
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process.pid}/net/{table}").read_text().splitlines()[1:]:
            _, address, _, state, *_ = line.split()
            if state == "0A":  # TCP_LISTEN
                found.add(address.split(":")[0])
    return found


OTHER_ADDRESS = "192.0.2.2"  # of RFC 5737, for documentation
IN_NAMESPACE = "ip link set lo up && ip addr add {}/32 dev lo && mount --bind {} /etc/hosts"


def test_only_loopback_listens_where_the_hosts_name_is_another_address(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n{OTHER_ADDRESS} {socket.gethostname()}\n")
    namespace = ["unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-c"]
    prepare = IN_NAMESPACE.format(OTHER_ADDRESS, hosts)
    if shutil.which("unshare") is None or subprocess.run([*namespace, prepare], capture_output=True).returncode:
        pytest.skip("this machine lets nobody make a network namespace")
    lesson = [sys.executable, SCRIPT, "--prefix-tokens", "300", "--requests", "2"]
    command = [*namespace, f'{prepare} && exec "$@"', "sh", *lesson]
    found = set()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                found |= listening(process)
            time.sleep(0.02)
    assert process.returncode == 0
    assert found == {"0100007F"}, "127.0.0.1"


@pytest.mark.alone
def test_an_engine_that_is_killed_while_it_starts_is_one_line(temporary: Path) -> None:
    process = start()
    wait_until_starting(process, temporary)
    os.kill(max(lesson_processes(temporary)), signal.SIGKILL)  # the youngest: the engine
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in out + err
    log = re.search(r"vLLM did not start: its process ended .* killed \(the engine's log: (.+\.log)\)\n$", err)
    assert log, err
    Path(log[1]).unlink()
    assert left_behind(temporary) == []


@pytest.mark.parametrize("lesson", LESSONS.values(), ids=lambda lesson: lesson.name)
def test_a_lesson_copied_alone_asks_for_a_model_and_runs_with_one(lesson: Lesson, tmp_path: Path) -> None:
    alone = shutil.copy(ROOT / f"{lesson.name}.py", tmp_path)
    done = subprocess.run([sys.executable, alone], capture_output=True, text=True)
    assert done.returncode == 1
    assert "not beside this script: give --model" in done.stderr
    model = write_llama(tmp_path / "llama")
    options = ["--model", model, "--prefix-tokens", "600", "--requests", "3"]
    done = subprocess.run([sys.executable, alone, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.alone
@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        (["--prefix-tokens", "100"], 2, "at least two blocks, 256 tokens here"),
        (["--prefix-tokens", "40000"], 2, "the model takes 32,768: choose a shorter prompt"),
        (["--prefix-tokens", "1000000000"], 2, "the model takes 32,768: choose a shorter prompt"),
        (["--model", "no/such/folder"], 1, "no model in no/such/folder"),
        (["--model", str(ROOT / "tests")], 1, "holds no config.json"),
        (["--model", "nobody-of-this-name/no-model-of-this-name"], 1, "nobody-of-this-name/no-model-of-this-name"),
    ],
)
def test_bad_input_is_refused_in_one_line_before_an_engine_starts(options: list[str], status: int, says: str) -> None:
    begin = time.monotonic()
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (status, 1), done.stderr
    assert says in done.stderr
    assert time.monotonic() - begin < 30


def test_a_full_disk_behind_standard_output_is_one_line(temporary: Path) -> None:
    command = [sys.executable, SCRIPT, "--prefix-tokens", "300", "--requests", "2"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "stable_prefix_vs_timestamp.py: error: cannot write: No space left on device\n"
    assert left_behind(temporary) == []


@pytest.mark.parametrize(
    "variable",
    [
        {"HF_ENDPOINT": "http://[::1"},
        {"HTTPS_PROXY": "socks5://127.0.0.1:1"},
        {"ALL_PROXY": "ftp://127.0.0.1"},
        {"HTTP_PROXY": ":::"},
        {"SSL_CERT_FILE": "/no/such/file"},
        {"HF_TOKEN": "\u00fc"},
        {"HF_HUB_ETAG_TIMEOUT": "soon"},
    ],
    ids=str,
)
def test_an_environment_that_the_hubs_client_cannot_use_is_one_line(variable: dict[str, str]) -> None:
    command = [sys.executable, SCRIPT, "--model", "somebody/a-model"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variable)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert "error: cannot ask the hub: " in done.stderr or "error: cannot import vLLM: " in done.stderr


def test_too_little_memory_is_one_line() -> None:
    command = [sys.executable, SCRIPT, "--prefix-tokens", "300"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9)),
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert re.search("too little memory|is a library or memory missing", done.stderr)


def test_a_bug_keeps_its_traceback() -> None:
    code = (
        "import sys, stable_prefix_vs_timestamp as script\n"
        "sys.argv[1:] = ['--prefix-tokens', '300']\n"
        "async def lesson(run): raise LookupError('a bug')\n"
        "script.lesson = lesson\n"
        "script.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("LookupError: a bug\n")


OWN_CODE = """
from pathlib import Path
Path(__file__).with_name("it_ran").touch()
from transformers import PretrainedConfig
class OwnConfig(PretrainedConfig):
    model_type = "own"
"""


@pytest.mark.parametrize("script", [*(f"{lesson.name}.py" for lesson in LESSONS.values()), "replay", "pinned"])
def test_code_in_a_models_folder_is_never_run_and_nobody_is_asked(script: str, tmp_path: Path) -> None:
    own = {"AutoConfig": "own.OwnConfig", "AutoTokenizer": ["own.OwnTokenizer", None]}
    model = write_llama(tmp_path / "own", model_type="own", architectures=["OwnForCausalLM"], auto_map=own)
    (model / "own.py").write_text(OWN_CODE)
    log = tmp_path / "log.jsonl"
    log.write_text('{"messages": [{"role": "user", "content": "one"}]}\n')
    tools = {
        "replay": ["-m", "going_further.replay_request_log", log, "--without-engine"],
        "pinned": ["-m", "going_further.pinned_system_prompt"],
    }
    command = [sys.executable, *tools.get(script, [script]), "--model", model]
    modules = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, input="y\n" * 9, env=os.environ | modules, timeout=120
    )
    assert done.returncode == 1
    assert "custom code" in done.stderr.splitlines()[-1]
    assert "[y/N]" not in done.stdout + done.stderr
    assert list(tmp_path.rglob("it_ran")) == []


@pytest.mark.alone
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["append_only_vs_inplace_edit.py", "--requests", "1000"], "the model takes 32,768"),
        (["session_consistency.py", "--sessions", "1000", "--requests", "1000"], "the model takes 32,768"),
        (["session_consistency.py", "--sessions", "1000", "--prefix-tokens", "20000"], "GiB are free"),
    ],
)
def test_what_cannot_fit_is_refused_before_its_prompts_are_made(words: list[str], says: str) -> None:
    begin = time.monotonic()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert time.monotonic() - begin < 40
