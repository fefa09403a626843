"""ChatGLM3's tools: what the official code reads and writes, and what damaged, cut or hostile answers come to."""

import json
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.core import Message, Tool, ToolCall
from server.errors import BadRequest
from server.models.chatglm2.prompt import ChatGLM3
from server.models.chatglm2.tools import with_metadata
from server.models.families import families
from tests.models.reference import DATA
from tests.oracle import ROOT, oracle_file

# pytest puts filters of its own in the place of the program's
pytestmark = pytest.mark.filterwarnings("ignore:invalid")

GLM3 = ChatGLM3()
WEATHER = Tool("get_weather", "天气 / weather", {"type": "object", "properties": {"city": {"type": "string"}}})
CALL = "get_weather\n ```python\ntool_call(city='北京', days=3)\n```"
WEATHER_CALL = ToolCall("get_weather", '{"city": "北京", "days": 3}')


@pytest.fixture(scope="module", params=["genuine", "demo"])
def tokenizer(request):
    folder = DATA / "chatglm2-tokenizer" if request.param == "genuine" else ROOT / "THUDM" / "demo"
    if not folder.exists():
        pytest.skip(f"no tokenizer at {folder} (set DATA_DIR)")
    return GLM3.load_tokenizer(folder)


def shown(raw, names=("get_weather",), **options):
    return GLM3.display_calls(raw, names, final=True, **options)


def history(tokenizer, *messages, tools=()):
    """What stands between [gMASK] sop and the last <|assistant|>, as the tokenizer decodes it."""
    ids = GLM3.build_prompt(tokenizer, messages, tools=tools)
    return tokenizer.decode(ids[2:-1])


def test_official_tool_conversations():
    folder = DATA / "chatglm2-tokenizer"
    if not folder.exists():
        pytest.skip(f"no official tokenizer at {folder} (set DATA_DIR)")
    tokenizer = GLM3.load_tokenizer(folder)
    cases = json.loads(oracle_file("chat", "chatglm3_chat.json").read_text(encoding="utf-8"))["cases"]
    cases = [case for case in cases if any("tools" in item for item in case["history"])]
    assert len(cases) == 2
    for case in cases:
        system, *turns = case["history"]
        tools = [Tool(**tool) for tool in system["tools"]]
        names = [tool.name for tool in tools]
        messages = []
        for item in turns:
            if item.get("metadata"):
                text, calls = shown(f"{item['metadata']}\n{item['content']}", names)
                assert not text
                messages.append(Message(item["role"], "", calls))
            else:
                messages.append(Message(item["role"], item["content"]))
        messages.append(Message(case["role"], case["query"]))
        assert GLM3.build_prompt(tokenizer, messages, tools=tools) == case["input_ids"]
        answer = [i for i in case["model_output_ids"] if i not in GLM3.stop_ids(tokenizer)]
        text, calls = shown(tokenizer.decode(answer), names)
        if isinstance(case["chat_response"], str):
            assert (text, calls) == (case["chat_response"], ())
        else:
            (call,) = calls
            assert not text
            assert {"name": call.name, "parameters": json.loads(call.arguments)} == case["chat_response"]


def test_tools_stand_in_front_and_the_users_system_message_stays(tokenizer):
    offer = (
        "Answer the following questions as best as you can. You have access to the following tools:\n[\n    {\n"
        '        "name": "get_weather",\n        "description": "天气 / weather",\n        "parameters": {\n'
        '            "type": "object",\n            "properties": {\n                "city": {\n'
        '                    "type": "string"\n                }\n            }\n        }\n    }\n]'
    )
    messages = [Message("system", "Be brief."), Message("user", "q")]
    offered = GLM3.build_prompt(tokenizer, messages, tools=[WEATHER])
    assert offered == GLM3.build_prompt(tokenizer, [Message("system", offer), *messages])


