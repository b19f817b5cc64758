"""Random chat templates give a text or one clear error."""

from __future__ import annotations

import random

from mukv.core.errors import BadInput
from mukv.hub.chat import rendered
from tests.hostile.harness import check_all

VALUES = {"messages": [{"role": "user", "content": "hi"}], "tools": None, "bos_token": "<s>"}
ATOMS = (
    *("messages", "messages[0]", "messages[0].content", "tools", "bos_token", "missing", "1", "0"),
    *(
        "-1",
        "10**3",
        "'a'",
        "''",
        "none",
        "true",
        "[]",
        "{}",
        "range(9)",
        "messages.append",
        "loop",
    ),
    *(
        "1.5",
        "'\\n'",
        "namespace(a=1)",
        "dict()",
        "strftime_now",
        "raise_exception",
        "self",
        "''''",
    ),
)
FILTERS = (
    *("tojson", "trim", "upper", "join", "length", "first", "last", "list", "int", "float", "map"),
    *("sort", "reverse", "safe", "replace('a','b')", "indent(3)", "default(1)", "batch(2)", "sum"),
    *("tojson(indent=1)", "nosuch", "round", "abs", "format(1)", "xmlattr", "groupby('x')", "min"),
)
OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "is", ".", "[")


def expression(rng: random.Random, depth: int = 3) -> str:
    if not depth or rng.random() < 0.3:
        return rng.choice(ATOMS)
    kind = rng.randrange(4)
    inner = expression(rng, depth - 1)
    if kind == 0:
        return f"({inner}) | {rng.choice(FILTERS)}"
    if kind == 1:
        return f"({inner} {rng.choice(OPERATORS)} {expression(rng, depth - 1)})"
    if kind == 2:
        return f"{inner}[{expression(rng, 0)}]"
    return f"({inner} if {expression(rng, 0)} else {expression(rng, 0)})"


def template(rng: random.Random) -> str:
    inner = f"{{{{ {expression(rng)} }}}}"
    forms = (
        inner,
        f"{{% for m in {expression(rng, 1)} %}}{inner}{{% endfor %}}",
        f"{{% if {expression(rng, 1)} %}}{inner}{{% else %}}b{{% endif %}}",
        f"{{% set x = {expression(rng, 1)} %}}{{{{ x }}}}",
        f"{{% macro f(a) %}}{inner}{{% endmacro %}}{{{{ f({expression(rng, 0)}) }}}}",
        f"{{% generation %}}{inner}{{% endgeneration %}}",
        f"{{% for m in messages %}}{{% break %}}{inner}{{% endfor %}}{{% raw %}}{{{{{{% endraw %}}",
    )
    text = rng.choice(forms)
    if rng.random() < 0.15:
        cut = rng.randrange(len(text))
        text = text[:cut] + rng.choice(("", "{{", "%}", "\0", "{#", "\ud7ff")) + text[cut + 1 :]
    return text


def test_templates(record_property):
    rng = random.Random(0)
    templates = [template(rng) for _ in range(400)]
    answers = []
    for first in range(0, len(templates), 50):  # a process for each fifty
        answers += rendered(templates[first : first + 50], VALUES, "templates")

    def judge(answer):
        if "error" in answer:
            raise BadInput("template", answer["error"], "another template")
        assert isinstance(answer["text"], str)

    calls = [
        (text, lambda answer=answer: judge(answer))
        for text, answer in zip(templates, answers, strict=True)
    ]
    counts = check_all("templates", calls, record_property)
    assert min(counts.values()) > 40
