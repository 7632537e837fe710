"""The vocabulary of the programs that attack from inside: Python source that is put before each of them.

``attempt(name, action)`` must fail with an OSError; ``twin(name, action)`` must not; ``in_child(action)`` tries in a
child, for what may end the process. Each reports one JSON line ``[name, held, detail, is_twin]``.
"""

from __future__ import annotations

PRELUDE = r"""
import ctypes, errno, fcntl, json, mmap, os, select, signal, socket, stat, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
facts = json.loads(sys.argv[1])
X86 = os.uname().machine == "x86_64"

def report(name, held, detail="", is_twin=False):
    print(json.dumps([name, bool(held), str(detail)[:150], is_twin]), flush=True)

def word(error):
    return errno.errorcode.get(error.errno, str(error))

def attempt(name, action):
    try:
        got = action()
    except (OSError, ValueError) as error:
        report(name, True, word(error) if isinstance(error, OSError) else error)
    else:
        report(name, False, "got " + repr(got))

def twin(name, action):
    try:
        action()
    except Exception as error:
        report(name, False, f"{type(error).__name__}: {error}", True)
    else:
        report(name, True, "", True)

def nothing(text="came to nothing"):
    raise ValueError(text)

def call(number, *arguments):
    if number is None:
        nothing("not on this architecture")
    ready = [a if isinstance(a, (bytes, ctypes.Array, ctypes.Structure, type(None))) else ctypes.c_long(a) for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *ready)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def nr(x86, arm=None):
    return x86 if X86 else arm

def in_child(action):
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except OSError as error:
            os._exit(100 + min(error.errno or 0, 99))
        except BaseException:
            os._exit(99)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        raise OSError(0, f"killed by signal {os.WTERMSIG(status)}")
    code = os.WEXITSTATUS(status)
    if code:
        raise OSError(max(code - 100, 0), os.strerror(max(code - 100, 0)))
    return "done"

def write(path, data):
    fd = os.open(path, os.O_WRONLY)
    try:
        if stat.S_ISCHR(os.fstat(fd).st_mode):
            nothing("it is a null device")
        return os.write(fd, data.encode())
    finally:
        os.close(fd)

def read(path, size=64):
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        data = os.read(fd, size)
    finally:
        os.close(fd)
    return data or nothing("it is empty")

def pids():
    return [int(p) for p in os.listdir("/proc") if p.isdigit()]
"""