def test_calls_and_results_in_a_conversation(tokenizer):
    calls = (WEATHER_CALL, ToolCall("f", '{"a-b": [true, null, 1.5], "class": "it\'s"}'), ToolCall("g", ""))
    messages = [Message("user", "q"), Message("assistant", "我查一下", calls), Message("observation", "[1]")]
    assert history(tokenizer, *messages) == (
        "<|user|> \n q<|assistant|> \n 我查一下"
        "<|assistant|> get_weather\n ```python\ntool_call(city='北京', days=3)\n```"
        "<|assistant|> f\n ```python\ntool_call(**{'a-b': [True, None, 1.5], 'class': \"it's\"})\n```"
        "<|assistant|> g\n ```python\ntool_call()\n```<|observation|> \n [1]"
    )
    without_text = [Message("assistant", "", (WEATHER_CALL,))]
    assert history(tokenizer, *without_text).count("<|assistant|>") == 1
    assert history(tokenizer, Message("assistant", ""), Message("user", "q")).startswith("<|assistant|> \n<|user|>")


def test_a_call_at_the_end_is_not_continued(tokenizer):
    ids = GLM3.build_prompt(tokenizer, [Message("user", "q"), Message("assistant", "", (WEATHER_CALL,))])
    assert tokenizer.decode(ids).endswith("```<|assistant|>")


@pytest.mark.parametrize(
    "arguments", ["{", "[1]", "null", '"x"', '{"x": NaN}', '{"x": 1e999}', "tool_call()", "[" * 100_000, '{"x": 1} y']
)
def test_arguments_that_are_no_object_are_the_callers_mistake(tokenizer, arguments):
    with pytest.raises(BadRequest, match="get_weather") as caught:
        GLM3.build_prompt(tokenizer, [Message("assistant", "", (ToolCall("get_weather", arguments),))])
    assert caught.value.param == "messages" and "JSON" in caught.value.zh


def test_only_chatglm3_takes_tools():
    assert {family.name: family.takes_tools for family in families()} == {
        "chatglm": False,
        "chatglm2": False,
        "chatglm3": True,
        "codegeex2": False,
    }


def test_calls_given_to_a_family_without_tools_are_refused_not_lost(tokenizer):
    for family in families():
        if not family.takes_tools:
            with pytest.raises(BadRequest, match=rf"{family.name} .*tool_calls") as caught:
                family.build_prompt(tokenizer, [Message("assistant", "a", (WEATHER_CALL,)), Message("user", "q")])
            assert caught.value.param == "messages"


@pytest.mark.parametrize("arguments", ["{}", '{"x": 1}', '{"x": "\'"}', '{"a-b": 1}', '{"城市": "北京"}', '{"_": 1}'])
def test_an_opening_begins_the_same_call_in_a_conversation(tokenizer, arguments):
    names = ["get", "get_weather", "interpreter", "天气"]
    for name, opening in zip(names, GLM3.call_openings(tokenizer, names), strict=True):
        call = Message("assistant", "", (ToolCall(name, arguments),))
        # [gMASK] sop <|assistant|> in front
        assert GLM3.build_prompt(tokenizer, [call, Message("user", "q")])[3:][: len(opening)] == opening
        assert tokenizer.decode(opening).removeprefix(f"{name}\n").lstrip() == "```python\ntool_call"


@pytest.mark.parametrize(
    ("raw", "text", "arguments"),
    [
        (CALL, "", [WEATHER_CALL.arguments]),
        ("\n你好", "你好", []),
        ("no newline", "no newline", []),
        ("\n查一下<|assistant|> " + CALL, "查一下", [WEATHER_CALL.arguments]),
        (CALL + "<|assistant|>get_weather\n```\ntool_call()\n```", "", [WEATHER_CALL.arguments, "{}"]),
        (CALL + "\n再见", "再见", [WEATHER_CALL.arguments]),
        (CALL + "<|assistant|>\n再见 [[训练时间]]", "再见 2023年", [WEATHER_CALL.arguments]),
        (CALL.removesuffix("\n```"), "", [WEATHER_CALL.arguments]),
        ("get_weather \n```\n  tool_call()```", "", ["{}"]),
        ("get_weather\ntool_call(x=1)", "", ['{"x": 1}']),
        ("get_weather\n```python\ntool_call(x='```', y=\"\"\"\n```\n)```\"\"\")\n```", "",
         ['{"x": "```", "y": "\\n```\\n)```"}']),
        ("get_weather\n```python\ntool_call(\n    x=true, y=[null, False, -1.5e3, (1, 'a' 'b')],\n)\n```", "",
         ['{"x": true, "y": [null, false, -1500.0, [1, "ab"]]}']),
        ("get_weather\n```python\ntool_call(x='\\ud83d\\ude00', y='\\ud83d', z='\\d')\n```", "",
         ['{"x": "😀", "y": "\ufffd", "z": "\\\\d"}']),
        ("interpreter\n```python\nprint(1)\n```", "interpreter\n```python\nprint(1)\n```", []),
        ("get_time\n```python\ntool_call()\n```", "get_time\n```python\ntool_call()\n```", []),
        ("\nget_weather\n```python\ntool_call()\n```", "get_weather\n```python\ntool_call()\n```", []),
        ("get_weather", "get_weather", []),
        ("\n你好<|assist", "你好<|assist", []),
    ],
)  # fmt: skip
def test_calls_and_texts_of_an_answer(raw, text, arguments):
    result = shown(raw)
    assert result.text == text
    assert [call.arguments for call in result.calls] == arguments
    assert {call.name for call in result.calls} <= {"get_weather"}


