"""From a request to its answers: the model, prompts, grammars, limits."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial

from qexport.errors import InputError, QexportError
from qexport.runtime.constraint import Grammar
from qexport.runtime.generator import Generator
from qexport.runtime.server.answers import Answers, Job
from qexport.runtime.server.errors import FieldError, NoSuchModelError, UnavailableError
from qexport.runtime.server.lanes import Lane
from qexport.runtime.server.limits import Limits
from qexport.runtime.server.metrics import Metrics
from qexport.runtime.server.record import Record
from qexport.runtime.server.replies import Choice, Counts, Delta
from qexport.runtime.server.request_log import RequestLog
from qexport.runtime.server.requests import ChatRequest, GenerateRequest, ResponseFormat
from qexport.runtime.server.tools import call_schema, must_call, offered

__all__ = ["Exchange", "Service"]


class Service:
    """One model, served under one name."""

    def __init__(
        self, generator: Generator, model: str, limits: Limits, log: RequestLog | None = None
    ) -> None:
        self.generator, self.model, self.limits, self.log = generator, model, limits, log
        self.metrics = Metrics(model, generator.engine)
        if log is not None:
            self.metrics.gauge("qexport:log_lines_dropped", "Not written.", lambda: log.dropped)
        self.draining = False
        waiting = limits.queue
        self.template_lane = Lane("templates", 1, waiting)  # their process does one at a time
        self.text_lane = Lane("text", 2, waiting)
        self.grammar_lane = Lane("grammars", 1, waiting)  # likewise

    def admit(self) -> None:
        """Raise UnavailableError or QueueFullError where nothing new may begin."""
        if self.draining:
            raise UnavailableError("the server is shutting down; ask another one.")
        engine = self.generator.engine
        if engine.ended is not None:
            raise UnavailableError(str(engine.ended))
        engine.check_room()

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
        return bytes(self.generator.grammars.tokenizer.decode_bytes([token]))

    async def prepare_spelling(self) -> None:
        """Make what `spell` needs, off the event loop."""
        await self.text_lane.run(lambda: self.generator.grammars.tokenizer)

    async def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Prompt tokens of a text."""
        return await self.text_lane.run(lambda: self.generator.encode(text, special_tokens))

    async def encode_chat(self, body: ChatRequest) -> list[int]:
        """Prompt tokens of a conversation. Raises InputError where the template refuses it."""
        messages = [message.for_template() for message in body.messages]
        variables = body.template_variables()
        if offered(body):
            variables["tools"] = [tool.model_dump(exclude_none=True) for tool in offered(body)]
        text = await self.template_lane.run(lambda: self.generator.render(messages, **variables))
        return await self.encode(text, special_tokens=False)

    async def grammar(self, body: ChatRequest) -> Grammar | None:
        """What answers are held to. Raises FieldError for a schema that is not understood."""
        grammars, must = self.generator.grammars, must_call(body)
        tagged = self.generator.tags_calls
        wanted: ResponseFormat | None = body.response_format
        held = wanted is not None and wanted.type != "text"
        if must is not None:
            if not must:
                raise FieldError("tool_choice: no tool has this name.", "tool_choice")
            if held:
                text = "response_format: a call has to be made, which has a form of its own."
                raise FieldError(text, "response_format")
            schema = call_schema(must)
            return await self._compiled(lambda: grammars.json_schema(schema), "tools")
        called = call_schema(offered(body)) if offered(body) else None
        if wanted is not None and held:
            form = {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_
            answer = form or {}
            if called is None:
                return await self._compiled(lambda: grammars.json_schema(answer), "response_format")
            both = partial(grammars.calls_or, called, answer, tagged)
            return await self._compiled(both, "response_format")
        if called is not None and tagged:
            parallel = body.parallel_tool_calls is not False
            return await self._compiled(lambda: grammars.calls(called, parallel), "tools")
        return None

    async def _compiled(self, make: Callable[[], Grammar], param: str) -> Grammar:
        try:
            return await self.grammar_lane.run(make)
        except InputError as error:
            raise FieldError(f"{param}: {error}", param) from error

    def check_choices(self, prompts: int, body: GenerateRequest) -> None:
        """Raise FieldError for more answers than there may be, before any work is done."""
        most = min(self.limits.choices, self.limits.queue + self.generator.decoder.slots)
        if prompts * body.choices > most:
            param = "prompt" if prompts > most else "n"
            text = f"{param}: a request has at most {most} answers, prompts times n."
            raise FieldError(text, param)

    def jobs(
        self,
        body: GenerateRequest,
        prompts: list[list[int]],
        default: int,
        grammar: Grammar | None = None,
    ) -> list[Job]:
        """`n` answers to each prompt. Raises FieldError for what no sampler takes."""
        jobs = []
        for prompt in prompts:
            room = self.generator.room(prompt, default)
            for index in range(body.choices):
                sampling = body.sampling(body.limit() or room, self.limits, index)
                jobs.append(Job(prompt, sampling, grammar))
        return jobs


class Exchange:
    """One request whose answers are being made, from the moment that this is.

    answer    the id under which they are given
    tools     names of what they may call; parallel: more than one at a time
    """

    def __init__(
        self,
        service: Service,
        jobs: list[Job],
        record: Record,
        answer: str,
        tools: set[str] | None = None,
        parallel: bool = True,
    ) -> None:
        self.answers = Answers(service.generator.engine, jobs)
        self.choices = [Choice(tools or set(), parallel) for _ in jobs]
        self._firsts = list({id(job.prompt): n for n, job in reversed([*enumerate(jobs)])}.values())
        self.counts = Counts(sum(len(jobs[n].prompt) for n in self._firsts))
        self._record = record
        record.begun(answer, self.answers.sequences, self.counts)

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """What is new, choice by choice; counts are right at the end."""
        sequences = self.answers.sequences
        try:
            async with aclosing(self.answers):
                async for number, piece in self.answers:
                    self._record.piece(number, piece)
                    yield number, self.choices[number].add(piece)
        except QexportError as error:
            self._record.failed(error)
            raise
        finally:
            self.counts.completion = sum(len(sequence.generated) for sequence in sequences)
            self.counts.cached = sum(sequences[n].cached for n in self._firsts)

    async def finish(self) -> None:
        """Wait for all of it."""
        async with aclosing(self.deltas()) as deltas:
            async for _ in deltas:
                pass
