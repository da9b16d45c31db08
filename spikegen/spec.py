"""The base of every config object, and the one error a user can cause."""

import difflib
import re
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator


class UserError(Exception):
    """A mistake in the call, the config or the input: one line that says what, where, and what would be right.

    The command line prints it without a traceback and exits with code 2.
    """


class Spec(BaseModel):
    """A frozen, strict description of a part; subclasses sit above the module they describe and have `build(...)`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, values: Any) -> Any:
        """YAML's `true`, `yes` and `on` are no 1."""
        for name, value in values.items() if isinstance(values, Mapping) else ():
            parts = value if isinstance(value, list | tuple) else [value]
            field = cls.model_fields.get(name)
            if field is not None and any(isinstance(x, bool) for x in parts) and _is_number(field.annotation):
                raise ValueError(f"{name} is {value!r}; it must be a number")
        return values


def _is_number(annotation: Any) -> bool:
    """Whether a field holds numbers, and neither truths nor a section, of which pydantic says better what is wrong."""
    inside, seen = [annotation], []
    while inside:
        seen.append(inside.pop())
        inside += get_args(seen[-1])
    numbers = any(part in (int, float) or type(part) is int for part in seen)  # of a Literal's the values
    return numbers and bool not in seen and not _specs(annotation)


def default_kind(kind: str) -> BeforeValidator:
    """For a union of kinds: a mapping that names none is of this one."""
    return BeforeValidator(lambda v: {"kind": kind, **v} if isinstance(v, Mapping) else v)


S = TypeVar("S", bound=Spec)


def parse(spec: type[S], values: Any, source: str) -> S:
    """Validate `values` as `spec`; `source` (a file, a preset) is named in the UserError that a mistake raises."""
    try:
        return spec.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(spec, error)}") from None


def explain(spec: type[Spec], error: ValidationError) -> str:
    """One line for the first thing wrong in `error`: the key, what was wrong, and the nearest right one."""
    # A key that is missing may be one that is misspelt: that tells more.
    first, *more = sorted(error.errors(include_url=False), key=lambda found: found["type"] == "missing")
    loc, context = first["loc"], first.get("ctx", {})
    extra = first["type"] == "extra_forbidden"
    models, shown, others = _walk(spec, loc, extra)
    key = ".".join(shown)
    if extra:
        parent, name = ".".join(shown[:-1]), str(loc[-1])
        keys = sorted({k for m in models for k in m.model_fields})
        elsewhere = sorted(tag for tag, other in others.items() if name in other.model_fields)
        if elsewhere:
            line = f"{key} is only for {parent}.kind {', '.join(elsewhere)}"
        else:
            line = f"{key} is not a key{f' of {parent}' if parent else ''}; {suggest(name, keys)}"
    elif loc and first["type"] in ("model_type", "model_attributes_type"):
        inner = sorted({k for s in _held(models, str(loc[-1])) for k in s.model_fields})
        got = "null" if first["input"] is None else repr(first["input"])
        line = f"{key} is {got}, but it is a section, with the keys {', '.join(inner)}"
    elif first["type"] == "missing":
        line = f"{key} is missing"
    elif "expected_tags" in context or first["type"] == "literal_error":
        expected = context.get("expected_tags", context.get("expected", ""))
        choices = re.findall(r"'([^']*)'", expected) or re.split(r", | or ", expected)
        got = context.get("tag", first["input"])
        kind = ".kind" if "expected_tags" in context else ""
        line = f"{key}{kind} is {got!r}; {suggest(str(got), choices)}"
    else:
        message = first["msg"].removeprefix("Value error, ")
        shown_input = "" if isinstance(first["input"], Mapping) else f" (got {first['input']!r})"
        line = f"{key}: {message}{shown_input}" if key else message
    return line + (f" (and {len(more)} more)" if more else "")


def suggest(name: str, choices: list[str]) -> str:
    """'did you mean X?' for the choice nearest to `name`, else the choices."""
    known = {choice.lower(): choice for choice in choices}
    near = [known[k] for k in difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)]
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices)}"


def _walk(
    spec: type[Spec], loc: tuple[int | str, ...], extra: bool
) -> tuple[list[type[Spec]], list[str], dict[str, type[Spec]]]:
    """Follow a pydantic location from `spec`; where `extra`, its last part is a key that a user wrote.

    The models that hold its last key, the path without union tags, and the other kinds where that key is of one.
    """
    models, shown = [spec], []
    here: list[type[Spec]] = [spec]
    others: dict[str, type[Spec]] = {}
    for place, part in enumerate(loc, 1):
        models = here
        if extra and place == len(loc):
            pass
        elif isinstance(part, str) and any(part in m.model_fields for m in here):
            here, others = _held(here, part), {}
        elif isinstance(part, str) and part in (tags := {tag: m for m in here for tag in _tags(m)}):
            here, others = [tags[part]], {tag: m for tag, m in tags.items() if tag != part}
            continue
        elif isinstance(part, str) and (
            part.startswith(("function-", "constrained-")) or part[:1].isupper() or "[" in part
        ):
            continue  # pydantic's own name for a branch of a union
        shown.append(str(part))
    return models, shown, others


def _held(models: list[type[Spec]], key: str) -> list[type[Spec]]:
    return [s for m in models if key in m.model_fields for s in _specs(m.model_fields[key].annotation)]


def _tags(spec: type[Spec]) -> tuple[str, ...]:
    field = spec.model_fields.get("kind")
    return get_args(field.annotation) if field else (spec.__name__,)


def _specs(annotation: Any) -> list[type[Spec]]:
    """Every Spec inside an annotation such as `list[A | B] | None`."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return [annotation] if issubclass(annotation, Spec) else []
    if get_origin(annotation) is Union or get_args(annotation):
        return [s for a in get_args(annotation) for s in _specs(a)]
    return []
