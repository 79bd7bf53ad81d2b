"""Chats as text: a row of messages through the tokenizer's chat template, and which characters of it
the assistant says.

Those are what the template marks with {% generation %}. Where it marks nothing they are what an
assistant's message adds to the text of the messages before it; that holds only where the text of the
first messages begins the text of all.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from minipuzzle.core.errors import InputError
from minipuzzle.data.worker import Spans

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Chat:
    """The messages of a row, what tools they may use, and where the row is."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    place: str

    @classmethod
    def read(cls, row: dict[str, Any], place: str) -> Chat:
        """Raises InputError for what is no list of messages."""
        messages = row["messages"]
        if not messages:
            raise InputError(f"{place}: messages is empty; remove the row")
        for number, message in enumerate(messages):
            wrong = ("is no object" if not isinstance(message, dict) else
                     "has no role" if not isinstance(message.get("role"), str) else
                     "has no content that is text" if not isinstance(message.get("content"), str) else "")
            if wrong:
                raise InputError(f"{place}: message {number} {wrong}; a message is "
                                 '{"role": "user", "content": "text"}')
        tools = row.get("tools")
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise InputError(f"{place}: tools is no list of objects; write JSON schemas, or leave it out")
        return cls(messages, tools, place)

    @property
    def text(self) -> str:
        """What tells it from another."""
        return json.dumps([self.messages, self.tools], sort_keys=True, default=str)


class Template:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def render(self, chat: Chat) -> tuple[str, Spans | None]:
        """(the text, the characters that the assistant says; None where that cannot be told)

        Raises:
            InputError: there is no template, or it refuses the messages.
        """
        template = self._template(chat.place)
        text, marked = self._text(template, chat, len(chat.messages), marks=bool(_MARKED.search(template)))
        return text, _joined(marked) if marked is not None else self._added(template, chat, text)

    def _template(self, place: str) -> str:
        try:
            return str(self.tokenizer.get_chat_template())
        except (AttributeError, ValueError):
            folder = getattr(self.tokenizer, "name_or_path", "the model")
            raise InputError(f"{place}: messages need a chat template, and the tokenizer of {folder} has none; put a "
                             "chat_template.jinja there, or write the rows as text") from None

    def _text(self, template: str, chat: Chat, count: int, marks: bool = False,
              prompt: bool = False) -> tuple[str, Spans | None]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, found = render_jinja_template(
                [chat.messages[:count]], tools=chat.tools, chat_template=template, return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt, **self.tokenizer.special_tokens_map)
        except Exception as error:  # of jinja, or of whatever the template does with odd messages
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"{chat.place}: the chat template refuses these messages ({reason}); correct or remove "
                             "the row") from None
        text = texts[0].encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair
        return text, found[0] if marks else None

    def _added(self, template: str, chat: Chat, text: str) -> Spans | None:
        """What each message of the assistant adds, without the words that ask for it."""
        spans: Spans = []
        for number, message in enumerate(chat.messages):
            if message["role"] != "assistant":
                continue
            try:
                whole = self._text(template, chat, number + 1)[0]
                before = [self._text(template, chat, number, prompt=asks)[0] for asks in (True, False) if number]
            except InputError:  # of the first messages alone
                return None
            begin = next((len(b) for b in before or [""] if whole.startswith(b)), None)
            if begin is None or not text.startswith(whole):
                return None
            spans.append((begin, len(whole)))
        return spans


def _joined(spans: list[Any]) -> Spans:
    return sorted((int(begin), int(end)) for begin, end in spans)
