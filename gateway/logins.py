"""Enhanced authentication (MQTT5-4.12): AUTH packets between CONNECT and CONNACK, and again on a live connection.

The one method is SCRAM-SHA-256 (`scram.py`). It ends where a plain CONNECT begins: the password it proved is put into
the CONNECT, and `admission` decides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from secrets import token_urlsafe
from typing import TYPE_CHECKING, Any, Final

from gateway.hub import Hub
from gateway.mqtt import Auth, Connect, Properties, ProtocolError, Reason, encode
from gateway.scram import METHOD, Credentials, KeyCache, ScramError, ScramExchange

if TYPE_CHECKING:
    from gateway.connection import Connection

NONCE_BYTES: Final = 18


@dataclass(slots=True)
class Login:
    """Of one connection: while `exchange` is there, a client-final-message is awaited."""

    connect: Connect
    hub: Hub
    exchange: ScramExchange | None = None
    deriving: bool = False
    proof: bytes = b""  # the server's, for CONNACK


class Logins:
    """`admitted` is called with the CONNECT as if it had the password, `refused` when it was wrong."""

    def __init__(
        self,
        *,
        admitted: Callable[[Connection, Connect, Login], None],
        refused: Callable[[Connection, Login, str], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._admitted = admitted
        self._refused = refused
        self._spawn = spawn
        self._cache = KeyCache()
        self._logins: dict[Connection, Login] = {}

    def begin(self, connection: Connection, connect: Connect, hub: Hub) -> None:
        """A CONNECT with an authentication method that is known here."""
        login = self._logins[connection] = Login(connect, hub)
        self._challenge(connection, login, connect.properties.get("authentication_data", b""))

    def take(self, connection: Connection, packet: Auth) -> None:
        """An AUTH. Raises ProtocolError where it has no place."""
        login = self._logins.get(connection)
        if login is None:  # MQTT5-4.12.0-7
            raise ProtocolError("AUTH without an authentication method in CONNECT")
        if packet.properties.get("authentication_method") != METHOD:  # MQTT5-4.12.0-5
            raise ProtocolError(f"the authentication method is {METHOD} until the connection ends")
        data = packet.properties.get("authentication_data", b"")
        if packet.reason == Reason.CONTINUE_AUTHENTICATION and login.exchange and not login.deriving:
            login.deriving = True
            self._spawn(self._finish(connection, login, login.exchange, data))
        elif (
            packet.reason == Reason.RE_AUTHENTICATE and not login.exchange and connection.session is not None
        ):
            self._challenge(connection, login, data)
        else:
            raise ProtocolError(f"AUTH 0x{packet.reason:02x} is not what comes next")

    def forget(self, connection: Connection) -> None:
        """It is over, however it ended."""
        self._logins.pop(connection, None)

    def _challenge(self, connection: Connection, login: Login, client_first: bytes) -> None:
        credentials = Credentials(login.hub.app, login.connect.client_id)
        login.exchange = ScramExchange(credentials, token_urlsafe(NONCE_BYTES), self._cache)
        try:
            server_first = login.exchange.first(client_first)
        except ScramError as error:
            self._refused(connection, login, error.reason)
            return
        connection.send(self._auth(Reason.CONTINUE_AUTHENTICATION, server_first))

    async def _finish(
        self, connection: Connection, login: Login, exchange: ScramExchange, client_final: bytes
    ) -> None:
        derivation = exchange.derivation()
        if derivation is not None:
            await asyncio.to_thread(derivation)
        if self._logins.get(connection) is not login:
            return  # gone meanwhile
        login.exchange, login.deriving = None, False
        try:
            login.proof = exchange.final(client_final)
        except ScramError as error:
            self._refused(connection, login, error.reason)
            return
        connect = replace(login.connect, password=exchange.secret.encode())
        login.connect = replace(login.connect, will=None)  # of no use any more, and may be large
        self._admitted(connection, connect, login)

    def confirm(self, connection: Connection, login: Login) -> None:
        """A live connection has proved itself again."""
        connection.send(self._auth(Reason.SUCCESS, login.proof))

    def proof_for(self, connection: Connection) -> Properties:
        """What CONNACK says of the login."""
        login = self._logins.get(connection)
        if login is None:
            return {}
        return {"authentication_method": METHOD, "authentication_data": login.proof}

    @staticmethod
    def _auth(reason: Reason, data: bytes) -> bytes:
        return encode(Auth(reason, {"authentication_method": METHOD, "authentication_data": data}), 5)
