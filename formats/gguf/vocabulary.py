"""The tokenizer: tokenizer.json as GGUF metadata, and back.

Two kinds are known: byte-level BPE (`gpt2`), where llama.cpp has the splitting of text compiled in
under a name (`tokenizer.ggml.pre`), and SentencePiece's BPE with byte fallback (`llama`). A
tokenizer whose parts llama.cpp does not have is refused. Two things it does otherwise are let pass:
it does not normalize to NFC, and it merges SentencePiece's pieces by the score of the whole.
"""

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexport.errors import CheckpointError, RefusedError
from qexport.formats.gguf.container import GgufFile, Value

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["tokenizer_of", "vocabulary"]

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama-bpe": _CL100K % "1,3",
    "qwen2": _CL100K.replace("{%s}", ""),
}
_SPACE = "▁"
_MOST_MERGES = 1 << 20  # four times what the largest vocabularies known have


def vocabulary(folder: Path, size: int) -> dict[str, Value]:
    """The tokenizer of a Hugging Face folder as metadata, for a model of `size` embeddings.

    Raises RefusedError where llama.cpp has no such tokenizer, CheckpointError for none at all.
    """
    try:
        return _vocabulary(folder, size)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{folder}/tokenizer.json is not what the tokenizers library writes ({error!r})."
        ) from error


def _vocabulary(folder: Path, size: int) -> dict[str, Value]:
    spec = _read(folder / "tokenizer.json")
    if spec is None:
        raise CheckpointError(
            f"{folder} has no tokenizer.json, which gguf carries inside; save the tokenizer with "
            "transformers' save_pretrained first."
        )
    config = {
        **(_read(folder / "special_tokens_map.json") or {}),
        **(_read(folder / "tokenizer_config.json") or {}),
    }
    model = spec.get("model") or {}
    if model.get("type") != "BPE":
        raise _unknown(f"a {model.get('type')} tokenizer")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise _unknown(key)
    tokens, types = _tokens(spec, size)
    pre = _pre_tokenizer(spec)
    values = {
        "tokenizer.ggml.model": Value("str", "llama" if pre is None else "gpt2"),
        "tokenizer.ggml.pre": Value("str", pre or "default"),
        "tokenizer.ggml.tokens": Value("[str]", tokens),
    }
    if pre is None:
        values["tokenizer.ggml.scores"] = Value("[f32]", _scores(model, tokens))
        values["tokenizer.ggml.add_space_prefix"] = Value("bool", _adds_space(spec))
        unknown = tokens.index(model["unk_token"]) if model.get("unk_token") in tokens else None
        types = _sentencepiece_types(tokens, types, unknown)
    else:
        merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
        values["tokenizer.ggml.merges"] = Value("[str]", merges)
    values["tokenizer.ggml.token_type"] = Value("[i32]", types)
    return {**values, **_special(folder, config, tokens), **_template(folder, config)}


def tokenizer_of(file: GgufFile) -> Any:
    """A transformers tokenizer of a file's metadata. Raises CheckpointError for an unknown one."""
    from transformers import PreTrainedTokenizerFast

    kind = file.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"{file.path}: a {kind[:40]!r} tokenizer is not read.")
    tokens = file.strings("tokenizer.ggml.tokens")
    types = file.numbers("tokenizer.ggml.token_type").tolist()
    if len(types) != len(tokens):
        raise file.damaged("tokenizer.ggml.token_type is not as long as the tokens")
    try:
        backend = (_byte_level if kind == "gpt2" else _sentencepiece)(file, tokens)
        _add_special(backend, tokens, types)
        names = _named(file, tokens)
        _add_template(backend, file, names)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises its errors as bare Exceptions
        raise file.damaged(f"its tokenizer does not fit together ({error})") from error
    if "tokenizer.chat_template" in file:
        tokenizer.chat_template = file.text("tokenizer.chat_template")
    return tokenizer


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold an object.")
    return value


def _unknown(what: str) -> RefusedError:
    return RefusedError(f"llama.cpp has no tokenizer like this one ({what}); native holds it.")


