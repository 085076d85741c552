"""The settings: the only reader of the environment. Whatever is wrong with one is told in one line."""

import collections.abc
import importlib.util
import os
import typing

import pydantic
import pydantic_settings

from afterhours_grpc import failpoints, setting_types

_MAX_PORT = 65535


class SettingsError(Exception):
    """A setting is wrong or missing; the message is one line, names the variable, and says what to do."""


def _variable(name: str, default: typing.Any, description: str) -> typing.Any:
    return pydantic.Field(default, validation_alias=name, description=description, validate_default=True)


class Settings(pydantic_settings.BaseSettings):
    """What the service runs with. Each field's alias is its variable; a flag of the same name overrides it."""

    model_config = pydantic_settings.SettingsConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, env_ignore_empty=True
    )

    database_url: setting_types.PostgresUrl | None = _variable(
        "DATABASE_URL", None, "Postgres: postgresql://…, as libpq reads it."
    )
    redis_url: setting_types.RedisUrl = _variable(
        "REDIS_URL", "redis://localhost:6379", "Redis: redis://…, rediss://… or unix://…"
    )
    listen: setting_types.Address = _variable("AFTERHOURS_LISTEN", "127.0.0.1:50051", "host:port; port 0 picks one.")
    workers: typing.Annotated[int, pydantic.Field(ge=1, le=64)] = _variable(
        "AFTERHOURS_WORKERS", 1, "Processes sharing the port, 1 to 64."
    )
    worker: int | None = _variable(
        "AFTERHOURS_WORKER", None, "Set by the supervisor: the number of the worker that this process is, from 0."
    )
    transport: typing.Literal["grpcio", "native"] = _variable(
        "AFTERHOURS_TRANSPORT", "grpcio", "What carries HTTP/2: grpcio, or native (the extra of that name)."
    )
    durations: setting_types.Durations = _variable(
        "AFTERHOURS_DURATIONS", "15m,30m,60m", "Durations allowed for start and for extend."
    )
    warning_lead: setting_types.Bounded = _variable(
        "AFTERHOURS_WARNING_LEAD", "2m", "EXPIRING is sent this long before the end; 0s turns it off."
    )
    reconcile_interval: setting_types.Positive = _variable(
        "AFTERHOURS_RECONCILE_INTERVAL", "5s", "Time between two sweeps."
    )
    auth: typing.Literal["jwt", "mtls", "none"] = _variable(
        "AFTERHOURS_AUTH", "jwt", "Credentials: jwt, mtls, or on a loopback address none."
    )
    jwt_secret: setting_types.Secret | None = _variable(
        "AFTERHOURS_JWT_SECRET", None, "Secret of tokens, HS256: at least 32 bytes."
    )
    jwks_url: setting_types.KeySetUrl | None = _variable(
        "AFTERHOURS_JWKS_URL", None, "Key set of tokens, RS256, ES256 or EdDSA: https://… or file:///…"
    )
    jwt_issuer: str | None = _variable("AFTERHOURS_JWT_ISSUER", None, "Issuer that tokens must name.")
    jwt_audience: str | None = _variable("AFTERHOURS_JWT_AUDIENCE", None, "Audience that tokens must name.")
    tls_cert: setting_types.Path | None = _variable("AFTERHOURS_TLS_CERT", None, "PEM: the server's certificate chain.")
    tls_key: setting_types.Path | None = _variable("AFTERHOURS_TLS_KEY", None, "PEM: the certificate's key.")
    tls_client_ca: setting_types.Path | None = _variable(
        "AFTERHOURS_TLS_CLIENT_CA", None, "PEM: the CA of client certificates, which are then required."
    )
    mtls_allow: setting_types.Path | None = _variable(
        "AFTERHOURS_MTLS_ALLOW", None, "File: a client certificate's SAN and its scopes on each line."
    )
    gates: setting_types.Gates = _variable(
        "AFTERHOURS_GATES", "", "What a start and an extension need: any of premium,verified,consent."
    )
    rate_limit: setting_types.RateOrOff = _variable(
        "AFTERHOURS_RATE_LIMIT", None, "Starts and extends of one user a minute."
    )
    exact_location_retention: setting_types.Bounded = _variable(
        "AFTERHOURS_EXACT_LOCATION_RETENTION", "30d", "How long after a session's end its exact location is kept."
    )
    history_retention: setting_types.History = _variable(
        "AFTERHOURS_HISTORY_RETENTION", "365d", "How long after its end a session is kept, at least 24h."
    )
    event_retention: setting_types.Bounded = _variable(
        "AFTERHOURS_EVENT_RETENTION", "7d", "How long events are kept, and how far back a cursor may reach."
    )
    fuzz_key: setting_types.FuzzKeys = _variable(
        "AFTERHOURS_FUZZ_KEY", None, "version:secret,…, newest first; at least 32 characters each."
    )
    metrics_listen: setting_types.AddressOrOff = _variable(
        "AFTERHOURS_METRICS_LISTEN", None, "host:port of the Prometheus endpoint."
    )
    reflection: bool = _variable("AFTERHOURS_REFLECTION", True, "Serve reflection: on or off.")
    drain: setting_types.Positive = _variable("AFTERHOURS_DRAIN", "10s", "Longest time from SIGTERM to exit.")
    log_format: typing.Literal["console", "json"] = _variable(
        "AFTERHOURS_LOG_FORMAT", "console" if os.isatty(2) else "json", "console or json."
    )
    postgres_bin: setting_types.Path | None = _variable(
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
