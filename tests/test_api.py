"""The calls that `import qexport` gives: the command line's jobs from Python."""

from dataclasses import asdict, fields
from pathlib import Path

import pytest

import qexport
from qexport.cli.quantize import command as quantize_command
from qexport.cli.train import command as train_command


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RUN by the calls, its settings as a user of the command line would write them."""
    output = tmp_path_factory.mktemp("api") / "run"
    config = qexport.TrainConfig(
        model=str(tiny_model),  # type: ignore[arg-type]  # text does, too
        data="builtin",
        output=str(output),  # type: ignore[arg-type]
        bits=2,  # type: ignore[arg-type]
        group_size=32,
        max_steps=2,
        max_length=32,
    )
    results = qexport.train(config)
    assert results["steps"] == 2
    assert (config.bits, config.output) == ("2", output)
    return output


def test_exported_names() -> None:
    assert qexport.__all__ == dir(qexport)
    assert set(qexport._HOMES) == set(qexport.__all__) - {"__version__"}
    calls = {"generate", "load", "pack", "quantize", "train", "verify"}
    assert calls < set(qexport.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = qexport.nothing


def test_a_run_is_packed_verified_and_asked(run: Path, tmp_path: Path) -> None:
    report = qexport.pack(str(run), tmp_path / "packed")
    assert report.exact and report.format == "native"
    assert qexport.verify(run, tmp_path / "packed").exact
    with qexport.load(tmp_path / "packed", qexport.Serving(context=64)) as model:
        text = qexport.generate(model, "The language", max_tokens=8)
        again = qexport.generate(model, "The language", max_tokens=8)
        answer = qexport.generate(
            model, [{"role": "user", "content": "Hello"}], max_tokens=4, temperature=1.0, seed=1
        )
    assert text == again
    with pytest.raises(qexport.QexportError, match="was closed"):
        qexport.generate(model, "The language", max_tokens=8)
    assert isinstance(answer, str)
    assert qexport.generate(tmp_path / "packed", "The language", max_tokens=8) == text


def test_pack_says_what_it_cannot_hold(run: Path, tmp_path: Path) -> None:
    with pytest.raises(qexport.QexportError, match=r"Formats that hold it exactly: .*native"):
        qexport.pack(run, tmp_path / "out", "gguf", type="q3_k")
    assert not (tmp_path / "out").exists()


def test_pack_takes_no_words_that_it_does_not_know(run: Path, tmp_path: Path) -> None:
    with pytest.raises(qexport.QexportError, match="--embeddings q4_0: there are exact, f16"):
        qexport.pack(run, tmp_path / "out", "gguf", embeddings="q4_0")


def test_verify_tells_another_run(run: Path, runs: "object", tmp_path: Path) -> None:
    other = runs("3")  # type: ignore[operator]
    qexport.pack(run, tmp_path / "packed", "gptq", bits=4)
    assert not qexport.verify(other, tmp_path / "packed").exact


def test_quantize_and_settings_as_on_the_command_line(tiny_model: Path, tmp_path: Path) -> None:
    config = qexport.QuantizeConfig(
        model=tiny_model, output=tmp_path / "run", method="rtn", bits="4", group_size=-1
    )
    assert config.group_size is None
    results = qexport.quantize(config, progress=False)
    assert len(results["layers"]) == 14
    missing = qexport.QuantizeConfig(
        model=tmp_path / "no such", output=tmp_path / "other", method="rtn", bits="4"
    )
    with pytest.raises(qexport.QexportError, match="does not exist"):
        qexport.quantize(missing)


def test_settings_are_the_options() -> None:
    """Every field of the settings is an option of its command, and every option a field."""
    beside = {"as_json", "config", "dry_run", "help"}
    named = {parameter.name for parameter in train_command.params} - beside
    assert named - {"smoke"} == {field.name for field in fields(qexport.TrainConfig)}
    named = {parameter.name for parameter in quantize_command.params} - beside
    own = {field.name for field in fields(qexport.QuantizeConfig)} - {"gptq", "signround"}
    gptq, learning = asdict(qexport.GptqOptions()), asdict(qexport.SignRoundOptions())
    assert own | set(gptq) < named < own | set(gptq) | set(learning)
