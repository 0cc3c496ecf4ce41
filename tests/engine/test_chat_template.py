"""A template of a stranger can neither reach out of its sandbox nor stop the server; a good one does what it must."""

from __future__ import annotations

import threading
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from shoestring.core.errors import UsageError
from shoestring.engine.chat_template import CHARACTERS, Template, TemplateRefused

EVIL = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ messages.__class__.__init__.__globals__ }}",
    "namespace": "{% set n = namespace(__class__=1) %}{{ n }}",
    "namespace later": "{% set n = namespace(a=1) %}{% set n.__init__ = 1 %}",
    "changing a list": "{{ messages.append(1) }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "endless": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "text times": "{{ 'a' * 10**10 }}",
    "list times": "{{ [1] * 10**10 }}",
    "times text": "{{ 10**10 * 'a' }}",
    "power": "{{ 9**9**9 }}",
    "center": "{{ 'a' | center(10**9) }}",
    "ljust": "{{ 'a'.ljust(999999999) }}",
    "percent": "{{ '%0999999999d' % 1 }}",
    "format": "{{ '{:>999999999}'.format(1) }}",
    "doubling": "{% set n = namespace(x='abcdefgh') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "indent": "{{ [1] | tojson(indent=999999999) }}",
    "unsound": "{% for %}",
}


@pytest.mark.parametrize("name", EVIL)
def test_evil_templates_end(name: str) -> None:
    start = time.perf_counter()
    with pytest.raises(UsageError):
        Template(EVIL[name]).render({"messages": [{"role": "user"}]})
    assert time.perf_counter() - start < 20  # two seconds of its own on a machine that is busy


def test_a_long_conversation_is_no_fault_of_the_template() -> None:
    long = "x" * (CHARACTERS + 10)
    text = Template("{% for m in messages %}<{{ m.content }}>{% endfor %}").render({"messages": [{"content": long}]})
    assert text == f"<{long}>"


def test_the_limit_says_so_in_any_thread() -> None:
    said: list[str] = []

    def work() -> None:
        try:
            Template(EVIL["endless"]).render({})
        except UsageError as error:
            said.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert said and "longer than 2 s" in said[0]


def test_nothing_is_raised_after_the_end() -> None:
    template = Template("{{ messages }}")
    for _ in range(300):
        assert template.render({"messages": 1}) == "1"
    time.sleep(0.1)


def test_a_refusal_is_the_templates_own() -> None:
    with pytest.raises(TemplateRefused, match="roles must alternate"):
        Template("{{ raise_exception('roles must alternate') }}").render({})
    with pytest.raises(TemplateRefused):
        Template("{{ messages[0].content + 1 }}").render({"messages": [{"content": "a"}]})


GOOD = [
    "{%- for m in messages %}\n  {%- if m.role == 'user' %}\n{{ m.content | trim }}\n  {% endif %}\n{%- endfor %}",
    "{{ messages | tojson }} {{ tools | tojson(indent=2) }} {{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true) }}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{% set ns = namespace(found=false) %}{% for m in messages %}{% set ns.found = true %}{% endfor %}{{ ns.found }}",
    "{% generation %}{{ messages[-1].content }}{% endgeneration %}",
    "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[0].role) }}{{ dict(a=1).items() | list }}",
    "{{ messages[0]['content'].split(' ')[-1] }}{{ messages[0].content[::-1] }}{{ 'a' * 5 }}{{ 7 % 4 }}{{ '%s' % 3 }}",
    "{{ strftime_now('%Y') | length }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{% if add_generation_prompt %}go{% endif %}{{ absent is defined }}{{ extra }}",
    "{{ '{:>3}|{}'.format(1, 'é') }}{{ 2 ** 10 }}{{ 'x' | center(5) }}{{ [1, 2] * 2 }}",
]


@pytest.mark.parametrize("text", GOOD)
def test_good_templates_are_as_in_transformers(text: str) -> None:
    messages = [{"role": "user", "content": " hi you "}, {"role": "assistant", "content": "é <b>"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    wanted, _ = render_jinja_template(
        [messages], tools=tools, chat_template=text, add_generation_prompt=True, extra="more"
    )
    found = Template(text).render(
        {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": True, "extra": "more"}
    )
    assert found == wanted[0]
