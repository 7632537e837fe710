"""SSH ended at the gateway: real OpenSSH and git clients in a cell's network, a real sshd outside."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vallum.gateway.kit import Canary, Kit
from vallum.gateway.ssh.hostkey import write_known_hosts
from vallum.node.authority import make_authority
from vallum.rules.grants import Rule, Ruleset

pytestmark = pytest.mark.root
if os.geteuid() != 0:
    pytest.skip("needs root: network namespaces", allow_module_level=True)
if not all(map(shutil.which, ("ssh", "git", "ssh-keygen"))) or not Path("/usr/sbin/sshd").exists():
    pytest.skip("needs OpenSSH and git", allow_module_level=True)


def _load(name: str, file: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(file))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


world_module = _load("ssh_world_priv", "gateway_world_priv.py")
server_module = _load("ssh_server", "ssh_server.py")
World, SshServer = world_module.World, server_module.SshServer

IP, INSIDE = "198.51.100.7", "10.77.0.5"
AUTHORITY = make_authority("r1")


def grant(*ssh: str, **terms) -> Rule:
    return Rule(id="git", host="ssh.test", ports=(22,), ssh=ssh, credential="deploy", **terms)


def serve(tmp: Path, scenario, *allow: Rule, canaries: tuple[Canary, ...] = (), host_key: str = "", hold=()) -> None:
    """Run ``scenario(world, server)`` with a server and a cell that may do what ``allow`` says."""
    made = SshServer(0, tmp, IP)
    for name in ("host_key", "user_key"):
        server_module.keygen(tmp / name)
    credential = made.make_credential(host_key) if host_key else made.credential
    kit = Kit(authority=AUTHORITY, credentials=(credential,), canaries=canaries, verify_upstream=False)

    async def play(world: World) -> None:
        made.fakes = world.fakes
        with made:
            await scenario(world, made)

    world_module.run_in_world(tmp, Ruleset(allow=allow, hold=hold), play, kit=kit)


async def run(world: World, tmp: Path, *argv: str, wait_s: float = 30, **environ: str) -> tuple[int, str, str]:
    """A program in the cell's network; its ssh knows the run's host key, has no key of its own and asks nobody."""
    (tmp / "none").write_text("")
    (tmp / "resolv").write_text("nameserver 9.9.9.9\noptions timeout:2 attempts:1\n")
    (tmp / "known").write_bytes(write_known_hosts(AUTHORITY))
    binds = f"mount --bind {tmp}/none /etc/hosts && mount --bind {tmp}/resolv /etc/resolv.conf"
    process = await asyncio.create_subprocess_exec(
        *("nsenter", "-t", str(world.cell), "-n", "unshare", "-m", "sh", "-c", f'{binds} && exec "$@"', "sh", *argv),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp), "LANG": "C.UTF-8", **environ},
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), wait_s)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, out.decode(), err.decode()


def ssh(tmp: Path, *more: str) -> list[str]:
    known = f"UserKnownHostsFile={tmp}/known"
    return ["ssh", "-F", "/dev/null", "-o", known, "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", *more]


def make_repository(tmp: Path) -> Path:
    work, bare = tmp / "work", tmp / "srv" / "repo.git"
    identity = ["-c", "user.name=t", "-c", "user.email=t@t.test"]
    quiet = {"check": True, "timeout": 20, "stdout": subprocess.DEVNULL}
    subprocess.run(["git", "init", "-q", "-b", "main", str(work)], **quiet)
    (work / "a").write_text("hello\n")
    subprocess.run(["git", "-C", str(work), "add", "a"], **quiet)
    subprocess.run(["git", "-C", str(work), *identity, "commit", "-qm", "one"], **quiet)
    bare.parent.mkdir()
    subprocess.run(["git", "clone", "-q", "--bare", str(work), str(bare)], **quiet)
    return bare


async def push(world: World, tmp: Path, bare: Path) -> tuple[int, str]:
    """Clone and push, as a guest."""
    environ = {"GIT_SSH_COMMAND": " ".join(ssh(tmp))}
    url = f"ssh://root@ssh.test{bare}"
    code, _, err = await run(world, tmp, "git", "clone", "-q", url, str(tmp / "got"), **environ)
    assert code == 0, err
    assert (tmp / "got" / "a").read_text() == "hello\n"
    (tmp / "got" / "b").write_text("more\n")
    script = (
        "cd got && git add b && git -c user.name=t -c user.email=t@t.test commit -qm two && git push -q origin main"
    )
    code, _, err = await run(world, tmp, "sh", "-c", f"cd {tmp} && {script}", **environ)
    return code, err


def head_of(bare: Path) -> str:
    at = subprocess.run(["git", "-C", str(bare), "log", "--oneline"], capture_output=True, text=True, check=True)
    return at.stdout.split()[-1]


@pytest.mark.parametrize("may_push", [False, True])
def test_git(tmp_path: Path, may_push: bool) -> None:
    bare = make_repository(tmp_path)

    async def scenario(world: World, server) -> None:
        code, err = await push(world, tmp_path, bare)
        sessions = await world.settled(4 if may_push else 3, "ssh.session")
        assert all(e.scope.step == 3 for e in sessions)
        commits = len(subprocess.check_output(["git", "-C", str(bare), "rev-list", "main"]).split())
        if may_push:
            assert (code, commits) == (0, 2), err
            closed = [e for e in sessions if e.state == "closed"]
            assert [e.wants for e in closed] == ["git-read", "git-write"]
            assert all(e.exit_status == 0 and e.credential == "deploy" for e in closed)
        else:
            assert code != 0 and commits == 1
            assert "vallum: blocked by rule session-mismatch" in err, err
            denied = next(e for e in sessions if e.state == "denied")
            assert (denied.wants, denied.verdict, denied.bytes_out) == ("git-write", "deny", 0)
            assert server.logins == 1, "the server never heard of the push"

    serve(tmp_path, scenario, grant("git-write" if may_push else "git-read"))


def test_only_granted_repositories_and_commands(tmp_path: Path) -> None:
    bare = make_repository(tmp_path)

    async def scenario(world: World, server) -> None:
        for command in ("id", f"git-upload-pack '{bare}'; id", "git-upload-pack '/other.git'", "bash -i"):
            code, out, err = await run(world, tmp_path, *ssh(tmp_path), "root@ssh.test", command)
            assert (code, out) == (126, ""), err
            assert "session-mismatch" in err
        assert server.logins == 0
        environ = {"GIT_SSH_COMMAND": " ".join(ssh(tmp_path))}
        code, out, err = await run(world, tmp_path, "git", "ls-remote", f"ssh://root@ssh.test{bare}", **environ)
        assert code == 0 and "refs/heads/main" in out, err

    serve(tmp_path, scenario, grant("git-read", paths=(f"{bare.parent}/**",)))


def test_exec_shell_and_sftp(tmp_path: Path) -> None:
    async def scenario(world: World, server) -> None:
        script = "printf out; printf err >&2; echo $LC_X-$GIT_PROTOCOL-$EVIL; cat; exit 7"
        argv = ssh(tmp_path, "-o", "SetEnv=LC_X=1 GIT_PROTOCOL=version=2 EVIL=1")
        code, out, err = await run(world, tmp_path, *argv, "root@ssh.test", script)
        assert (code, out, err) == (7, "out1-version=2-\n", "err")
        for more in (["root@ssh.test"], ["-s", "root@ssh.test", "sftp"]):
            code, out, err = await run(world, tmp_path, *ssh(tmp_path), *more)
            assert code == 126 and not out and "session-mismatch" in err
        big = f"head -c 3000000 /dev/zero | {' '.join(ssh(tmp_path))} root@ssh.test 'wc -c'"
        code, out, err = await run(world, tmp_path, "sh", "-c", big)
        assert (code, out.strip()) == (0, "3000000"), err
        closed = [e for e in await world.settled(6, "ssh.session") if e.state == "closed"]
        assert closed[-1].bytes_out == 3_000_000

    serve(tmp_path, scenario, grant("exec"))


def test_shell_with_terminal_and_sftp_when_granted(tmp_path: Path) -> None:
    async def scenario(world: World, server) -> None:
        line = f"(echo 'tty; exit 3'; sleep 2) | {' '.join(ssh(tmp_path, '-tt'))} root@ssh.test"
        code, out, err = await run(world, tmp_path, "sh", "-c", line)
        assert code == 3 and "/dev/pts/" in out, (out, err)
        (tmp_path / "data").write_text("x" * 100_000)
        line = f"echo 'put {tmp_path}/data {tmp_path}/copy' | sftp -q -b - {' '.join(ssh(tmp_path)[1:])} root@ssh.test"
        code, out, err = await run(world, tmp_path, "sh", "-c", line)
        assert code == 0, (out, err)
        assert (tmp_path / "copy").stat().st_size == 100_000

    serve(tmp_path, scenario, grant("shell", "sftp"))


FORWARDS = {
    "local": ["-L", f"127.0.0.1:9:{INSIDE}:80"],
    "stdio": ["-W", f"{INSIDE}:80"],
    "remote": ["-R", "0.0.0.0:8022:127.0.0.1:22"],
    "remote-dynamic": ["-R", "1080"],
    "remote-unix": ["-R", "/tmp/vallum-test-fwd.sock:127.0.0.1:22"],
    "tunnel": ["-w", "0:0"],
    "config": ["-o", "RemoteForward=8023 127.0.0.1:22"],
}


@pytest.mark.parametrize("name", FORWARDS)
def test_forwarding_is_refused(tmp_path: Path, name: str) -> None:
    """Whatever is asked for beside a granted command: nobody is reached, nothing listens, the step is charged."""

    async def scenario(world: World, server) -> None:
        async with world.tap(INSIDE, 80, reply=b"secret") as target:
            more = ["-o", "Tunnel=point-to-point"] if name == "tunnel" else []
            options = [*FORWARDS[name], *more]
            use = (
                ""
                if name == "stdio"
                else "ss -Hltn | grep -E ':(8022|8023|1080)' ; ls /tmp/vallum-test-fwd.sock 2>&1; sleep 0.3"
            )
            argv = [*ssh(tmp_path), *options, "root@ssh.test", *([use] if use else [])]
            if name == "local":
                # Use it while the granted command runs.
                line = f"{' '.join(argv[:-1])} 'sleep 2' & sleep 1; exec 3<>/dev/tcp/127.0.0.1/9 && echo GET >&3 && timeout 1 cat <&3; wait"
                argv = ["bash", "-c", line]
            code, out, err = await run(world, tmp_path, *argv)
            assert target.connections == 0 and "secret" not in out
            if name not in {"stdio", "local"}:
                assert "LISTEN" not in out and "No such file" in out, (out, err)
            denied = [e for e in await world.settled(2) if e.rule == "ssh-forwarding"]
            assert denied and all(e.verdict == "deny" and e.scope.step == 3 for e in denied), (out, err)
            # The twin: the same connection without the forwarding.
            code, out, err = await run(world, tmp_path, *ssh(tmp_path), "root@ssh.test", "echo fine")
            assert (code, out) == (0, "fine\n"), err

    serve(tmp_path, scenario, grant("exec"))


def test_forwarding_over_a_shared_connection_and_a_jump(tmp_path: Path) -> None:
    async def scenario(world: World, server) -> None:
        async with world.tap(INSIDE, 22, banner=b"SSH-2.0-inside\r\n") as target:
            mux = ssh(tmp_path, "-o", f"ControlPath={tmp_path}/mux")
            line = f"""
            {" ".join(mux)} -o ControlMaster=yes -N root@ssh.test & sleep 1.5
            {" ".join(mux)} root@ssh.test 'echo granted'
            {" ".join(mux)} -O forward -R 8024:127.0.0.1:22 root@ssh.test
            {" ".join(mux)} -W {INSIDE}:22 root@ssh.test
            {" ".join(mux)} -O exit root@ssh.test; wait
            """
            _, out, err = await run(world, tmp_path, "bash", "-c", line)
            assert "granted" in out and "SSH-2.0-inside" not in out, err
            proxy = f"ProxyCommand={' '.join(ssh(tmp_path))} -W %h:%p root@ssh.test"
            code, _, err = await run(world, tmp_path, *ssh(tmp_path), "-o", proxy, f"root@{INSIDE}", "id")
            assert code == 255, err
            code, _, err = await run(world, tmp_path, *ssh(tmp_path), "-J", "root@ssh.test", f"root@{INSIDE}", "id")
            assert code == 255, err
            assert target.connections == 0
            denied = [e for e in await world.settled(4) if e.rule == "ssh-forwarding"]
            assert len(denied) >= 3
            assert any(INSIDE in e.reason for e in denied)

    serve(tmp_path, scenario, grant("exec"))


def test_agent_and_x11_are_not_forwarded(tmp_path: Path) -> None:
    async def scenario(world: World, server) -> None:
        agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(tmp_path / "agent")], stdout=subprocess.DEVNULL)
        try:
            while not (tmp_path / "agent").exists():
                await asyncio.sleep(0.02)
            environ = {"SSH_AUTH_SOCK": str(tmp_path / "agent"), "DISPLAY": "127.0.0.1:0"}
            argv = [*ssh(tmp_path, "-A", "-Y"), "root@ssh.test", "echo [$SSH_AUTH_SOCK$DISPLAY]"]
            code, out, err = await run(world, tmp_path, *argv, **environ)
            assert (code, out) == (0, "[]\n"), err
        finally:
            agent.terminate()
            agent.wait(5)

    serve(tmp_path, scenario, grant("exec"))


def test_a_server_with_another_key_gets_nothing(tmp_path: Path) -> None:
    other = server_module.keygen(tmp_path / "other_key").with_suffix(".pub").read_text()

    async def scenario(world: World, server) -> None:
        code, _, err = await run(world, tmp_path, *ssh(tmp_path), "root@ssh.test", "id")
        assert code == 126 and "upstream-host-key" in err
        assert server.logins == 0
        assert any(e.rule == "upstream-host-key" for e in await world.settled(3, "ssh.session"))

    serve(tmp_path, scenario, grant("exec"), host_key=other)


def test_grants_that_do_not_say_what_for_are_refused(tmp_path: Path) -> None:
    async def scenario(world: World, server) -> None:
        code, _, _ = await run(world, tmp_path, *ssh(tmp_path), "root@ssh.test", "id")
        assert code == 255 and server.logins == 0
        (denied,) = await world.settled(1)
        assert (denied.state, denied.rule, denied.scope.step) == ("denied", "ssh-unread", 3)

    serve(tmp_path, scenario, Rule(id="git", host="ssh.test", ports=(22,)))


def test_canaries_stay_inside(tmp_path: Path) -> None:
    canary = Canary(name="planted", value=b"CANARY-7f3a9c21d0")

    async def scenario(world: World, server) -> None:
        target = tmp_path / "received"
        target.write_text("")
        argv = [*ssh(tmp_path), "root@ssh.test"]
        line = f"(echo before; sleep 2; echo CANARY-7f3a9c21d0) | {' '.join(argv)} 'cat > {target}'"
        code, _, err = await run(world, tmp_path, "sh", "-c", line)
        assert code == 126 and "canary" in err
        code, _, err = await run(world, tmp_path, *argv, f"echo CANARY-7f3a9c21d0 > {target}")
        assert code == 126
        assert target.read_text() == "before\n"
        assert sum(e.rule == "canary" for e in await world.settled(6, "ssh.session")) >= 2
        code, out, _ = await run(world, tmp_path, *argv, f"echo fine > {target}; cat {target}")
        assert (code, out) == (0, "fine\n")

    serve(tmp_path, scenario, grant("exec"), canaries=(canary,))


def test_a_change_of_rules_ends_sessions(tmp_path: Path) -> None:
    async def scenario(world: World, server) -> None:
        running = asyncio.create_task(
            run(world, tmp_path, *ssh(tmp_path), "root@ssh.test", f"echo $$ > {tmp_path}/pid; sleep 20")
        )
        async with asyncio.timeout(10):
            while not (tmp_path / "pid").exists():
                await asyncio.sleep(0.05)
        await world.link.update_rules("c1", Ruleset(allow=(grant("git-read"),)))
        code, _, err = await running
        assert code == 126 and "session-mismatch" in err
        states = [e.state for e in await world.settled(3, "ssh.session")]
        assert states == ["opened", "denied", "closed"]

    serve(tmp_path, scenario, grant("exec"))
