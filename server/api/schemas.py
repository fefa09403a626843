"""JSON schemas: of declared fields, as the server reads them, and of examples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

Schema = dict[str, Any]

# the plain forms of numeric strings; pydantic reads a few more, such as " 1_000 "
WHOLE = "^[+-]?[0-9]+$"
DECIMAL = r"^[+-]?[0-9]+(\.[0-9]+)?$"
NULL = {"type": "null"}
# pydantic's own words for limits, which it leaves as they are where they stand behind one of our validators
KEYWORDS = {"ge": "minimum", "le": "maximum", "gt": "exclusiveMinimum", "lt": "exclusiveMaximum"}
KINDS = {bool: "boolean", int: "integer", float: "number", str: "string"}


def of_models(models: Iterable[type[BaseModel]]) -> tuple[dict[type[BaseModel], Schema], dict[str, Schema]]:
    """For each model a reference into /openapi.json's components, and these components, nested models included."""
    wanted = [(model, "validation") for model in dict.fromkeys(models)]
    references, schemas = models_json_schema(
        wanted, ref_template="#/components/schemas/{model}", schema_generator=_AsRead
    )
    return {model: schema for (model, _), schema in references.items()}, schemas.get("$defs", {})


def of_parameters(model: type[BaseModel]) -> dict[str, Schema]:
    """The schema of each field of a model whose values are texts in a query, where nothing is null."""
    properties = model.model_json_schema(schema_generator=_AsRead).get("properties", {})
    return {name: _of_parameter(schema) for name, schema in properties.items()}


def _of_parameter(schema: Schema) -> Schema:
    kind = _kinds(schema)[0]
    dropped = {"pattern"} if kind in ("integer", "number") else set()
    if schema.get("default", 0) is None:
        dropped.add("default")
    return {**{key: value for key, value in schema.items() if key not in dropped}, "type": kind}


class _AsRead(GenerateJsonSchema):
    """Numbers may be numeric strings, and null stands for a field that is not there."""

    def normalize_name(self, name: str) -> str:
        return super().normalize_name(name.removeprefix("server.api.dialects."))

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def generate_inner(self, schema: Any) -> Schema:
        return {KEYWORDS.get(key, key): value for key, value in super().generate_inner(schema).items()}

    def int_schema(self, schema: Any) -> Schema:
        return _or_text(super().int_schema(schema), WHOLE)

    def float_schema(self, schema: Any) -> Schema:
        return _or_text(super().float_schema(schema), DECIMAL)

    def dict_schema(self, schema: Any) -> Schema:
        found = super().dict_schema(schema)
        return {**found, "additionalProperties": False} if "patternProperties" in found else found

    def nullable_schema(self, schema: Any) -> Schema:
        return _or_null(self.generate_inner(schema["schema"]))

    def default_schema(self, schema: Any) -> Schema:
        return _or_null(super().default_schema(schema))


def _or_text(number: Schema, pattern: str) -> Schema:
    return {**number, "type": [number["type"], "string"], "pattern": pattern}


def _or_null(schema: Schema) -> Schema:
    if "$ref" in schema:
        others = {key: value for key, value in schema.items() if key != "$ref"}
        return {**others, "anyOf": [{"$ref": schema["$ref"]}, NULL]}
    if "anyOf" in schema:
        return {**schema, "anyOf": [*(kind for kind in schema["anyOf"] if kind != NULL), NULL]}
    if "const" in schema:
        schema = {key: value for key, value in schema.items() if key != "const"} | {"enum": [schema["const"]]}
    values = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
    kinds = [kind for kind in _kinds(schema) if kind != "null"]
    return {**schema, **values, "type": [*kinds, "null"]}


def _kinds(schema: Schema) -> list[str]:
    return schema["type"] if isinstance(schema["type"], list) else [schema["type"]]


def of_example(example: Any) -> Schema:
    """What the example shows: the type of every value and the keys of every object; null may be anything else."""
    if isinstance(example, dict):
        properties = {name: of_example(value) for name, value in example.items()}
        return {"type": "object", "properties": properties, "required": list(properties)}
    if isinstance(example, list):
        items = [of_example(item) for item in example]
        if not items:
            return {"type": "array"}
        alike = all(item == items[0] for item in items)
        return {"type": "array", **({"items": items[0]} if alike else {"prefixItems": items})}
    return {} if example is None else {"type": KINDS[type(example)]}
