"""The last user turn of a prompt that a chat template wrote: what a person asked, without the template's words."""

from __future__ import annotations

from lorafit.data.template import SENTINEL, ChatTemplate


def last_user_turn(prompt: str, template: ChatTemplate) -> str:
    """What the user says last in a rendered prompt; empty where the template's words are not in it, as in plain
    text."""
    head, end = _around_a_turn(template)
    start = prompt.rfind(head) if head else -1
    if start < 0 or not end:
        return ""
    said, found, _ = prompt[start + len(head) :].partition(end)
    return said.strip() if found else ""


def _around_a_turn(template: ChatTemplate) -> tuple[str, str]:
    """What the template writes before every user turn, and behind it; empty where that cannot be told."""
    asked = {"role": "user", "content": SENTINEL}
    first = template.probe([asked])
    later = template.probe([{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, asked])
    opened = template.probe([asked], opened=True)
    if any(text is None or text.count(SENTINEL) != 1 for text in (first, later, opened)):
        return "", ""
    before, behind = str(first).split(SENTINEL)
    shared = 0
    for one, other in zip(reversed(before), reversed(str(later).split(SENTINEL)[0]), strict=False):
        if one != other:
            break
        shared += 1
    # an end of white space alone is in many texts: what opens the answer ends such a turn
    return before[len(before) - shared :].strip(), behind.strip() or str(opened).split(SENTINEL)[1].strip()
