"""A language model that plays its part well: it explains by the tokens that are marked, and finds by looking for them.

Its explanation is a list of the tokens that are marked in most of the excerpts; a text is active where it holds one of
them, and marks are right where all stand at them.
"""

import json
import re

from evaluate.explanations import ABOUT

MARKED = re.compile(r"«(.*?)»")


def user(messages) -> str:
    assert ABOUT in messages[0]["content"]
    return messages[1]["content"]


def excerpts(text: str) -> list[str]:
    return re.findall(r"^Excerpt \d+.*?: (.*)$", text, re.MULTILINE)


def oracle(messages) -> str:
    text, system = user(messages), messages[0]["content"]
    if "one JSON object" in system:
        found = [set(MARKED.findall(each)) for each in excerpts(text)]
        every = sorted(set().union(*found))
        best = max(every, key=lambda token: (sum(token in each for each in found), token))
        return "Here it is:\n```json\n" + json.dumps({"label": f"token {best}", "sentence": f"[{best}]"}) + "\n```"
    wanted = re.search(r"Description: .*?\. \[(.*?)\]$", text, re.MULTILINE)[1]
    if "stand between" in system:  # tokens beside each other are marked as one
        marked = ["|".join(MARKED.findall(each)) for each in excerpts(text)]
        return json.dumps([int(not each.replace(wanted, "").strip("|")) for each in marked])
    return json.dumps([int(wanted in each) for each in excerpts(text)])
