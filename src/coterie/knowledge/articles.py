"""Salesforce Knowledge as a folder of documents: each published article is kept as a file, which is then learned.

Notable: a list of all published versions says what is new, changed, renamed or gone, so nothing depends on two clocks
agreeing, and only what changed is fetched. What was fetched stands in `.articles.json` beside the files, written after
each batch; files that are not named there are somebody else's, and are left alone.
"""

import html
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from coterie.errors import CoterieError, DataError, StorageError
from coterie.files import alone, write_atomic
from coterie.knowledge.documents_spec import ArticlesSpec

if TYPE_CHECKING:  # it comes with coterie[salesforce]
    from coterie.salesforce import Org

STATE, LOCK = ".articles.json", ".articles.lock"
AT_ONCE = 100  # articles fetched by one query
TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
Kept = dict[str, list[str]]  # article -> its version, when that was changed, its name


def open_org(name: str, spec: ArticlesSpec) -> "Org":
    """Raises CoterieError where something that it needs is not there."""
    missing = [v for v in (spec.client_id_env, spec.client_secret_env) if not os.environ.get(v)]
    if missing:
        raise CoterieError(f"knowledge.{name}.salesforce: the environment has no {' and no '.join(missing)}")
    try:
        from coterie.salesforce import Org
    except ImportError as error:
        raise CoterieError(
            f"knowledge.{name}.salesforce: it needs simple-salesforce; pip install 'coterie[salesforce]'"
        ) from error
    return Org(spec.url, os.environ[spec.client_id_env], os.environ[spec.client_secret_env])


def fetch(name: str, spec: ArticlesSpec, folder: Path, org: "Org") -> None:
    """Bring the files in `folder` up to date with what is published. Raises CrmError, DataError, StorageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror})") from error
    with alone(folder / LOCK, f"{name}: another `coterie learn` fetches its articles; let it end"):
        kept = _kept(folder, spec)
        listed = _ask(org, spec, "Id, KnowledgeArticleId, UrlName, LastModifiedDate")
        published = {str(r["KnowledgeArticleId"]): _version(r) for r in listed}
        _drop(folder, kept, published)
        wanted = [a for a, v in published.items() if kept.get(a) != v or not _file(folder, v[2]).exists()]
        for at in range(0, len(wanted), AT_ONCE):
            batch = {published[a][0]: a for a in wanted[at : at + AT_ONCE]}
            ids = ", ".join(f"'{id}'" for id in batch)
            for record in _ask(org, spec, ", ".join(["Id", "Title", *spec.fields]), f" AND Id IN ({ids})"):
                if article := batch.get(str(record["Id"])):  # one that was unpublished meanwhile does not come
                    write_atomic(_file(folder, published[article][2]), _page(record, spec))
                    kept[article] = published[article]
            _keep(folder, spec, kept)
        _keep(folder, spec, kept)


def link_of(spec: ArticlesSpec, path: str) -> str:
    """Where the article of this file is read."""
    return spec.link.replace("{name}", quote(Path(path).stem, safe="")) if spec.link else ""


def _ask(org: "Org", spec: ArticlesSpec, fields: str, more: str = "") -> list[dict[str, Any]]:
    """Published articles. Fields, language, channel and ids are checked, so that nothing here is another's words."""
    soql = (
        f"SELECT {fields} FROM Knowledge__kav WHERE PublishStatus = 'Online' AND Language = '{spec.language}' "
        f"AND IsVisibleIn{spec.channel} = true{more}"
    )
    return org.ask(lambda sf: list(sf.query_all(soql)["records"]))


def _version(record: dict[str, Any]) -> list[str]:
    id, name = str(record["Id"]), str(record["UrlName"])
    if not re.fullmatch(r"\w{1,18}", id) or not re.fullmatch(r"\w[\w-]{0,254}", name):
        raise DataError(f"Salesforce: an article with the id {id!r} and the URL name {name!r} cannot be kept as a file")
    return [id, str(record["LastModifiedDate"]), name]


def _drop(folder: Path, kept: Kept, published: Kept) -> None:
    """Remove the files of articles that are gone or have another name."""
    for article, (_, _, name) in list(kept.items()):
        if published.get(article, ["", "", ""])[2] != name:
            _file(folder, name).unlink(missing_ok=True)
            del kept[article]


def _page(record: dict[str, Any], spec: ArticlesSpec) -> str:
    """An article as a page. A field of rich text is HTML already; plain text becomes paragraphs."""
    parts = []
    for field in spec.fields:
        value = str(record.get(field) or "")
        plain = "".join(f"<p>{html.escape(p)}</p>" for p in value.splitlines() if p.strip())
        parts.append(value if TAG.search(value) else plain)
    title, body = html.escape(str(record.get("Title") or "")), "\n".join(parts)
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{title}</title></head>\n'
        f"<body><article><h1>{title}</h1>\n{body}\n</article></body></html>\n"
    )


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.html"


def _mark(spec: ArticlesSpec) -> list[Any]:
    """Of what decides what a file holds: after another declaration everything is fetched anew."""
    return [spec.url, spec.language, spec.channel, spec.fields]


def _kept(folder: Path, spec: ArticlesSpec) -> Kept:
    try:
        said = json.loads((folder / STATE).read_text())
        kept = {str(k): [str(x) for x in v] for k, v in said["articles"].items() if len(v) == 3}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / STATE}: damaged ({error}); delete it and the articles' files beside it") from error
    if said.get("mark") != _mark(spec):
        return {k: ["", "", v[2]] for k, v in kept.items()}
    return kept


def _keep(folder: Path, spec: ArticlesSpec, kept: Kept) -> None:
    write_atomic(folder / STATE, json.dumps({"mark": _mark(spec), "articles": kept}, indent=1) + "\n")
