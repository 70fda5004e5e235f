"""What processes that are asked for their Python stacks leave, whatever they are doing."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

from longseq.launch import processes


def test_stacks_are_read_to_their_end_however_slowly_they_are_written(tmp_path):
    code = """
import os, signal, sys, time
from longseq_data.children import END_OF_STACKS
def writes(*_):
    for part in ("  File 'a', li", "ne 1 in inner\\n", END_OF_STACKS.format(os.getpid())):
        os.write(1, part.encode())
        time.sleep(0.5)
signal.signal(signal.SIGQUIT, writes)
print("ready", file=sys.stderr, flush=True)
signal.pause()
time.sleep(1000)
"""
    assert stacks_of(code, tmp_path).endswith(
        "  File 'a', line 1 in inner\n--- end of the Python stacks of process PID\n"
    )


WAITS = """
import ctypes, os, sys, threading, time
from longseq_data import children
os.environ[children.STACKS] = "/proc/self/fd/1"
children.stacks_on_request()
def sleeps():
    time.sleep(1000)
threading.Thread(target=sleeps, name="beside", daemon=True).start()
time.sleep(0.2)
def waits_here():
    {0}
def ready():
    print("ready", file=sys.stderr, flush=True)
waits_here()
"""


def test_every_thread_is_shown_by_name_the_main_thread_first(tmp_path):
    text = stacks_of(WAITS.format("ready(); time.sleep(1000)"), tmp_path)
    main, beside = text.index("Thread MainThread:\n"), text.index("Thread beside:\n")
    assert main < text.index(" in waits_here\n") < beside < text.index(" in sleeps\n")
    assert text.count("Thread ") == 2  # not the one that writes


def test_a_process_that_keeps_the_interpreters_lock_is_shown_all_the_same(tmp_path):
    lock = "mutex = ctypes.create_string_buffer(64); lock = ctypes.PyDLL(None).pthread_mutex_lock"  # no signal ends it
    text = stacks_of(WAITS.format(f"{lock}; ready(); lock(mutex); lock(mutex)"), tmp_path)
    assert "process PID, which keeps the interpreter's lock:\n" in text
    assert " in waits_here\n" in text


def test_a_process_that_answers_to_no_signal_is_said_to(tmp_path):
    code = """
import signal, sys, time
signal.signal(signal.SIGQUIT, lambda *_: None)
print("ready", file=sys.stderr, flush=True)
time.sleep(1000)
"""
    assert stacks_of(code, tmp_path).endswith("process PID: no Python stack: it does not answer to a signal\n")


def test_a_fork_is_shown_too_and_does_not_wake_its_parent(tmp_path):
    fork = "os.fork() or forked()\n    time.sleep(1000)\ndef forked():\n    ready()\n    time.sleep(1000)"
    text = stacks_of(WAITS.format(fork), tmp_path)
    assert text.count("Python stacks of process PID, innermost") == text.count("--- end of the Python stacks") == 1
    assert " in forked\n" in text


def test_what_stacks_were_asked_of_keeps_nothing_alive(tmp_path):
    code = """
import gc, os, signal, sys, time, weakref
from longseq_data import children
os.environ[children.STACKS] = sys.argv[1]
children.stacks_on_request()
class Large: pass
def works():
    large = Large()
    os.kill(os.getpid(), signal.SIGQUIT)
    while "end of the Python stacks" not in open(sys.argv[1]).read():
        time.sleep(0.01)
    return weakref.ref(large)
held = works()
print("works" in open(sys.argv[1]).read(), held() is None)
"""
    path = tmp_path / "stacks"
    path.touch()
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("True True\n", "")


def stacks_of(code: str, folder: Path) -> str:
    """Of a process that says on standard error when it is to be asked, and writes to its standard output."""
    with (
        (folder / "stacks").open("w+b") as file,
        subprocess.Popen([sys.executable, "-c", code], stdout=file, stderr=subprocess.PIPE) as process,
    ):
        fcntl.fcntl(file, fcntl.F_SETFL, os.O_APPEND)
        try:
            process.stderr.readline()
            text = "".join(processes.stacks(process.pid, file, native=False))
        finally:
            for each in [*processes.descendants(process.pid), process.pid]:
                os.kill(each, signal.SIGKILL)
    return text.replace(str(process.pid), "PID")
