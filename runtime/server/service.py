"""From a request to its answers: the model, prompts, grammars, limits."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
from anyio import to_thread
from fastapi import Request, Response
from fastapi.responses import JSONResponse

from qexport.errors import InputError, QexportError
from qexport.runtime.constraint import Grammar, Grammars
from qexport.runtime.engine import Engine
from qexport.runtime.generator import Generator
from qexport.runtime.scheduler import QueueFullError
from qexport.runtime.server.answers import Answers, Job
from qexport.runtime.server.errors import FieldError, NoSuchModelError, UnavailableError
from qexport.runtime.server.limits import Limits
from qexport.runtime.server.observe import Metrics, Record, RequestLog
from qexport.runtime.server.replies import Choice, Counts, Delta
from qexport.runtime.server.requests import ChatRequest, GenerateRequest, ResponseFormat
from qexport.runtime.server.tools import call_schema, must_call

__all__ = ["Exchange", "Service"]

_COMPILE_SECONDS = 10.0  # for a grammar
Result = TypeVar("Result")


class Service:
    """One model, served under one name."""

    def __init__(
        self, generator: Generator, model: str, limits: Limits, log: RequestLog | None = None
    ) -> None:
        self.generator, self.model, self.limits, self.log = generator, model, limits, log
        self.metrics = Metrics(model, generator.engine)
        self.draining = False
        self._grammars = Grammars(
            generator.tokenizer, generator.decoder.vocabulary, generator.end_tokens
        )

    @property
    def engine(self) -> Engine:
        """Raises UnavailableError where nothing new may begin."""
        if self.draining:
            raise UnavailableError("the server is shutting down; ask another one.")
        engine = self.generator.engine
        if engine.ended is not None:
            raise UnavailableError(str(engine.ended))
        return engine

    @property
    def trouble(self) -> str | None:
        """Why the engine does not go on, if so."""
        engine = self.generator.engine
        if engine.ended is not None:
            return str(engine.ended)
        stalled = engine.stalled
        if stalled > self.limits.stall_seconds:
            return f"a step has taken {stalled:.0f} seconds so far."
        return None

    def check_model(self, name: str | None) -> None:
        """Raise NoSuchModelError before any work is done for a model that is not served."""
        if name is not None and name != self.model:
            shown = name[:100]
            raise NoSuchModelError(f"the model {shown!r} is not served here; {self.model!r} is.")

    def spell(self, token: int) -> bytes:
        """A token's own bytes."""
        return bytes(self._grammars.tokenizer.decode_bytes([token]))

    async def prepare(self, with_logprobs: bool) -> None:
        """Make what `spell` needs, off the event loop."""
        if with_logprobs:
            await to_thread.run_sync(lambda: self._grammars.tokenizer)

    async def encode(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        return await to_thread.run_sync(self.generator.encode, prompt)

    async def encode_chat(self, body: ChatRequest) -> list[int]:
        """Prompt tokens of a conversation. Raises InputError where the template refuses it."""
        messages = [message.for_template() for message in body.messages]
        variables = body.template_variables()
        if body.tools and body.tool_choice != "none":
            variables["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools]
        return await to_thread.run_sync(lambda: self.generator.encode_chat(messages, **variables))

    async def grammar(self, body: ChatRequest) -> Grammar | None:
        """What answers are held to. Raises FieldError for a schema that is not understood."""
        must = must_call(body)
        if must is not None:
            if not must:
                raise FieldError("tool_choice: no tool has this name.", "tool_choice")
            return await self._compiled(call_schema(must), "tools")
        wanted: ResponseFormat | None = body.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.json_schema is None:
            return await self._compiled({"type": "object"}, "response_format")
        return await self._compiled(wanted.json_schema.schema_ or {}, "response_format")

    async def _compiled(self, schema: dict[str, Any], param: str) -> Grammar:
        work = to_thread.run_sync(self._grammars.json_schema, schema, abandon_on_cancel=True)
        try:
            with anyio.fail_after(_COMPILE_SECONDS):
                return await work
        except TimeoutError as error:
            raise FieldError(f"{param}: the schema takes too long to compile.", param) from error
        except InputError as error:
            raise FieldError(f"{param}: {error}", param) from error

    def check_choices(self, prompts: int, body: GenerateRequest) -> None:
        """Raise FieldError for more answers than there may be, before any work is done."""
        if prompts * body.choices > self.limits.choices:
            most = self.limits.choices
            raise FieldError(f"n: a request has at most {most} answers, prompts times n.", "n")

    def jobs(
        self,
        body: GenerateRequest,
        prompts: list[list[int]],
        default: int,
        grammar: Grammar | None = None,
    ) -> list[Job]:
        """`n` answers to each prompt. Raises FieldError for more than there may be."""
        self.check_choices(len(prompts), body)
        jobs = []
        for prompt in prompts:
            room = max(1, min(default, self.generator.context - len(prompt)))
            for index in range(body.choices):
                sampling = body.sampling(body.limit() or room, self.limits, index)
                jobs.append(Job(prompt, sampling, grammar))
        return jobs


@dataclass
class Exchange:
    """One request whose answers are being made."""

    service: Service
    answers: Answers
    choices: list[Choice]
    counts: Counts
    record: Record

    @classmethod
    def begin(
        cls, service: Service, jobs: list[Job], record: Record, tools: set[str]
    ) -> "Exchange":
        """Submit the jobs: here, before a stream's 200 is on the wire, what is wrong is raised."""
        try:
            answers = Answers(service.engine, jobs)
        except QexportError as error:
            if isinstance(error, QueueFullError):
                service.metrics.rejections.inc()
            raise
        prompts = {id(job.prompt): len(job.prompt) for job in jobs}
        counts = Counts(sum(prompts.values()))
        return cls(service, answers, [Choice(set(tools)) for _ in jobs], counts, record)

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """What is new, choice by choice; counts are right at the end."""
        error: str | None = "the client left"
        try:
            async with aclosing(self.answers):
                async for number, piece in self.answers:
                    self.record.piece(number, piece)
                    yield number, self.choices[number].add(piece)
            error = None
        except QexportError as failure:
            error = str(failure)
            raise
        finally:
            sequences = self.answers.sequences
            self.counts.completion = sum(len(sequence.generated) for sequence in sequences)
            self.counts.cached = sequences[0].cached if sequences else 0
            reasons = [choice.finish for choice in self.choices]
            self.record.about(finish_reason=reasons[0] if len(reasons) == 1 else reasons)
            self.record.end(200 if error is None else 499, sequences, error)

    async def whole(self, request: Request, make: Callable[[], dict[str, Any]]) -> Response:
        """A JSON answer when all is there; the work stops when the client leaves."""

        async def gather() -> Response:
            async with aclosing(self.deltas()) as deltas:
                async for _ in deltas:
                    pass
            return JSONResponse(make())

        return await while_connected(request, gather) or Response(status_code=499)


async def while_connected(request: Request, work: Callable[[], Awaitable[Result]]) -> Result | None:
    """The result of `work`, or None if the client left before."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work()), asyncio.ensure_future(left())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
