"""OpenAI's own Python client and the demo model: what the answers mean."""

import math

import openai
import pytest

from tests.functional.program import Program
from tests.functional.test_openai_client import QUESTION, TOOLS, client_at, text_of


@pytest.fixture(scope="module")
def program():
    with Program("--slots", "2", "--queue", "2") as program:
        yield program


@pytest.fixture(scope="module")
def demo(program):
    return client_at(program.port)


def ask(demo, messages=QUESTION, **fields):
    extra = {name: fields.pop(name) for name in ("return_token_ids", "max_length") if name in fields}
    fields = {"temperature": 0, **fields}
    return demo.chat.completions.create(model="chatglm2-6b", messages=messages, extra_body=extra, **fields)


def content(demo, *args, **fields):
    return ask(demo, *args, **fields).choices[0].message.content


def test_answers_are_those_of_the_other_dialects(program, demo):
    whole = ask(demo)
    assert whole.model == "demo" and whole.choices[0].finish_reason == "stop"
    stream = list(ask(demo, stream=True, stream_options={"include_usage": True}))
    assert whole.choices[0].message.content == text_of(stream) == program.ask("你是谁？")
    assert stream[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert stream[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert stream[-1].usage.prompt_tokens_details.cached_tokens > 0


def test_conversations_are_read_whole(program, demo):
    first = content(demo)
    messages = [*QUESTION, {"role": "assistant", "content": first}, {"role": "user", "content": "谢谢"}]
    assert content(demo, messages) == program.ask("谢谢", history=[["你是谁？", first]])


def test_more_conversations_than_run_at_once_are_not_read_again(demo):
    talks = [[{"role": "user", "content": f"{word}是什么意思？"}] for word in ("int4", "显存", "档位", "模型", "端口")]
    first = [ask(demo, messages, max_tokens=20) for messages in talks]
    for messages, answer in zip(talks, first, strict=True):
        said = {"role": "assistant", "content": answer.choices[0].message.content}
        usage = ask(demo, [*messages, said, {"role": "user", "content": "谢谢"}], max_tokens=5).usage
        assert usage.prompt_tokens_details.cached_tokens >= answer.usage.prompt_tokens


def test_a_trailing_assistant_message_is_continued_and_not_repeated(program, demo):
    messages = [{"role": "user", "content": "怎么下载真正的模型？"}, {"role": "assistant", "content": "当然，"}]
    whole = program.ask("怎么下载真正的模型？", answer_prefix="当然，")
    assert "当然，" + content(demo, messages) == "当然，" + text_of(ask(demo, messages, stream=True)) == whole


def test_the_same_seed_gives_the_same_answer_and_n_counts_it_up(demo):
    drawn = {"temperature": 2, "top_p": 1, "max_tokens": 30}
    alone = [content(demo, seed=seed, **drawn) for seed in (5, 6, 7)]
    assert len(set(alone)) == 3
    together = ask(demo, seed=5, n=3, **drawn)
    assert [choice.message.content for choice in together.choices] == alone
    streamed = ["", "", ""]
    for chunk in ask(demo, seed=5, n=3, stream=True, **drawn):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == alone
    assert together.usage.completion_tokens > 2 * 30
    assert content(demo, seed=-3, **drawn) == content(demo, seed=-3, **drawn)


def test_stop_strings_and_limits(demo):
    whole = content(demo)
    middle = whole[10:13]
    for stop in (middle, ["not there", middle]):
        cut = ask(demo, stop=stop)
        assert cut.choices[0].message.content == whole[: whole.index(middle)]
        assert cut.choices[0].finish_reason == "stop"
        assert text_of(ask(demo, stop=stop, stream=True)) == cut.choices[0].message.content
    for limit in ({"max_tokens": 5}, {"max_completion_tokens": 5}):
        short = ask(demo, **limit)
        assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 5)
    assert ask(demo, max_length=30).usage.total_tokens == 30


def test_logprobs(demo):
    whole = ask(demo, logprobs=True, top_logprobs=3)
    tokens = whole.choices[0].logprobs.content
    assert len(tokens) == whole.usage.completion_tokens
    said = b"".join(bytes(token.bytes) for token in tokens).decode()
    assert said.strip() == whole.choices[0].message.content
    for token in tokens:
        ranked = [other.logprob for other in token.top_logprobs]
        assert len(ranked) == 3 and ranked == sorted(ranked, reverse=True)
        assert ranked[0] == token.logprob <= 0  # greedy
        assert sum(map(math.exp, ranked)) <= 1 + 1e-5
    streamed = [
        token
        for chunk in ask(demo, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.bytes for token in streamed] == [token.bytes for token in tokens]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in tokens], abs=1e-4)


