"""The settings: the only reader of the environment. Whatever is wrong with one is told in one line."""

import collections.abc
import datetime
import importlib.util
import os
import pathlib
import re
import typing
import urllib.parse

import jwt.algorithms
import pydantic
import pydantic_settings

from afterhours_grpc import address, failpoints, redis_url
from afterhours_grpc.sessions import location, session

_UNIT = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_MAX_PORT = 65535
_LENGTH = re.compile(r"([0-9]{1,15})(s|m|h|d)|0")


class SettingsError(Exception):
    """A setting is wrong or missing; the message is one line, names the variable, and says what to do."""


def length(text: object) -> datetime.timedelta:
    """Read a length of time such as `2s`, `15m`, `1h`, `30d`."""
    if isinstance(text, datetime.timedelta):
        return text
    found = _LENGTH.fullmatch(str(text).strip())
    if not found:
        raise ValueError("must be a length of time such as 2s, 15m, 1h or 30d")
    try:
        return datetime.timedelta(**{_UNIT[found[2]]: int(found[1])}) if found[2] else datetime.timedelta()
    except OverflowError:
        raise ValueError("must be a length of time of at most 999999999 days") from None


def _lengths(text: object) -> tuple[datetime.timedelta, ...]:
    lengths = tuple(length(each) for each in str(text).split(","))
    if not all(datetime.timedelta() < each <= datetime.timedelta(days=366) for each in lengths):
        raise ValueError("each must be from 1s to 366d")
    return lengths


def _within(least: str, most: str) -> pydantic.AfterValidator:
    def check(value: datetime.timedelta) -> datetime.timedelta:
        if not length(least) <= value <= length(most):
            raise ValueError(f"must be from {least} to {most}")
        return value

    return pydantic.AfterValidator(check)


def _unless_off(text: object) -> object:
    return None if text == "off" else text


def _keys(text: object) -> tuple[location.FuzzKey, ...]:
    return location.FuzzKey.parse(str(text))


Length = typing.Annotated[datetime.timedelta, pydantic.BeforeValidator(length)]
Bounded = typing.Annotated[Length, _within("0s", "36500d")]
Positive = typing.Annotated[Length, _within("1s", "36500d")]
Address = typing.Annotated[address.Address, pydantic.BeforeValidator(address.parse), pydantic_settings.NoDecode]


def _gates(text: object) -> frozenset[session.Gate]:
    try:
        return frozenset(session.Gate(each.strip()) for each in str(text).split(",") if each.strip())
    except ValueError:
        raise ValueError(f"each must be one of {', '.join(session.Gate)}") from None


def _redis_url(url: str) -> str:
    redis_url.parse(url)
    return url


def _secret(secret: pydantic.SecretStr) -> pydantic.SecretStr:
    text = secret.get_secret_value()
    try:
        if len(text.encode()) < 32:
            raise ValueError("must have at least 32 bytes: make one by `openssl rand -hex 32`")
        # What it refuses would be refused for each token.
        jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).prepare_key(text)
    except UnicodeEncodeError:
        raise ValueError("must be UTF-8: make one by `openssl rand -hex 32`") from None
    except jwt.InvalidKeyError:
        raise ValueError("must be no public key and no certificate: those belong into AFTERHOURS_JWKS_URL") from None
    return secret


