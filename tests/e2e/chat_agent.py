"""An agent as others write them, for tests: runs in a cell, speaks chat completions, runs each tool call in a shell.

Calls of one reply run at once; a call of ``task`` is a sub-agent in a thread of this process. usage: chat_agent.py TASK
"""

import json
import os
import subprocess
import sys
import threading
import urllib.request

BASE, KEY = os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {key: {"type": "string"}}}},
    }
    for name, key in (("bash", "command"), ("task", "prompt"))
]


def ask(messages):
    body = json.dumps({"model": "m", "messages": messages, "tools": TOOLS}).encode()
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{BASE}/chat/completions", body, headers)) as answer:
        return json.load(answer)["choices"][0]["message"]


def run(call):
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "task":
        return work(arguments["prompt"])
    done = subprocess.run(["bash", "-c", arguments["command"]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout.decode()


def work(task):
    messages = [{"role": "user", "content": task}]
    while True:
        said = ask(messages)
        messages.append(said)
        calls = said.get("tool_calls") or []
        if not calls:
            return said.get("content") or ""
        results = {}

        def one(call, results=results):
            results[call["id"]] = run(call)

        threads = [threading.Thread(target=one, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        messages += [{"role": "tool", "tool_call_id": call["id"], "content": results[call["id"]]} for call in calls]


print(work(sys.argv[1]))
