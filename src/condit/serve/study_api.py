"""The routes of a preference study."""

from __future__ import annotations

from typing import Literal

from fastapi import FastAPI, Query
from pydantic import Field
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response

from condit.serve.forms import Strict, body_of, on_thread, read_form
from condit.serve.limits import Limits, Refusal
from condit.serve.study import Study


class AnswerForm(Strict):
    """POST /v1/study/answers."""

    ticket: str = Field(min_length=1, max_length=4000)
    choice: Literal["left", "right", "neither"]
    seconds: float = Field(default=0.0, ge=0, le=1e6)


def add_study(app: FastAPI, study: Study, limits: Limits) -> None:
    """The routes of a preference study."""

    @app.get("/v1/study/next")
    async def question(rater: str = Query(pattern=r"^[\w .@-]{1,60}$")) -> Response:
        """The next question for a rater."""
        return JSONResponse(study.next(rater))

    @app.post("/v1/study/answers", openapi_extra=body_of(AnswerForm))
    async def answer(request: HTTPRequest) -> Response:
        """Store an answer; the reply comes after it is on disk."""
        form = await read_form(request, AnswerForm, limits)
        try:
            count = await on_thread(lambda: study.answer(form.ticket, form.choice, form.seconds))
        except OSError as error:
            message = f"The answer could not be stored ({error.strerror or error}). Try again."
            raise Refusal(503, "not_stored", message, retry=5) from None
        return JSONResponse({"answered": count})

    @app.get("/v1/study/pictures/{name}")
    async def picture(name: str) -> Response:
        """A picture of the study."""
        if name not in study.pictures:
            raise Refusal(404, "not_found", "Not found.")
        return Response(study.pictures[name], media_type="image/png")
