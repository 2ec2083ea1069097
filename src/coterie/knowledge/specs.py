"""What coterie.toml says of graphs, databases and tables: fields, defaults and what each is for."""

from typing import Literal

from pydantic import Field, model_validator

from coterie.declared import Several, Strict
from coterie.knowledge.evidence import EVERYONE

READERS = 'groups that may read it; "*" is everyone'


class MappingSpec(Strict):
    """[[knowledge.NAME.tables]] of a graph: how rows become triples; {Column} is a cell of the row."""

    table: str = Field("", description="a table of `database`")
    file: str = Field("", description="or a CSV file")
    id: str = Field(min_length=1, description='the row\'s address under `base`, as "album/{AlbumId}"')
    type: str = Field(min_length=1, description="what a row is, in the singular: album")
    label: str = Field("", description='its name, as "{FirstName} {LastName}"; found by it')
    aliases: Several = Field([], description="other names, in the same way")
    properties: dict[str, str] = Field({}, description="relation = column")
    links: dict[str, str] = Field({}, description='relation = id of another row, as "artist/{ArtistId}"')
    readers: Several = Field([EVERYONE], description=READERS)

    @model_validator(mode="after")
    def _one_source(self) -> "MappingSpec":
        if bool(self.table) == bool(self.file):
            raise ValueError("name a `table` or a `file`, one of them")
        return self


class PartSpec(Strict):
    """[[knowledge.NAME.parts]]: files of a graph that the same groups may read."""

    files: Several = Field(
        min_length=1, description="Turtle (.ttl), N-Triples (.nt) or JSON-LD (.jsonld); * is any name"
    )
    readers: Several = Field([EVERYONE], description=READERS)


class ExtractSpec(Strict):
    """[knowledge.NAME.extract] of a graph: facts that a model reads in documents, for `coterie facts` to decide on."""

    documents: str = Field(min_length=1, description="the source of documents that is read: the NAME of its section")
    relations: Several = Field(min_length=1, description="what may be read, in words: made by, located in")
    accept: Several = Field([], description="of them, those that need no person: what a model reads is taken as it is")
    expert: str = Field("", description="expert that reads; none: the base model")

    @model_validator(mode="after")
    def _of_relations(self) -> "ExtractSpec":
        if other := set(self.accept) - set(self.relations):
            raise ValueError(f"accept: {min(other)!r} is not among `relations`")
        return self


class GraphSpec(Strict):
    """[knowledge.NAME] with `kind = "graph"`: a knowledge graph of files and tables, or a SPARQL endpoint."""

    kind: Literal["graph"] = Field("graph", description="files and tables as triples, or a SPARQL endpoint")
    description: str = Field("", description="what it knows; shown to people")
    parts: list[PartSpec] = Field([], description="its files")
    tables: list[MappingSpec] = Field([], description="tables that become triples")
    extract: ExtractSpec | None = Field(None, description="facts that are read in documents")
    database: str = Field("", description="SQLAlchemy address of the database that `tables` names tables of")
    base: str = Field("urn:coterie:thing:", description="how the IRIs of mapped rows begin")
    shapes: str = Field("", description="a file of SHACL shapes that each file must fit (pip install 'coterie[shacl]')")
    endpoint: str = Field("", description="address of a SPARQL 1.1 endpoint, instead of files and tables")
    endpoint_graphs: dict[str, Several] = Field({}, description="endpoint: who may read which named graph")
    readers: Several = Field([EVERYONE], description="endpoint without `endpoint_graphs`: " + READERS)
    examples: Several = Field([], description="JSONL files of question and path; the path finder learns from them")
    timeout_s: float = Field(5.0, gt=0, le=600, description="longest a query may take")

    @model_validator(mode="after")
    def _one_kind(self) -> "GraphSpec":
        if self.endpoint and (self.parts or self.tables or self.extract):
            raise ValueError("an `endpoint` has its own data; leave out `parts`, `tables` and `extract`")
        if not self.endpoint and not self.parts and not self.tables and not self.extract:
            raise ValueError("name `parts`, `tables`, `extract` or an `endpoint`")
        if not self.database and any(t.table for t in self.tables):
            raise ValueError("`tables` of a database need `database`, its address")
        return self


class RowsSpec(Strict):
    """[knowledge.NAME.tables.TABLE]: who may read a table, which of its columns, and which rows each group sees."""

    readers: Several = Field([EVERYONE], description=READERS)
    columns: Several = Field([], description="columns that may be read; none named: all")
    rows: dict[str, str] = Field(
        {}, description="group = SQL condition on this table: the rows it sees; :reader is the name of who asks"
    )
    description: str = Field("", description="what a row is; shown to the model")


class DatabaseSpec(Strict):
    """[knowledge.NAME] with `kind = "database"`: a SQL database, read only."""

    kind: Literal["database"] = Field("database", description="SQLite or PostgreSQL")
    description: str = Field("", description="what it knows; shown to people")
    url: str = Field(min_length=1, description="SQLAlchemy address, as sqlite:///shop.db or postgresql+psycopg://...")
    tables: dict[str, RowsSpec] = Field(min_length=1, description="the tables that may be asked; no others exist")
    expert: str = Field("", description="expert that writes its SQL; none: the base model")
    examples: Several = Field([], description="JSONL files of question and SQL: the nearest are shown to the model")
    rows: int = Field(100, ge=1, le=10_000, description="most rows of one answer")
    timeout_s: float = Field(5.0, gt=0, le=600, description="longest a query may take")


class TablesSpec(Strict):
    """[knowledge.NAME] with `kind = "tables"`: files that are asked like a database."""

    kind: Literal["tables"] = Field("tables", description="CSV, Parquet and Excel files")
    description: str = Field("", description="what they know; shown to people")
    files: dict[str, str] = Field(min_length=1, description="table = file (.csv, .parquet, .xlsx)")
    tables: dict[str, RowsSpec] = Field({}, description="who may read what; tables not named here: everyone, all")
    expert: str = Field("", description="expert that writes its SQL; none: the base model")
    examples: Several = Field([], description="JSONL files of question and SQL: the nearest are shown to the model")
    rows: int = Field(100, ge=1, le=10_000, description="most rows of one answer")
    timeout_s: float = Field(5.0, gt=0, le=600, description="longest a query may take")
