"""`vallum run` behind a real terminal, behind pipes, and behind an output that fails."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

pytestmark = [pytest.mark.root, pytest.mark.e2e]


class Terminal:
    """`vallum run` with a terminal of ours around it."""

    def __init__(self, home, *command):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["VALLUM_HOME"] = str(home)
            os.execv(sys.executable, [sys.executable, "-m", "vallum", "run", *command])
        self.resize(30, 100)
        self.seen = b""

    def resize(self, rows, columns):
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text):
        os.write(self.fd, text.encode())

    def expect(self, pattern, seconds=10):
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.seen):
            left = deadline - time.monotonic()
            assert left > 0, f"{pattern!r} not in {self.seen!r}"
            if select.select([self.fd], [], [], left)[0]:
                try:
                    self.seen += os.read(self.fd, 65536)
                except OSError:
                    assert re.search(pattern, self.seen), self.seen
        found = re.search(pattern, self.seen)
        self.seen = self.seen[found.end() :]
        return found

    def wait(self):
        end = time.monotonic() + 10
        while time.monotonic() < end:
            if select.select([self.fd], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self.fd, 65536)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"did not end: {self.seen!r}")


def test_a_shell_in_a_terminal(home):
    terminal = Terminal(home, "--", "sh")
    terminal.expect(rb"[$#] ")
    terminal.type("tty; stty size\r")
    terminal.expect(rb"/dev/pts/\d+\r\n30 100")
    terminal.resize(25, 90)
    time.sleep(0.3)
    terminal.type("stty size\r")
    terminal.expect(rb"25 90", seconds=5)
    terminal.type("sleep 60\r")
    time.sleep(0.5)
    terminal.type("\x03")
    terminal.expect(rb"\^C")
    terminal.type("echo still-$((20+3)); exit 5\r")
    terminal.expect(rb"still-23")
    assert terminal.wait() == 5


def test_every_keystroke_arrives_at_once(home):
    terminal = Terminal(home, "--", "sh", "-c", "stty -echo; echo ready; cat")
    terminal.expect(rb"ready")
    for number in range(30):
        terminal.type(f"line-{number}\r")
        terminal.expect(b"line-%d\r\n" % number, seconds=3)
    terminal.type("\x04")
    assert terminal.wait() == 0


def run(home, *arguments, **options):
    environ = {**os.environ, "VALLUM_HOME": str(home)}
    return subprocess.Popen([sys.executable, "-m", "vallum", "run", "-q", *arguments], env=environ, **options)


def test_pipes_carry_everything(home):
    data = os.urandom(5_000_000)
    done = run(home, "--", "cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    out, _ = done.communicate(data, timeout=60)
    assert out == data
    assert done.returncode == 0


def test_a_reader_that_goes_ends_the_command(home):
    done = run(home, "--", "yes", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.stdout.read(4) == b"y\ny\n"
    done.stdout.close()
    assert done.wait(timeout=20) == 141
    assert b"Traceback" not in done.stderr.read()
    done.stderr.close()


def test_an_output_without_room_is_one_sentence(home):
    with open("/dev/full", "wb") as full:
        done = run(home, "--", "echo", "x", stdout=full, stderr=subprocess.PIPE)
        _, err = done.communicate(timeout=30)
    assert done.returncode == 1
    assert err.count(b"vallum: ") == 1
    assert b"No space left" in err


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_reach_the_command(home, signum, code):
    done = run(home, "--", "sh", "-c", "echo up; exec sleep 60", stdout=subprocess.PIPE)
    assert done.stdout.readline() == b"up\n"
    done.send_signal(signum)
    assert done.wait(timeout=20) == code
    done.stdout.close()
