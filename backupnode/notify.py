"""Tells people how scheduled backups went: by webhook and by mail. It never makes a backup fail."""

from __future__ import annotations

import asyncio
import json
import logging
import smtplib
import ssl
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from email.message import EmailMessage
from enum import Enum
from http.client import HTTPException
from pathlib import Path
from typing import Final

from stillpoint.errors import ConfigError

logger = logging.getLogger(__name__)

_TIMEOUT_S: Final = 15.0
_ATTEMPTS: Final = 3
_PAUSE_S: Final = 2.0


class NotifyOn(Enum):
    FAILURE = "failure"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class MailConfig:
    """recipients: none, no mail. password_file: its first line, for `user`."""

    recipients: tuple[str, ...] = ()
    sender: str = "stillpoint@localhost"
    host: str = "localhost"
    port: int = 25
    starttls: bool = False
    user: str = ""
    password_file: Path | None = None


@dataclass(frozen=True, slots=True)
class NotifyConfig:
    """webhook: an http:// or https:// URL that takes a POST of JSON (the fields of Notice); "": none."""

    when: NotifyOn = NotifyOn.FAILURE  # not `on`, which is a truth value in YAML
    webhook: str = ""
    mail: MailConfig = field(default_factory=MailConfig)

    def __post_init__(self) -> None:
        if self.webhook and not self.webhook.startswith(("http://", "https://")):
            raise ConfigError(f"notify.webhook is {self.webhook!r}; it must be an http:// or https:// URL")
        for address in (*self.mail.recipients, self.mail.sender):
            if "@" not in address or any(character in address for character in "\r\n"):
                raise ConfigError(f"notify.mail: {address!r} is no mail address")


@dataclass(frozen=True, slots=True)
class Notice:
    """How one run went. failures: in a row, this one included; 0: it succeeded."""

    node: str
    schedule: str
    volume: str
    succeeded: bool
    started_ns: int
    finished_ns: int
    backup: str = ""
    error: str = ""
    warnings: tuple[str, ...] = ()
    failures: int = 0

    @property
    def subject(self) -> str:
        if not self.succeeded:
            return f"backup of {self.volume} FAILED on {self.node}"
        return f"backup of {self.volume} done on {self.node}" + (", with warnings" if self.warnings else "")


class Notifier:
    def __init__(self, config: NotifyConfig, *, pause_s: float = _PAUSE_S) -> None:
        self._config = config
        self._pause_s = pause_s

    async def tell(self, notice: Notice) -> None:
        """Raises nothing: what cannot be told is logged. A success with warnings counts as a failure here."""
        if notice.succeeded and not notice.warnings and self._config.when is not NotifyOn.ALWAYS:
            return
        ways: list[tuple[str, Callable[[Notice], None]]] = []
        if self._config.webhook:
            ways.append(("webhook", self._post))
        if self._config.mail.recipients:
            ways.append(("mail", self._mail))
        await asyncio.gather(*(self._try(name, way, notice) for name, way in ways))

    async def _try(self, name: str, way: Callable[[Notice], None], notice: Notice) -> None:
        for attempt in range(_ATTEMPTS):
            if attempt:
                await asyncio.sleep(self._pause_s * attempt)
            try:
                await asyncio.to_thread(way, notice)
                return
            except (OSError, smtplib.SMTPException, HTTPException, ValueError) as error:
                logger.warning("cannot notify by %s: %s", name, error)
        logger.error("nobody was told by %s: %s", name, notice.subject)

    def _post(self, notice: Notice) -> None:
        request = urllib.request.Request(
            self._config.webhook,
            data=json.dumps(asdict(notice)).encode(),
            headers={"Content-Type": "application/json", "User-Agent": "stillpoint"},
        )
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            response.read(4096)

    def _mail(self, notice: Notice) -> None:
        config = self._config.mail
        with smtplib.SMTP(config.host, config.port, timeout=_TIMEOUT_S) as server:
            if config.starttls:
                server.starttls(context=ssl.create_default_context())
            if config.user:
                server.login(config.user, _first_line(config.password_file))
            server.send_message(mail_of(notice, config))


def mail_of(notice: Notice, config: MailConfig) -> EmailMessage:
    message = EmailMessage()
    message["Subject"] = notice.subject
    message["From"] = config.sender
    message["To"] = ", ".join(config.recipients)
    lines = [f"schedule: {notice.schedule}", f"volume: {notice.volume}"]
    lines += [f"backup: {notice.backup}"] if notice.backup else []
    lines += [f"error: {notice.error}", f"failures in a row: {notice.failures}"] if not notice.succeeded else []
    lines += [f"warning: {each}" for each in notice.warnings]
    lines.append(f"took: {(notice.finished_ns - notice.started_ns) / 1e9:.1f} s")
    message.set_content("\n".join(lines) + "\n")
    return message


def _first_line(path: Path | None) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0] if path is not None else ""
