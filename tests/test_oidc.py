"""Signing in with an identity provider: a small one, on this machine, that can be made to lie."""

import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import RSAKey

from coterie.errors import CoterieError
from coterie.privacy.access import NotSignedIn
from coterie.privacy.house import House, open_house
from coterie.privacy.oidc import Attempt, Provider, ProviderDown, provider
from coterie.store.database import open_database

KEY, OTHER = (RSAKey.generate_key(2048, {"kid": "k1"}) for _ in range(2))
BACK = "http://localhost:8000/login/oidc/return"


class Issuer:
    """A provider that lets anna in; `claims` and `key` are what it signs, and with what."""

    def __init__(self) -> None:
        self.claims: Callable[[dict[str, Any]], dict[str, Any]] = lambda c: c
        self.key, self.asked = KEY, dict[str, dict[str, str]]()
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def _say(self, body: dict[str, Any], status: int = 200) -> None:
                raw = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def do_GET(self) -> None:
                url = issuer.url
                if self.path == "/.well-known/openid-configuration":
                    self._say({"issuer": url, "authorization_endpoint": f"{url}/authorize",
                               "token_endpoint": f"{url}/token", "jwks_uri": f"{url}/keys"})  # fmt: skip
                else:
                    self._say({"keys": [KEY.as_dict(private=False)]})

            def do_POST(self) -> None:
                form = dict(urllib.parse.parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode()))
                asked = issuer.asked.get(form["code"])
                if asked is None or _challenge(form["code_verifier"]) != asked["code_challenge"]:
                    return self._say({"error": "invalid_grant"}, 400)
                claims = {"iss": issuer.url, "aud": "shop", "sub": "u1", "exp": int(time.time()) + 60,
                          "nonce": asked["nonce"], "email": "anna@example.org", "email_verified": True}  # fmt: skip
                token = jwt.encode({"alg": "RS256", "kid": "k1"}, issuer.claims(claims), issuer.key)
                return self._say({"access_token": "x", "token_type": "Bearer", "id_token": token})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def let_in(self, url: str) -> dict[str, str]:
        """As a browser would: what the redirect back carries."""
        asked = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query))
        self.asked["code-1"] = asked
        return {"code": "code-1", "state": asked["state"]}


def _challenge(verifier: str) -> str:
    from authlib.oauth2.rfc7636 import create_s256_code_challenge

    return str(create_s256_code_challenge(verifier))


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    made = Issuer()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    opened = open_house(tmp_path, open_database(f"sqlite:///{tmp_path}/coterie.db"), {})
    opened.accounts.add("anna@example.org", "owner")
    yield opened
    opened.close()


def test_who_the_provider_vouches_for_is_signed_in_and_known_again(issuer: Issuer, house: House) -> None:
    at = Provider(issuer.url, "shop", "secret")
    for email in ("anna@example.org", "married@example.org"):  # the second time, by subject alone
        issuer.claims = lambda c, email=email: c | {"email": email}
        url, attempt = at.begin(BACK)
        who = at.finish(issuer.let_in(url), attempt, BACK)
        login = house.accounts.login_oidc(who.subject, who.email)
        person = house.accounts.who(login.secret)
        assert person is not None
        assert person.name == "anna@example.org"


CLAIMED: list[tuple[dict[str, Any], list[str]]] = [
    ({"groups": ["hr", "Human Resources"]}, ["Human Resources", "hr"]), ({"groups": "hr"}, ["hr"]), ({}, []),
    ({"groups": ["owner", "*", 7, None, "hr"]}, ["hr"]), ({"groups": {"hr": True}}, []),
]  # fmt: skip


@pytest.mark.parametrize(("claims", "groups"), CLAIMED)
def test_the_providers_groups_take_the_place_of_the_accounts_own(
    claims: dict[str, Any], groups: list[str], issuer: Issuer, house: House
) -> None:
    """What it may not give: a role's group, or everyone's."""
    house.accounts.change("anna@example.org", groups=["board"])
    issuer.claims = lambda c: c | claims
    plain, asking = Provider(issuer.url, "shop", "s"), Provider(issuer.url, "shop", "s", "groups")
    for at, wanted in ((plain, ["board"]), (asking, groups)):
        url, attempt = at.begin(BACK)
        who = at.finish(issuer.let_in(url), attempt, BACK)
        person = house.accounts.who(house.accounts.login_oidc(who.subject, who.email, who.groups).secret)
        assert person is not None
        assert sorted(person.groups) == wanted


