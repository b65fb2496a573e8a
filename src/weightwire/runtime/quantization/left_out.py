r"""Which modules a checkpoint leaves out of its quantization: names and patterns of ``quantization_config``.

A module is known by its path in the Hugging Face checkpoint (``model.layers.0.self_attn.o_proj``). Three spellings:

- A plain name leaves out the module that is called so, by its whole path or by the end of it, and all that is below its
  whole path: ``lm_head``, ``o_proj``, ``model.layers.0.self_attn``. So transformers reads ``modules_to_not_convert``;
  compressed-tensors writes whole paths.
- A name with ``*``, ``?`` or ``[…]`` is a pattern of ``fnmatch`` for the whole path, as modelopt writes it and
  TensorRT-LLM and vLLM read it.
- ``re:`` begins a regular expression of compressed-tensors, which matches the beginning of a path.

A regular expression comes from a checkpoint, so none is run: it is rewritten as patterns of ``fnmatch``, which take
time in proportion to the path. What cannot be (repeats but for ``.*``, ``.+`` and ``\d+``, groups within groups,
looking ahead) is refused by name. How tools differ beyond that cannot pass unseen: each quantized weight has scales,
and the names of a checkpoint's tensors must be exactly those that this reading asks for.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from weightwire.errors import ConfigError

MAX_NAMES = 100_000
MAX_PATTERNS = 512
MAX_CHARS = 256
"""Of one name or pattern."""
_MAX_FORMS = 64
"""Of one regular expression, rewritten."""

_REGEX = "re:"
_SPECIAL = re.compile(r"[*?\[]")
_DIGIT = "[0-9]"
_NUMBERS = [_DIGIT * digits for digits in range(1, 5)]
_ATOM = re.compile(
    r"(?P<any>\.\*)|(?P<some>\.\+)|(?P<number>(?:\\d|\[0-9\])\+)|(?P<one>\.)|(?P<digit>\\d)|(?P<class>\[[\w-]+\])"
    r"|\\(?P<escaped>[^\w\s])|(?P<char>[\w-])|\((?:\?:)?(?P<group>[^()]*)\)"
)
"""What an expression may be made of, one after the other; a group has no group in it."""


@dataclass(frozen=True)
class LeftOut:
    """What is not quantized. ``patterns`` are ``fnmatch``'s."""

    names: frozenset[str] = frozenset()
    patterns: tuple[str, ...] = ()

    @classmethod
    def parse(cls, entries: Iterable[str]) -> LeftOut:
        """From what the three fields list, all together.

        Raises:
            ConfigError: a regular expression that is not read here, or too much of anything.
        """
        names, patterns = set[str](), dict[str, None]()
        for entry in entries:
            if len(entry) > MAX_CHARS:
                raise ConfigError(
                    f"quantization_config leaves out a name of {len(entry)} characters", f"at most {MAX_CHARS} are read"
                )
            if entry.startswith(_REGEX):
                patterns |= dict.fromkeys(_rewritten(entry))
            elif _SPECIAL.search(entry):
                patterns[entry] = None
            else:
                names.add(entry)
        for found, most, what in ((names, MAX_NAMES, "names"), (patterns, MAX_PATTERNS, "patterns")):
            if len(found) > most:
                raise ConfigError(f"quantization_config leaves out {len(found)} {what}", f"at most {most} are read")
        return cls(frozenset(names), tuple(patterns))

    def has(self, path: str) -> bool:
        """Whether the module at ``path`` is left out."""
        return self._named(path) or any(_matcher(pattern)(path) for pattern in self.patterns)

    def all_of(self, paths: Sequence[str]) -> bool:
        """Whether the modules that one layer is made of are left out: all of them, or none.

        Raises:
            ConfigError: some are.
        """
        # experts are many, and most patterns are for other layers
        shared = os.path.commonprefix(paths)  # noqa: RUF071 - by characters, which patterns end with, too
        near = LeftOut(self.names, tuple(pattern for pattern in self.patterns if _may_match(pattern, shared)))
        first = near.has(paths[0])
        other = next((path for path in paths[1:] if near.has(path) is not first), None)
        if other is None:
            return first
        out, kept = (paths[0], other) if first else (other, paths[0])
        raise ConfigError(
            f"quantization_config leaves out {out} and not {kept}",
            "both are parts of one layer here: all its parts are quantized, or none",
        )

    def _named(self, path: str) -> bool:
        dots = (at for at, char in enumerate(path) if char == ".")
        return path in self.names or any(path[:at] in self.names or path[at + 1 :] in self.names for at in dots)


@lru_cache(maxsize=2 * MAX_PATTERNS)
def _matcher(pattern: str) -> Callable[[str], re.Match[str] | None]:
    return re.compile(fnmatch.translate(pattern)).match


def _may_match(pattern: str, shared: str) -> bool:
    """Whether a path that begins with ``shared`` may be one of ``pattern``'s."""
    literal = _SPECIAL.split(pattern, maxsplit=1)[0]
    return literal.startswith(shared) or shared.startswith(literal)


def _rewritten(entry: str) -> list[str]:
    """The patterns of ``fnmatch`` that together match what a regular expression does."""
    body = entry.removeprefix(_REGEX).removeprefix("^")
    ends = body.endswith("$") and not body.endswith(r"\$")
    forms = _forms(entry, body[:-1] if ends else body)
    return forms if ends else [form if form.endswith("*") else f"{form}*" for form in forms]


def _forms(entry: str, body: str) -> list[str]:
    choices, at, total = list[list[str]](), 0, 1
    while at < len(body):
        atom = _ATOM.match(body, at)
        if atom is None:
            raise _unread(entry)
        choices.append(_choices(entry, atom))
        at, total = atom.end(), total * len(choices[-1])
        if total > _MAX_FORMS:
            raise _unread(entry)
    return ["".join(form) for form in product(*choices)]


def _choices(entry: str, atom: re.Match[str]) -> list[str]:
    if atom["group"] is not None:
        return [form for each in atom["group"].split("|") for form in _forms(entry, each)]
    if atom["number"]:
        return _NUMBERS
    char = atom["escaped"] or atom[0]
    literal = f"[{char}]" if char in ("*", "?", "[") else char
    return [{"any": "*", "some": "?*", "one": "?", "digit": _DIGIT}.get(str(atom.lastgroup), literal)]


def _unread(entry: str) -> ConfigError:
    return ConfigError(
        f"quantization_config leaves out {entry[:80]}, an expression that is not read here",
        "use names, . * + \\d and groups of these, or patterns with *",
    )