def _tokens(spec: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and type of every id; ids that the tokenizer leaves out are unused."""
    by_id: dict[int, tuple[str, int]] = {
        index: (token, _NORMAL) for token, index in spec["model"]["vocab"].items()
    }
    for added in spec.get("added_tokens") or []:
        if added.get("lstrip") or added.get("rstrip") or added.get("single_word"):
            raise _unknown(f"the token {added['content']!r} takes in what stands beside it")
        by_id[added["id"]] = (added["content"], _CONTROL if added["special"] else _USER)
    if by_id and max(by_id) >= size:
        raise CheckpointError(
            f"the tokenizer has the id {max(by_id)} and the model {size} embeddings."
        )
    found = [by_id.get(index, (f"[PAD{index}]", _UNUSED)) for index in range(size)]
    return [token for token, _ in found], [kind for _, kind in found]


def _pre_tokenizer(spec: dict[str, Any]) -> str | None:
    """llama.cpp's name for how text is split before BPE, or None for SentencePiece's way."""
    steps = _flat(spec.get("pre_tokenizer"), "pretokenizers")
    kinds = [step.get("type") for step in steps]
    normalizers = [step.get("type") for step in _flat(spec.get("normalizer"), "normalizers")]
    if "ByteLevel" not in kinds:
        spaces = all(kind in ("Prepend", "Replace") for kind in normalizers)
        if spec["model"].get("byte_fallback") and kinds in ([], ["Metaspace"]) and spaces:
            return None
        raise _unknown(f"splitting by {', '.join(map(str, kinds)) or 'nothing'}")
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise _unknown("a space before the text")
    if normalizers not in ([], ["NFC"]):
        raise _unknown(f"normalization by {', '.join(map(str, normalizers))}")
    if spec["model"].get("ignore_merges") and kinds != ["Split", "ByteLevel"]:
        raise _unknown("whole words before merges")
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        return "gpt-2"
    digits = kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits")
    if digits and last.get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        pattern = (steps[0].get("pattern") or {}).get("Regex")
        plain = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        whole_words = bool(spec["model"].get("ignore_merges"))
        for name, regex in _SPLITS.items():
            if pattern == regex and plain and whole_words == (name == "llama-bpe"):
                return name
    raise _unknown(f"splitting by {', '.join(map(str, kinds))}")


def _flat(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if not step:
        return []
    return list(step.get(inner) or []) if step.get("type") == "Sequence" else [step]


def _adds_space(spec: dict[str, Any]) -> bool:
    for step in _flat(spec.get("normalizer"), "normalizers"):
        if step.get("type") == "Prepend":
            return True
    for step in _flat(spec.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace":
            return bool(step.get("prepend_scheme", "always") != "never")
    return False


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """SentencePiece's order of merging: minus the rank of the first merge that makes a piece."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model.get("merges", [])):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    last = float(len(ranks))
    return [-float(ranks[token]) if token in ranks else -last for token in tokens]


def _sentencepiece_types(tokens: list[str], types: list[int], unknown: int | None) -> list[int]:
    byte = re.compile(r"<0x[0-9A-F]{2}>")
    found = [_BYTE if byte.fullmatch(t) else kind for t, kind in zip(tokens, types, strict=True)]
    if unknown is not None:
        found[unknown] = _UNKNOWN
    return found


def _special(folder: Path, config: dict[str, Any], tokens: list[str]) -> dict[str, Value]:
    values = {}
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for name, theirs in names.items():
        token = config.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        index = tokens.index(text) if text in tokens else _config_id(folder, name)
        if index is not None and 0 <= index < len(tokens):
            values[f"tokenizer.ggml.{theirs}_token_id"] = Value("u32", index)
    adds_bos, adds_eos = _adds_special(folder, tokens, values)
    values["tokenizer.ggml.add_bos_token"] = Value("bool", adds_bos)
    values["tokenizer.ggml.add_eos_token"] = Value("bool", adds_eos)
    return values


def _config_id(folder: Path, name: str) -> int | None:
    """An id that only the model's config names; the first where it names several."""
    found = (_read(folder / "config.json") or {}).get(f"{name}_token_id")
    first = found[0] if isinstance(found, list) and found else found
    return first if type(first) is int else None


def _adds_special(folder: Path, tokens: list[str], values: dict[str, Value]) -> tuple[bool, bool]:
    """Whether the tokenizer itself puts bos before a text and eos after it, by trying."""
    backend = _backend(folder / "tokenizer.json", (folder / "tokenizer.json").stat().st_mtime_ns)
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
    if at is None:
        raise _unknown("special tokens within the text")
    bos = [values[k].value for k in ("tokenizer.ggml.bos_token_id",) if k in values]
    eos = [values[k].value for k in ("tokenizer.ggml.eos_token_id",) if k in values]
    before, after = whole[:at], whole[at + len(plain) :]
    if before not in ([], bos) or after not in ([], eos):
        raise _unknown(f"it surrounds text with {[tokens[i] for i in before + after]}")
    return bool(before), bool(after)


@lru_cache(2)
def _backend(path: Path, _: int) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises its errors as bare Exceptions
        raise CheckpointError(f"{path} is damaged ({error}).") from error


def _template(folder: Path, config: dict[str, Any]) -> dict[str, Value]:
    path = folder / "chat_template.jinja"
    found = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(found, list):  # several by name
        named = {one.get("name"): one.get("template") for one in found}
        found = named.get("default")
    return {"tokenizer.chat_template": Value("str", found)} if isinstance(found, str) else {}


def _byte_level(file: GgufFile, tokens: list[str]) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = file.text("tokenizer.ggml.pre", "gpt-2")
    merges = []
    key = "tokenizer.ggml.merges"
    for merge in file.strings(key) if key in file else []:  # gguf-py leaves out an empty list
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _SPLITS)
    if pre in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[pre]), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    elif pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, whole])
    elif pre in ("gpt-2", "default"):
        backend.pre_tokenizer = whole
    else:
        raise CheckpointError(f"{file.path}: text split the {pre[:40]!r} way is not read.")
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(file: GgufFile, tokens: list[str]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.numbers("tokenizer.ggml.scores").tolist()
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = tokens[file.integer("tokenizer.ggml.unknown_token_id", 0)]
    merges = _merges_of(vocab, scores)
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = file.flag("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return backend


def _merges_of(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, in the order of its score and then of its parts."""
    found = []
    for piece, index in vocab.items():
        pairs = [  # no piece of a real vocabulary is longer
            (vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:])
            for cut in range(1, len(piece) if len(piece) <= 64 else 0)
            if piece[:cut] in vocab and piece[cut:] in vocab
        ]
        found += [(-scores[index], *pair) for pair in pairs]
        if len(found) > _MOST_MERGES:
            raise CheckpointError(f"its pieces come together in more than {_MOST_MERGES} ways.")
    return [(left, right) for *_, left, right in sorted(found)]


def _add_special(backend: "Tokenizer", tokens: list[str], types: list[int]) -> None:
    from tokenizers import AddedToken

    for kind, special in ((_CONTROL, True), (_UNKNOWN, True), (_USER, False)):
        named = [token for token, its in zip(tokens, types, strict=True) if its == kind]
        added = [AddedToken(token, special=special, normalized=False) for token in named]
        (backend.add_special_tokens if special else backend.add_tokens)(added)


def _named(file: GgufFile, tokens: list[str]) -> dict[str, str]:
    names = {}
    for name, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        key = f"tokenizer.ggml.{theirs}_token_id"
        if key in file and 0 <= file.integer(key) < len(tokens):
            names[f"{name}_token"] = tokens[file.integer(key)]
    return names


def _add_template(backend: "Tokenizer", file: GgufFile, names: dict[str, str]) -> None:
    """Have the tokenizer put bos and eos where the file says so."""
    from tokenizers import processors

    is_spm = file.text("tokenizer.ggml.model") == "llama"
    wanted = {
        "bos_token": file.flag("tokenizer.ggml.add_bos_token", is_spm),
        "eos_token": file.flag("tokenizer.ggml.add_eos_token", False),
    }
    around = {k: names[k] for k, wants in wanted.items() if wants and k in names}
    if not around:
        return
    single = [*[around[k] for k in ("bos_token",) if k in around], "$A"]
    single += [around[k] for k in ("eos_token",) if k in around]
    ids = [(token, backend.token_to_id(token)) for token in set(around.values())]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
