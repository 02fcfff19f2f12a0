"""Random JSON schemas for `dsi-actors bench schemas`: most can be followed, some contradict themselves."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

_NAMES = ("id", "name", "kind", "size", "a b", "näme", 'quo"te', "$x", "")
_WORDS = ("red", "green", "blue", "", "two words", "naïve", 'say "hi"', "\\", "日本", "\n")
_PATTERNS = ("^[a-c]{1,4}$", "^[0-9]{3}-[0-9]{2}$", "^(yes|no)$", "^x+y?$", "^[A-Z][a-z]{0,5}$")
_DEPTH = 3


def random_schema(chance: random.Random) -> Schema:
    """A schema whose parts were drawn by `chance`. Texts and lists mostly have a limit, or an answer would rarely end."""
    definitions: Schema = {}
    if chance.random() < 0.2:
        definitions["leaf"] = _schema(chance, 1, ())
    if chance.random() < 0.15:  # recursive: it can end at each level
        item = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}
        definitions["tree"] = {
            "type": "object",
            "properties": {"value": _scalar(chance), "next": item},
            "required": chance.choice([["value"], ["value", "next"]]),
            "additionalProperties": False,
        }
    schema = _schema(chance, _DEPTH, tuple(definitions))
    return {**schema, "$defs": definitions} if definitions else schema


def _schema(chance: random.Random, depth: int, definitions: tuple[str, ...]) -> Schema:
    drawn = chance.random()
    if definitions and drawn < 0.15:
        return {"$ref": f"#/$defs/{chance.choice(definitions)}"}
    if depth == 0 or drawn < 0.35:
        return _scalar(chance)
    if drawn < 0.45:
        return {"anyOf": [_schema(chance, depth - 1, definitions) for _ in range(chance.randint(1, 3))]}
    if drawn < 0.5:
        return {"allOf": [_schema(chance, depth - 1, definitions) for _ in range(chance.randint(1, 2))]}
    return (_array if drawn < 0.7 else _object)(chance, depth, definitions)


def _scalar(chance: random.Random) -> Schema:
    match chance.randrange(9):
        case 0:
            return {"const": _value(chance)}
        case 1:
            return {"enum": [_value(chance) for _ in range(chance.randint(1, 4))]}
        case 2:
            return {"type": chance.choice(["boolean", "null"])}
        case 3 | 4:
            return _integer(chance)
        case 5:
            low = round(chance.uniform(-100, 100), chance.randint(0, 3))
            return {"type": "number", "minimum": low, "maximum": low + round(chance.uniform(0, 50), 2)}
        case 6:
            return {"type": "string", "pattern": chance.choice(_PATTERNS)}
        case 7:
            return {"type": chance.sample(["boolean", "null", "integer"], 2)}
    least = chance.randint(0, 4)
    return {"type": "string", "minLength": least, "maxLength": least + chance.randint(-1, 8)}


def _integer(chance: random.Random) -> Schema:
    schema: Schema = {"type": "integer"}
    if chance.random() < 0.7:
        schema[chance.choice(["minimum", "exclusiveMinimum"])] = chance.randint(-1000, 1000)
    if chance.random() < 0.7:
        schema[chance.choice(["maximum", "exclusiveMaximum"])] = chance.randint(-900, 10_000)
    if chance.random() < 0.1:
        schema["multipleOf"] = chance.randint(2, 12)
    return schema


def _array(chance: random.Random, depth: int, definitions: tuple[str, ...]) -> Schema:
    least = chance.randint(0, 2)
    schema: Schema = {"type": "array", "minItems": least, "maxItems": least + chance.randint(0, 2)}
    if chance.random() < 0.8:
        schema["items"] = _schema(chance, depth - 1, definitions)
    else:
        schema["prefixItems"] = [_schema(chance, depth - 1, definitions) for _ in range(chance.randint(1, 2))]
        schema["items"] = chance.choice([False, {"type": "boolean"}])
    return schema


def _object(chance: random.Random, depth: int, definitions: tuple[str, ...]) -> Schema:
    names = chance.sample(_NAMES, chance.randint(0, 4))
    schema: Schema = {
        "type": "object",
        "properties": {name: _schema(chance, depth - 1, definitions) for name in names},
        "required": [name for name in names if chance.random() < 0.6],
        "additionalProperties": False,
    }
    if chance.random() < 0.1:  # names of the model's own
        schema["additionalProperties"] = chance.choice([{"type": "boolean"}, True])
    return schema


def _value(chance: random.Random) -> object:
    return chance.choice(
        [None, True, False, 0, -7, 12345, 1.5, -0.25, [], {}, [1, "x"], {"a": [None]}, *chance.sample(_WORDS, 6)]
    )