@pytest.mark.parametrize(
    "source",
    [
        "tool_call(city='北",
        "tool_call('北京')",
        "tool_call(*['北京'])",
        "tool_call(x=1); tool_call(x=2)",
        "tool_call(x=1)\ntool_call(x=2)",
        "get_weather(x=1)",
        "tools.tool_call(x=1)",
        "(lambda: tool_call)()(x=1)",
        "tool_call(x=open('marker', 'w'))",
        "tool_call(x=__import__('os').getcwd())",
        "tool_call(**open('marker', 'w'))",
        "tool_call(x=[i for i in range(3)])",
        "tool_call(x='a' * 10**9)",
        "tool_call(x=f'{1}')",
        "tool_call(x=b'1')",
        "tool_call(x={1, 2})",
        "tool_call(x=1e999)",
        "tool_call(x=...)",
        "tool_call(x=2j)",
        "tool_call(x=0x" + "f" * 5000 + ")",
        "tool_call(x=" + "[" * 5000 + "]" * 5000 + ")",
        "tool_call(x=" + "-" * 50_000 + "1)",
        "tool_call(x='\0')\0",
        "x=1",
        "",
    ],
    ids=lambda source: source[:40],
)
def test_a_damaged_or_hostile_call_is_text_in_full(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = f"get_weather\n```python\n{source}\n```"
    assert shown(raw) == (raw, ())
    assert shown(f"\na<|assistant|>{raw}<|assistant|>{CALL}") == (f"a\n{raw}", (WEATHER_CALL,))
    assert GLM3.display_calls(raw, ["get_weather"], final=False) == ("", ())
    assert not list(tmp_path.iterdir())


def test_text_streams_and_a_call_comes_with_its_fence():
    raw = "\n我查<|assistant|> " + CALL
    seen = [GLM3.display_calls(raw[:n], ["get_weather"], final=False) for n in range(len(raw) + 1)]
    assert [s.text for s in seen[:4]] == ["", "", "我", "我查"]
    assert {s.text for s in seen[4:]} == {"我查"}
    assert [n for n, s in enumerate(seen) if s.calls] == [len(raw)]
    plain = "get the weather\nyourself"
    seen = [GLM3.display_calls(plain[:n], ["get_weather"], final=False).text for n in range(len(plain) + 1)]
    assert seen[3] == "" and seen[4] == "get" and seen[5] == "get t"


def test_an_answer_that_is_continued_begins_with_text():
    """Its header stands in front of the answer prefix, so its first line is none."""
    raw = " weather\n```python\ntool_call()\n```<|assistant|>get_weather\n```python\ntool_call()\n```"
    text, calls = shown(raw, ["weather", "get_weather"], continued=True)
    assert text == " weather\n```python\ntool_call()\n```"
    assert calls == (ToolCall("get_weather", "{}"),)
    assert GLM3.display("<|assistant|>interpreter\nx", final=True, continued=True) == "\ninterpreter\nx"


def test_backslashes_of_a_model_are_no_warnings_on_the_console():
    program = (
        "from server.models.chatglm2.prompt import ChatGLM3\n"
        r"raw = 'f\n```python\ntool_call(x=\'\\d\', y=1if 1 else 2)\n```'" + "\n"
        "print(ChatGLM3().display_calls(raw, ['f'], final=True))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and "tool_call" in done.stdout and done.stderr == ""


unhurried = settings(deadline=None)  # other programs may have the processor
NAMES = ("get", "get_weather", "interpreter")
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
names_of_arguments = st.sampled_from(["city", "a-b", "class", "城市", "ﬁ", "x=1", "", "__debug__", "None"]) | st.text()
objects = st.dictionaries(names_of_arguments, values, max_size=4)


# in an answer's text, what a model spells out cannot be told from the token
arguments = objects.map(json.dumps).filter(lambda text: "<|assistant|>" not in text)
calls = st.builds(ToolCall, st.sampled_from(NAMES), arguments)


def as_answer(call):
    """The call as a part of an answer."""
    ((name, content),) = with_metadata(Message("assistant", "", (call,)))
    return f"{name}\n {content}"


@unhurried
@given(calls)
def test_any_object_survives_being_written_as_a_call(call):
    (read,) = shown(as_answer(call), NAMES).calls
    assert read.name == call.name
    # JSON has no half surrogate pairs that could be sent as UTF-8
    meant = json.dumps(json.loads(call.arguments), ensure_ascii=False)
    assert read.arguments == meant.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@unhurried
@given(calls)
def test_any_call_survives_the_tokenizer(tokenizer, call):
    ids = GLM3.build_prompt(tokenizer, [Message("assistant", "", (call,))])
    (read,) = shown(tokenizer.decode(ids[3:-1]), NAMES).calls
    # sentencepiece's own sign for a space is the one character that it cannot tell from one
    assert read.arguments == shown(as_answer(call).replace("\u2581", " "), NAMES).calls[0].arguments


@st.composite
def damaged_calls(draw):
    raw = as_answer(draw(calls))
    begin, end = sorted(draw(st.lists(st.integers(0, len(raw)), min_size=2, max_size=2)))
    return raw[:begin] + draw(st.sampled_from(["", "\n", "```", "'", ")", "[[训练时间]]"])) + raw[end:]


others = ["get", "get_weather ", "interpreter\n```python\nprint(1)\n```", "\n在 [[训练时间]]", "get_time\n```"]
texts = st.text(st.sampled_from("a你 \n`[训)") | st.characters(), max_size=12)
parts = (
    texts
    | texts.map("\n{}".format)
    | calls.map(as_answer)
    | st.builds("{} \n{}".format, calls.map(as_answer), texts)
    | damaged_calls()
    | st.sampled_from(others)
)


@unhurried
@given(st.lists(parts, min_size=1, max_size=4).map("<|assistant|>".join), st.booleans())
@example("\n查<|assistant|>get\n```python\ntool_call(x='\\n```')\n```get<|assistant|>get_weather\n```tool_call(", False)
@example(" get_weather \t\n```python\ntool_call()\n```", False)
def test_what_is_shown_only_grows_and_nothing_is_lost(raw, continued):
    options = {"names": NAMES, "continued": continued}
    for length in range(len(raw) + 1):
        so_far = GLM3.display_calls(raw[:length], final=False, **options)
        # an answer may end anywhere
        for later in (
            GLM3.display_calls(raw[: length + 1], final=False, **options),
            GLM3.display_calls(raw[:length], final=True, **options),
        ):
            assert later.text.startswith(so_far.text)
            assert later.calls[: len(so_far.calls)] == so_far.calls
    first, *later_parts = raw.split("<|assistant|>")
    begun = shown(first, NAMES, continued=continued)
    found = [begun, *(shown(part, NAMES) for part in later_parts)]
    for part, (text, taken) in zip([first, *later_parts], found, strict=True):
        assert taken or text.strip() == part.strip().replace("[[训练时间]]", "2023年")
    lines = [begun.text] if continued or begun.text else []
    assert shown(raw, NAMES, continued=continued) == (
        "\n".join([*lines, *(text for text, _ in found[1:] if text)]),
        tuple(call for _, taken in found for call in taken),
    )


@unhurried
@given(st.lists(parts, min_size=1, max_size=4).map("<|assistant|>".join), st.booleans(), st.booleans())
def test_without_tools_everything_is_text(raw, continued, final):
    options = {"final": final, "continued": continued}
    assert GLM3.display_calls(raw, (), **options) == (GLM3.display(raw, **options), ())
