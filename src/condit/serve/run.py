"""Running the server: models are loaded, then the address is opened; a signal ends what runs and refuses what waits."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from condit.serve.app import Server, guarded, make_app
from condit.serve.guard import LOOPBACK, Guard
from condit.serve.limits import Limits
from condit.serve.models import Served


@dataclass(frozen=True)
class ServeOptions:
    """models: names, folders or files; token: needed for another address than the loopback; hosts: more names of this
    server; study: a folder of `condit study make`; prompts: whether logs contain them."""

    models: Sequence[str] = ("tiny",)
    host: str = "127.0.0.1"
    port: int = 8188
    token: str | None = None
    hosts: Sequence[str] = ()
    study: Path | None = None
    device: str | None = None
    prompts: bool = False
    limits: Limits = Limits()
    batching: bool = True

    def __post_init__(self) -> None:
        if self.host not in LOOPBACK and not self.token:
            raise ValueError(f"{self.host} can be reached by others: give --token, or serve on 127.0.0.1.")
        if self.token is not None and len(self.token) < 16:
            raise ValueError("the token needs at least 16 characters, such as those of `openssl rand -hex 16`.")


class Uvicorn(uvicorn.Server):
    """Refuses what waits as soon as the server is asked to stop."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self.state_of_models = server

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.state_of_models.engine.stop()
        await super().shutdown(sockets)


def serve(options: ServeOptions, tell: Callable[[str], None]) -> None:
    """Serves until a signal, which ends it in order. tell receives the address."""
    server = Server(
        [Served(name, options.limits, options.device) for name in options.models],
        options.limits,
        batching=options.batching,
        prompts=options.prompts,
    )
    app = make_app(server, options.study)
    json_lines(logging.getLogger("condit.serve"))
    config = config_of(guarded(app, server, options.token, [options.host, *options.hosts]), options.host, options.port)
    shown = f"[{options.host}]" if ":" in options.host else options.host
    tell(f"http://{shown}:{options.port}{'/study' if options.study else ''}")
    running = Uvicorn(config, server)
    try:
        running.run()
    except KeyboardInterrupt:  # uvicorn sends itself the signal again after it has shut down
        if not running.should_exit:
            raise


def config_of(app: Guard, host: str, port: int) -> uvicorn.Config:
    """Settings of the HTTP server: it trusts no header of a proxy and says nothing about itself."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=512,
        timeout_keep_alive=5,
        http="h11",
        ws="none",
        lifespan="on",
    )


def json_lines(logger: logging.Logger) -> None:
    """Messages of the server are JSON already: one line each on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
