from pathlib import Path

import pytest
import torch

from qexport.errors import InputError, QexportError
from qexport.runtime.generator import Generator, Sampling, _StopText
from qexport.runtime.loader import open_model


@pytest.fixture(scope="module")
def generator(tiny_model: Path) -> Generator:
    model, tokenizer, _ = open_model(tiny_model, "float32")
    return Generator(model, tokenizer)


def text(generator: Generator, prompt: str, sampling: Sampling) -> tuple[str, str | None, int]:
    pieces = list(generator.stream(generator.encode(prompt), sampling))
    assert all(piece.finish_reason is None for piece in pieces[:-1])
    return "".join(p.text for p in pieces), pieces[-1].finish_reason, pieces[-1].tokens


def test_greedy_is_what_transformers_generates(generator: Generator) -> None:
    prompt = generator.encode("The quick brown fox")
    expected = generator.model.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=256
    )[0, len(prompt) :]
    found = list(generator._tokens(prompt, Sampling(max_tokens=12)))
    assert found == expected.tolist()


def test_length_and_seed(generator: Generator) -> None:
    sampling = Sampling(max_tokens=20, temperature=1.0, top_p=0.9, seed=5)
    first = text(generator, "hello", sampling)
    assert first == text(generator, "hello", sampling)
    assert first != text(generator, "hello", Sampling(20, 1.0, 0.9, seed=6))
    assert first[1:] == ("length", 20)


def test_it_ends_at_the_end_token(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(generator._tokens(generator.encode("abc"), Sampling(max_tokens=1)))
    monkeypatch.setattr(generator, "_end", frozenset([first]))
    assert text(generator, "abc", Sampling(max_tokens=9)) == ("", "stop", 1)


def test_top_p_keeps_the_smallest_set(generator: Generator) -> None:
    greedy = text(generator, "hello", Sampling(max_tokens=10))
    assert text(generator, "hello", Sampling(10, temperature=2.0, top_p=1e-6)) == greedy


@pytest.mark.parametrize("chunks", [["ab", "cSTO", "P", "x"], ["abcSTOPx"], list("abcSTOPx")])
def test_stop_strings_across_pieces(chunks: list[str]) -> None:
    stopper = _StopText(("STOP", "never"))
    shown = ""
    for chunk in chunks:
        shown += stopper.feed(chunk)
        if stopper.found:
            break
    assert (shown, stopper.found) == ("abc", True)


def test_text_held_for_a_stop_that_does_not_come_is_given_back() -> None:
    stopper = _StopText(("STOP",))
    assert stopper.feed("abST") == "ab"
    assert stopper.feed("AR") == "STAR"
    assert stopper.feed("S") == ""
    assert stopper.rest() == "S"


def test_characters_of_several_tokens_come_whole(generator: Generator) -> None:
    from tokenizers.decoders import DecodeStream

    ids = generator.encode("naïve 🙂")
    assert len(ids) > len("naïve 🙂")
    stream = DecodeStream(skip_special_tokens=True)
    parts = [stream.step(generator.tokenizer.backend_tokenizer, i) for i in ids]
    assert "".join(part or "" for part in parts) == "naïve 🙂"
    assert "🙂" in parts


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 5, "prompt is empty"),
        ([1] * 500, 13, "does not fit the context of 512"),
        ([9999], 5, "token 9999 is not in the model's vocabulary"),
    ],
)
def test_bad_prompts(
    generator: Generator, prompt: list[int], max_tokens: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        generator.stream(prompt, Sampling(max_tokens=max_tokens))


def test_nan_is_an_error_and_not_a_row_of_exclamation_marks(tiny_model: Path) -> None:
    model, tokenizer, _ = open_model(tiny_model, "float32")
    model.model.norm.weight.data.fill_(float("nan"))
    broken = Generator(model, tokenizer)
    with pytest.raises(QexportError, match="gave NaN"):
        list(broken.stream([1, 2], Sampling(max_tokens=2)))
