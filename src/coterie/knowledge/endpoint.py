"""A SPARQL 1.1 endpoint somewhere else, asked as the graph on this disk is."""

import json
import time
from collections.abc import Mapping, Sequence

import httpx

from coterie.errors import SourceError, Unreachable
from coterie.knowledge.evidence import Reader
from coterie.knowledge.graph import LIMIT, TIMEOUT_S
from coterie.knowledge.sparql import Rows, check, limited, read_answer

LARGEST = 32 << 20  # bytes of an answer
FRESH_S = 600.0  # for which names that were read here are taken as they were: it does not say when it changes


class Endpoint:
    """The endpoint at `address`.

    With `graphs`, who may read which named graph, a query gets those of its reader as its data set (SPARQL 1.1
    Protocol, 2.1.4; it goes before what a query says itself). Without, all of it belongs to `readers`.
    """

    def __init__(
        self, address: str, graphs: Mapping[str, Sequence[str]] | None = None, readers: Sequence[str] = ("*",),
        timeout_s: float = TIMEOUT_S,
    ) -> None:  # fmt: skip
        self.address, self.timeout_s, self.fresh_s = address, timeout_s, FRESH_S
        self.graphs = dict(graphs or {}) or {"": readers}
        self._client = httpx.Client(timeout=timeout_s, follow_redirects=False)

    def seen(self, reader: Reader) -> frozenset[str]:
        return frozenset(g for g, readers in self.graphs.items() if set(readers) & reader.may)

    def select(self, query: str, reader: Reader, limit: int = LIMIT) -> Rows:
        check(query)
        seen = sorted(self.seen(reader))
        if not seen:
            return Rows((), ())
        named = [g for g in seen if g]
        form = {"query": limited(query, limit + 1), "default-graph-uri": named, "named-graph-uri": named}
        accept = {"Accept": "application/sparql-results+json"}
        end, body = time.monotonic() + self.timeout_s, b""
        try:
            with self._client.stream("POST", self.address, data=form, headers=accept) as response:
                for piece in response.iter_bytes():
                    body += piece
                    if time.monotonic() > end:  # httpx's own limit is for each piece: a slow one would never end
                        raise httpx.ReadTimeout("too slow")
                    if len(body) > LARGEST:
                        raise SourceError(f"{self.address}: an answer of over {LARGEST >> 20} MB; ask for less")
            if response.status_code != 200:
                said = body[:200].decode(errors="replace")
                raise SourceError(f"{self.address}: answered {response.status_code}: {said}")
            return read_answer(json.loads(body), limit)
        except httpx.TimeoutException as error:
            raise Unreachable(f"{self.address}: no answer in {self.timeout_s:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unreachable(f"{self.address}: cannot be reached ({error})") from error
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{self.address}: its answer is not JSON ({error})") from error

    def close(self) -> None:
        self._client.close()
