"""Requests as users make them: greedy text, ends, stops, cancellation, errors."""

import threading
from collections.abc import Iterator
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor

import qexport
from qexport.errors import InputError, QexportError
from qexport.runtime.generator import Generator, Sampling
from qexport.runtime.loader import open_model
from qexport.runtime.model import Decoder, Span
from qexport.runtime.scheduler import QueueFullError
from qexport.runtime.serving import Serving, open_generator
from qexport.runtime.text import StopText, TextStream

EXACT = Serving(slots=3, kernel="cpu-exact", cache="float32")


@pytest.fixture(scope="module", params=["cpp", "torch"])
def generator(tiny_model: Path, request: pytest.FixtureRequest) -> Iterator[Generator]:
    serving = EXACT if request.param == "cpp" else Serving(slots=3, kernel="reference")
    with open_generator(tiny_model, serving) as opened:
        yield opened


def text(generator: Generator, prompt: str, sampling: Sampling) -> tuple[str, str | None, int]:
    pieces = list(generator.stream(generator.encode(prompt), sampling))
    assert all(piece.finish_reason is None for piece in pieces[:-1])
    return "".join(p.text for p in pieces), pieces[-1].finish_reason, pieces[-1].tokens


def tokens(generator: Generator, prompt: list[int], sampling: Sampling) -> list[int | None]:
    return [piece.token for piece in generator.stream(prompt, sampling)]


def test_greedy_is_what_transformers_generates(generator: Generator, tiny_model: Path) -> None:
    model, _, _ = open_model(tiny_model, "float32")
    for words in ("The quick brown fox", "x", "naïve 🙂"):
        prompt = generator.encode(words)
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=30, do_sample=False, pad_token_id=256
        )[0, len(prompt) :]
        assert tokens(generator, prompt, Sampling(max_tokens=30)) == expected.tolist()


def test_greedy_does_not_depend_on_the_batch(generator: Generator) -> None:
    prompts = [generator.encode(f"{n} little words " * n) for n in range(1, 8)]
    alone = [tokens(generator, prompt, Sampling(max_tokens=20)) for prompt in prompts]
    tickets = [generator.stream(prompt, Sampling(max_tokens=20)) for prompt in prompts]
    assert [[piece.token for piece in ticket] for ticket in tickets] == alone


def test_what_a_slot_holds_is_not_run_again(generator: Generator) -> None:
    prompt = generator.encode("A sentence that is long enough to be worth keeping.")
    first = list(generator.stream(prompt, Sampling(max_tokens=5)))
    again = list(generator.stream(prompt, Sampling(max_tokens=5)))
    assert again[0].cached == len(prompt) - 1
    assert [piece.token for piece in again] == [piece.token for piece in first]


def test_length_and_seed(generator: Generator) -> None:
    sampling = Sampling(max_tokens=20, temperature=1.0, top_p=0.9, seed=5)
    first = text(generator, "hello", sampling)
    assert first == text(generator, "hello", sampling)
    assert first != text(generator, "hello", Sampling(20, 1.0, 0.9, seed=6))
    assert first[1:] == ("length", 20)


def test_it_ends_at_the_end_token(tiny_model: Path) -> None:
    with open_generator(tiny_model, EXACT) as plain:
        first = tokens(plain, plain.encode("abc"), Sampling(max_tokens=1))[0]
        assert first is not None
        with Generator(plain.decoder, plain.tokenizer, frozenset([first])) as ending:
            assert text(ending, "abc", Sampling(max_tokens=9)) == ("", "stop", 1)
            assert text(ending, "abc", Sampling(9, ignore_end=True))[1:] == ("length", 9)


def test_a_stop_string_ends_it(generator: Generator) -> None:
    whole, _, _ = text(generator, "hello", Sampling(max_tokens=30))
    stop = whole[5:8]
    found, reason, count = text(generator, "hello", Sampling(max_tokens=30, stop=(stop,)))
    assert (found, reason) == (whole[: whole.index(stop)], "stop")
    assert count < 30


@pytest.mark.parametrize("chunks", [["ab", "cSTO", "P", "x"], ["abcSTOPx"], list("abcSTOPx")])
def test_stop_strings_across_pieces(chunks: list[str]) -> None:
    stopper = StopText(("STOP", "never"))
    shown = ""
    for chunk in chunks:
        shown += stopper.feed(chunk)
        if stopper.found:
            break
    assert (shown, stopper.found) == ("abc", True)


def test_text_held_for_a_stop_that_does_not_come_is_given_back() -> None:
    stopper = StopText(("STOP",))
    assert stopper.feed("abST") == "ab"
    assert stopper.feed("AR") == "STAR"
    assert stopper.feed("S") == ""
    assert stopper.rest() == "S"


def test_characters_of_several_tokens_come_whole(generator: Generator) -> None:
    ids = generator.encode("naïve 🙂")
    assert len(ids) > len("naïve 🙂")
    stream = TextStream(generator.tokenizer.backend_tokenizer, [], ())
    parts = [stream.add(i) for i in ids]
    assert "".join(parts) == "naïve 🙂"
    assert "🙂" in parts
    assert stream.rest() == ""


def test_a_prompt_is_never_given_back(generator: Generator) -> None:
    """Not even one that ends within a character, or in the sign for a broken one."""
    backend = generator.tokenizer.backend_tokenizer
    for prompt in (generator.encode("secret \ufffd"), generator.encode("secret 🙂")[:-1]):
        stream = TextStream(backend, prompt, ("secret",))
        shown = "".join(stream.add(i) for i in generator.encode("ab")) + stream.rest()
        assert shown == "ab" and not stream.stopped


