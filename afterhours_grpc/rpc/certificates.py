"""TLS: the server's certificate, its clients', and who of them may call."""

import collections.abc
import functools
import pathlib
import re
import ssl
import typing

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from afterhours_grpc.rpc import auth
from afterhours_grpc.sessions import errors

log = structlog.get_logger()

_PEM = "x509_pem_cert"
# Certificates whose names are remembered: reading them takes 30 microseconds of each call.
_REMEMBERED = 1024
# What is a DNS name and nothing else; of digits and dots alone it would look like an address.
_DNS_NAME = re.compile(r"(?![0-9.]+$)[A-Za-z0-9_*.-]+")
_REFUSED = "This client certificate's subject alternative name is not on the server's list; use one that is."


class CertificateError(Exception):
    """A PEM file or the list of callers cannot be used; the message is one line."""


class Encryption:
    """TLS by PEM files: the server's certificate chain and key, and the CA whose clients alone may connect, if any.

    The files are looked at for each new connection. Those that cannot be used, or not yet, leave what was there.
    """

    def __init__(self, certificate: pathlib.Path, key: pathlib.Path, client_ca: pathlib.Path | None) -> None:
        """Read the files. Raise CertificateError."""
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        self._paths = [each for each in (certificate, key, client_ca) if each]
        self._seen = self._stamps()
        self._first = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """Give what a server is built with."""
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            typing.cast("typing.Any", self._changed),  # None means unchanged, which its types forgot
            require_client_authentication=self._client_ca is not None,
        )

    def _read(self) -> grpc.ServerCertificateConfiguration:
        try:
            # Says whether the key belongs to the certificate, of which grpc would only log a page.
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._certificate, self._key, password=_no_password)
            if self._client_ca:
                context.load_verify_locations(self._client_ca)
            pair = self._key.read_bytes(), self._certificate.read_bytes()
            _check_algorithm(pair[1])
            return grpc.ssl_server_certificate_configuration(
                [pair], self._client_ca.read_bytes() if self._client_ca else None
            )
        except (OSError, ValueError) as error:
            names = ", ".join(str(each) for each in self._paths)
            raise CertificateError(
                f"{names} cannot be used for TLS ({type(error).__name__}): check the files"
            ) from None

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Give what changed, or None. grpc calls this in threads of its own."""
        stamps = self._stamps()
        if stamps == self._seen:
            return None
        self._seen = stamps
        try:
            found = self._read()
        except CertificateError as error:
            log.error("tls_files_unusable", error=str(error))
            return None
        log.info("tls_files_reloaded")
        return found

    def _stamps(self) -> list[tuple[int, int, int]] | None:
        try:
            found = [each.stat() for each in self._paths]
        except OSError:
            return None
        return [(each.st_mtime_ns, each.st_size, each.st_ino) for each in found]


def _check_algorithm(chain: bytes) -> None:
    """Raise ValueError for a key that grpc refuses: it would say that the address cannot be listened on."""
    match x509.load_pem_x509_certificate(chain).public_key():
        case rsa.RSAPublicKey() | ed25519.Ed25519PublicKey():
            return
        case ec.EllipticCurvePublicKey(curve=ec.SECP256R1() | ec.SECP384R1() | ec.SECP521R1()):
            return
    raise ValueError("the key is of no kind that grpc knows")


def _no_password() -> str:
    """Say so instead of asking at the terminal for the password of an encrypted key."""
    raise ValueError("the key is encrypted")


class Allowed:
    """Gives the caller of a client certificate that is on the list."""

    def __init__(self, path: pathlib.Path) -> None:
        """Read the list: on each line a subject alternative name, then its scopes. Raise CertificateError."""
        try:
            lines = [line.split() for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
        except (OSError, ValueError) as error:
            raise CertificateError(
                f"{path} cannot be read ({type(error).__name__}): check AFTERHOURS_MTLS_ALLOW"
            ) from None
        listed = [(name, frozenset(scopes)) for name, *scopes in filter(None, lines)]
        self._callers = {name: auth.Caller(name, scopes) for name, scopes in listed}
        self._names = functools.lru_cache(_REMEMBERED)(_names)
        unknown = {scope for _, scopes in listed for scope in scopes} - set(auth.Scope)
        if unknown or len(self._callers) < max(1, len(listed)):
            twice = "names a certificate twice" if listed else "has no line"
            what = f"does not know the scope {min(unknown)}" if unknown else twice
            raise CertificateError(f"{path} {what}: write a certificate's SAN and its scopes on each line")

    async def __call__(self, context: auth.Context) -> auth.Caller:
        """Give who calls. Raise Unauthenticated."""
        found: collections.abc.Mapping[str, collections.abc.Iterable[bytes]] = context.auth_context()
        for pem in found.get(_PEM, ()):
            for name in self._names(pem):
                if caller := self._callers.get(name):
                    return caller
        raise errors.Unauthenticated(_REFUSED)


def _names(pem: bytes) -> tuple[str, ...]:
    """Return the subject alternative names of a certificate: DNS names, URIs, email addresses and IP addresses.

    They are read from the certificate because grpc cuts each one at a NUL, so that `gateway.corp` followed
    by a NUL and `.example.com` would be `gateway.corp`, and hides their kinds, so that a DNS name could pass for a URI.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return ()
    return tuple(filter(None, map(_text, names)))


def _text(name: x509.GeneralName) -> str | None:
    match name:
        case x509.DNSName() if _DNS_NAME.fullmatch(name.value):
            return name.value
        case x509.UniformResourceIdentifier() if ":" in name.value:
            return name.value
        case x509.RFC822Name() if "@" in name.value:
            return name.value
        case x509.IPAddress():
            return str(name.value)
    return None
