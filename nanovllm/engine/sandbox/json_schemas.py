"""Close the objects of a JSON schema: forbid undeclared properties.

By the standard, an object may have other properties than those in `properties`. A model that
follows such a schema invents properties until it reaches max_tokens. Closing an object sets
`additionalProperties` to false, as vLLM's default backend (xgrammar, `strict_mode`) does.

- An explicit `additionalProperties` or `unevaluatedProperties` is kept.
- An object without `properties` and `patternProperties` stays open.
- Objects that the schema combines (the branches of `allOf`, a `$ref` or `anyOf` beside
  `properties`) stay open where more than one part declares properties, because each part would
  forbid those of the others. The same holds where a part requires a property that none declares.
"""

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

MAX_STEPS = 200_000
"""Maximum number of subschemas that are visited; each is visited once for each combination."""

Schema = dict[str, Any]

_DECLARATIONS = ("properties", "patternProperties")
_EXPLICIT = ("additionalProperties", "unevaluatedProperties")
# Keywords whose subschemas apply to a part of the instance, or are definitions. `not`, `if`,
# `contains` and `propertyNames` are conditions: closing their objects would change the condition.
_MAPS = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_VALUES = (*_EXPLICIT, "items", "prefixItems", "additionalItems", "unevaluatedItems")
_ALTERNATIVES = (("anyOf",), ("oneOf",), ("then", "else"))


def close_objects(schema: Schema) -> None:
    """Close the objects of `schema` in place. Raises ValueError beyond MAX_STEPS."""
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
    """Declare the required properties, without which a closed object could not be satisfied."""
    properties, required = node.get("properties"), node.get("required")
    if isinstance(properties, dict) and isinstance(required, list):
        if "patternProperties" in node:
            return
        for name in required:
            if isinstance(name, str):
                properties.setdefault(name, {})


def _requires_undeclared(parts: list[Schema]) -> bool:
    """Return whether a part without properties requires one that no other part declares."""
    declared = {
        name
        for part in parts
        if isinstance(properties := part.get("properties"), dict)
        for name in properties
    }
    return any(
        name not in declared
        for part in parts
        if not _declares(part) and isinstance(part.get("required"), list)
        for name in part["required"]
        if isinstance(name, str)
    )


class _Combinations:
    """Finds the schemas to leave open because others apply to the same instance."""

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
        """Yield groups of subschemas for the same instance; one of each group applies."""
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
        """Yield schemas and, recursively, the subschemas that apply to the same instance."""
        seen: set[int] = set()
        stack = list(schemas)
        while stack:
            node = stack.pop()
            if id(node) in seen:
                continue
            self._num_steps += 1
            if self._num_steps > MAX_STEPS:
                raise ValueError(
                    f"the schema combines its parts in more than {MAX_STEPS} ways; simplify it"
                )
            seen.add(id(node))
            yield node
            stack += [part for group in self._groups(node) for part in group]

    def _target(self, reference: object) -> Schema | None:
        """Return the target of a reference inside the schema (a JSON pointer)."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        target: Any = self._root
        for part in unquote(reference[1:]).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and name.isdecimal() and int(name) < len(target):
                target = target[int(name)]
            elif isinstance(target, dict):
                target = target.get(name)
            else:
                return None
        return target if isinstance(target, dict) else None


def _all_schemas(root: Schema) -> Iterator[Schema]:
    """Yield every subschema once, except conditions."""
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
    """Yield a schema, or those of a list, without boolean schemas."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            yield item
