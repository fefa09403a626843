"""/openapi.json says what the server does; a validator, the recorded exchanges and requests made up from it judge."""

import json
import re
from urllib.parse import parse_qsl

import pytest
import schemathesis
from hypothesis import settings
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate as validate_openapi
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.api import openapi, schemas
from server.api.app import create_app
from server.api.dialect import ApiSettings
from server.api.fields import decode_text
from server.api.routing import DIALECTS, by_path, choose
from server.errors import Overloaded
from tests.dialects import recorded, test_bad_input
from tests.fake_engine import FakeEngine

DOCUMENT = openapi.document("1.2.3")
ROUTES = [(dialect, route) for dialect in DIALECTS for route in dialect.routes]
JSON = "application/json"

# what /generate refuses although no schema can: halves of characters, odd rounds, numbers of more than 64 bits
UNSAYABLE = {
    ("query", '"\\ud800"'),
    ("history", '[["a","\\ud83d"]]'),
    ("history", '[["a","b","c"]]'),
    ("max_length", "1e300"),
    ("max_length", '"' + "9" * 5000 + '"'),
}

# the sentences of what no schema can say: of numbers in texts, of rounds, of fields that depend on one another
RULES = (
    r'must be a (whole )?number .+, but "[^"]+" was given',
    r"are expected in pairs, but there are \d*[13579] elements",
    r"messages\[\d+\].content is missing|function(_call)?\.arguments(: The JSON is| must be the text)",
    r"a function that is not among|With continue_final_message the last|top_logprobs needs|best_of can only be",
    r"dimensions can only be|answers at once|suffix is not supported",
)

MADE_UP = schemathesis.openapi.from_wsgi(
    "/openapi.json",
    create_app(FakeEngine("你"), ApiSettings(language="en")),
    config=schemathesis.Config.from_dict({"generation": {"mode": "positive"}}),
)


class Exchange:
    """One recorded request and its answer; ``operation`` is None if the document has none for it."""

    def __init__(self, path):
        self.name = f"{path.parent.name}/{path.stem}"
        head, _, self.body = path.read_bytes().partition(b"\n\n")
        self.method, target, _ = head.decode().split("\n")[0].split(" ")
        self.path, _, query = target.partition("?")
        self.parameters = {name for name, _ in parse_qsl(query, encoding="gbk")}
        head, _, answer = path.with_suffix(".response").read_bytes().partition(b"\n\n")
        status, content_type = head.decode().split("\n")
        self.status, self.answer = status.split(" ")[0], answer.decode()
        self.content_type = content_type.removeprefix("Content-Type: ").partition(";")[0]
        template = next((template for template in DOCUMENT["paths"] if _fits(template, self.path)), "")
        self.operation = DOCUMENT["paths"].get(template, {}).get(self.method.lower())

    @property
    def fields(self):
        """The body's JSON, None if it is none."""
        try:
            return json.loads(decode_text(self.body).strip() or "{}")
        except ValueError:
            return None


def _fits(template, path):
    pattern, real = template.split("/"), path.split("/")
    return len(pattern) == len(real) and all(a == b or a.startswith("{") for a, b in zip(pattern, real, strict=True))


EXCHANGES = [Exchange(path) for path in sorted(recorded.DATA.glob("*/*.request"))]


def each(exchanges):
    assert exchanges
    return pytest.mark.parametrize("exchange", exchanges, ids=lambda exchange: exchange.name)


def problems(schema, value):
    """What the schema has against the value; its references are into the document."""
    validator = Draft202012Validator({**schema, "components": DOCUMENT["components"]})
    return [error.message for error in validator.iter_errors(value)]


def body_schema(operation):
    return operation["requestBody"]["content"][JSON]["schema"]


def shown(content):
    """The examples of a content type."""
    return [content["example"]] if "example" in content else [item["value"] for item in content["examples"].values()]


def events(text):
    """The lines before its data and the data of every event."""
    for block in text.split("\n\n"):
        if block and not block.startswith(":"):
            *head, data = block.split("\n")
            data = data.removeprefix("data: ")
            yield head, data if data == "[DONE]" else json.loads(data)


def test_is_openapi():
    validate_openapi(DOCUMENT)
    assert (DOCUMENT["openapi"], DOCUMENT["info"]["version"]) == ("3.1.0", "1.2.3")


def test_has_every_route_and_nothing_else():
    served = {(openapi.template(route.path), method.lower()) for _, route in ROUTES for method in route.methods}
    assert {(path, method) for path, operations in DOCUMENT["paths"].items() for method in operations} == served
    ids = [operation["operationId"] for operations in DOCUMENT["paths"].values() for operation in operations.values()]
    assert len(set(ids)) == len(ids) == len(served)


def test_explains_everything():
    assert all(tag["description"] for tag in DOCUMENT["tags"])
    for operations in DOCUMENT["paths"].values():
        for operation in operations.values():
            assert operation["summary"]
            assert all(parameter["description"] for parameter in operation["parameters"])
    for name, schema in DOCUMENT["components"]["schemas"].items():
        for field, said in schema["properties"].items():
            assert name.endswith("_Error") or said.get("description"), f"{name}.{field}"


