"""A guest that wants another step, another episode or nobody to be charged."""

import pytest

import vallum

pytestmark = [pytest.mark.root, pytest.mark.e2e]

NOWHERE = "203.0.113.9"
GONE_AT_ONCE = f"""
import os, socket, struct
for i in range(40):
    s = socket.socket(); s.setblocking(False); s.connect_ex(("{NOWHERE}", 443))
    s.setsockopt(1, 13, struct.pack("ii", 1, 0)); s.close()
"""


async def flows(node, sandbox):
    events = await node.events(run=sandbox.run, episode=sandbox.episode)
    return [event for event in events if event["kind"] == "net.flow"]


async def test_connections_closed_before_they_are_looked_up(node, code):
    """Reset at once, at the very end of a step, with the next step right behind it."""
    async with node.sandbox() as sb:
        for _ in range(3):
            guilty = await sb.exec(code(GONE_AT_ONCE))
            innocent = await sb.exec(["sleep", "0.3"])
            steps = {flow["scope"]["step"] for flow in await flows(node, sb)}
            assert steps
            assert innocent.step not in steps
            assert steps <= {None, *range(0, guilty.step + 1, 2)}


async def test_a_daemon_that_flushes_the_memory_of_its_end(node, code):
    """Its exit is followed by hundreds of others', so that nobody remembers it; its connection is reset meanwhile."""
    script = f"""
import os, socket, struct, time
if os.fork(): os._exit(0)
time.sleep(1)
{GONE_AT_ONCE}
for i in range(400): os.waitpid(os.posix_spawn("/bin/true", ["true"], {{}}), 0)
"""
    async with node.sandbox() as sb:
        guilty = await sb.exec(code(script))
        innocent = await sb.exec(["sleep", "3"])
        steps = {flow["scope"]["step"] for flow in await flows(node, sb)}
        assert steps
        assert innocent.step not in steps
        assert steps <= {None, guilty.step}


async def test_a_flood_cannot_shift_its_charge(node, code):
    """While the flood of one step keeps the look-up busy, the next step begins."""
    script = f"""
import os, socket, time
if os.fork(): os._exit(0)
for i in range(900): os.dup(0)
end = time.time() + 3
while time.time() < end:
    socks = []
    for i in range(60):
        s = socket.socket(); s.setblocking(False); s.connect_ex(("{NOWHERE}", 443)); socks.append(s)
    del socks
"""
    async with node.sandbox() as sb:
        guilty = await sb.exec(code(script))
        for _ in range(6):
            innocent = await sb.exec(["sleep", "0.5"])
            assert innocent.step != guilty.step
        seen = await flows(node, sb)
        assert len(seen) > 100
        assert {flow["scope"]["step"] for flow in seen} <= {None, guilty.step}


async def test_two_cells_cannot_be_one_episode(home):
    async with vallum.Node(home=home) as node:
        first = await node.sandbox(run="shared", episode="e1")
        second = await node.sandbox(run="shared")
        third = await node.sandbox(run="shared")
        with pytest.raises(vallum.InvalidInput, match="e1"):
            await node.sandbox(run="shared", episode="e1")
        await first.close()
        with pytest.raises(vallum.InvalidInput, match="e1"):
            await node.sandbox(run="shared", episode="e1")
        names = {first.episode, second.episode, third.episode}
        assert len(names) == 3
    async with vallum.Node(home=home) as node:  # another node goes on with the run
        again = await node.sandbox(run="shared")
        assert again.episode not in names
        with pytest.raises(vallum.InvalidInput):
            await node.sandbox(run="shared", episode="e1")


IN_THE_SHELLS_PLACE = f"""
import os, re, socket, threading, time
def act():
    time.sleep(1)
    s = socket.socket()
    try: s.connect(("{NOWHERE}", 443)); s.recv(1)
    except OSError: pass
threading.Thread(target=act).start()
while data := os.read(3, 65536):
    for nonce in re.findall(rb"printf '%s %s.n' ([0-9a-f]+)", data): os.write(4, nonce + b" 0" + bytes([10]))
"""


async def test_a_program_in_the_place_of_the_shell_takes_no_step_along(node):
    """It speaks the shell's protocol, so that it is moved into the next step, and acts there."""
    async with node.sandbox() as sb:
        await sb.write_file("/tmp/evil.py", IN_THE_SHELLS_PLACE)
        shell = await sb.session()
        guilty = await shell.run(
            "exec python3 /tmp/evil.py 3</proc/$$/fd/255 4>/proc/$$/fd/11 >/dev/null 2>&1", timeout_s=5
        )
        with pytest.raises(vallum.CellGone, match="exec"):
            await shell.run("true", timeout_s=5)
        await sb.exec(["sleep", "1.5"])
        assert {flow["scope"]["step"] for flow in await flows(node, sb)} <= {guilty.step}
        async with sb.session() as another:
            assert [(await another.run("true")).exit_code for _ in range(3)] == [0, 0, 0]
