"""What tells callers, and what encrypts, as the settings have it."""

import structlog

from afterhours_grpc import background, settings
from afterhours_grpc.rpc import auth, certificates, key_sets, tokens

log = structlog.get_logger()


class CredentialsError(Exception):
    """Credentials cannot be checked as configured; the message is one line and says what to do."""


async def configured(
    config: settings.Settings, tasks: background.Background
) -> tuple[auth.Authenticator, certificates.Encryption | None]:
    """Give what tells callers, and what encrypts. Raise CredentialsError."""
    authenticate: auth.Authenticator = auth.anyone
    try:
        expected = tokens.Expected(config.jwt_issuer, config.jwt_audience)
        if config.auth == "jwt" and config.jwt_secret:
            authenticate = tokens.Tokens(tokens.Secret(config.jwt_secret.get_secret_value()), expected)
        elif config.auth == "jwt" and config.jwks_url:
            authenticate = tokens.Tokens(await _key_set(config.jwks_url, tasks), expected)
        elif config.auth == "mtls" and config.mtls_allow:
            authenticate = certificates.Allowed(config.mtls_allow)
        if not (config.tls_cert and config.tls_key):
            if not config.listen.on_loopback:
                log.warning("credentials_in_the_clear", advice="set AFTERHOURS_TLS_CERT and AFTERHOURS_TLS_KEY")
            return authenticate, None
        return authenticate, certificates.Encryption(config.tls_cert, config.tls_key, config.tls_client_ca)
    except (certificates.CertificateError, key_sets.KeySetError) as error:
        raise CredentialsError(str(error)) from error


async def check(config: settings.Settings) -> None:
    """Raise CredentialsError for files, or a key set, with which no caller would be known."""
    try:
        if config.auth == "jwt" and config.jwks_url:
            await key_sets.KeySet(config.jwks_url).refresh()
        if config.auth == "mtls" and config.mtls_allow:
            certificates.Allowed(config.mtls_allow)
        if config.tls_cert and config.tls_key:
            certificates.Encryption(config.tls_cert, config.tls_key, config.tls_client_ca)
    except (certificates.CertificateError, key_sets.KeySetError) as error:
        raise CredentialsError(str(error)) from error


async def _key_set(url: str, tasks: background.Background) -> key_sets.KeySet:
    """Give the keys at a URL. A file must be there; an endpoint may be away, for sessions end without it."""
    keys = key_sets.KeySet(url)
    try:
        await keys.refresh()
    except key_sets.KeySetError as error:
        if url.startswith("file:"):
            raise
        log.error("jwks_unavailable", error=str(error))
    tasks.keep("key set", keys.run)
    return keys
