"""The artifact: a folder with moec.json (the manifest), the program and what the target needs to run it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..artifact.generation_files import EndTokens, find_end_tokens, find_sampling
from ..artifact.manifest import add_figures, check_files, is_language_model, read_manifest
from ..artifact.remote import is_url, near_folder
from ..errors import MoecError
from ..errors.paths import check_path
from .calls import bind_arrays
from .chat import ChatTemplate, load_template
from .generate import END, Generation, PromptCache, Runner, Sampling, generate, iterate_rows
from .scores import iterate_logits, score_tokens
from .tokenizer import FILES, TextStream, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from .compare import Comparison
    from .compare_calls import CallComparison


@dataclass(frozen=True)
class Token:
    """A generated token: its id, and the text that became whole with it (None: text that the end left)."""

    id: int | None
    text: str


@dataclass(frozen=True, eq=False)
class Artifact:
    """An artifact folder and its manifest (moec.json as read)."""

    folder: Path
    manifest: Mapping[str, Any]

    @staticmethod
    def open(folder: Path | str, check: bool = False) -> Artifact:
        """Open a folder; with `check` the sha256 of every file is compared. MoecError says what is wrong with it."""
        folder = near_folder(folder) if is_url(folder) else check_path(folder, "the artifact")
        manifest = read_manifest(folder)
        check_files(folder, manifest, hashes=check)
        return Artifact(folder, manifest)

    @property
    def target(self) -> str:
        """The name of the target that it was compiled for."""
        return self.manifest["target"]

    @property
    def lossy(self) -> bool:
        """Whether a pass changed the numbers on purpose (quantization)."""
        return self.manifest["lossy"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that came with the checkpoint; MoecError if it came without one."""
        return load_tokenizer(self.folder)

    @property
    def report(self) -> dict[str, Any]:
        """Facts and figures: the manifest without hashes and signatures, with the bytes of every file."""
        kept = ("source", "target", "pipeline", "precision", "lossy", "dims", "figures", "unfused")
        sizes = {name: (self.folder / name).stat().st_size for name in sorted(self.manifest["files"])}
        facts = {key: self.manifest[key] for key in kept}
        return {**facts, "states": len(self.manifest["states"]), "files": sizes, "bytes": sum(sizes.values())}

    def session(self, **options: Any) -> Any:
        """Open the artifact with its target's runtime; every target takes `threads` (capped to what the machine has),
        `spinning`, `accuracy` and `device` (see their session.load)."""
        from ...targets import load_artifact
        from ..weights.memory import capped_threads

        options["threads"] = capped_threads(options.get("threads"))
        return load_artifact(self.target, self.folder, **options)

    @cached_property
    def default_session(self) -> Any:
        """A session with the target's own settings, opened once."""
        return self.session()

    def run(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        tokens: Sequence[int] | Sequence[Sequence[int]] | None = None,
        max_new_tokens: int = 128,
        greedy: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        eos: Collection[int] | None = None,
        stop: Sequence[str] = (),
        on_token: Callable[[int, int], None] | None = None,
        on_text: Callable[[int, str], None] | None = None,
        session: Runner | None = None,
        cache: PromptCache | None = None,
    ) -> Generation:
        """Continue a text, or token ids, or a list of either as one batch.

        What is not given is as generation_config.json has it: without sampling there (do_sample), the most likely
        token is taken. A row ends at an end token, in front of a text of `stop`, after `max_new_tokens` or with the
        model's context; `stopped` of the result says which. `on_token(row, id)` and `on_text(row, text)` are called as
        tokens and whole characters come. A `PromptCache` that the turns of a conversation share, with one session, keeps what
        they have in common from being run again. The text of the result is None where there is no tokenizer.

        >>> artifact.run("def main():", max_new_tokens=40, stop=["\\n\\n"]).text[0]  # doctest: +SKIP
        '\\n    parser = argparse.ArgumentParser()'
        """
        rows = self._rows(prompt, tokens)
        settings = self._settings(temperature, top_k, top_p)
        ends = self.eos if eos is None else frozenset(eos)
        streams = [TextStream(self.tokenizer, stop) for _ in rows] if on_text or stop else []
        written: list[list[str]] = [[] for _ in rows]

        def write(row: int, text: str) -> None:
            written[row].append(text)
            if on_text and text:
                on_text(row, text)

        def forward(row: int, token: int) -> bool:
            if on_token:
                on_token(row, token)
            if streams and token not in ends:  # an end token is no text
                write(row, streams[row].push(token))
            return bool(streams) and streams[row].stopped

        found = generate(
            session or self.default_session, rows, max_new_tokens=max_new_tokens, greedy=greedy, seed=seed,
            eos=ends, on_token=forward if on_token or streams else None, cache=cache, **settings,
        )  # fmt: skip
        for row, stream in enumerate(streams):
            write(row, stream.finish())
        text = ["".join(parts) for parts in written] if streams else self._texts(found, wanted=prompt is not None)
        return replace(found, text=text)

    def stream(
        self,
        prompt: str | None = None,
        *,
        tokens: Sequence[int] | None = None,
        max_new_tokens: int = 128,
        greedy: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        session: Runner | None = None,
    ) -> Iterator[Token]:
        """Yield tokens as they are computed, each with the text that became whole with it; settings as in `run`.

        Text that the end leaves unfinished comes last, with the id None. An artifact without a tokenizer gives no text.

        >>> for token in artifact.stream("def main():", greedy=True):  # doctest: +SKIP
        ...     print(token.text, end="", flush=True)
        """
        row = self._rows(prompt, tokens)[0]
        settings = self._settings(temperature, top_k, top_p) | ({"temperature": 0.0} if greedy else {})
        sampling = Sampling(max_new_tokens, **settings, seed=(seed, 0))
        text = TextStream(self.tokenizer, ()) if self._has_tokenizer else None
        for _, token in iterate_rows(session or self.default_session, [row], [sampling], eos=self.eos):
            yield Token(token, text.push(token) if text is not None and token not in self.eos else "")
        if text is not None and (rest := text.finish()):
            yield Token(None, rest)

    def logits(self, prompt: str | None = None, *, tokens: Sequence[int] | None = None) -> np.ndarray:
        """Return the logits f32[tokens, vocabulary] after each token of a text, or of token ids.

        >>> artifact.logits("import os").argmax(axis=-1)[-1]  # doctest: +SKIP
        """
        return np.concatenate(list(iterate_logits(self.default_session, self._rows(prompt, tokens)[0])))

    def scores(self, prompt: str | None = None, *, tokens: Sequence[int] | None = None) -> np.ndarray:
        """Return the natural logarithm of each token's probability after those before it, f64[tokens - 1].

        >>> numpy.exp(-artifact.scores(text).mean())  # the perplexity of a text  # doctest: +SKIP
        """
        return score_tokens(self.default_session, self._rows(prompt, tokens)[0])

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Generation:
        """Answer the last of a conversation's messages, with the model's own chat template; options as in `run`.

        >>> artifact.chat([{"role": "user", "content": "Name a colour."}]).text[0]  # doctest: +SKIP
        'Blue.'
        """
        return self.run(tokens=self.chat_tokens(messages), **options)

    def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the tokens that the model continues with its answer to a conversation."""
        return self.tokenizer.encode(self.chat_template.render(messages), special=False)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The chat template that came with the checkpoint; MoecError if it came without one."""
        return load_template(self.folder)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Call a program that is no language model as its module is called: with arrays or torch tensors.

        Inputs are given in their order or by name. Returns a numpy array, or a tuple of them where there are several
        results. MoecError for inputs that do not fit, see calls.bind_arrays.

        >>> artifact = moec.compile(module, example_inputs=x, out="layer")  # doctest: +SKIP
        >>> artifact(x).shape  # doctest: +SKIP
        (5, 32)
        """
        arrays = bind_arrays(self.manifest, inputs, named)
        found = tuple(self.default_session.call(arrays).values())
        return found[0] if len(found) == 1 else found

    def verify(self, against: Any = None, **options: Any) -> Comparison | CallComparison:
        """Compare with the source: a model in transformers (compare.py), or a torch module or program (compare_calls.py)."""
        if not is_language_model(self.manifest):
            from .compare_calls import compare_calls

            return compare_calls(self, against, **options)
        from .compare import compare_with_source

        return compare_with_source(self, against, **options)

    def sampling(self) -> dict[str, Any]:
        """Return temperature, top_k and top_p as generation_config.json wants them."""
        return find_sampling(self.folder)

    def _settings(self, temperature: float | None, top_k: int | None, top_p: float | None) -> dict[str, Any]:
        """Return how tokens are drawn: as asked, else as generation_config.json has it."""
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        return self.sampling() | {key: value for key, value in given.items() if value is not None}

    @property
    def _has_tokenizer(self) -> bool:
        return any((self.folder / name).is_file() for name in FILES)

    @property
    def end_tokens(self) -> EndTokens:
        """The tokens that end a sequence: every one that a file of the checkpoint names (see generation_files)."""
        return find_end_tokens(self.folder)

    @property
    def eos(self) -> frozenset[int]:
        """Their ids."""
        return frozenset(self.end_tokens.ids)

    def _rows(self, prompt: Any, tokens: Any) -> list[list[int]]:
        if not is_language_model(self.manifest):
            raise MoecError(
                "the artifact is no language model: it cannot continue a text", str(self.folder),
                todo="call it with arrays: artifact(*inputs), or moec run DIR --inputs FILE.npz",
            )  # fmt: skip
        if (prompt is None) == (tokens is None):
            raise MoecError("give either a prompt or tokens")
        if prompt is not None:
            return [self.tokenizer.encode(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        rows = list(tokens)
        return [rows] if not rows or not isinstance(rows[0], Sequence) else [list(row) for row in rows]

    def with_prompts(self, found: Generation, prompt: Any = None, tokens: Any = None) -> list[list[int]]:
        """Return the token ids of each row of a generation with those of its prompt in front."""
        return [[*row, *new] for row, new in zip(self._rows(prompt, tokens), found.tokens, strict=True)]

    def _texts(self, found: Generation, wanted: bool) -> list[str] | None:
        rows = zip(found.tokens, found.stopped, strict=True)
        try:
            return [self.tokenizer.decode(row[:-1] if stopped == END else row) for row, stopped in rows]
        except MoecError:
            if wanted:
                raise
            return None


def record_figures(folder: Path, figures: Mapping[str, Any]) -> Artifact:
    """Add measured figures to the manifest of a finished artifact and return it as it is then."""
    add_figures(folder, figures)
    return Artifact.open(folder)