LIES: list[Callable[[dict[str, Any]], dict[str, Any]]] = [
    lambda c: c | {"iss": "https://evil.example"}, lambda c: c | {"aud": "another"}, lambda c: c | {"nonce": "old"},
    lambda c: c | {"exp": int(time.time()) - 3600}, lambda c: {k: v for k, v in c.items() if k != "nonce"},
    lambda c: {k: v for k, v in c.items() if k != "exp"},
]  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_token_that_is_not_for_this_very_attempt_is_refused(
    lie: Callable[[dict[str, Any]], dict[str, Any]], issuer: Issuer
) -> None:
    at = Provider(issuer.url, "shop", "secret")
    issuer.claims = lie
    url, attempt = at.begin(BACK)
    with pytest.raises(NotSignedIn):
        at.finish(issuer.let_in(url), attempt, BACK)


def test_a_token_signed_by_somebody_else_is_refused(issuer: Issuer) -> None:
    at = Provider(issuer.url, "shop", "secret")
    issuer.key = OTHER
    url, attempt = at.begin(BACK)
    with pytest.raises(NotSignedIn):
        at.finish(issuer.let_in(url), attempt, BACK)


def test_another_attempts_code_or_state_is_refused(issuer: Issuer) -> None:
    at = Provider(issuer.url, "shop", "secret")
    url, attempt = at.begin(BACK)
    query = issuer.let_in(url)
    for wrong in ({**query, "state": "guess"}, {"state": query["state"]}, {}, {**query, "code": "guess"}):
        with pytest.raises(NotSignedIn):
            at.finish(wrong, attempt, BACK)
    with pytest.raises(NotSignedIn):  # a stolen code without the verifier (PKCE)
        at.finish(query, Attempt(attempt.state, attempt.nonce, "x" * 64), BACK)


@pytest.mark.parametrize(("subject", "email"), [("i u2", "ben@example.org"), ("i u2", "")])
def test_an_identity_without_an_account_is_not_let_in(house: House, subject: str, email: str) -> None:
    with pytest.raises(NotSignedIn, match="there is no account"):
        house.accounts.login_oidc(subject, email)


def test_an_account_that_belongs_to_one_identity_is_not_given_to_another(house: House) -> None:
    house.accounts.login_oidc("i u1", "anna@example.org")
    with pytest.raises(NotSignedIn):
        house.accounts.login_oidc("i u2", "anna@example.org")


def test_an_address_that_is_not_verified_does_not_count(issuer: Issuer) -> None:
    at = Provider(issuer.url, "shop", "secret")
    issuer.claims = lambda c: c | {"email_verified": "true"}
    url, attempt = at.begin(BACK)
    assert at.finish(issuer.let_in(url), attempt, BACK).email == ""


def test_a_provider_that_is_down_or_another_is_named(issuer: Issuer) -> None:
    with pytest.raises(ProviderDown, match="does not answer"):
        Provider("http://127.0.0.1:1", "shop", "secret").begin(BACK)
    with pytest.raises(ProviderDown, match="not that of this issuer"):
        Provider(issuer.url + "/", "shop", "secret").begin(BACK)


def test_the_environment_says_which_provider() -> None:
    whole = {"COTERIE_OIDC_ISSUER": "https://id.example", "COTERIE_OIDC_CLIENT": "shop", "COTERIE_OIDC_SECRET": "s"}
    assert provider({}) is None
    assert provider(whole) == Provider("https://id.example", "shop", "s")
    asking = {"COTERIE_OIDC_GROUPS": "roles", "COTERIE_OIDC_SCOPE": "openid email groups"}
    assert provider(whole | asking) == Provider("https://id.example", "shop", "s", "roles", "openid email groups")
    for bad in ({**whole, "COTERIE_OIDC_SECRET": ""}, {**whole, "COTERIE_OIDC_ISSUER": "http://id.example"}):
        with pytest.raises(CoterieError, match="COTERIE_OIDC"):
            provider(bad)


def test_the_browser_goes_there_and_comes_back_signed_in(
    issuer: Issuer, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_access import AWAY, application, client

    for part, value in (("ISSUER", issuer.url), ("CLIENT", "shop"), ("SECRET", "s")):
        monkeypatch.setenv(f"COTERIE_OIDC_{part}", value)
    browser = client(application(house, tmp_path), where=AWAY)
    assert "/login/oidc" in browser.get("/login").text
    url = browser.get("/login/oidc").headers["location"]
    back = browser.get("/login/oidc/return", params=issuer.let_in(url))
    assert (back.status_code, back.headers["location"]) == (httpx.codes.SEE_OTHER, "/")
    assert browser.get("/v1/me").json()["name"] == "anna@example.org"
    again = browser.get("/login/oidc/return", params=issuer.let_in(url))
    assert again.status_code == 401, "an attempt ends with its cookie"
