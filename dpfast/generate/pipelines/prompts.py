"""Class names to prompts, and those to tables of embeddings: one or more rows a class, and a last
one for the negative prompt, which is empty unless its user has one.

Each prompt passes the text encoders once, when a pipeline is loaded; the encoders are dropped after
that. In half precision a prompt takes 118 kB for Stable Diffusion 1.5 and 2.7 MB for Stable
Diffusion 3 (derived: 77 tokens of 768, 333 of 4096).
"""

from __future__ import annotations

import contextlib
import inspect
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpfast import imagenet
from dpfast.errors import InputError
from dpfast.extras import require
from dpfast.files import there
from dpfast.generate.models.denoiser import PromptRows
from dpfast.generate.pipelines.folder import PipelineFolder
from dpfast.labels import shortened
from dpfast.textfiles import read_json

PROMPTS_AT_ONCE = 64
TOKENIZERS = {  # the classes of transformers, by those of the encoders
    "CLIPTextModel": "CLIPTokenizer",
    "CLIPTextModelWithProjection": "CLIPTokenizer",
    "T5EncoderModel": "T5TokenizerFast",
    "Gemma2Model": "GemmaTokenizerFast",
}
EVERY = "*"  # in a file of prompts: all classes that it does not name


@dataclass(frozen=True)
class Prompts:
    """The prompts of the classes of a pipeline with text.

    template: a prompt with "{}" for the class name. file: of prompts by class, in its place: a JSON
    table from the name of a class, or its WordNet id, to a prompt or a list of them, in which "{}"
    stands for the class name as well; "*" stands for all other classes. negative: the prompt that
    classifier-free guidance leads away from.

    A class of ImageNet that is called by its WordNet id is asked for by its name.
    """

    template: str = "a photo of a {}"
    file: str = ""
    negative: str = ""

    @property
    def given(self) -> str:
        """The argument that only a pipeline with text prompts takes; empty for none."""
        return "prompts" if self.file else "negative_prompt" if self.negative else ""

    def of(self, names: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
        """Returns the prompts of each class.

        Raises ``InputError`` where the template does not have exactly one "{}", for a file that
        cannot be used, and for a name that is a WordNet id outside of ImageNet.
        """
        if not isinstance(self.template, str) or self.template.count("{}") != 1:
            raise InputError(
                f"prompt_template = {self.template!r}: expected text with one '{{}}' for the class "
                "name"
            )
        listed = _read(self.file, names) if self.file else [(self.template,)] * len(names)
        return tuple(
            tuple(_filled(text, name) for text in texts)
            for texts, name in zip(listed, names, strict=True)
        )

    def texts(self, names: tuple[str, ...]) -> list[str]:
        """Returns all prompts, class by class, and the negative one behind them. Raises what ``of``
        raises.
        """
        return [text for texts in self.of(names) for text in texts] + [self.negative]

    def rows(self, names: tuple[str, ...], device: torch.device) -> PromptRows | None:
        """Returns the rows of each class among ``texts``; None where every class has one."""
        counts = [len(texts) for texts in self.of(names)]
        return None if set(counts) == {1} else PromptRows(counts, device)


def _filled(text: str, name: str) -> str:
    """Returns a prompt with the class name in it, as people call the class."""
    if "{}" not in text:
        return text
    known = imagenet.load()
    if imagenet.WORDNET_ID.fullmatch(name.strip()):
        if name.strip() not in known.ids:
            raise InputError(
                f"class_names: {name!r} is a WordNet id and no prompt; name the class, or say "
                "--prompts FILE"
            )
        name = known.names[known.ids.index(name.strip())]
    return text.replace("{}", name)


def _read(file: str, names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Returns the prompts of each class in a file."""
    where = f"prompts = {file!r}"
    try:
        table = read_json(Path(file))
    except FileNotFoundError:
        raise InputError(f"{where}: no such file; expected JSON, class names to prompts") from None
    if not isinstance(table, dict):
        raise InputError(f"{where}: expected a table of class names and prompts")
    called: dict[str, list[int]] = {}
    with contextlib.suppress(InputError):  # a name of two classes
        for label, wordnet_id in enumerate(imagenet.load().ids_of(names) or ()):
            called[wordnet_id] = [label]
    for label, name in enumerate(names):
        if called.get(_nfc(name)) != [label]:
            called.setdefault(_nfc(name), []).append(label)
    found: dict[int, tuple[str, ...]] = {}
    for key, value in table.items():
        texts = [value] if isinstance(value, str) else value
        right = isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts)
        if not right or not all(text.strip() for text in texts):
            raise InputError(
                f"{where}: {key!r} has {shortened(value)}; expected a prompt or a list of them, "
                "none of them empty"
            )
        if key == EVERY:
            continue
        labels = called.get(_nfc(key), [])
        if not labels:
            some = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
            raise InputError(f"{where}: {key!r} is none of the class names {some}")
        if len(labels) > 1:
            raise InputError(
                f"{where}: {key!r} is the name of classes {labels[0]} and {labels[1]}; say their "
                "WordNet ids"
            )
        (label,) = labels
        if label in found:
            raise InputError(f"{where}: {key!r} is the class {names[label]!r}, which it has twice")
        found[label] = tuple(texts)
    others = table.get(EVERY)
    lacking = [name for label, name in enumerate(names) if label not in found]
    if lacking and others is None:
        more = f" and {len(lacking) - 1} more classes" if len(lacking) > 1 else ""
        raise InputError(
            f"{where}: has no prompts of {lacking[0]!r}{more}; {EVERY!r} stands for all others"
        )
    rest = (others,) if isinstance(others, str) else tuple(others or ())
    return [found.get(label, rest) for label in range(len(names))]


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip())


def blank(
    folder: PipelineFolder, prompts: list[str], width: int, *, more: int = 0, tokens: int = 0
) -> torch.Tensor:
    """Returns embeddings (len(prompts), tokens, width) on the device meta; 0 tokens: as many as the
    part "text_encoder" gives, or CLIP's 77, and ``more``.
    """
    if tokens:
        return torch.empty(len(prompts), tokens, width, device="meta")
    known = folder.config("text_encoder") if folder.has("text_encoder") else {}
    tokens = int(known.get("max_position_embeddings") or 77) + more
    return torch.empty(len(prompts), tokens, width, device="meta")


def without_padding(
    embeddings: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns embeddings (n, tokens, width) as long as the longest prompt, up to the next multiple
    of 8, and what attention adds at their tokens, (n, 1, tokens): 0, and -10000 at padding.

    mask: (n, tokens), 1 at a prompt's own tokens, which come first. What is cut off is padding in
    all of them, at which no image looks; nothing is where a prompt has no token of its own.
    """
    lengths = mask.sum(1)
    most = -(-int(lengths.max()) // 8) * 8 if int(lengths.min()) else mask.shape[1]
    bias = (1 - mask[:, None, :most].to(embeddings.dtype)) * -10000.0
    return embeddings[:, :most].contiguous(), bias


def transformers_library() -> Any:
    """Returns the library of the text encoders, which pipelines without text do without."""
    require("transformers")
    import transformers

    return transformers


def encoding_pipeline(
    folder: PipelineFolder,
    kind: Any,
    encoders: Mapping[str, str],
    device: torch.device,
    dtype: torch.dtype,
    **others: Any,
) -> Any:
    """Returns a pipeline of diffusers of this kind, of which the text encoders and their tokenizers
    alone exist, and what ``others`` gives.

    encoders: of each part the class of transformers.
    """
    given: dict[str, Any] = dict(others)
    for part, named in encoders.items():
        given[part] = encoder(
            folder, getattr(transformers_library(), named), part, device=device, dtype=dtype
        )
        beside = part.replace("text_encoder", "tokenizer")
        given[beside] = tokenizer(folder, beside, TOKENIZERS[named])
    names = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    return kind(**dict.fromkeys(names) | given)


def encoded(
    encode: Callable[[list[str]], Sequence[torch.Tensor]], prompts: list[str]
) -> list[torch.Tensor]:
    """Returns the tables that ``encode`` makes of some of the prompts, for all of them."""
    parts = [prompts[i : i + PROMPTS_AT_ONCE] for i in range(0, len(prompts), PROMPTS_AT_ONCE)]
    return [torch.cat(table) for table in zip(*map(encode, parts), strict=True)]


def encoder(
    folder: PipelineFolder, kind: Any, part: str, *, device: torch.device, dtype: torch.dtype
) -> Any:
    logging = transformers_library().utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return folder.model(kind, part, device=device, dtype=dtype)
    finally:
        if shown:
            logging.enable_progress_bar()


def tokenizer(folder: PipelineFolder, part: str, named: str) -> Any:
    folder.need(part)
    kind, place = getattr(transformers_library(), named), folder.path / part
    # without its files transformers makes a tokenizer that knows no word, and says nothing
    files = dict(kind.vocab_files_names)
    whole = files.pop("tokenizer_file", "tokenizer.json")
    parts = list(files.values()) or ["tokenizer.model"]
    if not there(place / whole) and not all(there(place / name) for name in parts):
        raise folder.lacking(
            f"{part!r} has no words: expected {whole}, or {' and '.join(parts)}", part
        )
    try:
        return kind.from_pretrained(place)
    except Exception as error:  # tokenizers raises its own
        raise folder.error(f"{part!r} cannot be loaded: {error}") from error
