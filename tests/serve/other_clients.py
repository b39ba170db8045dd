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


def litellm():
    from litellm import acompletion, completion, text_completion

    options = {"model": "openai/tiny", "api_base": BASE, "api_key": KEY, "temperature": 0, "max_tokens": 12}
    wanted = plain("/chat/completions", messages=MESSAGES)
    assert completion(messages=MESSAGES, **options).choices[0].message.content == wanted
    chunks = completion(messages=MESSAGES, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
    assert asyncio.run(acompletion(messages=MESSAGES, **options)).choices[0].message.content == wanted
    options["model"] = "text-completion-openai/tiny"
    assert text_completion(prompt=QUESTION, **options).choices[0].text == plain("/completions", prompt=QUESTION)


def langchain():
    from langchain_openai import ChatOpenAI, OpenAI

    options = {"model": "tiny", "base_url": BASE, "api_key": KEY, "temperature": 0, "max_tokens": 12}
    chat, wanted = ChatOpenAI(**options), plain("/chat/completions", messages=MESSAGES)
    assert chat.invoke(QUESTION).content == wanted
    assert "".join(chunk.content for chunk in chat.stream(QUESTION)) == wanted
    assert [message.content for message in chat.batch([QUESTION] * 3)] == [wanted] * 3
    assert chat.invoke([("system", "Be brief."), ("human", QUESTION)]).usage_metadata["output_tokens"] <= 12
    assert OpenAI(**options).invoke(QUESTION) == plain("/completions", prompt=QUESTION)


def llm():
    with tempfile.TemporaryDirectory() as home:
        entry = f"- model_id: ours\n  model_name: tiny\n  api_base: {BASE}\n"
        (Path(home) / "extra-openai-models.yaml").write_text(entry)
        command = [str(Path(sys.executable).parent / "llm"), "-m", "ours", "--key", KEY, "-o", "temperature", "0"]
        command += ["-o", "max_tokens", "12", QUESTION]
        wanted = plain("/chat/completions", messages=MESSAGES)
        for flags in ([], ["--no-stream"]):
            environment = {**os.environ, "LLM_USER_PATH": home}
            done = subprocess.run([*command, *flags], capture_output=True, text=True, env=environment)
            assert done.stdout.rstrip("\n") == wanted.rstrip("\n"), done.stderr


def main():
    """Runs every client; prints one JSON object: versions and results."""
    results = {}
    for package, case in (("litellm", litellm), ("langchain-openai", langchain), ("llm", llm)):
        try:
            case()
            results[f"{package} {version(package)}"] = "passed"
        except Exception as error:
            results[f"{package} {version(package)}"] = f"{type(error).__name__}: {error}"
    print(json.dumps(results))


if __name__ == "__main__":
    main()
