"""Close the objects of a JSON schema: forbid the properties that it does not declare.

By the standard an object may have any property beside those in `properties`. A model that follows
such a schema to the letter invents properties until its answer is full. Closing sets
`additionalProperties` to false, as vLLM's default backend (xgrammar, `strict_mode`) does.

- What the schema says itself is kept: `additionalProperties`, `unevaluatedProperties`.
- An object without `properties` and `patternProperties` stays open.
- Objects that the schema combines (the branches of `allOf`, a `$ref` or `anyOf` beside `properties`)
  stay open where more than one part declares properties: each part would forbid those of the others.
  The same holds where one part requires a property that no part declares.
"""

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

MAX_STEPS = 200_000
"""Maximum number of subschemas that are visited; each is visited once for each combination."""

Schema = dict[str, Any]

_DECLARATIONS = ("properties", "patternProperties")
_EXPLICIT = ("additionalProperties", "unevaluatedProperties")
# Where the instance of a subschema is a part of the instance, or a definition. `not`, `if`,
# `contains` and `propertyNames` are conditions: closing their objects would change what they ask.
_MAPS = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_VALUES = (*_EXPLICIT, "items", "prefixItems", "additionalItems", "unevaluatedItems")
_ALTERNATIVES = (("anyOf",), ("oneOf",), ("then", "else"))


def close_objects(schema: Schema) -> None:
    """Close the objects of `schema`, in place. Raises ValueError where it combines too much."""
    combined = _Combinations(schema).combined
    for node in list(_all_schemas(schema)):
        is_open = any(key in node for key in _EXPLICIT) or id(node) in combined
        if not is_open and _declares(node):
            _declare_required(node)
            node["additionalProperties"] = False


def _declares(node: Schema) -> bool:
    """Return whether a schema itself declares properties."""
    return any(isinstance(node.get(key), dict) for key in _DECLARATIONS)


def _declare_required(node: Schema) -> None:
    """Declare the properties that are only required, which nothing could satisfy otherwise."""
    properties, required = node.get("properties"), node.get("required")
    if isinstance(properties, dict) and isinstance(required, list):
        if "patternProperties" in node:
            return
        for name in required:
            if isinstance(name, str):
                properties.setdefault(name, {})


def _requires_undeclared(parts: list[Schema]) -> bool:
    """Return whether a part without properties requires one that no other part declares."""
    objects = [found for part in parts if isinstance(found := part.get("properties"), dict)]
    declared = {name for properties in objects for name in properties}
    return any(
        name not in declared
        for part in parts
        if not _declares(part) and isinstance(part.get("required"), list)
        for name in part["required"]
        if isinstance(name, str)
    )


class _Combinations:
    """Finds the schemas that stay open because others apply to the same instance."""

    def __init__(self, root: Schema) -> None:
        self.combined: set[int] = set()
        self._root = root
        self._num_steps = 0
        for node in _all_schemas(root):
            groups = list(self._groups(node))
            if not groups:
                continue
            parts = list(self._parts([node]))
            num_declaring = sum(map(self._group_declares, groups)) + _declares(node)
            if num_declaring > 1 or _requires_undeclared(parts):
                self.combined.update(map(id, parts))

    def _groups(self, node: Schema) -> Iterator[list[Schema]]:
        """Yield the subschemas for the same instance; only one of each group applies at a time."""
        for part in _schemas(node.get("allOf")):
            yield [part]
        dependent = node.get("dependentSchemas")
        if isinstance(dependent, dict):
            for part in dependent.values():
                yield list(_schemas(part))
        target = self._target(node.get("$ref"))
        if target is not None:
            yield [target]
        for keys in _ALTERNATIVES:
            group = [part for key in keys for part in _schemas(node.get(key))]
            if group:
                yield group

    def _group_declares(self, group: list[Schema]) -> bool:
        return any(map(_declares, self._parts(group)))

    def _parts(self, schemas: list[Schema]) -> Iterator[Schema]:
        """Yield schemas and, however deep, those that apply to the same instance."""
        seen: set[int] = set()
        stack = list(schemas)
        while stack:
            node = stack.pop()
            if id(node) in seen:
                continue
            self._num_steps += 1
            if self._num_steps > MAX_STEPS:
                raise ValueError(
                    f"the schema combines its parts in more than {MAX_STEPS} ways; make it simpler"
                )
            seen.add(id(node))
            yield node
            stack += [part for group in self._groups(node) for part in group]

    def _target(self, reference: object) -> Schema | None:
        """Return what a reference inside the schema, a JSON pointer, refers to."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        found: Any = self._root
        for part in unquote(reference[1:]).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, dict):
                found = found.get(name)
            else:
                return None
        return found if isinstance(found, dict) else None


def _all_schemas(root: Schema) -> Iterator[Schema]:
    """Yield every subschema once, conditions left out."""
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        for key in _MAPS:
            if isinstance(node.get(key), dict):
                stack += [part for value in node[key].values() for part in _schemas(value)]
        for key in (*_VALUES, "allOf", *(key for keys in _ALTERNATIVES for key in keys)):
            stack += _schemas(node.get(key))


def _schemas(value: object) -> Iterator[Schema]:
    """Yield a schema, or those of a list; a schema that is true or false has nothing to close."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            yield item
