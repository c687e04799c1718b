"""What a person sees, on a terminal, in a pipe, and where nobody looks any more."""

import io
import os
import pty
import re
import subprocess
import sys

import pytest

from rlhf_cli.console import Console, clock, describe, peak_memory_gib

METRICS = {"loss": 1.2341, "perplexity": 3.4, "learning_rate": 2e-4, "tokens_per_second": 1234.4}
SCRIPT = """
from rlhf_cli.console import Console
console = Console(True)
console.plan([("Data", [("rows kept", "1,000 of 1,200"), ("ends", "100 % \\u2014 all, " + "said at length " * 3)])])
console.example([("user: 2+2?", False), ("4", True)])
with console.progress(3) as progress:
    for step in (1, 2, 3):
        progress.update(step, 3, {"loss": 1.0, "learning_rate": 1e-4, "tokens_per_second": 10.0}, 1.5)
        console.say(f"saved \\u2192 {step}")
    progress.evaluated(3, {"loss": 0.5, "perplexity": 1.65, "token_accuracy": 0.9})
console.warn("careful")
import sys
print("end", file=sys.stderr)
"""


def piped(**kwargs):
    out, err = io.StringIO(), io.StringIO()
    return Console(True, out, err), out, err


def start(env=None, **kwargs):
    return subprocess.run([sys.executable, "-c", SCRIPT], env={**os.environ, **(env or {})}, check=False, **kwargs)


def test_piped_progress_is_one_plain_line_every_log_every():
    console, out, _ = piped()
    with console.progress(200, log_every=2) as progress:
        for step in range(10, 14):
            progress.update(step, 200, METRICS, memory_gib=1.23)
        progress.update(200, 200, METRICS, memory_gib=1.23)
        progress.evaluated(200, {"loss": 1.5, "perplexity": 4.4817, "token_accuracy": 0.5})
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["10/200", "12/200", "200/200", "200/200"]
    assert re.fullmatch(r"step 12/200 loss 1\.234 lr 2\.0e-04 1,234 tok/s \d\d:\d\d left 1\.2 GiB", lines[1])
    assert lines[2] == "step 200/200 loss 1.234 lr 2.0e-04 1,234 tok/s 00:00 left 1.2 GiB"
    assert lines[3] == "step 200/200 held-out loss 1.500 perplexity 4.482 accuracy 0.500"


@pytest.mark.parametrize(("total", "lines"), [(8, 8), (50, 50), (1000, 51)])
def test_a_pipe_gets_about_fifty_lines_a_run(total, lines):
    console, out, _ = piped()
    with console.progress(total) as progress:
        for step in range(1, total + 1):
            progress.update(step, total, METRICS, memory_gib=1.23)
    assert len(out.getvalue().splitlines()) == lines


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (120, "step 3/3 loss 1.000 lr 1.0e-04 10 tok/s 00:00 left 1.5 GiB"),
        (80, "step 3/3 loss 1.000"),
        (40, "step 3/3 loss 1.000"),
    ],
)
def test_the_time_left_stays_where_a_terminal_is_narrow(columns, said):
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", on_terminal({"TERM": "xterm", "NO_COLOR": "1"}, columns=columns))
    line = [text for text in shown.replace("\r", "\n").split("\n") if "step 3/3" in text and "left" in text][-1]
    assert said in line and "00:00 left" in line and "━" in line and len(line.rstrip()) <= columns


def test_time_left_counts_the_steps_of_this_process(monkeypatch):
    console, out, _ = piped()
    now = iter([0.0, 100.0, 115.0, 125.0, 145.0])
    monkeypatch.setattr("rlhf_cli.console.time.monotonic", lambda: next(now))
    with console.progress(100, log_every=1) as progress:  # resumed after step 90
        progress.evaluated(90, {"loss": 1.0})  # took 100 s, once
        for step in (91, 92, 93):  # 15 s; 10 s; a mean of 15 s since the first
            progress.update(step, 100, METRICS, 1.0)
    assert [line.split()[-4] for line in out.getvalue().splitlines()[1:]] == ["02:15", "01:20", "01:45"]


def test_nothing_wraps_in_a_pipe():
    console, out, err = piped()
    console.say("x" * 500)
    console.warn("y" * 500)
    console.plan([("T", [("label", "z" * 500)])])
    assert out.getvalue() == "x" * 500 + "\nT\n  label  " + "z" * 500 + "\n"
    assert err.getvalue() == "warning: " + "y" * 500 + "\n"


def test_the_plan_is_aligned():
    console, out, _ = piped()
    console.plan([("Data", [("rows", 10), ("longest response", "7 tokens")]), ("Run", [("steps", 4)])])
    assert out.getvalue() == ("Data\n  rows              10\n  longest response  7 tokens\nRun\n  steps             4\n")


