"""Which conversation a request goes on with."""

from vallum.core.messages import Message, Reasoning, Text, ToolCall, ToolResult
from vallum.gateway.model.branches import Branches


def user(words):
    return Message("user", (Text(words),))


def said(words, *calls):
    return Message("assistant", (Text(words), *(ToolCall(c, "bash", '{"a": 1, "b": 2}') for c in calls)))


def result(call, words="ok"):
    return Message("tool", (ToolResult(call, (Text(words),)),))


class Talk:
    def __init__(self, *, with_ids=True):
        self.branches, self.with_ids, self.count = Branches(), with_ids, 0

    def ask(self, *messages, seed="", reply=None):
        self.count += 1
        place = self.branches.place(f"m{self.count}", messages, seed=seed, with_ids=self.with_ids)
        if reply is not None:
            self.branches.answered(place, f"m{self.count}", reply, with_ids=self.with_ids)
        return place


def test_a_conversation_keeps_its_branch():
    talk = Talk()
    one = talk.ask(user("go"), reply=said("x", "c1"))
    two = talk.ask(user("go"), said("x", "c1"), result("c1"))
    assert (one.is_new, two.is_new, two.branch) == (True, False, one.branch)
    assert (two.parent, two.known, two.goes_on) == ("m1", 2, one.branch)


def test_reasoning_space_and_spelling_of_json_do_not_matter():
    talk = Talk()
    reply = Message("assistant", (Reasoning("hm", "sig"), Text("x\n"), ToolCall("c1", "bash", '{"a":1,"b":2}')))
    one = talk.ask(user("go"), reply=reply)
    again = Message("assistant", (Text(" x"), ToolCall("c1", "bash", '{ "b": 2, "a": 1 }')))
    assert talk.ask(user("go"), again, result("c1")).branch == one.branch


def test_system_prompts_with_clocks_do_not_matter():
    talk = Talk()
    one = talk.ask(Message("system", (Text("10:00"),)), user("go"), reply=said("x"))
    two = talk.ask(Message("system", (Text("10:01"),)), user("go"), said("x"), user("more"))
    assert (two.branch, two.known) == (one.branch, 3)


def test_a_reply_in_other_words_goes_on_in_the_branch():
    talk = Talk()
    one = talk.ask(user("go"), reply=said("x", "c1"))
    two = talk.ask(user("go"), said("(cut)"), user("Observation: ok"))
    assert (two.branch, two.parent, two.known) == (one.branch, "m1", 1)


def test_going_back_forks():
    talk = Talk()
    one = talk.ask(user("go"), reply=said("x"))
    talk.ask(user("go"), said("x"), user("left"), reply=said("y"))
    back = talk.ask(user("go"), said("x"), user("right"))
    assert back.branch != one.branch
    assert (back.parent, back.known, back.goes_on) == ("m1", 2, "")


def test_seeds_tell_agents_apart():
    talk = Talk()
    one = talk.ask(user("go"), seed="a", reply=said("x"))
    assert talk.ask(user("go"), seed="b", reply=said("x")).branch != one.branch
    assert talk.ask(user("go"), said("x"), user("more"), seed="a").branch == one.branch


def test_the_same_asked_again_stays():
    talk = Talk()
    one = talk.ask(user("go"))
    two = talk.ask(user("go"))
    assert (two.branch, two.parent, two.is_new) == (one.branch, "", False)


def test_without_ids_results_are_not_looked_up():
    talk = Talk(with_ids=False)
    talk.ask(user("go at 1"), reply=said("x", "call_1"))
    other = talk.ask(user("go at 2"), said("x", "call_1"), result("call_1"))
    assert (other.parent, other.goes_on) == ("", "")


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("vallum.gateway.model.branches.MAX_LINKS", 50)
    talk = Talk()
    for number in range(200):
        talk.ask(user(f"{number}"), reply=said(f"r{number}"))
    assert len(talk.branches._links) <= 50
    assert talk.ask(user("199"), said("r199"), user("on")).branch == "b200"
