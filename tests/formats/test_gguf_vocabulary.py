"""GGUF: tokenizers that go into a file and come back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qexport.errors import RefusedError
from qexport.formats.gguf.vocabulary import tokenizer_of, vocabulary
from tests.formats.gguf_files import TEXTS, header_only


def trained(pre: str) -> Tokenizer:
    """A small BPE tokenizer of each kind, trained on the texts above and this file."""
    corpus = [*TEXTS, Path(__file__).read_text()]
    if pre == "spm":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
        special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator([w for text in corpus for w in text.split("\n")], trainer)
        saved = json.loads(tokenizer.to_str())
        saved["added_tokens"] = saved["added_tokens"][:3]
        return Tokenizer.from_str(json.dumps(saved))
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    elif pre == "gpt-2":
        tokenizer.pre_tokenizer = level
    else:
        numbers = r"\p{N}{1,3}" if pre == "llama-bpe" else r"\p{N}"
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
            + numbers
            + r"| ?[^\s\p{L}\p{N}]"
            r"+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|end|>", "<|user|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "spm"])
def test_tokenizers_go_there_and_back(tmp_path: Path, pre: str) -> None:
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    if pre != "spm":
        names = {"eos_token": "<|end|>"}
    PreTrainedTokenizerFast(tokenizer_object=trained(pre), **names).save_pretrained(tmp_path)
    mine = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    values = vocabulary(tmp_path, 640)
    assert values["tokenizer.ggml.pre"].value == ("default" if pre == "spm" else pre)
    assert len(values["tokenizer.ggml.tokens"].value) == 640
    back = tokenizer_of(header_only(tmp_path / "a.gguf", values, {"x": torch.zeros(1)}))
    for text in [*TEXTS, *Path(__file__).read_text().splitlines()[:200]]:
        assert back.encode(text) == mine.encode(text).ids, text
        assert back.decode(back.encode(text)) == mine.decode(mine.encode(text).ids, False)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "Unigram", "vocab": []}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
    ],
)
def test_tokenizers_that_llama_cpp_lacks_are_refused(
    tiny_model: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    spec = {**json.loads((tiny_model / "tokenizer.json").read_text()), **change}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(RefusedError, match=r"llama.cpp has no tokenizer like this one"):
        vocabulary(tmp_path, 260)
