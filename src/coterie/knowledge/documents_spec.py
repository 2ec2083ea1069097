"""What coterie.toml says of a folder of documents."""

from typing import Annotated, Literal

from pydantic import Field

from coterie.declared import Several, Strict

KINDS = (".md", ".markdown", ".html", ".htm", ".pdf", ".docx", ".txt")


class ReadersSpec(Strict):
    """[[knowledge.NAME.permissions]]: who may read some of the files; of several that fit a file, the last holds."""

    files: Several = Field(min_length=1, description='which files, as in `"hr/*"`; `*` stands for `/` too')
    readers: Several = Field(description="groups that may read them; none: nobody")


class ArticlesSpec(Strict):
    """[knowledge.NAME.salesforce]: Salesforce Knowledge; `coterie learn` keeps its published articles in the folder."""

    url: str = Field(pattern="^https?://", description="https://NAME.my.salesforce.com")
    client_id_env: str = Field("SALESFORCE_CLIENT_ID", description="the environment variable of the id")
    client_secret_env: str = Field("SALESFORCE_CLIENT_SECRET", description="and of the secret")
    fields: list[Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")]] = Field(
        ["Summary"], description="fields of an article that hold its text, in order, such as `Answer__c`"
    )
    language: str = Field("en_US", pattern=r"^[A-Za-z_]+$", description="of the articles")
    channel: Literal["Pkb", "Csp", "Prm", "App"] = Field(
        "Pkb",
        description="articles that the public sees (Pkb), or customers (Csp), partners (Prm), colleagues (App)",
    )
    link: str = Field(
        "", pattern=r"^(https?://.*)?$", description="where an article is read, with `{name}` for its URL name"
    )


class DocumentsSpec(Strict):
    """[knowledge.NAME]: a folder of documents, with `kind = "documents"`."""

    kind: Literal["documents"] = Field(description="Markdown, HTML, PDF, DOCX and text files")
    path: str = Field(min_length=1, description="a folder, or one file")
    description: str = Field("", description="what it is about; shown to people")
    files: Several = Field(["*"], description="which of its files, as in `*.md`; `*` stands for `/` too")
    readers: Several = Field(["*"], description='groups that may read it; `"*"`: everyone')
    permissions: list[ReadersSpec] = Field([], description="other readers for some of the files")
    salesforce: ArticlesSpec | None = Field(None, description="articles that are kept in the folder")
    max_mb: float = Field(50, gt=0, description="larger files are reported, and not read")
    judged: str = Field(
        "", description='a .jsonl of `{"question": ..., "documents": [...]}`: what served which question before'
    )