def test_a_broken_character_at_the_end_is_told(generator: Generator) -> None:
    stream = TextStream(generator.tokenizer.backend_tokenizer, [], ())
    parts = [stream.add(i) for i in [*generator.encode("x"), *generator.encode("🙂")[:2]]]
    assert "".join(parts) == "x"
    assert set(stream.rest()) == {"\ufffd"}
    assert stream.rest() == ""


def test_bytes_that_are_no_text_do_not_end_an_answer() -> None:
    """Byte fallback, as Llama 2 has it: a newline's byte, then one that is no character."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    stream = TextStream(tokenizer, [vocabulary["a"]], ())
    ids = [vocabulary[name] for name in ("<0x0A>", "<0xFF>", "a", *["<0xFE>"] * 40, "a")]
    shown = "".join(stream.add(i) for i in ids) + stream.rest()
    assert shown.endswith("a") and shown.count("\ufffd") >= 30


def test_threads_that_begin_together_share_one_engine(tiny_model: Path) -> None:
    with open_generator(tiny_model, EXACT) as opened:
        barrier, found = threading.Barrier(8), []

        def begin() -> None:
            barrier.wait()
            found.append(opened.engine)

        threads = [threading.Thread(target=begin) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(engine) for engine in found}) == 1


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 5, "prompt is empty"),
        ([1] * 500, 13, "does not fit the context of 512"),
        ([9999], 5, "token 9999 is not in the model's vocabulary"),
        ([-1], 5, "is not in the model's vocabulary"),
    ],
)
def test_bad_prompts(
    generator: Generator, prompt: list[int], max_tokens: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        generator.stream(prompt, Sampling(max_tokens=max_tokens))


def test_a_closed_request_gives_its_slot_back(generator: Generator) -> None:
    tickets = [generator.stream([1, 2], Sampling(max_tokens=400)) for _ in range(5)]
    for ticket in tickets:
        ticket.close()
        ticket.close()
        assert list(ticket)[-1].finish_reason == "cancelled"
    assert text(generator, "hello", Sampling(max_tokens=3))[2] == 3


class Faulty(Decoder):
    """A decoder whose steps break, or give NaN, where a token says so."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.slots, self.context = decoder.slots, decoder.context
        self.vocabulary, self.kernels = decoder.vocabulary, decoder.kernels

    def forward(self, spans: Many[Span]) -> Tensor:
        if any(66 in span.tokens for span in spans):
            raise RuntimeError("a broken step")
        logits = self._decoder.forward(spans).clone()
        for row, span in zip(logits, [span for span in spans if span.logits], strict=True):
            if 67 in span.tokens:
                row[5] = float("nan")
        return logits


def test_a_fault_ends_one_request(tiny_model: Path) -> None:
    with open_generator(tiny_model, EXACT) as plain:
        want = tokens(plain, [1, 2, 3], Sampling(max_tokens=8))
        with Generator(Faulty(plain.decoder), plain.tokenizer) as generator:
            prompts = ([1, 2, 3], [1, 66], [1, 67], [1, 2, 3])
            tickets = [
                generator.stream(p, Sampling(max_tokens=8, ignore_end=True)) for p in prompts
            ]
            assert [piece.token for piece in tickets[0]] == want
            with pytest.raises(RuntimeError, match="a broken step"):
                list(tickets[1])
            with pytest.raises(QexportError, match="gave NaN"):
                list(tickets[2])
            assert [piece.token for piece in tickets[3]] == want


def test_the_queue_is_bounded(tiny_model: Path) -> None:
    with open_generator(tiny_model, EXACT) as plain:
        gate = threading.Event()

        class Waiting(Faulty):
            def forward(self, spans: Many[Span]) -> Tensor:
                gate.wait(30)
                return super().forward(spans)

        with Generator(Waiting(plain.decoder), plain.tokenizer, waiting=2) as generator:
            tickets = [generator.stream([1], Sampling(max_tokens=2)) for _ in range(2)]
            with pytest.raises(QueueFullError, match="2 requests are waiting"):
                # three have slots by and by
                tickets.extend(generator.stream([1], Sampling(max_tokens=2)) for _ in range(4))
            gate.set()
            assert all(list(ticket)[-1].finish_reason for ticket in tickets)


def test_a_closed_engine_fails_what_runs(tiny_model: Path) -> None:
    generator = open_generator(tiny_model, EXACT)
    ticket = generator.stream([1], Sampling(max_tokens=500))
    engine = generator.engine
    generator.close()
    with pytest.raises(QexportError, match="the engine has ended"):
        list(ticket)
    with pytest.raises(QexportError, match="the engine has ended"):
        engine.submit([1], Sampling(max_tokens=1))


def test_tokens_without_text_are_not_decoded_again_and_again(generator: Generator) -> None:
    """Special ones, say, of which a client may ask for a whole context."""
    backend = generator.tokenizer.backend_tokenizer
    longest = 0

    class Watched:
        def decode(self, tokens: list[int], **options: Any) -> str:
            nonlocal longest
            longest = max(longest, len(tokens))
            return str(backend.decode(tokens, **options))

    end = generator.tokenizer.eos_token_id
    stream = TextStream(Watched(), generator.encode("ab"), ())
    assert "".join(stream.add(end) for _ in range(1000)) == ""
    assert longest < 100
    assert "".join(stream.add(i) for i in generator.encode("c 🙂")) + stream.rest() == "c 🙂"


def test_no_tokens_are_none(generator: Generator) -> None:
    with pytest.raises(InputError):
        qexport.generate(generator, "a", max_tokens=0)
