"""Generated requests over the OpenAPI description: every answer is one of the API's, whatever was sent."""

import base64
import json
from collections.abc import Callable
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest_serve import Running, picture

CALM = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
GOOD = base64.b64encode(picture(1, 16)).decode()
TEXT = st.text(max_size=30) | st.sampled_from(["a key", "", "\0", "../x", "http://x/y.png", "1e400", "NaN"])
NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.integers(0, 3)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT | st.just(GOOD) | st.just(GOOD[:60])
ANY = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)


def values(schema: dict, whole: dict) -> st.SearchStrategy:
    """Mostly what the schema asks for, sometimes anything."""
    if "$ref" in schema:
        return values(whole["components"]["schemas"][schema["$ref"].rpartition("/")[2]], whole)
    if "anyOf" in schema:
        return st.one_of([values(option, whole) for option in schema["anyOf"]]) | ANY
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")])) | ANY
    kind = schema.get("type")
    if kind == "integer":
        low = int(schema.get("minimum", -5))
        return st.integers(low, low + 3) | NUMBERS
    if kind == "number":
        return st.floats(0, 2) | NUMBERS
    if kind == "array":
        item = values(schema.get("items", {}), whole)
        return st.lists(item, max_size=3) | ANY
    if kind == "object":
        return form(schema, whole) | ANY
    if kind == "string" and schema.get("pattern"):
        return st.from_regex(schema["pattern"].replace(r"\d", "[0-9]"), fullmatch=True) | TEXT
    return TEXT | st.sampled_from([GOOD, "a key", "tiny", "style"]) if kind == "string" else ANY


def form(schema: dict, whole: dict) -> st.SearchStrategy:
    known = {name: values(field, whole) for name, field in schema.get("properties", {}).items()}
    required = {name: known[name] for name in schema.get("required", [])}
    optional = {name: value for name, value in known.items() if name not in required}
    return st.fixed_dictionaries(required, optional=optional)


def tame(body: object) -> object:
    """With few steps, so that a valid request takes no time."""
    if isinstance(body, dict) and isinstance(body.get("num_inference_steps", 1), int):
        wanted = body.get("num_inference_steps", 1)
        return {**body, "num_inference_steps": 1 if 1 <= wanted <= 100 else wanted, "n": min(body.get("n", 1), 2)
                if isinstance(body.get("n", 1), int) else body["n"]}  # fmt: skip
    return body


def check(answer: httpx.Response) -> None:
    assert answer.status_code < 500 or answer.status_code == 503, answer.text
    assert "Traceback" not in answer.text and "/site-packages/" not in answer.text
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def fuzzed(live: Running, number: int) -> Callable[[], None]:
    description = live.get("/openapi.json").json()
    routes = [
        (path, method, route) for path, methods in description["paths"].items() for method, route in methods.items()
    ]
    assert len(routes) >= 9
    cases = []
    for path, method, route in routes:
        content = route.get("requestBody", {}).get("content", {})
        schema = content.get("application/json", {}).get("schema")
        body = st.none() if schema is None else form(schema, description) | ANY
        cases.append(st.tuples(st.just(path), st.just(method), body, TEXT, st.booleans()))

    @settings(max_examples=number, deadline=None, database=None, suppress_health_check=CALM)
    @given(st.one_of(cases))
    def run(case) -> None:
        path, method, body, name, as_form = case
        url = live.url + path.replace("{name}", quote(name, safe=""))
        headers = {"X-Condit": "1"}
        if method == "get":
            check(httpx.get(url, headers=headers, timeout=60))
        elif as_form and isinstance(body, dict):
            fields = [(str(k), None, v if isinstance(v, str) else json.dumps(v)) for k, v in body.items()]
            names = [f"{k}[]" if len(v) % 3 == 0 else k for k, _, v in fields]  # lists have brackets
            parts = [
                (name.replace("\0", "") or "x", (None, v.encode("utf-8", "replace")))
                for name, (_, _, v) in zip(names, fields, strict=True)
            ]
            check(httpx.post(url, files=parts or {"x": b""}, headers=headers, timeout=60))
        else:
            text = json.dumps(tame(body)).encode()
            check(httpx.post(url, content=text, headers={**headers, "Content-Type": "application/json"}, timeout=60))

    return run


def test_generated_requests_are_answered_in_the_words_of_the_api(live):
    fuzzed(live, 40)()


@pytest.mark.slow
def test_two_thousand_generated_requests(live):
    fuzzed(live, 2000)()
    assert live.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("fields", "strengths"),
    [
        ([("adapter", "style"), ("strength", "0.25")], [0.25]),
        ([("adapter[]", "style"), ("strength[]", "0.25"), ("adapter[]", "style"), ("strength[]", "2")], [0.25, 2.0]),
        ([("adapter", "style"), ("strength", "0.5"), ("when", "0-0.5"), ("controls", "[]")], [0.5]),
        ([("adapter", "style"), ("controls", "5")], None),
        ([("adapter", "style"), ("strength", "x")], None),
        ([("image", "a"), ("image[]", "b")], None),
    ],
)
def test_strings_of_a_form_become_lists_and_numbers(live, fields, strengths):
    parts = [(name, (None, value)) for name, value in [("prompt", "a key"), ("num_inference_steps", "1"), *fields]]
    parts += [("references[]", ("r.png", picture(number))) for number in (1, 2)]
    answer = live.post("/v1/images/generations", files=parts)
    check(answer)
    assert answer.status_code == (400 if strengths is None else 200)
    if strengths is not None:
        assert answer.json()["data"][0]["condit"]["strengths"] == strengths


def test_multipart_that_is_broken_is_refused(live):
    kind = {"Content-Type": "multipart/form-data; boundary=x", "X-Condit": "1"}
    for content in (
        b"",
        b"--x",
        b"--x\r\n\r\n",
        b"--x\r\nContent-Disposition: form-data; name=\xff\r\n\r\n--x--",
        b"\0" * 99,
    ):
        check(httpx.post(f"{live.url}/v1/images/edits", content=content, headers=kind))
    check(httpx.post(f"{live.url}/v1/annotate", content=b"", headers={**kind, "Content-Type": "multipart/form-data"}))
    check(httpx.post(f"{live.url}/v1/replay", content=b"[" * 100_000, headers={"Content-Type": "application/json"}))