def _key_set_url(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.port != 0 and parts.username is None and url.isprintable() and " " not in url
    except ValueError:
        usable = False
    if not usable or not (parts.hostname if parts.scheme == "https" else parts.path):
        raise ValueError("must be https://HOST/PATH, without a user or a password, or file:///PATH")
    return url


def _variable(name: str, default: typing.Any, description: str) -> typing.Any:
    return pydantic.Field(default, validation_alias=name, description=description, validate_default=True)


class Settings(pydantic_settings.BaseSettings):
    """What the service runs with. Each field's alias is its variable; a flag of the same name overrides it."""

    model_config = pydantic_settings.SettingsConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, env_ignore_empty=True
    )

    database_url: typing.Annotated[str, pydantic.Field(pattern=r"^postgres(ql)?://")] | None = _variable(
        "DATABASE_URL", None, "Postgres: postgresql://…, as libpq reads it."
    )
    redis_url: typing.Annotated[str, pydantic.AfterValidator(_redis_url)] = _variable(
        "REDIS_URL", "redis://localhost:6379", "Redis: redis://…, rediss://… or unix://…"
    )
    listen: Address = _variable("AFTERHOURS_LISTEN", "127.0.0.1:50051", "host:port; port 0 picks one.")
    workers: typing.Annotated[int, pydantic.Field(ge=1, le=64)] = _variable(
        "AFTERHOURS_WORKERS", 1, "Processes sharing the port, 1 to 64."
    )
    worker: int | None = _variable(
        "AFTERHOURS_WORKER", None, "Set by the supervisor: the number of the worker that this process is, from 0."
    )
    transport: typing.Literal["grpcio", "native"] = _variable(
        "AFTERHOURS_TRANSPORT", "grpcio", "What carries HTTP/2: grpcio, or native (the extra of that name)."
    )
    durations: typing.Annotated[
        tuple[datetime.timedelta, ...], pydantic.BeforeValidator(_lengths), pydantic_settings.NoDecode
    ] = _variable("AFTERHOURS_DURATIONS", "15m,30m,60m", "Durations allowed for start and for extend.")
    warning_lead: Bounded = _variable(
        "AFTERHOURS_WARNING_LEAD", "2m", "EXPIRING is sent this long before the end; 0s turns it off."
    )
    reconcile_interval: Positive = _variable("AFTERHOURS_RECONCILE_INTERVAL", "5s", "Time between two sweeps.")
    auth: typing.Literal["jwt", "mtls", "none"] = _variable(
        "AFTERHOURS_AUTH", "jwt", "Credentials: jwt, mtls, or on a loopback address none."
    )
    jwt_secret: typing.Annotated[pydantic.SecretStr, pydantic.AfterValidator(_secret)] | None = _variable(
        "AFTERHOURS_JWT_SECRET", None, "Secret of tokens, HS256: at least 32 bytes."
    )
    jwks_url: (
        typing.Annotated[str, pydantic.Field(pattern=r"^(https://|file:/)"), pydantic.AfterValidator(_key_set_url)]
        | None
    ) = _variable("AFTERHOURS_JWKS_URL", None, "Key set of tokens, RS256, ES256 or EdDSA: https://… or file:///…")
    jwt_issuer: str | None = _variable("AFTERHOURS_JWT_ISSUER", None, "Issuer that tokens must name.")
    jwt_audience: str | None = _variable("AFTERHOURS_JWT_AUDIENCE", None, "Audience that tokens must name.")
    tls_cert: pathlib.Path | None = _variable("AFTERHOURS_TLS_CERT", None, "PEM: the server's certificate chain.")
    tls_key: pathlib.Path | None = _variable("AFTERHOURS_TLS_KEY", None, "PEM: the certificate's key.")
    tls_client_ca: pathlib.Path | None = _variable(
        "AFTERHOURS_TLS_CLIENT_CA", None, "PEM: the CA of client certificates, which are then required."
    )
    mtls_allow: pathlib.Path | None = _variable(
        "AFTERHOURS_MTLS_ALLOW", None, "File: a client certificate's SAN and its scopes on each line."
    )
    gates: typing.Annotated[frozenset[session.Gate], pydantic.BeforeValidator(_gates), pydantic_settings.NoDecode] = (
        _variable("AFTERHOURS_GATES", "", "What a start and an extension need: any of premium,verified,consent.")
    )
    rate_limit: typing.Annotated[
        # Redis keeps the times of all that are counted.
        typing.Annotated[int, pydantic.Field(ge=1, le=100_000)] | None,
        pydantic.BeforeValidator(_unless_off),
    ] = _variable("AFTERHOURS_RATE_LIMIT", None, "Starts and extends of one user a minute.")
    exact_location_retention: Bounded = _variable(
        "AFTERHOURS_EXACT_LOCATION_RETENTION", "30d", "How long after a session's end its exact location is kept."
    )
    # Answers are kept for 24 hours and removed with their sessions: a retry without one would be applied again.
    history_retention: typing.Annotated[Length, _within("24h", "36500d")] = _variable(
        "AFTERHOURS_HISTORY_RETENTION", "365d", "How long after its end a session is kept, at least 24h."
    )
    event_retention: Bounded = _variable(
        "AFTERHOURS_EVENT_RETENTION", "7d", "How long events are kept, and how far back a cursor may reach."
    )
    fuzz_key: typing.Annotated[
        tuple[location.FuzzKey, ...] | None,
        pydantic.BeforeValidator(lambda text: None if text is None else _keys(text)),
        pydantic_settings.NoDecode,
    ] = _variable("AFTERHOURS_FUZZ_KEY", None, "version:secret,…, newest first; at least 32 characters each.")
    metrics_listen: typing.Annotated[
        address.Address | None,
        pydantic.BeforeValidator(lambda text: _unless_off(text) and address.parse(text)),
        pydantic_settings.NoDecode,
    ] = _variable("AFTERHOURS_METRICS_LISTEN", None, "host:port of the Prometheus endpoint.")
    reflection: bool = _variable("AFTERHOURS_REFLECTION", True, "Serve reflection: on or off.")
    drain: Positive = _variable("AFTERHOURS_DRAIN", "10s", "Longest time from SIGTERM to exit.")
    log_format: typing.Literal["console", "json"] = _variable(
        "AFTERHOURS_LOG_FORMAT", "console" if os.isatty(2) else "json", "console or json."
    )
    postgres_bin: pathlib.Path | None = _variable(
        "AFTERHOURS_POSTGRES_BIN", None, "Folder of the Postgres programs that dev starts."
    )

    fail_point: failpoints.Point | None = _variable(
        "AFTERHOURS_FAIL_POINT", None, "For tests: the point at which the process kills itself."
    )

    def check(self) -> None:
        """Raise SettingsError for what keeps the service from being served with these, all of it at once."""
        missing = [*self._credentials()]
        if not self.database_url:
            missing.append("DATABASE_URL is not set: set it to postgresql://…, or try `afterhours-grpc dev`")
        if not self.fuzz_key:
            missing.append("AFTERHOURS_FUZZ_KEY is not set: set it to 1:SECRET, the secret of 32 characters or more")
        if self.transport == "native" and not importlib.util.find_spec("pygrpc_native"):
            missing.append("AFTERHOURS_TRANSPORT=native is not installed: pip install 'afterhours-grpc[native]'")
        if self.metrics_listen and self.metrics_listen[1] > (highest := _MAX_PORT - self.workers + 1):
            missing.append(f"AFTERHOURS_METRICS_LISTEN is past {highest}: of {self.workers} workers each has a port")
        if missing:
            raise SettingsError("; ".join(missing))

    def _credentials(self) -> collections.abc.Iterator[str]:
        """Say what is missing for callers to be known, and for nobody else to listen."""
        if self.auth == "none" and not self.listen.on_loopback:
            yield "AFTERHOURS_AUTH=none is for a loopback AFTERHOURS_LISTEN only, such as 127.0.0.1:50051"
        if self.auth == "jwt" and bool(self.jwt_secret) == bool(self.jwks_url):
            yield "AFTERHOURS_AUTH=jwt needs either AFTERHOURS_JWT_SECRET or AFTERHOURS_JWKS_URL: set one of the two"
        if self.auth == "mtls":
            for name in ("tls_cert", "tls_key", "tls_client_ca", "mtls_allow"):
                if not getattr(self, name):
                    yield f"AFTERHOURS_AUTH=mtls needs AFTERHOURS_{name.upper()}: set it to a file"
        elif bool(self.tls_cert) != bool(self.tls_key) or (self.tls_client_ca and not self.tls_cert):
            yield "TLS needs both AFTERHOURS_TLS_CERT and AFTERHOURS_TLS_KEY: set them to PEM files"
        if self.transport == "native" and self.tls_cert:
            yield "AFTERHOURS_TRANSPORT=native has no TLS: set it to grpcio, or leave AFTERHOURS_TLS_CERT unset"


def environment(overrides: typing.Mapping[str, str]) -> dict[str, str]:
    """Give the environment of this process, and `overrides` over it, for one that it starts."""
    return {**os.environ, **overrides}  # noqa: TID251 - it is this module that does


def load(overrides: typing.Mapping[str, str]) -> Settings:
    """Read the environment, and `overrides` by variable over it. Raise SettingsError."""
    try:
        config = Settings(**typing.cast("dict[str, typing.Any]", overrides))
    except pydantic.ValidationError as error:
        problems = []
        for each in error.errors():
            name = ".".join(str(part) for part in each["loc"][:1])
            told = each["msg"].removeprefix("Value error, ")
            problems.append(f"{name}: {told}" if name else told)
        raise SettingsError("; ".join(dict.fromkeys(problems))) from None
    if config.fail_point:
        failpoints.arm(config.fail_point)
    return config
