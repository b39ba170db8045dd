"""What `llm`, LangChain's and LiteLLM's OpenAI clients must see: the text that a plain request gets, whole
and as a stream. Run by `python -m benchmarks serve clients` as `python other_clients.py ADDRESS KEY`, in an
environment that has them. Needs nothing of penstock.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from importlib.metadata import version
from pathlib import Path

ADDRESS, KEY = sys.argv[1:3]
BASE, QUESTION = f"{ADDRESS}/v1", "What is a penstock?"
MESSAGES = [{"role": "user", "content": QUESTION}]


def plain(path, **body):
    """The text of an answer to a request that no client made."""
    body = {"model": "tiny", "temperature": 0, "max_tokens": 12, **body}
    head = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    request = urllib.request.Request(BASE + path, json.dumps(body).encode(), head)
    with urllib.request.urlopen(request) as answer:
        choice = json.loads(answer.read())["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def litellm_is_answered():
    from litellm import acompletion, completion

    options = {"model": "openai/tiny", "api_base": BASE, "api_key": KEY, "temperature": 0, "max_tokens": 12}
    wanted = plain("/chat/completions", messages=MESSAGES)
    assert completion(messages=MESSAGES, **options).choices[0].message.content == wanted
    assert asyncio.run(acompletion(messages=MESSAGES, **options)).choices[0].message.content == wanted


def litellm_streams():
    from litellm import completion

    options = {"model": "openai/tiny", "api_base": BASE, "api_key": KEY, "temperature": 0, "max_tokens": 12}
    chunks = completion(messages=MESSAGES, stream=True, **options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == plain("/chat/completions", messages=MESSAGES)


def litellm_goes_on_with_a_text():
    from litellm import text_completion

    options = {"model": "text-completion-openai/tiny", "api_base": BASE, "api_key": KEY}
    answer = text_completion(prompt=QUESTION, temperature=0, max_tokens=12, **options)
    assert answer.choices[0].text == plain("/completions", prompt=QUESTION)


LANGCHAIN = {"model": "tiny", "base_url": BASE, "api_key": KEY, "temperature": 0, "max_tokens": 12}


def langchain_is_answered():
    from langchain_openai import ChatOpenAI

    chat, wanted = ChatOpenAI(**LANGCHAIN), plain("/chat/completions", messages=MESSAGES)
    assert chat.invoke(QUESTION).content == wanted
    assert [message.content for message in chat.batch([QUESTION] * 3)] == [wanted] * 3
    assert chat.invoke([("system", "Be brief."), ("human", QUESTION)]).usage_metadata["output_tokens"] <= 12


def langchain_streams():
    from langchain_openai import ChatOpenAI

    chunks = ChatOpenAI(**LANGCHAIN).stream(QUESTION)
    assert "".join(chunk.content for chunk in chunks) == plain("/chat/completions", messages=MESSAGES)


def langchain_goes_on_with_a_text():
    from langchain_openai import OpenAI

    assert OpenAI(**LANGCHAIN).invoke(QUESTION) == plain("/completions", prompt=QUESTION)


def llm(*flags):
    with tempfile.TemporaryDirectory() as home:
        entry = f"- model_id: ours\n  model_name: tiny\n  api_base: {BASE}\n"
        (Path(home) / "extra-openai-models.yaml").write_text(entry)
        command = [str(Path(sys.executable).parent / "llm"), "-m", "ours", "--key", KEY, "-o", "temperature", "0"]
        command += ["-o", "max_tokens", "12", QUESTION, *flags]
        environment = {**os.environ, "LLM_USER_PATH": home}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        wanted = plain("/chat/completions", messages=MESSAGES)
        assert done.stdout.rstrip("\n") == wanted.rstrip("\n"), done.stderr


def llm_streams():
    llm()


def llm_is_answered():
    llm("--no-stream")


CASES = {
    "litellm": (litellm_is_answered, litellm_streams, litellm_goes_on_with_a_text),
    "langchain-openai": (langchain_is_answered, langchain_streams, langchain_goes_on_with_a_text),
    "llm": (llm_streams, llm_is_answered),
}


def outcome(case):
    try:
        case()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "passed"


def main():
    """Runs every case; prints one JSON object: package and version -> case -> result."""
    results = {f"{name} {version(name)}": {case.__name__: outcome(case) for case in CASES[name]} for name in CASES}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
