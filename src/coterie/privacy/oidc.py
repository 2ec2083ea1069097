"""Signing in with an identity provider: OpenID Connect, authorization code with PKCE, through authlib.

Notable: an account must be there already; the provider only says who somebody is. What is checked of the ID token:
signature (by the provider's published keys), issuer, audience, expiry, and the nonce of this very attempt. An e-mail
address counts only where the provider says it is verified. Configured by the environment: COTERIE_OIDC_ISSUER,
COTERIE_OIDC_CLIENT and COTERIE_OIDC_SECRET; where the provider knows who is in which group, COTERIE_OIDC_GROUPS, the
name of the claim that says so, and COTERIE_OIDC_SCOPE, what it wants to be asked for that.
"""

import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from authlib.integrations.base_client.errors import OAuthError
from authlib.integrations.httpx_client import OAuth2Client
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from coterie.errors import CoterieError
from coterie.privacy.access import NotSignedIn

ALGORITHMS = ["RS256", "ES256", "PS256", "EdDSA"]
TIMEOUT_S = 10.0
SCOPE = "openid email"
LEEWAY_S = 60  # that two clocks may differ


class ProviderDown(CoterieError):
    """The identity provider does not answer, or answers nonsense."""

    status = 502
    code = "identity_provider"


@dataclass(frozen=True)
class Attempt:
    """One sign-in under way: kept in a signed cookie until the browser comes back."""

    state: str
    nonce: str
    verifier: str


@dataclass(frozen=True)
class Identity:
    """Who it is: `subject` is the issuer and its name for them; `email` is "" where it is not verified; `groups` is
    None where the provider is not asked for them."""

    subject: str
    email: str
    groups: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Provider:
    issuer: str
    client: str
    secret: str = field(repr=False)
    groups: str = ""  # the claim that names somebody's groups
    scope: str = SCOPE

    def begin(self, back: str) -> tuple[str, Attempt]:
        """Where to send the browser; it comes back to the address `back`. Raises ProviderDown."""
        attempt = Attempt(secrets.token_urlsafe(32), secrets.token_urlsafe(32), secrets.token_urlsafe(48))
        with self._session(back) as session:
            url, _ = session.create_authorization_url(
                self._facts()["authorization_endpoint"], state=attempt.state, nonce=attempt.nonce,
                code_verifier=attempt.verifier,
            )  # fmt: skip
        return str(url), attempt

    def finish(self, query: Mapping[str, str], attempt: Attempt, back: str) -> Identity:
        """Who came back. Raises NotSignedIn, ProviderDown."""
        if not hmac.compare_digest(query.get("state", "").encode(), attempt.state.encode()) or not query.get("code"):
            raise NotSignedIn("the identity provider did not let you in, or this attempt is another one; try again")
        facts = self._facts()
        try:
            with self._session(back) as session:
                token = session.fetch_token(
                    facts["token_endpoint"], code=query["code"], code_verifier=attempt.verifier,
                    grant_type="authorization_code",
                )  # fmt: skip
            keys = KeySet.import_key_set(self._get(facts["jwks_uri"]))
            claims = jwt.decode(str(token["id_token"]), keys, algorithms=ALGORITHMS).claims
            jwt.JWTClaimsRegistry(
                leeway=LEEWAY_S, iss={"essential": True, "value": self.issuer}, exp={"essential": True},
                aud={"essential": True, "value": self.client}, sub={"essential": True},
                nonce={"essential": True, "value": attempt.nonce},
            ).validate(claims)  # fmt: skip
        except (OAuthError, JoseError, KeyError, ValueError) as error:
            raise NotSignedIn(f"the identity provider's answer does not hold ({type(error).__name__})") from error
        except httpx.HTTPError as error:
            raise ProviderDown(f"{self.issuer}: does not answer ({type(error).__name__})") from error
        email = str(claims.get("email", "")) if claims.get("email_verified") is True else ""
        return Identity(f"{self.issuer} {claims['sub']}", email, self._groups(claims))

    def _groups(self, claims: Mapping[str, Any]) -> tuple[str, ...] | None:
        """What the claim says: a list, or one name; nobody is in a group that it does not name."""
        if not self.groups:
            return None
        said = claims.get(self.groups)
        named = [said] if isinstance(said, str) else said if isinstance(said, list) else []
        return tuple(group for group in named if isinstance(group, str))

    def _session(self, back: str) -> Any:
        return OAuth2Client(
            self.client, self.secret, scope=self.scope, redirect_uri=back, code_challenge_method="S256",
            timeout=TIMEOUT_S,
        )  # fmt: skip

    def _facts(self) -> dict[str, str]:
        """The provider's description of itself (OpenID Connect Discovery 1.0)."""
        found = self._get(self.issuer.rstrip("/") + "/.well-known/openid-configuration")
        wanted = ("issuer", "authorization_endpoint", "token_endpoint", "jwks_uri")
        if not all(isinstance(found.get(k), str) for k in wanted) or found["issuer"] != self.issuer:
            raise ProviderDown(f"{self.issuer}: its description is not that of this issuer; check COTERIE_OIDC_ISSUER")
        return {k: found[k] for k in wanted}

    def _get(self, url: str) -> Any:
        try:
            reply = httpx.get(url, timeout=TIMEOUT_S).raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            raise ProviderDown(f"{url}: does not answer ({type(error).__name__})") from error
        if not isinstance(reply, dict):
            raise ProviderDown(f"{url}: answers nonsense")
        return reply


def provider(environment: Mapping[str, str] | None = None) -> Provider | None:
    """As the environment says; None where it says nothing. Raises CoterieError where it says half."""
    env = os.environ if environment is None else environment
    names = [f"COTERIE_OIDC_{part}" for part in ("ISSUER", "CLIENT", "SECRET")]
    values = [env.get(name, "") for name in names]
    if not any(values):
        return None
    if missing := [name for name, value in zip(names, values, strict=True) if not value]:
        raise CoterieError(
            f"{missing[0]}: is not set, but {next(n for n, v in zip(names, values, strict=True) if v)} is"
        )
    here = ("http://127.0.0.1", "http://localhost")
    if not values[0].startswith(("https://", *here)):
        raise CoterieError("COTERIE_OIDC_ISSUER: must begin with https://")
    issuer, client, secret = values
    groups, scope = env.get("COTERIE_OIDC_GROUPS", ""), env.get("COTERIE_OIDC_SCOPE") or SCOPE
    return Provider(issuer, client, secret, groups, scope)
