"""The gateway's own connection to a granted SSH server, with a key that the guest never sees."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

import asyncssh

from vallum.core.text import show
from vallum.core.verdict import Decision
from vallum.gateway.door import reset
from vallum.gateway.http1 import RefusedError
from vallum.gateway.kit import Credential
from vallum.rules.grants import Rule

LOGIN_TIMEOUT_S = 15.0


def _refuse(rule: str, reason: str) -> RefusedError:
    return RefusedError(Decision(verdict="deny", rule=rule, reason=reason))


def choose_credential(name: str, credentials: Sequence[Credential], host: str) -> Credential:
    """The SSH key that a grant names.

    Raises:
        RefusedError: it names none, or one that is no SSH key or not for ``host``.
    """
    found = next((one for one in credentials if one.name == name), None)
    if found is None or found.header != "ssh-key":
        raise _refuse(
            "ssh-credential",
            f"SSH to {show(host)} is ended by the gateway, so its grant needs a credential that is an SSH key "
            "(`vallum credentials add NAME --ssh-key --known-hosts FILE`)",
        )
    if not any(Rule(id="", host=pattern).matches_name(host) or pattern == host for pattern in found.hosts):
        raise _refuse("ssh-credential", f"the credential {show(name)} is not for {show(host)}")
    return found


async def log_in(
    sock: socket.socket, credential: Credential, *, host: str, port: int, user: str
) -> asyncssh.SSHClientConnection:
    """Log in over a connected socket, which is the connection's from here on.

    The server has to show one of the credential's host keys for ``host``. No agent, no forwarding, no configuration
    file and no key but the credential's is used.

    Raises:
        RefusedError: the host key is another (``upstream-host-key``), or the login failed (``upstream``).
    """
    known = "".join(line.rstrip("\n") + "\n" for line in credential.host_keys)
    try:
        key = asyncssh.import_private_key(credential.secret)
        return await asyncssh.run_client(
            sock,
            config=None,
            host_key_alias=host,
            port=port,
            known_hosts=asyncssh.import_known_hosts(known),
            username=user,
            client_keys=[key],
            agent_path=None,
            agent_forwarding=False,
            x11_forwarding=False,
            preferred_auth="publickey",
            gss_host=None,
            login_timeout=LOGIN_TIMEOUT_S,
        )
    except asyncssh.HostKeyNotVerifiable as error:
        reset(sock)
        reason = f"the SSH server of {show(host)} showed a host key that the credential {credential.name} does not name"
        raise _refuse("upstream-host-key", reason) from error
    except (OSError, asyncssh.Error, asyncssh.KeyImportError) as error:
        reset(sock)
        said = "timeout" if isinstance(error, TimeoutError) else getattr(error, "reason", "") or str(error)
        raise _refuse("upstream", f"logging in to {show(host)} as {show(user)} failed: {show(said, 200)}") from error
    except asyncio.CancelledError:
        reset(sock)
        raise
