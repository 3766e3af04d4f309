"""Answers that are errors, in OpenAI's shape: each a sentence with its remedy."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

LONGEST_END = 500  # letters of a sentence at its beginning, and at its end
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    424: "server_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class Refusal(Exception):  # noqa: N818
    """A request that is not answered. parameter: the field of its body that is wrong. headers: of the response."""

    def __init__(
        self, status: int, sentence: str, parameter: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        if len(sentence) > 2 * LONGEST_END:  # it names a value of any length, and ends in the remedy
            sentence = f"{sentence[:LONGEST_END]} … {sentence[-LONGEST_END:]}"
        super().__init__(sentence)
        self.status = status
        self.parameter = parameter
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """What OpenAI's clients read."""
        error = {"message": str(self), "type": KINDS[self.status], "param": self.parameter, "code": None}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)
