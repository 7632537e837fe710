"""What became of a call, for the record and for the agent. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from vallum.core.messages import Message, Reply, Usage, encode, estimate_tokens
from vallum.core.text import show
from vallum.gateway.http.exchange import Headers
from vallum.gateway.model.answer import Answer
from vallum.gateway.model.dialects.contract import Dialect
from vallum.gateway.model.dialects.fields import dump
from vallum.gateway.model.plan import Plan
from vallum.gateway.model.relay import write_error_event
from vallum.gateway.model.upstreams.told import UpstreamRefusedError

MAX_RECORD_CHARS = 4 * 1024 * 1024
"""Longer texts are recorded by size and digest."""


def told(reply: Reply) -> dict[str, Any]:
    """The fields of the closing event that say what was answered."""
    slim = msgspec.structs.replace(reply, prompt_token_ids=None, completion_token_ids=None, logprobs=None)
    return {
        "reply": encode(slim, MAX_RECORD_CHARS),
        "tool_calls": [call.id for call in reply.tool_calls],
        "finish": reply.finish,
        "prompt_token_ids": reply.prompt_token_ids,
        "completion_token_ids": reply.completion_token_ids,
        "logprobs": reply.logprobs,
        "policy_version": reply.policy_version,
    }


def add_usage(plan: Plan, reply: Reply) -> Usage:
    """What the call has used with one more answer; what the upstream did not count is estimated, never free."""
    total, used = plan.used, reply.usage
    prompt = used.prompt_tokens
    completion = used.completion_tokens
    if prompt is None:
        prompt = estimate_tokens(plan.request)
    if completion is None:
        said = estimate_tokens(
            msgspec.structs.replace(plan.request, messages=(Message("assistant", reply.parts),), tools=())
        )
        completion = max(1, said)
    return Usage(
        prompt_tokens=(total.prompt_tokens or 0) + prompt,
        completion_tokens=(total.completion_tokens or 0) + completion,
        cached_tokens=(total.cached_tokens or 0) + (used.cached_tokens or 0),
    )


def explain(error: Exception, plan: Plan) -> tuple[int, str, str]:
    """(status, words, Retry-After) for the agent. The upstream's key is not in them."""
    if isinstance(error, UpstreamRefusedError):
        if error.status in (401, 403):
            return 502, f"the upstream does not accept the gateway's own credential (it said {error.status})", ""
        return error.status, plan.redact(show(error.message, 2000)), error.retry_after
    if isinstance(error, TimeoutError):
        return 504, "the upstream took too long", ""
    return 502, plan.redact(f"the upstream's answer cannot be passed on: {show(str(error), 500)}"), ""


def fail(
    answer: Answer, dialect: Dialect, status: int, message: str, rule: str, retry_after: str = "", *, cut: bool = False
) -> None:
    """End an answer with an error that the agent's client understands, or cut it off where words were sent already."""
    if answer.has_begun:
        if not cut:
            answer.write(write_error_event(dialect, status, message, rule))
        answer.end(message if cut else "")
        return
    headers: Headers = ((b"content-type", b"application/json"), (b"x-vallum-rule", rule.encode("latin-1", "replace")))
    if status < 500 and status not in (408, 409, 429):
        headers = (*headers, (b"x-should-retry", b"false"))
    if retry_after:
        headers = (*headers, (b"retry-after", retry_after.encode("latin-1", "replace")[:64]))
    answer.begin(status, headers, is_stream=False)
    answer.write(dump(dialect.write_error(status, message, rule)).encode())
    answer.end()
