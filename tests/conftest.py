"""Leaves out the tests this machine cannot run, saying why, or fails them when everything is required."""

import resource
import signal
from collections.abc import Generator

import pytest

from tests.support.cluster import local_cluster as local_cluster
from tests.support.cluster import own_cluster as own_cluster
from tests.support.requirements import MARKERS, REQUIRE_ALL_VARIABLE, everything_is_required, what_is_missing


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    # Engines that a test lets crash keep their files open until the run ends.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    # A run in the background starts with SIGINT ignored, and so would every program that a test interrupts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    reason = what_is_missing(item.iter_markers())
    if reason is not None:
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_skipped(report)
    return report


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    # An expected failure is reported as skipped too; it ran, so it stands.
    if not report.skipped or hasattr(report, "wasxfail") or not everything_is_required():
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"left out although {REQUIRE_ALL_VARIABLE} is set: {reason}"