def test_says_whose_a_request_is_on_shared_paths():
    shared = 0
    for candidates in by_path().values():
        sharing = [(dialect, route) for dialect, route in candidates if "POST" in route.methods]
        for dialect, route in sharing if len(sharing) > 1 else ():
            description = DOCUMENT["paths"][route.path]["post"]["description"]
            assert f"- **{dialect.name}** if it {route.claims.__doc__}: " in description
            assert choose(candidates, "POST", dict(route.example)) == (dialect, route)
            shared += 1
    assert shared == 6


@pytest.mark.parametrize("status", ["200", "503"])
@pytest.mark.parametrize("route", [pytest.param(route, id=f"{dialect.name} {route.path}") for dialect, route in ROUTES])
def test_examples_are_answered_as_the_document_says(route, status):
    engine = FakeEngine("你", "好")
    if status == "503":
        engine.refuse = Overloaded("满", "full")
    client = recorded.client_of(engine)
    path = openapi.template(route.path).format(**route.example)
    for method in route.methods:
        query = {name: value if isinstance(value, str) else json.dumps(value) for name, value in route.example.items()}
        sent = {"json": dict(route.example)} if method == "POST" else {"query_string": query}
        response = client.open(path, method=method, **sent)
        operation = DOCUMENT["paths"][openapi.template(route.path)][method.lower()]
        can_be_full = any(failure.status == 503 for failure in route.failures)
        assert str(response.status_code) == (status if can_be_full else "200"), response.get_data(as_text=True)
        if method != "HEAD":
            content = operation["responses"][str(response.status_code)]["content"][response.mimetype]
            value = response.json if response.mimetype == JSON else response.get_data(as_text=True)
            assert not problems(content["schema"], value)


@each([e for e in EXCHANGES if e.status in ("200", "400") and isinstance(e.fields, dict) and e.body.strip()])
def test_accepts_bodies_that_the_server_accepts_and_no_others(exchange):
    if exchange.method == "POST":
        refused = exchange.status == "400" and "too_long" not in exchange.name
        assert bool(problems(body_schema(exchange.operation), exchange.fields)) == refused


@each([exchange for exchange in EXCHANGES if exchange.parameters and exchange.operation])
def test_knows_the_parameters(exchange):
    assert exchange.parameters <= {parameter["name"] for parameter in exchange.operation["parameters"]}


@pytest.mark.parametrize(("field", "value", "zh", "en"), test_bad_input.FIELDS)
def test_refuses_fields_that_the_server_refuses(field, value, zh, en):
    schema = body_schema(DOCUMENT["paths"]["/generate"]["post"])
    assert bool(problems(schema, {field: json.loads(value)})) == ((field, value) not in UNSAYABLE)


@each([exchange for exchange in EXCHANGES if exchange.status != "405"])
def test_says_what_the_server_answers(exchange):
    content = exchange.operation["responses"][exchange.status]["content"][exchange.content_type]
    value = json.loads(exchange.answer) if exchange.content_type == JSON else exchange.answer
    assert not problems(content["schema"], value)
    if exchange.content_type == "text/event-stream":
        failure = exchange.operation["responses"]["400"]["content"][JSON]["schema"]
        described = [event for example in shown(content) for event in events(example)]
        for head, data in events(exchange.answer):
            shapes = [schemas.of_example(example) for other, example in described if other == head]
            assert not problems({"anyOf": [*shapes, failure]}, data)


def test_every_answer_that_the_document_shows_was_recorded():
    recorded_answers = {
        (exchange.operation["operationId"], exchange.content_type) for exchange in EXCHANGES if exchange.status == "200"
    }
    assert recorded_answers == {
        (operation["operationId"], content_type)
        for operations in DOCUMENT["paths"].values()
        for method, operation in operations.items()
        for content_type in operation["responses"]["200"].get("content", ())
        if content_type != "text/html"  # test_page_for_browsers_only
    }


def test_examples_of_events_are_events():
    for operations in DOCUMENT["paths"].values():
        for operation in operations.values():
            content = operation["responses"]["200"].get("content", {}).get("text/event-stream")
            for example in shown(content) if content else ():
                assert example.endswith("\n\n") and list(events(example))


@MADE_UP.parametrize()
@settings(max_examples=15, deadline=None, derandomize=True)
def test_made_up_requests_are_answered_as_the_document_says(case):
    response = case.call()
    checks = [not_a_server_error, status_code_conformance, content_type_conformance]
    if response.headers["content-type"] != ["text/event-stream; charset=utf-8"]:  # for its schema is of the whole text
        checks.append(response_schema_conformance)
    case.validate_response(response, checks=checks)
    if response.status_code == 400:
        assert any(re.search(rule, response.text.replace('\\"', '"')) for rule in RULES), response.text
