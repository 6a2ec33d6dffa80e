#!/usr/bin/env python3
"""The real openai client against the service: answers, streams, several choices, log-probabilities, errors, hang-ups.

    oracle_openai.py URL
"""
import asyncio
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import httpx2  # noqa: E402
import openai  # noqa: E402

from service import Service  # noqa: E402

MODEL = "client-base"
PROMPT = "The capital of France is"
CHAT = [{"role": "user", "content": "Name three colours."}]


class Counted(httpx2.Client):
    """Counts requests, so that a retry shows."""

    def __init__(self):
        super().__init__()
        self.sent = 0

    def send(self, *words, **options):
        self.sent += 1
        return super().send(*words, **options)


def refused(client, counted, kind, param, call):
    """The error of a request that must fail at once, without a retry."""
    before = counted.sent
    try:
        call(client)
    except kind as error:
        assert counted.sent == before + 1, f"{param}: sent {counted.sent - before} times"
        assert error.param == param and error.message and error.type, (error.param, error.body)
        return error
    raise AssertionError(f"{param}: not refused")


def completions(client, service):
    plain = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0)
    (choice,) = plain.choices
    assert choice.text and choice.index == 0 and choice.finish_reason == "length", choice
    assert plain.model == MODEL and plain.object == "text_completion" and len(plain.system_fingerprint) > 16
    usage = plain.usage
    assert usage.completion_tokens == 24 and usage.total_tokens == usage.prompt_tokens + 24, usage

    options = {"stream": True, "stream_options": {"include_usage": True}}
    *parts, last = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0, **options)
    assert "".join(part.choices[0].text for part in parts) == choice.text
    assert parts[-1].choices[0].finish_reason == "length" and not last.choices and last.usage == usage, last
    assert {part.id for part in parts} == {last.id} and len({part.system_fingerprint for part in parts}) == 1

    word = choice.text.split()[3]
    stopped = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0, stop=[word]).choices[0]
    assert stopped.text == choice.text[:choice.text.index(word)] and stopped.finish_reason == "stop", stopped

    ids = service.ask("POST", f"/m/{MODEL}/tokenize", {"prompt": PROMPT})["tokens"]
    batch = client.completions.create(model=MODEL, prompt=[ids, ids[:2]], max_tokens=24, temperature=0)
    assert [c.index for c in batch.choices] == [0, 1] and batch.choices[0].text == choice.text


def choices(client):
    draw = lambda seed: client.completions.create(model=MODEL, prompt=PROMPT, n=4, max_tokens=12, temperature=1.0, seed=seed)
    first, again, other = draw(7), draw(7), draw(8)
    texts = lambda drawn: [choice.text for choice in sorted(drawn.choices, key=lambda choice: choice.index)]
    assert texts(first) == texts(again) != texts(other) and len(set(texts(first))) > 1
    assert first.usage.completion_tokens <= 48 and first.usage.prompt_tokens == again.usage.prompt_tokens
    streamed = {}
    for part in client.completions.create(model=MODEL, prompt=PROMPT, n=4, max_tokens=12, temperature=1.0, seed=7, stream=True):
        for choice in part.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert [streamed[i] for i in range(4)] == texts(first)


def logprobs(client):
    scored = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=1, temperature=0, logprobs=5, echo=True)
    found = scored.choices[0].logprobs
    count = scored.usage.prompt_tokens + 1
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == count
    assert found.token_logprobs[0] is None and "".join(found.tokens) == scored.choices[0].text
    for token, value, top in list(zip(found.tokens, found.token_logprobs, found.top_logprobs))[1:]:
        assert value < 0 and top[token] == value and 5 <= len(top) <= 6, (token, value, top)
    chat = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3)
    content = chat.choices[0].logprobs.content
    assert len(content) == chat.usage.completion_tokens
    for entry in content:
        assert len(entry.top_logprobs) == 3 and entry.logprob == entry.top_logprobs[0].logprob, entry
        assert bytes(entry.bytes).decode(errors="replace") == entry.token


def chat(client):
    plain = client.chat.completions.create(model=MODEL, messages=CHAT, max_completion_tokens=20, temperature=0)
    message = plain.choices[0].message
    assert message.role == "assistant" and message.content and plain.object == "chat.completion", plain
    assert plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *parts, last = client.chat.completions.create(model=MODEL, messages=CHAT, max_completion_tokens=20, temperature=0, **options)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == message.content
    assert parts[0].choices[0].delta.role == "assistant" and last.usage == plain.usage and not last.choices
    blocks = [{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}]
    same = client.chat.completions.create(model=MODEL, messages=blocks, max_completion_tokens=20, temperature=0)
    assert same.choices[0].message.content == message.content


def errors(client, counted):
    create = lambda **more: lambda c: c.completions.create(**({"model": MODEL, "prompt": PROMPT, "max_tokens": 4} | more))
    unknown = refused(client, counted, openai.NotFoundError, "model", create(model="no-such-model"))
    assert unknown.code and "no-such-model" in unknown.message, unknown.body
    for name, value in {"temperature": -1, "top_p": 7, "n": 0, "logprobs": 100, "suffix": "x", "best_of": 5}.items():
        refused(client, counted, openai.BadRequestError, name, create(**{name: value}))
    long = refused(client, counted, openai.BadRequestError, "prompt", create(max_tokens=10_000_000))
    assert long.code == "context_length_exceeded", long.body
    bad = lambda c: c.chat.completions.create(model=MODEL, messages=[{"role": "wizard", "content": "x"}], max_tokens=4)
    assert refused(client, counted, openai.BadRequestError, "messages[0].role", bad)


def hang_up(client):
    """A client that gives up frees its work: the next one does not wait for it."""
    impatient = client.with_options(timeout=0.5, max_retries=0)
    try:
        impatient.completions.create(model=MODEL, prompt=PROMPT, n=16, max_tokens=900, temperature=1.0)
        raise AssertionError("16 x 900 tokens in half a second?")
    except openai.APITimeoutError:
        pass
    stream = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=900, temperature=1.0, stream=True)
    next(iter(stream))
    stream.close()
    start = time.monotonic()
    client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=1)
    assert time.monotonic() - start < 10


async def together(url):
    """Sixteen at a time get what each gets alone."""
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
    ask = lambda i: client.completions.create(model=MODEL, prompt=f"{PROMPT} {i} times", max_tokens=8, temperature=0, logprobs=1)
    alone = [await ask(i) for i in range(16)]
    crowd = await asyncio.gather(*(ask(i) for i in range(16)))
    for one, other in zip(alone, crowd):
        assert one.choices[0].text == other.choices[0].text
        assert one.choices[0].logprobs.token_logprobs == other.choices[0].logprobs.token_logprobs


def main():
    url = sys.argv[1]
    service = Service(url)
    service.load(MODEL, "base")
    counted = Counted()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=counted)
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL
    completions(client, service)
    choices(client)
    logprobs(client)
    chat(client)
    errors(client, counted)
    hang_up(client)
    asyncio.run(together(url))
    print(f"openai {openai.__version__}: {counted.sent} requests; answers, streams, choices, log-probabilities, errors and hang-ups are as it expects")


if __name__ == "__main__":
    main()
