"""Whether an answer is what the OpenAPI document says."""

from __future__ import annotations

import re
from typing import Any

import orjson
import pytest


class Conformance:
    """`document`: as served. Without jsonschema the test that asks is skipped."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._validators = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
        self._document = document
        # Paths without a parameter win.
        ordered = sorted(document["paths"], key=lambda path: path.count("{"))
        self._paths = {path: re.compile(re.sub(r"\{\w+\}", "[^/]+", path) + "/?") for path in ordered}

    def operation(self, method: str, path: str) -> dict[str, Any]:
        bare = path.partition("?")[0]
        found = next(name for name, pattern in self._paths.items() if pattern.fullmatch(bare))
        operation: dict[str, Any] = self._document["paths"][found][method.lower()]
        return operation

    def check(self, method: str, path: str, status: int, body: bytes) -> None:
        """Raises AssertionError."""
        response = self.operation(method, path)["responses"].get(str(status))
        assert response is not None, f"{method} {path}: {status} is not in the document"
        if "$ref" in response:
            response = self._document["components"]["responses"][response["$ref"].rpartition("/")[2]]
        content = response.get("content")
        if content is None:
            assert body == b"", f"{method} {path}: the document knows of no answer"
            return
        schema = {**content["application/json"]["schema"], "components": self._document["components"]}
        errors = list(self._validators.Draft202012Validator(schema).iter_errors(orjson.loads(body)))
        assert not errors, f"{method} {path} {status}: {errors[0].message} at {list(errors[0].absolute_path)}"
