"""Trust: token, Host, Origin, content types, sizes and times of bodies, headers."""

import base64
import json
import socket
import time

import pytest

from condit.serve.run import ServeOptions
from conftest_serve import picture

TOKEN = "0123456789abcdef0123"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def closed(run_server):
    with run_server(token=TOKEN, limits={"seconds": 1.0, "body": 200_000, "image": 100_000}) as running:
        yield running


def raw(live, request: bytes, seconds: float = 10.0) -> bytes:
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def asked(live, line: str, *headers: str, host: str | None = None) -> int:
    host = host or live.url.removeprefix("http://")
    text = "\r\n".join([line, f"Host: {host}", "Connection: close", *headers, "", ""])
    return int(raw(live, text.encode("latin1")).split()[1])


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "//v1/models", "/v1//models", "/%76%31/models", "/v1%2fmodels", "/v1/models/", "/./v1/models",
     "/page/../v1/models", "/page/..%2fv1/models", "/%2e%2e/v1/models", "/metrics", "/%6detrics", "/openapi.json",
     "/healthz/../metrics", "/healthz%00", "/;/metrics", "/page/", "/v1/models?x=/healthz", "http://a/v1/models"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_no_spelling_of_a_path_leads_around_the_token(closed, method, path):
    assert asked(closed, f"{method} {path} HTTP/1.1") == 401
    assert asked(closed, f"{method} {path} HTTP/1.1", "Authorization: Bearer wrong") == 401


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "FOO", "get"])
def test_odd_methods_are_refused(closed, method):
    assert asked(closed, f"{method} /v1/models HTTP/1.1") in (400, 401)
    status = asked(closed, f"{method} /v1/models HTTP/1.1", f"Authorization: Bearer {TOKEN}")
    assert status in (400, 405)
    assert asked(closed, f"{method} / HTTP/1.1") in (400, 405)


def test_the_token_opens_and_the_page_and_health_need_none(closed):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert closed.get("/v1/models", headers=headers).status_code == 200
    assert {closed.get(path).status_code for path in ("/", "/page/app.js", "/healthz", "/readyz")} == {200}
    answer = closed.get("/v1/models")
    assert answer.json()["error"]["code"] == "invalid_api_key" and answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1:1", 200), ("[::1]:80", 200), ("evil.example", 421),
     ("127.0.0.1.evil.example", 421), ("", 421), ("10.0.0.1", 421)],
)  # fmt: skip
def test_the_host_must_be_this_server(live, host, status):
    assert asked(live, "GET /v1/models HTTP/1.1", host=host or " ") == status


def test_pages_of_other_origins_are_refused(live):
    assert live.get("/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403
    assert live.get("/v1/models", headers={"Origin": "null"}).status_code == 403
    assert live.get("/v1/models", headers={"Origin": live.url}).status_code == 200


def test_a_form_that_any_page_could_send_changes_nothing(live):
    import httpx

    url, files = f"{live.url}/v1/annotate", {"image": picture()}
    assert httpx.post(url, files=files).status_code == 403  # without the header
    assert httpx.post(url, content="image=x", headers={"Content-Type": "text/plain"}).status_code == 415
    assert live.post("/v1/annotate", files=files, data={"kind": "gray"}).status_code == 200


def test_bodies_are_bounded_before_they_are_read_and_slow_ones_end(closed):
    length = "Content-Length: 999999999"
    post, token = "POST /v1/annotate HTTP/1.1", f"Authorization: Bearer {TOKEN}"
    assert asked(closed, post, "Content-Type: application/json", token, length) == 413
    large = {"image": base64.b64encode(bytes(120_000)).decode()}
    answer = closed.post("/v1/annotate", json=large, headers={"Authorization": f"Bearer {TOKEN}"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "image_too_large")
    host, port = closed.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        begun = time.monotonic()
        head = f"{post}\r\nHost: {host}\r\nContent-Type: application/json\r\n{token}\r\nContent-Length: 50\r\n\r\n{{"
        connection.sendall(head.encode())
        assert b" 408 " in connection.recv(4096)
        assert time.monotonic() - begun < 15


def test_a_decompression_bomb_and_a_broken_image_are_refused_in_words(live):
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    for data in (bomb, picture()[:-200], b"GIF89a", b"<svg/>"):
        answer = live.post("/v1/annotate", files={"image": data})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_image")


def test_every_answer_carries_the_security_headers(live):
    for path in ("/", "/v1/models", "/nothing", "/page/app.js"):
        headers = live.get(path).headers
        assert "script-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and "server" not in headers
    assert live.get("/nothing").json()["error"]["code"] == "not_found"


def test_the_page_is_small_and_names_no_other_host(live):
    import re

    from condit.serve.app import page_files

    files = page_files()
    assert sum(len(content) for content, _ in files.values()) < 200_000
    for name, (content, _) in files.items():
        hosts = re.findall(rb"https?://[\w.]+", content)
        assert set(hosts) <= {b"http://www.w3.org"}, name  # the namespace of SVG
    html = live.get("/").text
    assert "<script>" not in html and "style=" not in html and "onclick" not in html


def test_words_of_the_page_exist_in_both_languages(live):
    import re

    words = live.get("/page/words.json").json()
    assert set(words["en"]) == set(words["zh"])
    used = set()
    for name in ("index.html", "study.html"):
        used |= set(re.findall(r'data-t(?:-label|-placeholder)?="(\w+)"', live.get(f"/page/{name}").text))
    for name in ("app.js", "images.js", "study.js", "common.js"):
        used |= set(re.findall(r'\bt\("(\w+)"', live.get(f"/page/{name}").text))
    assert used - set(words["en"]) == set()


def test_another_address_needs_a_token_of_some_length():
    with pytest.raises(ValueError, match="give --token"):
        ServeOptions(host="0.0.0.0")
    with pytest.raises(ValueError, match="16 characters"):
        ServeOptions(host="0.0.0.0", token="short")
    assert ServeOptions(host="0.0.0.0", token=TOKEN)


def test_replay_gives_the_image_again_and_reads_no_file_of_the_server(live, tmp_path):
    style = base64.b64encode(picture(1)).decode()
    body = {"prompt": "a key", "seed": 4, "num_inference_steps": 2, "n": 2}
    body["controls"] = [{"adapter": "style", "reference": style}]
    made = live.post("/v1/images/generations", json=body).json()
    png = base64.b64decode(made["data"][1]["b64_json"])
    again = live.post("/v1/replay", files={"image": png}).json()
    assert again["identical"] is True
    from condit.data.images import load_image, read_recipe, save_image

    recipe = read_recipe(png)
    recipe["request"]["references"][0]["path"] = "/etc/hostname"  # type: ignore[index]
    path = save_image(load_image(png), tmp_path / "x.png", recipe=recipe)
    answer = live.post("/v1/replay", files={"image": path.read_bytes()})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "missing_reference")
    given = live.post("/v1/replay", files=[("image", path.read_bytes()), ("references[]", picture(1))])
    assert given.json()["identical"] is True
    recipe["request"]["references"][0]["use"] = "/tmp/own.py:Own"  # type: ignore[index]
    path = save_image(load_image(png), tmp_path / "x.png", recipe=recipe)
    assert live.post("/v1/replay", files={"image": path.read_bytes()}).json()["error"]["code"] == "unknown_adapter"
    assert json.loads(json.dumps(made["data"][0]["condit"]))["seed"] == 4
