"""Settings as text: a file of YAML 1.2 and `section.key=value` overrides, as plain values with their places.

PyYAML reads YAML 1.1, in which `010` is 8, `1:30` is 90, `no` is false and 2026-01-01 is a date. Here a plain scalar
is what the core schema of 1.2 says, with one addition: numbers may have underscores between digits, as `1_000`.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

MAX_SETTINGS_BYTES = 1 << 20  # a settings file is a page; a larger one is some other file
QUOTES = "a value with spaces takes quotes within SET: SET=\"train.sweep.l1_coefficient='[3, 5]'\""
COMMAND_LINE = "command line"


class SettingsError(Exception):
    """A settings file or override that cannot be used; the text is for the user."""


class Loaded(NamedTuple):
    """Nested plain values, and by dotted path where each is ("configs/x.yaml:7") and how numbers are written."""

    values: dict[str, Any]
    places: dict[str, str]
    numbers: dict[str, str]  # for settings that are text: a commit may be all digits

    def take_as_written(self, names: Sequence[str]) -> bool:
        """Make numbers of these settings the text that they were written as; whether any of them is one."""
        found = [name for name in names if name in self.numbers]
        for name in found:
            _put(self.values, name, self.numbers.pop(name), name)
        return bool(found)


class _Loader(yaml.SafeLoader):
    """The core schema of YAML 1.2, and merge keys (`<<`)."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own name for it

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """`010` is ten; octal is `0o10`, hexadecimal `0x10`."""
        text = self.construct_scalar(node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_FLOAT = rf"[-+]?(?:\.[0-9]+|{_DIGITS}(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", rf"[-+]?{_DIGITS}|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", rf"{_FLOAT}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read(path: Path, sections: list[str]) -> Loaded:
    """The values of a settings file, which has these sections.

    Raises SettingsError.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_SETTINGS_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{path}: cannot read the settings file: {error.strerror}") from None
    if len(raw) > MAX_SETTINGS_BYTES:
        raise SettingsError(f"{path}: larger than {MAX_SETTINGS_BYTES} bytes; is it a settings file?")
    try:
        values, noted = _parse(raw.decode(), "", str(path))
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: not UTF-8 text; is it a settings file?") from None
    except RecursionError:
        raise SettingsError(f"{path}: nested too deeply or refers to itself") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        raise SettingsError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: no settings in it; it needs {', '.join(sections)}")
    return noted._replace(values=values)


def _parse(text: str, prefix: str, source: str) -> tuple[Any, Loaded]:
    """The value of a text, and where its settings are and how numbers are written."""
    noted = Loaded({}, {}, {})
    loader = _Loader(text)
    node = loader.get_single_node()
    if node is None:
        return None, noted
    _note(node, prefix, source, noted)
    return loader.construct_document(node), noted


def _note(node: yaml.Node, prefix: str, source: str, noted: Loaded) -> None:
    def place(mark: yaml.Mark) -> str:
        return source if source == COMMAND_LINE else f"{source}:{mark.line + 1}"

    inner: list[tuple[str, yaml.Node, yaml.Mark]] = []
    if isinstance(node, yaml.MappingNode):
        inner = [(f"{prefix}{key.value}", value, key.start_mark) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        inner = [(f"{prefix}{i}", value, value.start_mark) for i, value in enumerate(node.value)]
    elif node.tag.endswith((":int", ":float")):
        noted.numbers[prefix.removesuffix(".")] = node.value
    for name, value, mark in inner:
        if name in noted.places:
            raise SettingsError(f"{place(mark)}: {name}: set twice")
        noted.places[name] = place(mark)
        _note(value, f"{name}.", source, noted)


def override(loaded: Loaded, text: str) -> None:
    """Set one dotted path; `sample.sources.0.share=0.3` reaches into a list.

    Of several, the last one counts. Raises SettingsError for what is no override.
    """
    name, equals, value_text = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", name):
        raise SettingsError(f"{text!r}: an override is section.key=value, as train.sae.l1_coefficient=4; {QUOTES}")
    if not value_text.strip():
        raise SettingsError(f"{COMMAND_LINE}: {text}: no value; null takes a setting away")
    try:
        value, given = _parse(value_text, f"{name}.", COMMAND_LINE)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise SettingsError(f"{text}: the value is not valid YAML; {QUOTES}") from None
    _put(loaded.values, name, value, text)
    for noted, new in ((loaded.places, given.places), (loaded.numbers, given.numbers)):
        for place in [p for p in noted if p == name or p.startswith(f"{name}.")]:
            del noted[place]
        noted.update(new)
    loaded.places[name] = COMMAND_LINE


def given_twice(overrides: Sequence[str]) -> Iterator[str]:
    """A sentence for each override that replaces an earlier one, or one within it, or a null above it."""
    loaded = Loaded({}, {}, {})
    for text in overrides:
        name = text.partition("=")[0]
        replaced = [place for place in loaded.places if place == name or place.startswith(f"{name}.")]
        above = [place for place in loaded.places if name.startswith(f"{place}.")]
        if above and not any(place.startswith(f"{above[-1]}.") for place in loaded.places):
            replaced = above
        if replaced:
            first = "" if replaced[0] == name else f", with {replaced[0]}"
            yield f"{COMMAND_LINE}: {name}: set twice{first}; the last one counts"
        override(loaded, text)


def _put(values: dict[str, Any], name: str, value: Any, text: str) -> None:
    target: Any = values
    *path, last = name.split(".")
    for part in path:
        if isinstance(target, list):
            target = target[int(part)] if part.isdigit() and int(part) < len(target) else None
        elif isinstance(target, dict):
            if target.get(part) is None:  # an absent section, or an empty one
                target[part] = {}
            target = target[part]
    if isinstance(target, list) and last.isdigit() and int(last) < len(target):
        target[int(last)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise SettingsError(f"{text}: there is no {name} to set")
