"""Keys, tokens and certificates, as an issuer and a certificate authority make them."""

import datetime
import ipaddress
import json
import pathlib
import time
import typing

import grpc
import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

SECRET = "a secret of thirty-two characters"
EVERYTHING = "sessions:any sessions:watch sessions:exact profiles:write"


def token(
    subject: str = "ada",
    scope: str | None = None,
    *,
    key: typing.Any = SECRET,
    algorithm: str = "HS256",
    lifetime: float = 60,
    headers: dict[str, typing.Any] | None = None,
    **claims: typing.Any,
) -> str:
    """Sign a token; a claim of None is left out."""
    body = {"sub": subject, "exp": int(time.time() + lifetime), "scope": scope, **claims}
    present = {name: value for name, value in body.items() if value is not None}
    return jwt.encode(present, key, algorithm=algorithm, headers=headers)


ALGORITHMS: dict[str, typing.Callable[[], typing.Any]] = {
    "RS256": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}


def key_set(keys: dict[str, tuple[str, typing.Any]]) -> str:
    """Give the JWKS of private keys: (algorithm, key) by key id."""
    algorithms = jwt.algorithms.get_default_algorithms()
    described = [
        {**json.loads(algorithms[name].to_jwk(key.public_key())), "kid": id, "alg": name, "use": "sig"}
        for id, (name, key) in keys.items()
    ]
    return json.dumps({"keys": described})


class Authority:
    """A certificate authority; its files are written into a folder."""

    def __init__(self, folder: pathlib.Path, name: str = "authority") -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        certificate = self._builder(self._name, self._key.public_key()).add_extension(constraints, critical=True)
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(_pem(certificate.sign(self._key, hashes.SHA256())))

    def _builder(self, subject: x509.Name, key: typing.Any) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return x509.CertificateBuilder(
            issuer_name=self._name,
            subject_name=subject,
            public_key=key,
            serial_number=x509.random_serial_number(),
            not_valid_before=now - datetime.timedelta(hours=1),
            not_valid_after=now + datetime.timedelta(hours=1),
        )

    def issue(
        self, name: str, *sans: x509.GeneralName, curve: ec.EllipticCurve | None = None
    ) -> tuple[pathlib.Path, pathlib.Path]:
        """Issue a certificate: the files of it and of its key."""
        key = ec.generate_private_key(curve or ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        built = self._builder(subject, key.public_key()).add_extension(x509.SubjectAlternativeName(sans), False)
        files = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        files[0].write_bytes(_pem(built.sign(self._key, hashes.SHA256())))
        encodings = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        files[1].write_bytes(key.private_bytes(*encodings))
        return files

    def server(self, name: str = "server") -> tuple[pathlib.Path, pathlib.Path]:
        """Issue a certificate for this machine."""
        addresses = x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")
        return self.issue(name, *addresses)

    def trusting(self, client: tuple[pathlib.Path, pathlib.Path] | None = None) -> grpc.ChannelCredentials:
        """Give credentials that trust it, with a client's certificate."""
        chain, key = (client[0].read_bytes(), client[1].read_bytes()) if client else (None, None)
        return grpc.ssl_channel_credentials(self.file.read_bytes(), key, chain)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
