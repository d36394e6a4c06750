"""An S3 service for the tests that need one, and a bucket for each of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.support.s3 import new_bucket, s3_service

_bucket_number = itertools.count()


@pytest.fixture(scope="session")
def service() -> Iterator[str]:
    with s3_service() as url:
        yield url


@pytest.fixture
def bucket(service: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    return new_bucket(service, f"bucket-{next(_bucket_number)}")
