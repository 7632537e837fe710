"""A real OpenSSH server in the fakes' namespace, with everything allowed that an attacker could wish for."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from vallum.gateway.kit import Credential


def keygen(path: Path) -> Path:
    if not path.exists():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True, timeout=20)
    return path


class SshServer:
    """``with SshServer(world.fakes, tmp, ip) as server``; ``server.credential`` logs in as root."""

    def __init__(self, fakes: int, tmp: Path, ip: str, port: int = 22) -> None:
        self.fakes, self.tmp, self.ip, self.port = fakes, tmp, ip, port
        self.log = tmp / "sshd.log"

    def __enter__(self) -> SshServer:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        host = keygen(self.tmp / "host_key")
        (self.tmp / "authorized").write_text(keygen(self.tmp / "user_key").with_suffix(".pub").read_text())
        (self.tmp / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress {self.ip}\nHostKey {host}\nAuthorizedKeysFile {self.tmp}/authorized\n"
            f"PidFile {self.tmp}/sshd.pid\nStrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\n"
            "AllowTcpForwarding yes\nAllowStreamLocalForwarding yes\nGatewayPorts yes\nPermitTunnel yes\n"
            "AllowAgentForwarding yes\nX11Forwarding yes\nPermitUserEnvironment yes\nAcceptEnv *\n"
            "Subsystem sftp internal-sftp\nLogLevel VERBOSE\n"
        )
        argv = [
            "nsenter",
            "-t",
            str(self.fakes),
            "-n",
            "/usr/sbin/sshd",
            "-D",
            "-e",
            "-f",
            str(self.tmp / "sshd_config"),
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(argv, stderr=log, env={"PATH": os.environ["PATH"]})
        deadline = time.monotonic() + 10
        while b"Server listening" not in self.log.read_bytes():
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)
        return self

    @property
    def credential(self) -> Credential:
        return self.make_credential((self.tmp / "host_key.pub").read_text())

    def make_credential(self, host_key: str) -> Credential:
        return Credential(
            name="deploy",
            hosts=("ssh.test",),
            header="ssh-key",
            secret=keygen(self.tmp / "user_key").read_bytes(),
            user="root",
            host_keys=(f"ssh.test,{self.ip} {' '.join(host_key.split()[:2])}",),
        )

    @property
    def logins(self) -> int:
        return self.log.read_text().count("Accepted publickey")

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()
        self.process.wait(5)
