"""A conversation as a markdown file: one way through its tree, for people to read and keep."""

from datetime import UTC, datetime

from penstock.serve.store import Row

THOUGHT = "<think>", "</think>"


def as_markdown(conversation: Row, path: list[Row]) -> str:
    """The title, the system prompt and the messages of a path, each under a line that says whose it is and of when."""
    parts = [f"# {_line(conversation['title']) or 'Untitled'}"]
    if conversation["system"]:
        parts += ["## System prompt", conversation["system"]]
    for message in path:
        parts += [f"## {_who(message)}", _text(message)]
        if message["role"] == "assistant" and message["finish_reason"] not in ("stop", None):
            parts.append(f"*(cut: {message['finish_reason']})*")
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def _who(message: Row) -> str:
    name = "You" if message["role"] == "user" else _line(message["model"] or "Assistant")
    edited = ", rewritten by a person" if message["edited_from"] else ""
    moment = datetime.fromtimestamp(message["created_at"], UTC)
    return f"{name}{edited} ({moment:%Y-%m-%d %H:%M} UTC)"


def _text(message: Row) -> str:
    """An answer's thought is folded, as on the page."""
    content: str = message["content"]
    begin, end = THOUGHT
    if message["role"] != "assistant" or not content.lstrip().startswith(begin):
        return content
    thought, _, answer = content.lstrip().removeprefix(begin).partition(end)
    folded = f"<details>\n<summary>Thought</summary>\n\n{thought.strip()}\n\n</details>"
    return f"{folded}\n\n{answer.strip()}".strip()


def _line(text: str) -> str:
    return " ".join(text.split())