def test_logit_bias(demo):
    ids = ask(demo, return_token_ids=True).choices[0].model_extra["token_ids"]
    others = ask(demo, return_token_ids=True, logit_bias={str(ids[1]): -100}).choices[0].model_extra["token_ids"]
    assert others[0] == ids[0] and ids[1] not in others
    forced = ask(demo, return_token_ids=True, logit_bias={str(ids[1]): 100}, max_tokens=4)
    assert forced.choices[0].model_extra["token_ids"] == [ids[1]] * 4
    with pytest.raises(openai.BadRequestError):
        ask(demo, logit_bias={"9999999": 1})


def test_token_ids_round_trip(demo):
    """The ids of a templated prompt, sent back as a prompt, are continued in the same way."""
    chat = ask(demo, return_token_ids=True)
    ids = chat.choices[0].model_extra
    fields = {"model": "m", "temperature": 0, "max_tokens": -1, "extra_body": {"return_token_ids": True}}
    text = demo.completions.create(prompt=ids["prompt_token_ids"], **fields)
    assert text.choices[0].model_extra == ids
    assert text.choices[0].text.strip() == chat.choices[0].message.content
    chunks = list(demo.completions.create(prompt=[ids["prompt_token_ids"]], stream=True, **fields))
    extras = [chunk.choices[0].model_extra for chunk in chunks]
    assert [extra["prompt_token_ids"] for extra in extras if len(extra) > 1] == [ids["prompt_token_ids"]]
    assert [i for extra in extras for i in extra["token_ids"]] == ids["token_ids"]
    assert "".join(c.choices[0].text for c in chunks) == text.choices[0].text


def test_scoring_a_text_gives_the_log_probabilities_of_making_it(demo):
    """As evaluation harnesses ask: the prompt is echoed with its log probabilities, and nothing is added."""
    chat = ask(demo, return_token_ids=True, logprobs=True)
    ids = chat.choices[0].model_extra
    both = [*ids["prompt_token_ids"], *ids["token_ids"]]
    made = [token.logprob for token in chat.choices[0].logprobs.content]
    for prompt, max_tokens in ((both, 0), (both[:-1], 1)):
        fields = {"model": "m", "temperature": 0, "echo": True, "logprobs": 1, "max_tokens": max_tokens}
        (choice,) = demo.completions.create(prompt=prompt, **fields).choices
        scores = choice.logprobs
        assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.text_offset) == len(both)
        assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
        assert scores.token_logprobs[-len(made) :] == pytest.approx(made, abs=1e-3)
        likeliest = [max(top.values()) for top in scores.top_logprobs[-len(made) :]]
        assert likeliest == scores.token_logprobs[-len(made) :]  # greedy
        assert choice.finish_reason == "length" and choice.text.endswith(chat.choices[0].message.content)


def test_echo_of_a_text_and_where_its_tokens_begin(demo):
    prompt = "你好，世界！Hello world"
    answer = demo.completions.create(model="m", prompt=prompt, echo=True, logprobs=0, max_tokens=4, temperature=0)
    (choice,) = answer.choices
    plain = demo.completions.create(model="m", prompt=prompt, max_tokens=4, temperature=0).choices[0].text
    assert choice.text == prompt + plain
    pieces = zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True)
    named = [(token, offset) for token, offset in pieces if token and not token.startswith("bytes:")]
    # the tokenizer puts a space before a text, which the first piece has and the text has not
    assert all(choice.text[at:].startswith(token) for token, at in named[1:])
    assert answer.usage.prompt_tokens == len(choice.logprobs.tokens) - 4


def test_more_prompts_than_the_server_holds_are_answered_in_order(demo):
    prompts = [f"第 {i} 个" for i in range(12)]
    alone = [demo.completions.create(model="m", prompt=p, max_tokens=6, temperature=0) for p in prompts]
    together = demo.completions.create(model="m", prompt=prompts, max_tokens=6, temperature=0)
    assert [choice.text for choice in together.choices] == [answer.choices[0].text for answer in alone]
    assert together.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in alone)
    streamed = [""] * 12
    for chunk in demo.completions.create(model="m", prompt=prompts, max_tokens=6, temperature=0, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in together.choices]
    assert len(ask(demo, n=9).choices) == 9


def test_what_the_model_cannot_do_is_said(demo):
    with pytest.raises(openai.BadRequestError) as caught:
        content(demo, [{"role": "user", "content": "很长" * 5000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        demo.completions.create(model="m", prompt=[10**9])
    with pytest.raises(openai.BadRequestError, match="ChatGLM3") as caught:
        ask(demo, tools=TOOLS)
    assert caught.value.param == "tools"
    with pytest.raises(openai.BadRequestError):
        content(demo, [{"role": "system", "content": "only"}])
