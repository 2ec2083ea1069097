"""What coterie.toml says of a folder of documents."""

from typing import Annotated, Literal

from pydantic import BaseModel as Record
from pydantic import BeforeValidator, ConfigDict, Field

Several = Annotated[
    list[Annotated[str, Field(min_length=1)]], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)
]
KINDS = (".md", ".markdown", ".html", ".htm", ".pdf", ".docx", ".txt")


class _Strict(Record):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ReadersSpec(_Strict):
    """[[knowledge.NAME.permissions]]: who may read some of the files; of several that fit a file, the last holds."""

    files: Several = Field(min_length=1, description='which files, as in `"hr/*"`; `*` stands for `/` too')
    readers: Several = Field(description="groups that may read them; none: nobody")


class DocumentsSpec(_Strict):
    """[knowledge.NAME]: a folder of documents, with `kind = "documents"`."""

    kind: Literal["documents"] = Field(description="Markdown, HTML, PDF, DOCX and text files")
    path: str = Field(min_length=1, description="a folder, or one file")
    description: str = Field("", description="what it is about; shown to people")
    files: Several = Field(["*"], description="which of its files, as in `*.md`; `*` stands for `/` too")
    readers: Several = Field(["*"], description='groups that may read it; `"*"`: everyone')
    permissions: list[ReadersSpec] = Field([], description="other readers for some of the files")
    max_mb: float = Field(50, gt=0, description="larger files are reported, and not read")
    judged: str = Field(
        "", description='a .jsonl of `{"question": ..., "documents": [...]}`: what served which question before'
    )