def test_the_example_marks_what_is_learned():
    console, out, _ = piped()
    console.example([("user: hi\n", False), ("hel", True), ("lo\x1b[2J", True), ("", False), ("\nuser: bye", False)])
    assert out.getvalue() == (
        "First example; ⟦this⟧ is what the model learns to write:\nuser: hi\n⟦hello\\x1b[2J⟧\nuser: bye\n\n"
    )
    console.example([("a" * 5000, True)])
    assert f"⟦{'a' * 1000} … 3,000 characters … {'a' * 1000}⟧" in out.getvalue()


def test_other_ranks_are_silent():
    out, err = io.StringIO(), io.StringIO()
    console = Console(False, out, err)
    console.say("a")
    console.warn("a")
    console.example([("a", True)])
    console.plan([("a", [("b", "c")])])
    with console.progress(1) as progress:
        progress.update(1, 1, METRICS)
        console.say("a")
    assert out.getvalue() + err.getvalue() == ""


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_an_ascii_world_gets_ascii(env):
    done = start(env, capture_output=True)
    assert done.returncode == 0
    text = done.stdout.decode("ascii")
    assert "\nsaved -> 1\n" in text
    assert "[[4]]" in text
    assert "100 % - all" in text


def test_a_pipe_gets_no_escape_codes():
    done = start({"FORCE_COLOR": "1", "COLUMNS": "40"}, capture_output=True)
    assert done.returncode == 0
    assert b"\x1b" not in done.stdout + done.stderr
    assert b"step 3/3 loss 1.000 lr 1.0e-04 10 tok/s 00:00 left 1.5 GiB\n" in done.stdout


@pytest.mark.parametrize("redirect", ["1>&-", "2>&-", "1>&- 2>&-", ">/dev/full"])
def test_a_lost_reader_does_not_end_the_run(redirect, tmp_path):
    (tmp_path / "x.py").write_text(SCRIPT.replace('print("end", file=sys.stderr)', 'open("reached", "w").close()'))
    shell = f'set -o pipefail; "{sys.executable}" x.py {redirect}'
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert (tmp_path / "reached").stat().st_size == 0
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_closed_pipe_does_not_end_the_run():
    reader, writer = os.pipe()
    os.close(reader)
    done = start(stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 0
    assert done.stderr == b"warning: careful\nend\n"


def on_terminal(env, columns=80):
    """Run the script on a pseudo-terminal; what it wrote there."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=child,
        stderr=child,
        env={**os.environ, "COLUMNS": str(columns), "LINES": "24", **env},
    )
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # Linux says EIO where the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(parent)
    assert process.wait() == 0
    return shown.decode()


def test_a_terminal_gets_a_bar_and_colours():
    shown = on_terminal({"TERM": "xterm", "NO_COLOR": ""})
    assert "\x1b[1;32m4\x1b[0m" in shown
    assert "━" in shown
    assert "step 3/3 loss 1.000" in shown
    assert "saved → 3" in shown
    assert "\x1b[33mwarning: careful\x1b[0m" in shown


def test_no_color_and_dumb_terminals_get_markers():
    assert "⟦4⟧" in on_terminal({"TERM": "xterm", "NO_COLOR": "1"})
    dumb = on_terminal({"TERM": "dumb"})
    assert "⟦4⟧" in dumb
    assert "\x1b" not in dumb


def test_a_terminal_of_40_columns_is_not_overrun():
    shown = on_terminal({"TERM": "xterm", "NO_COLOR": "1"}, columns=40)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).replace("\r", "\n").split("\n")
    plan = [text for text in lines if text.startswith("  ")]
    assert plan[0] == "  rows kept  1,000 of 1,200"
    assert max(len(text) for text in plan) <= 40


def test_words_of_metrics():
    assert describe({"loss": 2.0, "token_accuracy": 0.5, "other": 1.0}) == ["loss 2.000", "accuracy 0.500"]
    pairs = {"rewards/chosen": 0.1, "rewards/margins": 0.25, "rewards/accuracies": 0.75, "loss": 0.5, "kl": 0.0}
    assert describe(pairs) == ["loss 0.500", "accuracy 0.750", "margin 0.250", "kl 0.000"]
    reward = {"loss": 0.5, "accuracy": 0.625, "margin": -1.5, "score_mean": 3.0, "learning_rate": 1e-4}
    assert describe(reward) == ["loss 0.500", "accuracy 0.625", "margin -1.500", "lr 1.0e-04"]
    drawn = {"response/length": 20.25, "objective/kl": 1.5, "objective/scores": 0.5, "objective/entropy": 40.0, "loss": -0.25}
    assert describe(drawn) == ["loss -0.250", "score 0.500", "KL 1.500", "entropy 40.000", "length 20.2"]
    assert [clock(seconds) for seconds in (0.4, 59.6, 3599, 3600)] == ["00:00", "01:00", "59:59", "1:00:00"]
    assert 0.001 < peak_memory_gib() < 1000


def test_the_console_is_light():
    code = (
        "import sys, rlhf_cli.console, rlhf_cli.reports.training as _; print({'torch', 'rich', 'matplotlib'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
