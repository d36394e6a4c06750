"""Errors become NBD's numbers and back."""

from __future__ import annotations

import errno
import inspect

import pytest

from stillpoint import errors
from stillpoint.nbd.constants import Errno
from stillpoint.nbd.errors import error_from_nbd, nbd_errno


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (errors.PermissionRefused(""), Errno.EPERM),
        (errors.Refused(""), Errno.EPERM),
        (errors.InUse(""), Errno.EPERM),
        (errors.OutOfRange(""), Errno.EINVAL),
        (errors.StoreFull(""), Errno.ENOSPC),
        (errors.SnapshotInvalid(""), Errno.EIO),
        (errors.DataCorrupt(""), Errno.EIO),
        (errors.FencedError(""), Errno.ESHUTDOWN),
        (errors.PeerUnavailable(""), Errno.EIO),
        (errors.DeviceError("", errno.ENOSPC), Errno.ENOSPC),
        (errors.DeviceError("", errno.EDQUOT), Errno.ENOSPC),
        (errors.DeviceError("", errno.EROFS), Errno.EPERM),
        (errors.DeviceError("", errno.ENODEV), Errno.EIO),
        (errors.DeviceError("", errno.EIO), Errno.EIO),
        (AssertionError(), Errno.EIO),
    ],
)
def test_each_error_has_its_number(error: Exception, number: Errno) -> None:
    assert nbd_errno(error) == number


def test_no_error_of_ours_is_called_success() -> None:
    names = {number.value for number in Errno if number}
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, errors.StillpointError) and kind is not errors.DeviceError:
            assert nbd_errno(kind("x")) in names


def test_a_servers_number_becomes_an_error_that_says_what_failed() -> None:
    refused = error_from_nbd("nbd://host/v: write of 1 bytes at 2", Errno.EPERM)
    assert isinstance(refused, errors.PermissionRefused)
    failed = error_from_nbd("nbd://host/v: write of 1 bytes at 2", Errno.ENOSPC)
    assert isinstance(failed, errors.DeviceError)
    assert failed.errno == errno.ENOSPC
    assert str(failed).startswith("nbd://host/v: write of 1 bytes at 2: ")
